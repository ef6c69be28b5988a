"""Reading the user's series: which columns, arrays and folders mean what."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core import DataError, near
from .files import LARGEST, Table, arrays, read_table, regular


class Found(NamedTuple):
    """What a file or folder holds. At most one of labels and targets."""

    series: list[np.ndarray]  # (T_i, C) float64, NaN where missing
    labels: list[str] | None = None  # one per series
    targets: list[np.ndarray] | None = None  # (E,) for the whole series, or (T_i, E) for its steps
    columns: tuple[str, ...] = ()  # what the C channels are called, where they have names


@dataclass(frozen=True)
class Names:
    """What the columns are called. A usual name may be absent; one that was chosen must be there."""

    series: str = "series"
    time: str = "time"
    label: str = "label"
    target: str = "target"  # and every column whose name begins with it
    ignore: tuple[str, ...] = ()


def read(path: Path, names: Names) -> Found:
    """A CSV, Parquet, NPZ or NPY file, or a folder. Raises DataError naming file, line and column."""
    return _folder(path, names) if path.is_dir() else _file(path, names)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _file(path: Path, names: Names) -> Found:
    if path.suffix.lower() == ".npz":
        return _packed(path, arrays(path))
    if path.suffix.lower() == ".npy":
        return Found([_one(path, names)[0]])
    if path.suffix.lower() not in (".csv", ".txt", ".parquet", ".pq"):
        regular(path)  # a missing file is the better thing to say
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected .csv, .parquet, .npz or .npy")
    return _columns(read_table(path), names)


def _columns(table: Table, names: Names) -> Found:
    """Rows into series, in order of appearance; within a series in order of time."""
    special = {field: _named(table, names, field) for field in ("series", "time", "label")}
    targets = [name for name in table.columns if names.target and name.startswith(names.target)]
    if not targets and names.target not in ("", Names.target):
        raise DataError(f"{table.path}: no column {names.target!r}; {near(names.target, table.columns)}")
    for name in names.ignore:
        if name not in table.columns:
            raise DataError(f"{table.path}: no column {name!r} to ignore; {near(name, table.columns)}")
    label, targets = special["label"], [name for name in targets if name not in names.ignore]
    if label and targets:
        raise DataError(f"{table.path}: has both {label!r} and {targets[0]!r}; leave one out: task.ignore=NAME")
    inputs = [name for name in table.columns if name not in (*special.values(), *targets, *names.ignore)]
    if not inputs:
        raise DataError(f"{table.path}: no column is left for the input among {', '.join(table.columns)}")
    x = np.stack([table.numbers(name) for name in inputs], 1)
    groups = _groups(table, special["series"], special["time"])
    series = [x[rows] for rows in groups]
    if label:
        return Found(series, labels=_labels(table, label, groups), columns=tuple(inputs))
    if targets:
        y = np.stack([table.numbers(name) for name in targets], 1)
        return Found(series, targets=[y[rows] for rows in groups], columns=tuple(inputs))
    return Found(series, columns=tuple(inputs))


def _named(table: Table, names: Names, field: str) -> str | None:
    """The column of that role; None where it is absent under its usual name, or ignored."""
    name: str = getattr(names, field)
    if name in table.columns:
        return None if name in names.ignore else name
    if name and name != getattr(Names, field):
        raise DataError(f"{table.path}: no column {name!r}; {near(name, table.columns)}")
    return None


def _groups(table: Table, series: str | None, time: str | None) -> list[np.ndarray]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.texts(series) if series else [""] * len(table)):
        if series and not name:
            raise DataError(f"{table.at(row)}: column {series!r} is empty; expected the name of a series")
        rows.setdefault(name, []).append(row)
    groups = [np.array(group) for group in rows.values()]
    if time is None:
        return groups
    moment = _moments(table, time)
    ordered = [group[np.argsort(moment[group], kind="stable")] for group in groups]
    for group in ordered:
        same = np.flatnonzero(np.diff(moment[group]) == 0)
        if len(same):
            raise DataError(f"{table.at(group[same[0] + 1])}: a second row of this series at the same {time!r}")
    return ordered


def _moments(table: Table, time: str) -> np.ndarray:
    """(rows,) float64: a column of numbers, or of dates as ISO 8601 writes them."""
    texts = table.texts(time)
    if isinstance(table.columns[time], np.ndarray) or is_number(texts[0]):
        moment = table.numbers(time)
        if np.isnan(moment).any():
            raise DataError(f"{table.at(int(np.isnan(moment).argmax()))}: column {time!r} is missing")
        return moment
    found = []
    for row, text in enumerate(texts):
        try:
            date = datetime.fromisoformat(text)
        except ValueError:
            wrong = f"{table.at(row)}: column {time!r} holds {text[:40]!r}"
            raise DataError(f"{wrong}; expected a number or a date such as 2024-05-31T12:00:00") from None
        found.append((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())
    return np.array(found)


def _labels(table: Table, column: str, groups: list[np.ndarray]) -> list[str]:
    texts = table.texts(column)
    found = []
    for group in groups:
        first = texts[group[0]]
        for row in group:
            if not texts[row] or texts[row].lower() == "nan":
                raise DataError(f"{table.at(row)}: column {column!r} is empty; expected the class of the series")
            if texts[row] != first:
                raise DataError(
                    f"{table.at(row)}: label {texts[row][:40]!r}, but the series began with {first[:40]!r}; a label is "
                    f"one per series (numbers at every step are a target)"
                )
        found.append(first)
    return found


def _packed(path: Path, found: dict[str, np.ndarray]) -> Found:
    """The arrays of an NPZ."""
    keys = {name.lower(): name for name in found}
    if "x" not in keys:
        raise DataError(f"{path}: no array X; it holds {', '.join(found) or 'nothing'}")
    unknown = [name for name in found if name.lower() not in ("x", "y", "lengths")]
    if unknown:
        raise DataError(f"{path}: unknown array {unknown[0]!r}; expected X, y and lengths")
    x = found[keys["x"]]
    if x.dtype.kind not in "fiub":
        raise DataError(f"{path}: X has dtype {x.dtype}; expected numbers")
    if "lengths" in keys:
        lengths = found[keys["lengths"]]
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
            raise DataError(f"{path}: lengths is {lengths.dtype} {lengths.shape}; expected positive integers (N,)")
        if x.ndim != 2 or lengths.sum() != len(x):
            raise DataError(f"{path}: lengths sum to {lengths.sum()}; X has shape {x.shape}; expected (steps, D)")
        series = list(np.split(_finite(path, "X", x), np.cumsum(lengths)[:-1]))
    elif x.ndim in (2, 3):
        series = list(_finite(path, "X", x if x.ndim == 3 else x[..., None]))
    elif x.ndim == 1:
        series = [_finite(path, "X", x[:, None])]
    else:
        raise DataError(f"{path}: X has shape {x.shape}; expected (N, T, D), (N, T) or (steps, D) with lengths")
    if not series or not len(series[0]) or not series[0].shape[1]:
        raise DataError(f"{path}: X has shape {x.shape}: it holds no steps")
    if "y" not in keys:
        return Found(series)
    y = found[keys["y"]]
    if len(y) != len(series) or y.ndim > 3:
        raise DataError(f"{path}: y has shape {y.shape}; X holds {len(series)} series")
    if y.dtype.kind in "iubUS" and y.ndim == 1:
        return Found(series, labels=[str(label) for label in y.astype(str)])
    if y.dtype.kind != "f":
        raise DataError(f"{path}: y is {y.dtype} {y.shape}; expected classes (N,), or floats (N,), (N, E), (N, T, E)")
    y = _finite(path, "y", y if y.ndim > 1 else y[:, None])
    if y.ndim == 3 and any(len(steps) != y.shape[1] for steps in series):
        raise DataError(f"{path}: y has shape {y.shape}; expected as many steps as X has")
    return Found(series, targets=list(y))


def _finite(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """float64 without infinities; NaN may stay, it stands for a missing value."""
    values = values.astype(np.float64)
    infinite = np.isinf(values)
    if infinite.any():
        first = np.unravel_index(infinite.argmax(), values.shape)
        raise DataError(
            f"{path}: {name}{[int(i) for i in first]} is infinite ({infinite.sum()} in all); expected finite"
        )
    large = np.abs(values) > LARGEST
    if large.any():
        first = np.unravel_index(large.argmax(), values.shape)
        raise DataError(f"{path}: {name}{[int(i) for i in first]} is {values[first]:g}; expected at most {LARGEST:g}")
    return values


def _folder(path: Path, names: Names) -> Found:
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    listed = path / "labels.csv"
    if listed in inside:
        return _listed(path, listed, names)
    folders = [entry for entry in inside if entry.is_dir()]
    if folders:
        members = [file for folder in folders for file in _data_files(folder)]
        if not members:
            raise DataError(f"{path}: its folders hold no .csv or .npy files")
        series, columns = _same_columns((file, *_one(file, names)) for file in members)
        return Found(series, labels=[file.parent.name for file in members], columns=columns)
    files = _data_files(path)
    if not files:
        raise DataError(f"{path}: the folder holds no .csv or .npy files, and no folders of them")
    parts = [_file(file, names) for file in files]
    series, columns = _same_columns(
        (file, steps, part.columns) for file, part in zip(files, parts) for steps in part.series
    )
    for field in ("labels", "targets"):
        have = [getattr(part, field) is not None for part in parts]
        if any(have) and not all(have):
            odd = files[have.index(not have[0])]
            raise DataError(f"{odd}: has {'no ' if have[0] else ''}{field}, unlike {files[0].name}")
    labels = [label for part in parts for label in part.labels or []]
    targets = [target for part in parts for target in part.targets or []]
    return Found(series, labels or None, targets or None, columns)


def _listed(path: Path, listed: Path, names: Names) -> Found:
    """Files named in labels.csv, with their labels or targets."""
    table = read_table(listed)
    if "file" not in table.columns:
        raise DataError(f"{listed}:1: no column 'file'; {near('file', table.columns)}")
    series = []
    for row, name in enumerate(table.texts("file")):
        file = path / name
        if not name or not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(path)):
            raise DataError(f"{table.at(row)}: {name!r} is not a file inside {path}")
        if not file.is_file():
            raise DataError(f"{table.at(row)}: no such file: {file}")
        series.append((file, *_one(file, names)))
    steps, columns = _same_columns(series)
    if names.label in table.columns:
        rows = [np.array([row]) for row in range(len(table))]
        return Found(steps, labels=_labels(table, names.label, rows), columns=columns)
    targets = [name for name in table.columns if name.startswith(names.target)]
    if not targets:
        raise DataError(f"{listed}:1: no column {names.label!r} or {names.target!r}")
    return Found(steps, targets=list(np.stack([table.numbers(name) for name in targets], 1)), columns=columns)


def _one(file: Path, names: Names) -> tuple[np.ndarray, tuple[str, ...]]:
    """(T, D) of a file whose answer stands elsewhere, and what the D are called."""
    if file.suffix.lower() == ".npy":
        values = arrays(file)["X"]
        if values.ndim not in (1, 2) or values.dtype.kind not in "fiub" or not values.size:
            raise DataError(f"{file}: {values.dtype} {values.shape}; expected numbers (T, D) or (T,)")
        return _finite(file, "X", values if values.ndim == 2 else values[:, None]), ()
    table = read_table(file)
    time = _named(table, names, "time")
    inputs = tuple(name for name in table.columns if name not in (time, *names.ignore))
    if not inputs:
        raise DataError(f"{file}: no column is left for the input")
    return np.stack([table.numbers(name) for name in inputs], 1)[_groups(table, None, time)[0]], inputs


def _data_files(folder: Path) -> list[Path]:
    kinds = (".csv", ".npy")
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in kinds and not file.name.startswith("."))


def _same_columns(
    series: Iterable[tuple[Path, np.ndarray, tuple[str, ...]]],
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The series, their columns in the order of the first. Raises DataError where they are not the same."""
    found: list[np.ndarray] = []
    known: tuple[str, ...] = ()
    for file, steps, columns in series:
        if found and steps.shape[1] != found[0].shape[1]:
            raise DataError(f"{file}: {steps.shape[1]} channels; the series before it have {found[0].shape[1]}")
        known = known or columns
        if columns and set(columns) != set(known):
            raise DataError(f"{file}: columns {', '.join(columns)}; the series before it have {', '.join(known)}")
        found.append(steps[:, [columns.index(name) for name in known]] if columns not in ((), known) else steps)
    return found, known
