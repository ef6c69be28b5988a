"""What a stream must know of a task's data: units, widths, classes. Kept with a run, so that it needs no data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from ..core import DataError, UsageError, read_json, write_json
from .base import Task

NAME = "units.json"
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Units:
    """x = (features - shift) * scale and answer = y * y_scale + y_shift, each of one entry or one per channel.

    span 0: the features are the values of a step. Else the task forecasts: the features are those of
    `windows.ahead` over that span, and the answer is a change from the values of this step, channel by channel.
    logarithm: the values are the exponentials of what is forecast.
    """

    kind: str
    x_width: int | None
    x_vocab: int | None
    y_width: int
    classes: tuple[str, ...] = ()
    shift: Numbers = (0.0,)
    scale: Numbers = (1.0,)
    y_shift: Numbers = (0.0,)
    y_scale: Numbers = (1.0,)
    span: int = 0
    logarithm: bool = False

    @property
    def columns(self) -> int:
        """How many values a step has."""
        width = self.x_width or 0
        return width // 2 if self.span else width

    def encode(self, values: list[float], recent: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The values of a step and what `encode` gave for the step before (None at the start) -> x (D,) float64, and
        what the next step needs: the last `span` steps (<= span, C) of a forecast, else None.

        A forecast takes NaN for a missing value and carries the last one forward. Raises ValueError for other values
        that it cannot take.
        """
        now = np.array(values, np.float64)
        if len(now) != self.columns:
            raise ValueError(f"{len(now)} numbers; expected {self.columns}")
        missing = np.isnan(now) & bool(self.span)
        if missing.any() and recent is None:
            raise ValueError(f"place {int(missing.argmax()) + 1} is missing at the first step; expected a number")
        if wrong := np.flatnonzero(~np.isfinite(now) & ~missing).tolist():
            raise ValueError(f"{len(wrong)} not finite, the first is {now[wrong[0]]} at place {wrong[0] + 1}")
        if self.logarithm:
            if (now <= 0).any():
                raise ValueError(f"{now.min():g}; expected numbers above 0, this forecast takes their logarithms")
            now = np.log(now)
        features = now
        if self.span:
            before = now[None] if recent is None else recent
            now = np.where(missing, before[-1], now)
            recent = np.concatenate([before if recent is not None else before[:0], now[None]])[-self.span :]
            features = np.concatenate([now - before[-1], now - recent.mean(0)])
        return (features - self.shift) * self.scale, recent

    def decode(self, y: list[float], recent: np.ndarray | None) -> list[float]:
        """The model's numbers y (E,) in the units of the data; recent as `encode` gave it for this step."""
        answer = np.array(y, np.float64) * self.y_scale + self.y_shift
        if recent is not None:
            answer = answer + recent[-1].repeat(len(answer) // recent.shape[1])
        found: list[float] = (np.exp(answer) if self.logarithm else answer).tolist()
        return found


def units_of(task: Task) -> Units:
    """Reads the task's data where it has some."""
    classes = getattr(task, "classes", ())  # their names; a task of symbols only says how many there are
    named = classes if isinstance(classes, tuple) else ()
    found = Units(task.kind, task.x_width, task.x_vocab, task.y_width, named)
    rows: Any = getattr(task, "rows", None)
    if rows is None:
        return found
    train, names = rows("train"), ("shift", "scale", "y_shift", "y_scale")
    numbers: dict[str, Any] = {name: tuple(getattr(train, name).flatten().tolist()) for name in names}
    return replace(found, **numbers, span=train.span, logarithm=getattr(task, "logarithm", False))


def write_units(run: Path, task: Task) -> None:
    """Keep them with a run."""
    write_json(run / NAME, asdict(units_of(task)))


def kept_units(run: Path) -> Units | None:
    """What `write_units` kept; None where nothing is. Raises DataError for a file that is damaged."""
    path = run / NAME
    if not path.exists():
        return None
    hints = get_type_hints(Units)
    try:
        found = read_json(path)
        if set(found) != {f.name for f in fields(Units)}:
            raise ValueError(f"it holds {', '.join(found)[:80] or 'nothing'}")
        return Units(**{name: _typed(value, hints[name]) for name, value in found.items()})
    except (TypeError, ValueError, UsageError) as error:
        raise DataError(f"{path}: not the units of a run ({error}); delete it, and the data is asked again") from None


def _typed(value: Any, hint: Any) -> Any:
    """Plain values as the field has them; a list is a tuple."""
    if isinstance(value, list):
        kind, _ = get_args(hint)
        return tuple(kind(part) for part in value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{str(value)[:40]!r} in place of {hint}")
    return value
