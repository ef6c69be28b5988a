"""The units of a task's data, kept with the run, so that a stream may speak in them without the data at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import DataError, read_json, write_json
from ..tasks import Task

NAME = "units.json"


@dataclass(frozen=True)
class Units:
    """Input x = (value - shift) * scale, each of one entry or one per input; names of the classes, if they have any."""

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    classes: tuple[str, ...] = ()

    def inward(self, values: list[float]) -> list[float]:
        shift, scale = (part * len(values) if len(part) == 1 else part for part in (self.shift, self.scale))
        return [(v - a) * b for v, a, b in zip(values, shift, scale, strict=True)]


def units_of(task: Task) -> Units:
    """Reads the task's data where it has some."""
    rows: Any = getattr(task, "rows", None)
    if rows is None:
        return Units()
    train, classes = rows("train"), tuple(getattr(task, "classes", ()))
    return Units(tuple(train.shift.tolist()), tuple(train.scale.tolist()), classes)


def write_units(run: Path, task: Task) -> None:
    made = units_of(task)
    if made != Units():
        write_json(run / NAME, {"shift": made.shift, "scale": made.scale, "classes": made.classes})


def read_units(run: Path, task: Task) -> Units:
    """What `write_units` kept, else what the task's data says."""
    path = run / NAME
    if not path.exists():
        return units_of(task)
    found = read_json(path)
    try:
        shift, scale = (tuple(float(v) for v in found[name]) for name in ("shift", "scale"))
        return Units(shift, scale, tuple(str(name) for name in found["classes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not the units of a run ({error}); delete it, and the data is asked again") from None
