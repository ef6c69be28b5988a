"""Forecasting real series: of nature, and those of the competitions M1, M3 and Tourism."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..core import DataError, UsageError
from .base import Split, register_task
from .finite import Sequences
from .sources import COMPETITIONS, STATSMODELS
from .windows import Regress, ahead, best_rule, constants, windows

Name = Literal[
    "co2", "sunspots", "elnino", "m1_yearly", "m1_quarterly", "m1_monthly", "m3_yearly", "m3_quarterly", "m3_monthly",
    "m3_other", "tourism_yearly", "tourism_quarterly", "tourism_monthly",
]  # fmt: skip
SEASON = {"co2": 52, "sunspots": 132, "elnino": 12, "yearly": 1, "quarterly": 4, "monthly": 12, "other": 1}
COUNT: dict[str, int] = dict(zip(get_args(Name)[3:], (181, 203, 617, 645, 756, 1428, 174, 518, 427, 366)))
HORIZON: dict[str, int] = dict(zip(COUNT, (6, 8, 18, 6, 8, 18, 8, 4, 8, 24)))  # of the competitions' own tests


@register_task
@dataclass(frozen=True)
class Forecast(Regress):
    """x        the last change, and the height above the mean of the last season
    answer    the changes from now to 1, 2, ..., horizon steps ahead, asked at every step

    series: "co2", 2284 weeks at Mauna Loa; "sunspots", 3126 months; "elnino", 732 months of sea temperature; or all
    series of one period of a competition, as logarithms: "m1_yearly" (181 series), "m1_quarterly" (203), "m1_monthly"
    (617), "m3_yearly" (645), "m3_quarterly" (756), "m3_monthly" (1428), "m3_other" (174), "tourism_yearly" (518),
    "tourism_quarterly" (427), "tourism_monthly" (366). A zero, which only tourism has, counts as missing.

    Of one series the last 15 % of the steps are the test, the 15 % before them validation; of those of a competition
    its own test, 4 to 24 steps, and as many before. Changes are in units of their root mean square over the training
    part: answering "as now" has a loss of about 1. Chance: a training answer drawn at random; baseline: the best of
    four rules.
    """

    series: Name = "co2"
    horizon: int = 8
    length: int = 128
    name = "forecast"
    data = f"{STATSMODELS.data} (competitions for series=m1_..., m3_..., tourism_...)"
    x_width = 2

    def __post_init__(self) -> None:
        if self.series not in get_args(Name):
            raise UsageError(f"forecast: series is {self.series!r}; expected one of {', '.join(get_args(Name))}")
        longest = HORIZON.get(self.series, 64)
        if not 1 <= self.horizon <= longest:
            raise UsageError(f"forecast: horizon is {self.horizon}; expected 1 to {longest} for {self.series}")
        if self.length < 2:
            raise UsageError(f"forecast: length is {self.length}; expected at least 2")

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.horizon

    @property
    def logarithm(self) -> bool:
        """The series are logarithms of the data."""
        return self.series in COUNT

    @property
    def season(self) -> int:
        """Steps of a year, or of whatever comes round."""
        return SEASON[self.series.split("_")[-1]]

    def load(self) -> dict[Split, Sequences]:
        series, ends = _read(self.series)
        tracks = ahead(self.name, [v[:, None] for v in series], ends, self.horizon, self.season)
        return windows(self.name, tracks, self.length)

    def baseline(self) -> float:
        """Test loss of the rule that is best on the validation split: as now, the mean training change, or the same
        change as whole seasons ago, so many that all of it is known."""
        series, ends = _read(self.series)
        tracks = ahead(self.name, [v[:, None] for v in series], ends, self.horizon, self.season)
        rules = [seasonal(track.y, self.season) for track in tracks]
        validation, test = (
            np.concatenate([np.square(t.y - rule)[t.asked[split]] for t, rule in zip(tracks, rules)]).mean()
            for split in ("validation", "test")
        )
        return best_rule([*constants(self), (float(validation), float(test))])


def seasonal(y: np.ndarray, season: int) -> np.ndarray:
    """Changes y (T, horizon) as they were s steps earlier, s the least number of whole seasons >= the lead: the change
    from t - s to t - s + lead <= t is known at t. Where the series began later than that: no change."""
    found = np.zeros_like(y)
    for lead in range(1, y.shape[1] + 1):
        back = season * -(-lead // season)
        found[back:, lead - 1] = y[:-back, lead - 1]
    return found


def _read(name: str) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """The series, NaN where a value is missing, and where training and validation end."""
    if name in COUNT:
        competition, period = name.split("_")
        path = COMPETITIONS.paths()[f"{'tcomp' if competition == 'tourism' else competition}_data.json"]
        found = [entry for entry in json.loads(path.read_bytes()).values() if entry["period"] == [period.upper()]]
        if len(found) != COUNT[name]:
            raise DataError(f"{path}: {len(found)} {period} series; expected {COUNT[name]}")
        fitted = [len(entry["x"]) for entry in found]
        whole = [np.array(entry["x"] + entry["xx"], np.float64) for entry in found]
        return [np.log(np.where(v > 0, v, np.nan)) for v in whole], [(n - HORIZON[name], n) for n in fitted]
    if name == "co2":
        with STATSMODELS.paths()["co2.csv"].open(encoding="ascii", newline="") as file:
            values = np.array([float(row["co2"] or "nan") for row in csv.DictReader(file)])
    elif name == "elnino":
        rows = STATSMODELS.paths()["elnino.csv"].read_text(encoding="ascii").splitlines()[1:]
        values = np.array([month for row in rows for month in row.split(",")[1:]], np.float64)
    else:
        text = STATSMODELS.paths()["sunspots_monthly.dat"].read_text(encoding="ascii")
        years = [line.split() for line in text.splitlines() if line[:4].isdigit()]
        values = np.array([month for year in years for month in year[1:]], np.float64)
    return [values], [(len(values) * 70 // 100, len(values) * 85 // 100)]
