"""An experiment from the words of a command line: shared by `train` and `compare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..comparing import SETTINGS
from ..comparing.budget import outline
from ..core import RecurrentLayer, ResourceError, UsageError, layers
from ..core.machine import free_memory
from ..models import descriptions, places
from ..tasks import Task, tasks
from ..training import Experiment
from .settings import dict_once, put_texts


def experiment(
    task: str, layer: str, *, width: int, depth: int, seed: int, data: Path | None = None, settings: Iterable[str] = ()
) -> Experiment:
    """Raises UsageError for a name, number or setting that does not fit, DataError for data that is not there."""
    for name, value, most in (("width", width, 10**9), ("depth", depth, 1000), ("seed", seed, 2**63 - 1)):
        if not (name != "seed") <= value <= most:
            raise UsageError(f"--{name} {value}; expected {int(name != 'seed')} to {most}")
    for place in places(layer):
        layers[place.layer]
    given = dict_once(settings)
    inside = {path.removeprefix("task."): text for path, text in given.items() if path.startswith("task.")}
    of_task = make_task(task, data, inside)
    made = Experiment(of_task, descriptions[of_task.model](layer=layer, width=width, depth=depth), seed=seed)
    made = put_texts(made, {path: str(value) for path, value in SETTINGS.get(task, {}).items() if path not in given})
    return put_texts(made, {path: text for path, text in given.items() if not path.startswith("task.")})


def make_task(name: str, data: Path | None, settings: Mapping[str, str]) -> Task:
    """The task of that name; data is the file or folder of a task that reads the user's own."""
    cls = tasks[name].cls
    takes_path = "path" in {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if data is not None and not takes_path:
        own = ", ".join(info.name for info in tasks if "path" in {f.name for f in fields(info.cls)})  # type: ignore[arg-type]
        raise UsageError(f"--data: task {name!r} reads no file of yours; those that do: {own}")
    if takes_path and data is None and "path" not in settings:
        raise UsageError(f"task {name!r} reads your own file: name it with --data FILE")
    given = {"path": str(data.expanduser().absolute())} if data is not None else {}
    return put_texts(cls(**given), settings, "task.")


def build(made: Experiment) -> RecurrentLayer[Any]:
    """The model of an experiment, built without memory: finds what does not fit before anything is allocated.

    Raises UsageError for arguments the layer does not take, ResourceError for a model larger than free memory.
    """
    task = made.task
    widths = (task.x_width, task.x_vocab, task.y_width)  # may read the data
    try:
        model = outline(made.model, *widths)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model {made.model.layer!r}: {error}") from None
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ResourceError(
            f"model {made.model.layer!r} of width {made.model.width} takes more memory than can be counted: "
            "try a smaller width"
        ) from None
    need = 4 * sum(p.numel() * p.element_size() for p in model.parameters())  # weights, gradients, two moments
    have = free_memory()
    if have is not None and need > have:
        raise ResourceError(
            f"model {made.model.layer!r} of width {made.model.width} takes {need / 2**30:.3g} GiB to train; "
            f"{have / 2**30:.3g} GiB are free: try a smaller width or depth"
        )
    return model
