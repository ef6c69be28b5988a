"""Forecasting real series: carbon dioxide, sunspots, and the monthly series of the M3 competition."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..core import DataError, UsageError
from .base import Split, register_task
from .finite import Sequences
from .sources import M3, STATSMODELS
from .windows import Regress, ahead, best_rule, constants, windows

Name = Literal["co2", "sunspots", "m3_monthly"]
SEASON = {"co2": 52, "sunspots": 132, "m3_monthly": 12}


@register_task
@dataclass(frozen=True)
class Forecast(Regress):
    """x        the last change, and the height above the mean of the last season
    answer    the changes from now to 1, 2, ..., horizon steps ahead, asked at every step

    series: "co2", 2284 weeks at Mauna Loa; "sunspots", 3126 months; "m3_monthly", 1428 series of 48 to 126 months as
    logarithms. The last 15 % of the steps are the test, the 15 % before them validation; of each M3 series its own
    18 months are the test. Changes are in units of their root mean square over the training part: answering "as
    now" has a loss of about 1.
    """

    series: Name = "co2"
    horizon: int = 8
    length: int = 128
    name = "forecast"
    data = f"{STATSMODELS.data} (m3 for series=m3_monthly)"
    x_width = 2

    def __post_init__(self) -> None:
        if self.series not in get_args(Name):
            raise UsageError(f"forecast: series is {self.series!r}; expected one of {', '.join(get_args(Name))}")
        longest = 18 if self.series == "m3_monthly" else 64
        if not 1 <= self.horizon <= longest:
            raise UsageError(f"forecast: horizon is {self.horizon}; expected 1 to {longest}")
        if self.length < 2:
            raise UsageError(f"forecast: length is {self.length}; expected at least 2")

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.horizon

    @property
    def logarithm(self) -> bool:
        """The series are logarithms of the data."""
        return self.series == "m3_monthly"

    def load(self) -> dict[Split, Sequences]:
        series, ends = _read(self.series)
        tracks = ahead(self.name, [v[:, None] for v in series], ends, self.horizon, SEASON[self.series])
        return windows(self.name, tracks, self.length)

    def baseline(self) -> float:
        """Test loss of the rule that is best on the validation split: as now, the mean training change, or the same
        change as whole seasons ago, so many that all of it is known."""
        series, ends = _read(self.series)
        tracks = ahead(self.name, [v[:, None] for v in series], ends, self.horizon, SEASON[self.series])
        rules = [seasonal(track.y, SEASON[self.series]) for track in tracks]
        validation, test = (
            np.concatenate([np.square(t.y - rule)[t.asked[split]] for t, rule in zip(tracks, rules)]).mean()
            for split in ("validation", "test")  # type: ignore[index]
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
    if name == "m3_monthly":
        path = M3.paths()["m3_data.json"]
        found = [entry for entry in json.loads(path.read_bytes()).values() if entry["period"] == ["MONTHLY"]]
        if len(found) != 1428:
            raise DataError(f"{path}: {len(found)} monthly series; expected 1428")
        fitted = [len(entry["x"]) for entry in found]
        series = [np.log(np.array(entry["x"] + entry["xx"], np.float64)) for entry in found]
        return series, [(n - 18, n) for n in fitted]
    if name == "co2":
        with STATSMODELS.paths()["co2.csv"].open(encoding="ascii", newline="") as file:
            values = np.array([float(row["co2"] or "nan") for row in csv.DictReader(file)])
    else:
        text = STATSMODELS.paths()["sunspots_monthly.dat"].read_text(encoding="ascii")
        years = [line.split() for line in text.splitlines() if line[:4].isdigit()]
        values = np.array([month for year in years for month in year[1:]], np.float64)
    return [values], [(len(values) * 70 // 100, len(values) * 85 // 100)]
