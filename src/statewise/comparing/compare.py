"""A comparison from its plan to its results: what `statewise compare` does, for Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..core import UsageError, near, read_json, write_json
from ..tasks import Generated
from ..training import at_lengths, choose_device, read_log
from ..training.evaluate import refusal
from .collect import collect
from .launch import Engine, Local, Setup
from .plan import TRIAL_STEPS, Cell, Plan
from .pool import Event, fitting_workers, locked, run_cells, run_dir
from .rows import Row
from .search import Halving

ENGINES = ("local", "ray")

FIRST = 5  # steps of a trial that its pace leaves out: kernels are compiled or loaded there


def compare(
    plan: Plan,
    out: Path,
    *,
    engine: str = "local",
    workers: Literal["auto"] | int = "auto",
    threads: int = 1,
    device: str = "cpu",
    memory: int = 0,
    timeout: float = 0.0,
    silence: float = 1800.0,
    lengths: Sequence[int] = (),
    command: str = "",
    on_event: Callable[[Event], object] = lambda event: None,
) -> dict[str, Any]:
    """Run what is not finished yet of a plan in a results folder; returns everything that a report needs, which is then
    in out/comparison.json too.

    The rows are in out/results.jsonl, for `read_results`. Called again after a stop or a kill with the same plan it
    goes on: finished runs are kept, others go on from their last checkpoint, failed ones are tried again.

    engine: "local", processes of this machine, or "ray". workers: runs at a time, "auto" for as many as processors and
    memory allow, one on a GPU. threads: of each. memory: bytes of address space of each, 0 for no limit. timeout:
    seconds for one run; silence: seconds without a sign of life, after which it is killed; 0 for no limit.
    lengths: of test examples at which models of generated tasks are scored too; a finished run gets what it lacks.
    command: what the report names as its origin.
    on_event gets {"event": "trial", "plan"} before models are timed, {"event": "plan", "plan", "workers"} when it is
    known what there is to run, the events of `run_cells`, and {"event": "streaming"} when all is trained.

    Raises UsageError, DataError, and Stopped when SIGINT or SIGTERM came and all is saved.
    """
    began, seen = time.monotonic(), {"kept": 0, "done": 0, "failed": 0}

    def count(event: Event) -> None:
        if event["event"] in seen:
            seen[event["event"]] += 1
        on_event(event)

    check_lengths(plan, lengths)
    setup, where = arrange(engine, plan.count(), workers, threads, device, memory)
    setup = replace(setup, lengths=tuple(sorted(lengths)))
    how: dict[str, Any] = {"setup": setup, "engine": where, "timeout": timeout, "silence": silence}
    with locked(out) as lock:
        plan = paced(replace(plan, workers=setup.workers), out, lock=lock, on_event=on_event, **how)
        on_event({"event": "plan", "plan": plan, "workers": setup.workers})
        rows = run_plan(plan, out, lock=lock, on_event=count, **how)
        on_event({"event": "streaming"})
        seconds = _total(out, time.monotonic() - began, seen)
        found = collect(plan, rows, out, command=command, setup=setup, seconds=seconds)
        write_json(out / "comparison.json", found)
    return found


def check_lengths(plan: Plan, lengths: Sequence[int]) -> None:
    """Raise UsageError for a length that none of the generated tasks can have, and where no task is a generated one.

    One that some of them can have is a failed point of the others, as lengths are that a grid makes impossible.
    """
    generated = [base.task for base in plan.bases if isinstance(base.task, Generated)]
    if lengths and not generated:
        at_lengths(plan.bases[0].task, lengths)
    doubled = len(set(lengths)) < len(lengths)
    for some in [lengths] if doubled else [[length] for length in lengths]:
        errors = [error for task in generated if (error := refusal(task, some))]
        if len(errors) == len(generated):
            raise errors[0]


def run_plan(plan: Plan, out: Path, **how: Any) -> dict[str, Row]:
    """Every run of a plan whose paces are known: what can be run at once, then what that has chosen. As `run_cells`."""
    halving = None
    if plan.search:
        groups = {}
        for setting in plan.settings:
            cells = list(plan.tries(setting))
            groups[f"{cells[0].board} / {cells[0].label}"] = cells
        halving = Halving(groups, plan.search, out / "optuna.jsonl")
    rows = run_cells(plan.first(), out, halving=halving, **how)
    rest = plan.rest(rows)
    return run_cells(rest, out, **how) if rest else rows


def arrange(
    engine: str, cells: int, workers: Literal["auto"] | int, threads: int, device: str, memory: int
) -> tuple[Setup, Engine]:
    """How many at a time, and where. Raises UsageError for an engine that is not there."""
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine!r}; {near(engine, ENGINES)}")
    device = str(choose_device(device))
    usual = fitting_workers(cells, threads) if device == "cpu" else 1
    setup = Setup(usual if workers == "auto" else workers, threads, device, memory)
    if engine == "local":
        return setup, Local()
    from .on_ray import OnRay, connect

    have = connect(setup.workers * threads)
    if workers == "auto":
        setup = replace(setup, workers=max(1, min(cells, have // max(threads, 1))))
    return setup, OnRay(setup)


def paced(plan: Plan, out: Path, *, on_event: Callable[[Event], object], **how: Any) -> Plan:
    """The plan with measured paces, where its numbers of steps follow from them.

    The trials are runs of their own in out/trial, kept like all others: so the same command started again finds the
    same paces, the same steps, the same runs. Raises UsageError if no model gets through its trial.
    """
    cells = plan.trials()
    if not cells:
        return plan
    on_event({"event": "trial", "plan": plan})
    place = out / "trial"
    place.mkdir(exist_ok=True)
    rows = run_cells(cells, place, **how | {"setup": replace(how["setup"], lengths=())})
    paces = {cell.key: _pace(rows[cell.key], place, cell) for cell in cells}
    reasons = [pace for pace in paces.values() if isinstance(pace, str)]
    if len(reasons) == len(paces):
        raise UsageError(f"no layer got through a trial of {TRIAL_STEPS} steps: {reasons[0]}")
    return replace(plan, paces=paces)


def _pace(row: Row, place: Path, cell: Cell) -> tuple[float, float] | str:
    """Seconds per step and of the start, or why there are none."""
    if row["status"] != "done":
        return str(row["reason"])
    each = pace(read_log(run_dir(place, cell) / "log.jsonl")[0])
    return each, max(row["seconds"] - TRIAL_STEPS * each, 0.0)


def pace(records: list[dict[str, Any]]) -> float:
    """Seconds per step between the first report after step FIRST and the last one. records: the log of a trial."""
    times = {r["step"]: r["seconds"] for r in records if r["event"] == "train" and r["step"] >= FIRST}
    first, last = min(times), max(times)
    return float((times[last] - times[first]) / (last - first))


def _total(out: Path, seconds: float, seen: dict[str, int]) -> float | None:
    """The time the whole comparison took; None where a part of it was done by an earlier call that did not end."""
    path = out / "comparison.json"
    if not seen["kept"]:
        return seconds
    if seen["done"] or seen["failed"] or not path.exists():
        return None
    found = read_json(path).get("seconds")
    return float(found) if found is not None else None
