"""Checkpoints: directories written beside, hashed, synced and renamed. A kill at any moment leaves the old or the new.

    RUN/checkpoints/step-120/model.safetensors   the weights to use: averaged, best so far
                             optim.safetensors   what resuming needs besides: raw weights, moments, carried state, RNG
                             state.json          step, scores, counters
                             MANIFEST.json       size and SHA-256 of each, written last

Renames are atomic; each file, the directory and its parent are synced around them. Where a step is saved anew, the old
one is first set aside as step-120.old, which the reader also takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import DataError, RecurrentLayer, StatewiseError, UsageError, read_json, read_tensors
from ..core.files import (
    check_format,
    hash_file,
    json_bytes,
    shown,
    sync_directory,
    tensor_chunks,
    write_error,
    write_synced,
)
from ..tasks.units import Units, kept_units
from .experiment import Experiment

FORMAT = 1
PARTS = ("model.safetensors", "optim.safetensors", "state.json")
KEEP = 2

_NAME = re.compile(r"step-(\d{1,12})(\.old)?")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]
    path: Path | None = None


def save(run: Path, step: int, content: Checkpoint, *, keep: int = KEEP) -> Path:
    """Write the checkpoint of a step and, once it is safe, remove all but the newest `keep`.

    Raises ResourceError (disk full or failing) or DataError (not writable); what was there stays whole, without litter.
    """
    folder = run / "checkpoints"
    final, beside = folder / f"step-{step}", folder / f"step-{step}.tmp-{os.getpid()}"
    aside = folder / f"step-{step}.old"
    size = sum(t.numel() * t.element_size() for part in (content.model, content.optim) for t in part.values())
    try:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        model = write_synced(beside / PARTS[0], tensor_chunks(content.model))
        optim = write_synced(beside / PARTS[1], tensor_chunks(content.optim))
        state = write_synced(beside / PARTS[2], [json_bytes(content.state)])
        files = {
            name: {"size": n, "sha256": digest} for name, (n, digest) in zip(PARTS, (model, optim, state), strict=True)
        }
        manifest = {"format": FORMAT, "statewise": _version(), "torch": str(torch.__version__), "files": files}
        write_synced(beside / "MANIFEST.json", [json_bytes(manifest)])
        sync_directory(beside)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(final, aside)
        os.rename(beside, final)
        sync_directory(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, StatewiseError):
            raise
        raise write_error(final, error, size) from error
    _remove(aside)
    for _, path in _found(folder)[keep:]:
        _remove(path)
    return final


def newest(run: Path, *, allow_nonfinite: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose manifest verifies, or None, and why newer ones were skipped.

    Raises DataError for what an older one must not silently replace: a newer format, weights that are not finite.
    """
    skipped: list[str] = []
    folder = run / "checkpoints"
    if folder.is_symlink():
        raise DataError(f"{shown(folder)} is a link; expected a directory of the run itself")
    for _, path in _found(folder):
        try:
            verify(path)
        except NewerFormat:
            raise
        except (DataError, UsageError) as error:
            skipped.append(f"{path.name}: {error}")
        else:
            return _read(path, allow_nonfinite), skipped
    return None, skipped


class NewerFormat(DataError):
    """A checkpoint of a later version of statewise."""


def verify(path: Path) -> None:
    """Compare the files of a checkpoint with its manifest. Raises DataError."""
    if path.is_symlink():
        raise DataError(f"{shown(path)} is a link; expected a directory of the run itself")
    manifest = read_json(path / "MANIFEST.json", follow=False)
    version = manifest.get("format")
    if type(version) is int and version > FORMAT:
        raise NewerFormat(
            f"{shown(path)}: checkpoint format {version}, written by statewise {manifest.get('statewise')}; this is "
            f"{_version()}, which reads up to format {FORMAT}: upgrade statewise"
        )
    check_format(version, FORMAT, shown(path))
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != set(PARTS):
        raise DataError(f"{shown(path)}: the manifest lists {sorted(files or [])}; expected {sorted(PARTS)}")
    for name, wanted in files.items():
        size, digest = hash_file(path / name)
        if {"size": size, "sha256": digest} != wanted:
            raise DataError(f"{shown(path / name)}: size or hash differs from the manifest; the file is damaged")


def _read(path: Path, allow_nonfinite: bool) -> Checkpoint:
    model, _ = read_tensors(path / PARTS[0], allow_nonfinite=allow_nonfinite, follow=False)
    optim, _ = read_tensors(path / PARTS[1], allow_nonfinite=True, follow=False)
    return Checkpoint(model, optim, read_json(path / PARTS[2], follow=False), path)


def read_experiment(run: str | os.PathLike[str]) -> Experiment:
    """What a run directory is a run of. Raises DataError where it is none, UsageError for a record that is wrong."""
    path = Path(run) / "experiment.json"
    if not os.path.lexists(path):
        raise DataError(f"{shown(run)} is not a run: no experiment.json; working directory {shown(os.getcwd())}")
    return Experiment.from_record(read_json(path))


def load(run: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> tuple[RecurrentLayer[Any], Experiment]:
    """The model of a run, with the best weights of its newest whole checkpoint, in evaluation mode; and its experiment.

    Warns of each checkpoint that it skipped because it is damaged.

    Raises DataError: no run, no checkpoint that verifies (each with its reason), weights that do not fit the model or
    are not finite.
    """
    experiment = read_experiment(run)
    found, skipped = newest(Path(run), allow_nonfinite=allow_nonfinite)
    if found is None:
        reasons = f": {'; '.join(skipped)}" if skipped else ""
        raise DataError(f"{shown(run)} has no usable checkpoint{reasons}")
    for reason in skipped:
        warnings.warn(f"skipped {reason}", stacklevel=2)
    with torch.random.fork_rng(devices=[]):  # building draws first weights; the caller's generator is not ours to move
        model = build(experiment, kept_units(Path(run)))  # the data may be gone
    load_weights(model, found.model, shown(found.path or run))
    return model.eval(), experiment


def build(experiment: Experiment, units: Units | None = None) -> RecurrentLayer[Any]:
    """The untrained model of an experiment. units: where its widths come from, if not from the task's data."""
    of = units or experiment.task
    made: RecurrentLayer[Any] = experiment.model.build(x_width=of.x_width, x_vocab=of.x_vocab, y_width=of.y_width)
    return made


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into parameters and buffers. Raises DataError with what is missing, extra or of another shape."""
    own = model.state_dict()
    faults = [f"missing {name} {list(own[name].shape)}" for name in own if name not in tensors]
    faults += [f"extra {name} {list(tensors[name].shape)}" for name in tensors if name not in own]
    faults += [
        f"{name} is {t.dtype} {list(t.shape)}, the model has {own[name].dtype} {list(own[name].shape)}"
        for name, t in tensors.items()
        if name in own and (t.shape != own[name].shape or t.dtype != own[name].dtype)
    ]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise DataError(f"{where}: the weights are of another model: {'; '.join(faults[:10])}{more}")
    model.load_state_dict(dict(tensors))


def clean(run: Path) -> None:
    """Remove what a killed save left behind in a run directory. Call it holding the lock of the run."""
    if not (run / "experiment.json").exists():
        return
    for path in (run / "checkpoints").glob("step-*"):
        if re.fullmatch(r"step-\d+(\.old)?(\.tmp-\d+|\.gone)", path.name):
            shutil.rmtree(path, ignore_errors=True)
    for path in run.glob(".tmp-*"):
        if re.fullmatch(r"\.tmp-\d+-[0-9a-f]{8}", path.name):
            path.unlink(missing_ok=True)


def _found(folder: Path) -> list[tuple[tuple[int, bool], Path]]:
    """Checkpoints, newest first; one set aside comes after the one that took its place."""
    matches = [(m, path) for path in folder.glob("step-*") if (m := _NAME.fullmatch(path.name))]
    return sorted((((int(m[1]), m[2] is None), path) for m, path in matches), reverse=True)


def _remove(path: Path) -> None:
    """Take it out of sight in one step, then delete: a kill in between leaves litter, not a broken checkpoint."""
    gone = path.with_name(path.name + ".gone")
    with contextlib.suppress(OSError):
        os.rename(path, gone)
        shutil.rmtree(gone)


def _version() -> str:
    from .. import __version__

    return __version__
