from __future__ import annotations

import pytest

from statewise.bench import linear_scan
from statewise.core import UsageError


def test_rows_hold_what_is_promised():
    rows = linear_scan.run([(2, 64, 8)], repeats=2, first_call=False)
    ways = {row["way"]: row for row in rows}
    assert {"ours: numba", "ours: torch", "loop", "floor: torch.add and copy"} <= set(ways)
    for way in ("ours: numba", "ours: torch", "loop"):
        assert ways[way]["error"] < 1e-5 and ways[way]["forward"] > 0 and ways[way]["training_floor"] > 0


@pytest.mark.slow
def test_the_first_call_is_cached():
    empty, filled = linear_scan._first_calls()
    assert filled["forward"] < empty["forward"]


def test_wrong_shapes_are_refused():
    with pytest.raises(UsageError, match="expected"):
        linear_scan.run([(0, 3, 2)])
