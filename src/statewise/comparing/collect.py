"""Rows, streaming times and descriptions as the one plain dict that every report is made from."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core import StatewiseError, Traits, layers
from ..core.registry import LayerInfo
from ..models import places
from ..training import load
from ..training.fit import WARM_UP as WARM_UP_STEPS
from ..training.log import Log
from .command import train_command
from .describe import describe_task, environment
from .launch import Setup
from .measure import WARM_UP, measure_streaming
from .plan import Cell, Plan, Setting
from .pool import run_dir
from .rows import RESULTS, Row
from .search import REDUCTION

FORMAT = 2


def collect(
    plan: Plan, rows: Mapping[str, Row], out: Path, *, command: str, setup: Setup, seconds: float | None
) -> dict[str, Any]:
    """Everything that was found. Times the streaming step of each line now, so nothing else should be running; what was
    timed before is not timed again.
    """
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = {key: dict(row) for key, row in rows.items()}
    boards: dict[str, list[tuple[Setting, int | None]]] = {}
    for setting in plan.settings:
        board = plan.cell(setting, 0, 0).board
        boards.setdefault(board, []).append((setting, plan.chosen(setting, rows)))
    before = torch.get_num_threads()
    torch.set_num_threads(setup.threads)
    try:
        with Log(out / RESULTS) as log:
            found = [_board(plan, name, lines, rows, out, setup, log) for name, lines in boards.items()]
    finally:
        torch.set_num_threads(before)
    machine = environment(setup.workers, setup.threads, setup.device)
    if load_average is not None:
        machine["load average when streaming was timed"] = f"{load_average:.2f}"
    return {
        "format": FORMAT,
        "command": command,
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seconds": seconds,
        "environment": machine,
        "method": method(plan, rows, setup),
        "boards": found,
    }


def _board(
    plan: Plan,
    name: str,
    lines: Sequence[tuple[Setting, int | None]],
    rows: dict[str, Row],
    out: Path,
    setup: Setup,
    log: Log,
) -> dict[str, Any]:
    entries = [_entry(plan, setting, number, rows, out, setup, log) for setting, number in lines]
    one = plan.cell(lines[0][0], lines[0][1] or 0, 0).experiment
    return {
        "name": name,
        "task": describe_task(one.task),
        "train": asdict(one.train),
        "budget": plan.budget.asked,
        "method": [score_is(plan, one.task.metric)],
        "layers": entries,
    }


def _entry(
    plan: Plan, setting: Setting, number: int | None, rows: dict[str, Row], out: Path, setup: Setup, log: Log
) -> dict[str, Any]:
    chosen = [plan.cell(setting, number or 0, seed) for seed in range(plan.seeds)]
    others = [cell for cell in plan.tries(setting) if cell.key not in {c.key for c in chosen}]
    parts, first = infos(setting.layer), chosen[0]
    return {
        "layer": setting.layer,
        "label": first.label,
        "overrides": dict(setting.point),
        "tried": dict(first.tried),
        "summary": parts[0].summary if len(parts) == 1 else " and ".join(info.name for info in parts),
        "paper": ", ".join(dict.fromkeys(info.paper for info in parts if info.paper)),
        "lr": first.lr,
        "command": train_command(first.experiment, setup.device, setup.threads),
        "record": first.experiment.record(),
        "streaming": _streaming(chosen, rows, out, setup, log),
        "cells": [rows[c.key] for c in chosen if c.key in rows],
        "others": [rows[c.key] for c in others if c.key in rows],
    }


def _streaming(cells: list[Cell], rows: dict[str, Row], out: Path, setup: Setup, log: Log) -> dict[str, Any] | None:
    """Of the first seed that finished, kept in its row. A layer that cannot stream says why and keeps its place."""
    done = next((c for c in cells if rows.get(c.key, {}).get("status") == "done"), None)
    if done is None:
        return None
    row = rows[done.key]
    if row.get("latency") is None:
        found = _timed(done, out, setup)
        row |= found
        log.write({"key": done.key, **found}, sync=True)
    if row.get("latency") is None:
        return {"failed": row["streaming_failed"]}
    names = {"median": "latency", "p95": "latency_p95", "state_bytes": "state_bytes", "steps": "latency_steps"}
    return {"key": done.key, **{name: row[column] for name, column in names.items()}}


def _timed(done: Cell, out: Path, setup: Setup) -> dict[str, Any]:
    try:
        model, experiment = load(run_dir(out, done))
        batch = next(experiment.task.batches("test"))
        row = int(batch.lengths.argmax()) if batch.lengths is not None else 0
        end = int(batch.lengths[row]) if batch.lengths is not None else batch.x.shape[1]
        x = batch.x[row : row + 1, : max(end, 1)]
        found = measure_streaming(model.to(setup.device), x.to(setup.device))
    except (StatewiseError, RuntimeError, NotImplementedError) as error:
        return {"streaming_failed": f"streaming was not measured: {str(error).splitlines()[0][:200]}"}
    return {
        "latency": found["median"], "latency_p95": found["p95"], "latency_steps": found["steps"],
        "state_bytes": found["state_bytes"], "streaming_failed": None,
    }  # fmt: skip


def score_is(plan: Plan, metric: str) -> str:
    seeds = "one seed" if plan.seeds == 1 else f"{plan.seeds} seeds"
    return (
        f"Score: {metric} on the test split by the weights with the best validation score; {seeds}, which set the "
        "initial weights and the order of the training data. Nothing was chosen by the test split: beside these scores "
        "it gives chance, the baseline, the examples shown here and the inputs on which the streaming step is timed."
    )


def method(plan: Plan, rows: Mapping[str, Row], setup: Setup) -> list[str]:
    """How it was made, in sentences that hold for every task."""
    workers, threads, device = setup.workers, setup.threads, setup.device
    return [
        "± is the sample standard deviation over seeds.",
        _choosing(plan),
        *_budget(plan),
        "All layers stand in a residual stack (norm, layer, gated MLP) of "
        + ("equal depth, each in the width that gives it the same number of parameters" if plan.budget.parameters else
           "equal width and depth, each in the size that is ordinary for it at that width, so numbers of parameters")
        + (", so sizes of states differ." if plan.budget.parameters else " and states differ.") + _linear(plan.layers),
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
        *_elsewhere(plan, rows, setup),
    ]  # fmt: skip


def _choosing(plan: Plan) -> str:
    best = "the one with the best validation score was used for all seeds."
    if plan.search:
        space = ", ".join(plan.search.space)
        return (
            f"The first seed tried {plan.search.trials} candidates of {space}, drawn at random; of every {REDUCTION} "
            f"at a rung of successive halving one went on; {best}"
        )
    if plan.adaptive:
        return f"Learning rate: the first seed tried {', '.join(f'{r:g}' for r in plan.lrs)}; {best}"
    rates = dict.fromkeys(f"{setting.base.train.lr:g}" for setting in plan.settings)
    if plan.lrs:
        rates = {f"{plan.lrs[0]:g}": None}
    if any(path.endswith("train.lr") for path in plan.grid):
        return "Learning rate: as each line says."
    return f"Learning rate {' or '.join(rates)}, " + ("by the task, the same " * (len(rates) > 1)) + "for every layer."


def _budget(plan: Plan) -> list[str]:
    budget, said = plan.budget, []
    if budget.parameters:
        said.append(
            f"Budget: {budget.parameters:,} parameters, within {budget.tolerance:.0%}: each width was chosen so."
        )
    if budget.tokens:
        said.append(f"Budget: {budget.tokens:,} training tokens, as nearly as whole steps allow.")
    if budget.seconds:
        said.append(
            f"Budget: {budget.seconds:g} s of training steps, turned into a number of steps by the pace of each model "
            "in a short trial beside other runs; the seconds that it then took are in its row."
        )
    return said


def _linear(names: Sequence[str]) -> str:
    """Which layers get more around them than the others."""
    parts = dict.fromkeys(info.name for name in names for info in infos(name))
    linear = [name for name in parts if _traits(name).linear_in_input]
    if not linear:
        return ""
    return (
        f" {', '.join(linear)}: linear in their input, and so followed by GELU and a gated linear unit where the "
        "others have one linear map."
    )


def infos(layer: str) -> list[LayerInfo]:
    """What the registry knows of a layer, or of each that a hybrid is made of."""
    return [layers[name] for name in dict.fromkeys(place.layer for place in places(layer))]


def _traits(name: str) -> Traits:
    found: Traits = getattr(layers[name].cls, "traits", Traits())
    return found


def _elsewhere(plan: Plan, rows: Mapping[str, Row], setup: Setup) -> list[str]:
    """What to know of runs that were kept from a call with another setup: their times do not compare."""
    now = {"device": setup.device, "threads": setup.threads, "workers": setup.workers, "version": __version__}
    keys = {cell.key for s in plan.settings for seed in range(plan.seeds) for cell in plan.tries(s, seed)}
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
