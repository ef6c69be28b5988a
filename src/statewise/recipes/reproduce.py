"""Making the runs of a recipe: what is finished is kept, what was stopped goes on, what fails is noted."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..comparing import environment
from ..core import NumericError, ResourceError, UsageError
from ..core.machine import locked
from ..training import Experiment, fit
from .recipe import SCALES, SEEDS, Measure, Run, Scale, find, seeded
from .results import Results, read_results

Event = dict[str, Any]


def reproduce(
    name: str,
    scale: Scale = "small",
    *,
    results: Path = Path("results"),
    runs: Path = Path("runs/reproduce"),
    again: bool = False,
    signals: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Results:
    """Make every run of a recipe that has no current result yet, seed by seed, in this process; write after each.

    results: folder of the results files. runs: folder of the training runs, from which a stopped one goes on.
    again: make all runs anew. signals: SIGTERM and Ctrl-C save a training run before they stop.
    on_event gets {"event": "kept" | "start" | "train" | "done" | "failed", "run", "seed", ...}.

    Raises Unknown (recipe), UsageError (scale, or another process at work on it), DataError, Stopped. Numbers that are
    not finite and memory that runs out mark the run as failed, and the rest goes on.
    """
    name, recipe = find(name)
    if scale not in SCALES:
        raise UsageError(f"scale {scale!r}; expected one of {', '.join(SCALES)}")
    made, keys = recipe.runs(scale), recipe.keys(scale)
    place = runs / f"{name}-{scale}"
    place.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    with locked(place, advice="wait, or name another place with --runs"):
        kept = read_results(results, name, scale).runs if not again else {}
        found = read_results(results, name, scale)
        found.runs = {
            run: kept[run] if run in kept and kept[run]["key"] == keys[run] else _entry(made[run], keys[run])
            for run in made
        }
        for seed in range(SEEDS[scale]):
            for run in made:
                about = {"run": run, "seed": seed}
                before = found.runs[run]["seeds"].get(str(seed), {})
                if "numbers" in before:
                    on_event({**about, "event": "kept", "row": before})
                    continue
                on_event({**about, "event": "start"})
                row = _row(seeded(made[run], seed), place, again, signals, lambda e: on_event({**e, **about}))  # noqa: B023
                row["environment"] = _place(found, environment(1, torch.get_num_threads(), "cpu"))
                found.runs[run]["seeds"][str(seed)] = row
                found.write(results)
                on_event({**about, "event": "failed" if "failed" in row else "done", "row": row})
        _drop_unused_environments(found)
        found.write(results)
    return found


def _entry(run: Run, key: str) -> dict[str, Any]:
    """A run of which nothing is known yet."""
    record = {k: v for k, v in seeded(run, 0).record().items() if k not in ("seed", "format")}
    found: dict[str, Any] = {"key": key, "record": record, "seeds": {}, "chance": None, "baseline": None}
    if isinstance(run, Measure):
        return {**found, "metric": run.metric, "higher_is_better": run.higher_is_better}
    task = run.task
    beside = {"chance": float(task.chance()), "baseline": float(task.baseline())}
    return {**found, **beside, "metric": task.metric, "higher_is_better": task.higher_is_better}


def _row(run: Run, place: Path, again: bool, signals: bool, on_event: Callable[[Event], None]) -> dict[str, Any]:
    """What came of one run: {"numbers"} or {"failed"}, and when and how long."""
    began = time.perf_counter()
    row: dict[str, Any]
    try:
        numbers = _measured(run) if isinstance(run, Measure) else _trained(run, place, again, signals, on_event)
        wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            raise NumericError(f"{wrong[0]} is {numbers[wrong[0]]}")
        row = {"numbers": numbers}
    except (NumericError, ResourceError) as error:
        row = {"failed": " ".join(str(error).split())[:300]}
    # a run that went on from a checkpoint has trained for longer than this process saw
    seconds = max(time.perf_counter() - began, row.get("numbers", {}).get("training_seconds", 0.0))
    return {**row, "seconds": round(seconds, 2), "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}


def _measured(run: Measure) -> dict[str, float]:
    with torch.random.fork_rng([], device_type="cuda"):
        torch.manual_seed(run.seed)
        found: Mapping[str, float] = run.function(seed=run.seed, **run.arguments)
    return {name: float(value) for name, value in found.items()}


def _trained(
    experiment: Experiment, place: Path, again: bool, signals: bool, on_event: Callable[[Event], None]
) -> dict[str, float]:
    """The test split's numbers. The weights are not kept."""
    folder = place / experiment.key
    result = fit(
        experiment, folder, resume=not again, signals=signals, tensorboard=False,
        on_event=lambda event: on_event(event) if event["event"] == "train" else None,
    )  # fmt: skip
    metric = experiment.task.metric
    shutil.rmtree(folder, ignore_errors=True)
    return {
        **result.metrics["test"],
        f"validation_{metric}": result.metrics["validation"][metric],
        "parameters": float(result.parameters),
        "tokens_per_second": result.tokens_per_second,
        "training_seconds": result.seconds,
    }


def _place(found: Results, now: dict[str, Any]) -> int:
    if now not in found.environments:
        found.environments.append(now)
    return found.environments.index(now)


def _drop_unused_environments(found: Results) -> None:
    rows = [row for run in found.runs.values() for row in run["seeds"].values()]
    used = sorted({row["environment"] for row in rows})
    found.environments = [found.environments[i] for i in used]
    for row in rows:
        row["environment"] = used.index(row["environment"])
