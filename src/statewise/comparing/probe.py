"""How many steps fit into a time: a short trial of every layer, side by side as the real runs will be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..core import UsageError, put
from ..training import read_log
from .plan import Cell, Plan
from .pool import run_cells, run_dir

STEPS = 20
FIRST = 5  # steps that the pace leaves out: kernels are compiled or loaded there
STARTING = 4.0  # seconds of a run beside its steps: imports, evaluations, checkpoints
SHARE = 0.85  # of the time that is given out; the rest is for evaluations and for measuring


def probe(plan: Plan, out: Path, seconds: float, lock: int, common: dict[str, Any]) -> int:
    """Steps for every run such that the whole plan takes about `seconds`; at least 10.

    Raises UsageError if no layer gets through the trial.
    """
    base = put(put(plan.base, "train.steps", STEPS), "train.evaluate_every", 0)
    cells = [Cell(layer, base.train.lr, put(base, "model.layer", layer)) for layer in plan.layers]
    place = out / "trial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rows = run_cells(cells, place, lock=lock, **common)
    done = [c for c in cells if rows[c.key]["status"] == "done"]
    paces = [pace(read_log(run_dir(place, c) / "log.jsonl")[0]) for c in done]
    starts = [max(rows[c.key]["seconds"] - STEPS * p, 0.0) for c, p in zip(done, paces, strict=True)]
    shutil.rmtree(place, ignore_errors=True)
    if not paces:
        raise UsageError(f"no layer got through a trial of {STEPS} steps: {rows[cells[0].key]['reason']}")
    runs = plan.count() / len(plan.layers)
    workers = min(common["workers"], plan.count())
    have = seconds * SHARE * workers - STARTING * plan.count() - runs * sum(starts)
    return max(10, int(have / (runs * sum(paces))))


def pace(records: list[dict[str, Any]]) -> float:
    """Seconds per step between the first report after step FIRST and the last one. records: the log of a trial."""
    times = {r["step"]: r["seconds"] for r in records if r["event"] == "train" and r["step"] >= FIRST}
    first, last = min(times), max(times)
    return float((times[last] - times[first]) / (last - first))
