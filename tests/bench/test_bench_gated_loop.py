"""The bench of the gated loops: it times what it says, and refuses what is no cell."""

from __future__ import annotations

import pytest

from statewise.bench import gated_loop
from statewise.core import UsageError


def test_a_row_for_each_cell_and_shape() -> None:
    rows = gated_loop.run(("gru", "elman"), shapes=[(2, 5, 3), (1, 4, 2)], repeats=1, first_call=False)
    assert [(row["cell"], row["shape"]) for row in rows] == [
        ("gru", (2, 5, 3)), ("elman", (2, 5, 3)), ("gru", (1, 4, 2)), ("elman", (1, 4, 2)),
    ]  # fmt: skip
    for row in rows:
        assert row["backend"] in ("numba", "aten") and row["products"] > 0 and 0 < row["ours"] < 10
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])


def test_steps_of_every_cell() -> None:
    rows = gated_loop.steps(4, rounds=1)
    assert [row["cell"] for row in rows] == ["lstm", "gru", "elman"] and all(0 < row["step"] < 1 for row in rows)


def test_what_is_no_cell_or_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="slstm"):
        gated_loop.run(("slstm",), shapes=[(1, 1, 1)])
    with pytest.raises(UsageError, match=r"\(1, 2\)"):
        gated_loop.run(shapes=[(1, 2)])
