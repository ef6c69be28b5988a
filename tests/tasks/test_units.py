"""A stream's numbers: its inputs are those of the task's own batches, and its answers are in the units of the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from statewise.core import DataError
from statewise.tasks import Adding, Forecast, Reverse, Series, Task
from statewise.tasks.finite import Finite
from statewise.tasks.forecast import seasonal
from statewise.tasks.units import NAME, Units, kept_units, units_of, write_units
from statewise.tasks.windows import best_rule


def walk(steps: int, channels: int) -> np.ndarray:
    return 100 + np.random.default_rng(0).normal(size=(steps, channels)).cumsum(0) * [1, 30][:channels]


def written(path: Path, values: np.ndarray, names: str) -> Series:
    rows = [",".join("" if np.isnan(v) else repr(float(v)) for v in row) for row in values]
    path.write_text("\n".join([names, *rows]) + "\n")
    return Series(path=str(path), horizon=3, length=24)


def streamed(units: Units, values: np.ndarray) -> tuple[torch.Tensor, list[np.ndarray | None]]:
    """x (T, D) of every step, and what was carried after it."""
    recent, xs, carried = None, [], []
    for row in values.tolist():
        x, recent = units.encode(row, recent)
        xs.append(torch.from_numpy(x).float())
        carried.append(recent)
    return torch.stack(xs), carried


def test_a_forecast_streams_as_its_batches_have_it(tmp_path: Path) -> None:
    """Step by step from raw columns: the same x as in the task, and perfect answers decode to the values to come."""
    values = walk(120, 2)
    values[[7, 8, 60], [0, 0, 1]] = np.nan
    task = written(tmp_path / "own.csv", values, "a,b")
    units, rows = units_of(task), task.rows("test")
    x, carried = streamed(units, values)
    torch.testing.assert_close(x, (rows.values - rows.shift) * rows.scale, rtol=1e-4, atol=1e-4)
    assert rows.asked is not None
    asked = rows.asked.nonzero()[:, 0].tolist()
    assert len(asked) > 10
    for t in asked:
        decoded = np.array(units.decode(rows.y[t].tolist(), carried[t])).reshape(2, 3)
        np.testing.assert_allclose(decoded, values[t + 1 : t + 4].T, rtol=1e-5)


def test_what_is_carried_stays_small() -> None:
    units = Units("regression", 2, None, 1, span=5)
    _, carried = streamed(units, walk(50, 1))
    assert max(len(recent) for recent in carried if recent is not None) == 5


def test_targets_come_back_in_their_units(tmp_path: Path) -> None:
    values = walk(120, 2)
    task = written(tmp_path / "own.csv", values, "a,target")
    rows, units = task.rows("test"), units_of(task)
    assert units.columns == 1
    found = [units.decode(y.tolist(), None)[0] for y in rows.y]
    np.testing.assert_allclose(found, values[:, 1], rtol=1e-5)


def test_a_forecast_of_logarithms_speaks_in_values() -> None:
    units = Units("regression", 2, None, 2, y_scale=(2.0,), span=3, logarithm=True)
    _, recent = units.encode([np.e], None)
    x, recent = units.encode([np.e**3], recent)
    assert x.tolist() == pytest.approx([2, 1])
    assert units.decode([0.5, -1.0], recent) == pytest.approx([np.e**4, np.e])
    with pytest.raises(ValueError, match="above 0"):
        units.encode([0.0], recent)


@pytest.mark.parametrize(
    ("values", "said"),
    [([1.0], "1 numbers; expected 2"), ([1.0, np.nan], "missing at the first"), ([np.inf, 1.0], "1 not finite")],
)
def test_values_that_cannot_be_taken(values: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Units("regression", 4, None, 2, span=3).encode(values, None)


@pytest.mark.parametrize("which", ["generated", "forecast", "labels"])
def test_kept_units_are_those_of_the_task(which: str, tmp_path: Path) -> None:
    task: Task = Adding()
    if which == "forecast":
        task = written(tmp_path / "own.csv", walk(120, 2), "a,b")
    if which == "labels":
        rows = [f"{i},{i % 2 + t},{'dog' if i % 2 else 'cat'}" for i in range(20) for t in range(3)]
        (tmp_path / "own.csv").write_text("\n".join(["series,a,label", *rows]) + "\n")
        task = Series(path=str(tmp_path / "own.csv"))
    assert kept_units(tmp_path) is None
    write_units(tmp_path, task)
    assert kept_units(tmp_path) == units_of(task)


def test_a_task_of_symbols_names_no_classes(tmp_path: Path) -> None:
    write_units(tmp_path, Reverse(length=4))
    assert kept_units(tmp_path) == Units("classification", None, 4, 2, ())


@pytest.mark.parametrize("wrong", ["{}", '{"kind": 3}', "[1]", "no"])
def test_damaged_units_are_refused(wrong: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(wrong)
    with pytest.raises(DataError, match=NAME):
        kept_units(tmp_path)


def test_the_seasonal_rule_knows_only_the_past() -> None:
    """The rule at t is made of values up to t, and is right about what repeats."""
    season, horizon = 4, 10
    values = np.tile([0.0, 3.0, 1.0, 7.0], 12)
    lead = np.arange(1, horizon + 1)

    def changes(values: np.ndarray) -> np.ndarray:
        time = np.arange(len(values))[:, None]
        return values[np.minimum(time + lead, len(values) - 1)] - values[time]

    rule = seasonal(changes(values), season)
    np.testing.assert_array_equal(rule[12:-horizon], changes(values)[12:-horizon])
    changed = values.copy()
    changed[25:] += 100
    np.testing.assert_array_equal(seasonal(changes(changed), season)[:25], rule[:25])


def test_baselines_are_chosen_on_validation() -> None:
    assert best_rule([(1.0, 5.0), (2.0, 3.0)]) == 5.0


def test_the_baseline_of_a_drifting_series_is_that_of_the_validation_part(tmp_path: Path) -> None:
    """Up in training and validation, down in the test: the training mean wins on validation and loses on the test."""
    drift = np.concatenate([np.full(85, 1.0), np.full(15, -1.0)]) + np.random.default_rng(0).normal(size=100) * 0.1
    task: Finite = written(tmp_path / "own.csv", drift.cumsum()[:, None], "a")
    task = replace(task, horizon=1)  # type: ignore[type-var]
    assert task.baseline() == pytest.approx(4, rel=0.2)


def test_shipped_forecasts_speak_in_their_units() -> None:
    from statewise.tasks.sources import sources

    if not sources["forecast"].here():
        pytest.skip("data set forecast is not in the cache: statewise data get forecast")
    units = units_of(Forecast())
    assert (units.columns, units.span, units.y_width) == (1, 52, 8)
