"""Rows, curves, streaming times and descriptions as the one plain dict that every report is made from."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core import StatewiseError, Traits, layers
from ..report import FORMAT
from ..tasks import Task
from ..training import Experiment, Train, load, read_log
from ..training.fit import WARM_UP as WARM_UP_STEPS
from .describe import describe_task, environment
from .measure import WARM_UP, measure_streaming
from .plan import Cell, Plan
from .pool import Row, run_dir
from .settings import SETTINGS


def collect(
    plan: Plan,
    rows: Mapping[str, Row],
    out: Path,
    *,
    command: str,
    workers: int,
    threads: int,
    device: str,
    seconds: float | None,
) -> dict[str, Any]:
    """Everything that was found. Times the streaming step of each layer now, so nothing else should be running."""
    chosen = plan.chosen(rows)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        entries = [_entry(plan, layer, chosen.get(layer), rows, out, device, threads) for layer in plan.layers]
    finally:
        torch.set_num_threads(before)
    machine = environment(workers, threads, device)
    if load_average is not None:
        machine["load average when streaming was timed"] = f"{load_average:.2f}"
    return {
        "format": FORMAT,
        "command": command,
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seconds": seconds,
        "task": describe_task(plan.base.task),
        "train": asdict(plan.base.train),
        "environment": machine,
        "method": _method(plan, rows, workers, threads, device),
        "layers": entries,
    }


def _entry(
    plan: Plan, layer: str, lr: float | None, rows: Mapping[str, Row], out: Path, device: str, threads: int
) -> dict[str, Any]:
    rate = plan.rates[0] if lr is None else lr
    chosen = list(plan.cells_of(layer, rate))
    others = [c for c in plan.first() if c.layer == layer and c.key not in {d.key for d in chosen}]
    info = layers[layer]
    return {
        "layer": layer,
        "summary": info.summary,
        "paper": info.paper,
        "lr": rate,
        "command": train_command(chosen[0].experiment, device, threads),
        "record": chosen[0].experiment.record(),
        "streaming": _streaming(chosen, rows, out, device),
        "cells": [_cell(c, rows, out) for c in chosen if c.key in rows],
        "others": [_cell(c, rows, out) for c in others if c.key in rows],
    }


def _cell(cell: Cell, rows: Mapping[str, Row], out: Path) -> dict[str, Any]:
    row = rows[cell.key]
    if row["status"] != "done":
        return {**row, "curve": []}
    records = read_log(run_dir(out, cell) / "log.jsonl")[0]
    # a run that was resumed may have evaluated a step twice, with the same bits
    found = {r["step"]: r for r in records if r["event"] == "evaluate" and r["split"] == "validation"}
    curve = [
        {"step": step, "seconds": r.get("seconds"), "score": r["score"]}
        for step, r in sorted(found.items())
        if isinstance(r["score"], float)
    ]
    return {**row, "curve": curve}


def _streaming(cells: list[Cell], rows: Mapping[str, Row], out: Path, device: str) -> dict[str, Any] | None:
    """Of the first seed that finished. A layer that cannot stream says why and keeps its place."""
    done = next((c for c in cells if rows.get(c.key, {}).get("status") == "done"), None)
    if done is None:
        return None
    try:
        model, experiment = load(run_dir(out, done))
        batch = next(experiment.task.batches("test"))
        row = int(batch.lengths.argmax()) if batch.lengths is not None else 0
        end = int(batch.lengths[row]) if batch.lengths is not None else batch.x.shape[1]
        x = batch.x[row : row + 1, : max(end, 1)]
        return {"key": done.key, **measure_streaming(model.to(device), x.to(device))}
    except (StatewiseError, RuntimeError, NotImplementedError) as error:
        return {"failed": f"streaming was not measured: {str(error).splitlines()[0][:200]}"}


def train_command(experiment: Experiment, device: str, threads: int) -> str:
    """The `statewise train` that trains this experiment alone: what differs from the defaults, spelled out."""
    record, model, task = experiment.record(), experiment.model, experiment.task
    own = SETTINGS.get(task.name, {})
    usual_train = {path.removeprefix("train."): value for path, value in own.items() if path.startswith("train.")}
    words = [
        "statewise",
        "train",
        task.name,
        "--layer",
        model.layer,
        "--width",
        str(model.width),
        "--depth",
        str(model.depth),
    ]
    words += ["--seed", str(experiment.seed), "--device", device, "--threads", str(threads)]
    sections: list[tuple[str, dict[str, Any], Any]] = [
        ("task", record["task"], _defaults(type(task))),
        ("model", record["model"], _defaults(type(model))),
        ("train", record["train"], asdict(Train()) | usual_train),
    ]
    for section, values, usual in sections:
        for name, value in values.items():
            if (section, name) in _SHOWN or name not in usual or value == usual[name]:
                continue
            if section == "task" and name == "path":
                words += ["--data", str(value)]
                continue
            inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, v in inner.items():
                words += ["--set", f"{section}.{key}={_text(v)}"]
    return shlex.join(words)


_SHOWN = {("model", "layer"), ("model", "width"), ("model", "depth")}


def _defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls) if f.init}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _method(plan: Plan, rows: Mapping[str, Row], workers: int, threads: int, device: str) -> list[str]:
    task: Task = plan.base.task
    seeds = "one seed" if plan.seeds == 1 else f"{plan.seeds} seeds"
    rates = (
        f"Learning rate {plan.rates[0]:g} for every layer."
        if len(plan.rates) == 1
        else f"Learning rate: the first seed tried {', '.join(f'{r:g}' for r in plan.rates)}; the one with the best "
        "validation score was used for all seeds."
    )
    return [
        f"Score: {task.metric} on the test split by the weights with the best validation score; {seeds}, which set the "
        "initial weights and the order of the training data. Nothing was chosen by the test split: beside these scores "
        "it gives chance, the baseline, the examples shown here and the inputs on which the streaming step is timed.",
        "± is the sample standard deviation over seeds.",
        rates,
        "All layers stand in a residual stack (norm, layer, gated MLP) of equal width and depth, each in the size that "
        "is ordinary for it at that width, so numbers of parameters and states differ." + _linear(plan.layers),
        f"Each run trains in a process of its own with {_count(threads, 'thread')} on {device}; "
        f"{_count(workers, 'process')} at a time.",
        "Training tokens/s: time steps without padding, over the time of training steps alone (data, forward, "
        f"backward, optimiser), without the first {WARM_UP_STEPS} steps of each process, in which kernels are compiled "
        "or loaded; median over seeds, while the other workers ran beside it. Training time counts all steps.",
        "Peak memory: the largest resident size of the training process, which includes Python and torch themselves; "
        "the largest over seeds." if device == "cpu" else "Peak memory: the most that tensors took of the GPU.",
        f"Streaming: batch 1, one call of step after another on a test example, {WARM_UP} calls to warm up, then up to "
        "2000 timed; median and 95th percentile; one layer at a time, after all training had ended.",
        "State: bytes that one stream carries from step to step, the same at every step; attention carries the keys "
        "and values of a window of fixed length.",
        *_elsewhere(plan, rows, workers, threads, device),
    ]  # fmt: skip


def _linear(names: Sequence[str]) -> str:
    """Which layers get more around them than the others."""
    linear = [name for name in names if _traits(name).linear_in_input]
    if not linear:
        return ""
    return (
        f" {', '.join(linear)}: linear in their input, and so followed by GELU and a gated linear unit where the "
        "others have one linear map."
    )


def _traits(name: str) -> Traits:
    found: Traits = getattr(layers[name].cls, "traits", Traits())
    return found


def _elsewhere(plan: Plan, rows: Mapping[str, Row], workers: int, threads: int, device: str) -> list[str]:
    """What to know of runs that were kept from a call with another setup: their times do not compare."""
    now = {"device": device, "threads": threads, "workers": workers, "version": __version__}
    keys = {c.key for layer in plan.layers for lr in plan.rates for c in plan.cells_of(layer, lr)}
    done = [row for key, row in rows.items() if key in keys and row["status"] == "done"]
    others = Counter(_setup({name: row.get(name) for name in now}) for row in done)
    others.pop(_setup(now), None)
    return [
        f"{count} of {len(done)} runs were kept from an earlier call with another setup ({found}): their "
        "times, speeds and memory do not compare with those of the rest."
        for found, count in others.items()
    ]


def _setup(of: Mapping[str, Any]) -> str:
    threads, workers = _count(of["threads"], "thread"), _count(of["workers"], "process")
    return f"{of['device']}, {threads}, {workers} at a time, statewise {of['version']}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"
