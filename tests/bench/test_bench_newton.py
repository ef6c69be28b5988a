"""bench newton: the crossover is read from rows, and rows are of what they say."""

import pytest

from statewise.bench import newton
from statewise.core import UsageError


def row(steps: int, *, loop: float, newton: float, predicted: float = 1.0) -> dict:
    times = {"loop_measured": loop, "newton_measured": newton, "loop_predicted": predicted, "newton_predicted": 2.0}
    return {"cell": "a", "width": 4, "steps": steps, **times}


def test_the_crossover_is_the_first_length_that_pays():
    rows = [row(16, loop=1, newton=2), row(64, loop=2, newton=1, predicted=1), row(256, loop=9, newton=1, predicted=3)]
    assert newton.crossovers(rows) == [{"cell": "a", "width": 4, "than": "loop", "measured": 64, "predicted": 256}]
    assert newton.crossovers(rows[:1])[0].items() >= {"measured": None, "predicted": None}.items()
    recorded = [r | {"recorded_measured": 1.5, "recorded_predicted": 2.5} for r in rows]
    beside = {"cell": "a", "width": 4, "than": "recorded", "measured": 64, "predicted": 16}
    assert newton.crossovers(recorded) == [*newton.crossovers(rows), beside]


@pytest.mark.parametrize("name", ["para_gru", "para_lstm"])
def test_a_cell_is_run_both_ways(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(newton, "LENGTHS", (8, 32))
    found = newton.run([name], widths=[2], repeats=1)
    assert [r["steps"] for r in found] == [8, 32]
    for r in found:
        assert r["iterations"] >= 1 and r["chosen"] in newton.WAYS
        assert min(r[f"{way}_{kind}"] for way in newton.WAYS for kind in ("measured", "predicted")) > 0


@pytest.mark.parametrize("name", ["attention", "lru"])
def test_what_newton_cannot_run_is_refused(name: str):
    with pytest.raises(UsageError, match=f"bench newton: {name}"):
        newton.run([name], widths=[4], repeats=1)
