from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from statewise.bench import linear_scan
from statewise.core import UsageError


def test_rows_hold_what_is_promised():
    rows = linear_scan.run([(2, 64, 8)], repeats=2, first_call=False)
    ways = {row["way"]: row for row in rows}
    assert {"ours: numba", "ours: torch", "loop", "floor: torch.add and copy"} <= set(ways)
    for way in ("ours: numba", "ours: torch", "loop"):
        assert ways[way]["error"] < 1e-5 and ways[way]["forward"] > 0 and ways[way]["training_floor"] > 0


MEASURE = """
import json, os, sys
import torch
from statewise.bench import linear_scan, memory
memory.keep_freed()
torch.set_num_threads(os.cpu_count() or 1)
shape = tuple(map(int, sys.argv[1:]))
print(json.dumps(linear_scan.run([shape], repeats=60, peers=False, first_call=False)))
"""


def _quiet() -> None:
    if os.getloadavg()[0] > 1.5:
        pytest.skip(f"load average {os.getloadavg()[0]:.1f}: a time measured now would say nothing")


@pytest.mark.slow
def test_the_first_call_is_short_and_cached():
    _quiet()
    empty, filled = linear_scan._first_calls()
    assert empty["forward"] <= 5000 and filled["forward"] <= 0.5 * empty["forward"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", linear_scan.SHAPES, ids=str)
def test_scans_run_at_the_speed_of_memory(shape):
    """Beside additions that move the same bytes, on as many threads."""
    _quiet()
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, shape)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    ours = next(row for row in rows if row["way"] == "ours: numba")
    assert ours["forward_floor"] <= 1.15 and ours["training_floor"] <= 1.3, ours


def test_wrong_shapes_are_refused():
    with pytest.raises(UsageError, match="expected"):
        linear_scan.run([(0, 3, 2)])
