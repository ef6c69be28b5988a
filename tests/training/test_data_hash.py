"""data_hash: other data, another hash; the same data, the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from toys import Trail

from statewise.core import DataError
from statewise.tasks.base import SPLITS, Split, Task, tasks
from statewise.tasks.finite import Classify, Sequences
from statewise.training import data_hash


def series(path: Path, values: np.ndarray) -> Task:
    np.savetxt(path, values, delimiter=",", header="a,b", comments="")
    return tasks["series"].cls(path=str(path))


def test_any_byte_of_a_file_counts(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(400, 2))
    first = data_hash(series(tmp_path / "a.csv", values))
    assert data_hash(series(tmp_path / "b.csv", values)) == first
    assert data_hash(series(tmp_path / "a.csv", values)) == first
    values[-1, -1] += 1  # a test step
    assert data_hash(series(tmp_path / "a.csv", values)) != first


def test_any_file_of_a_folder_counts(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", np.ones((5, 2)))
    task = tasks["series"].cls(path=str(tmp_path))
    first = data_hash(task)
    assert data_hash(task) == first
    np.save(tmp_path / "b" / "2.npy", np.ones((5, 2)))
    more = data_hash(task)
    (tmp_path / "b" / "2.npy").rename(tmp_path / "a" / "2.npy")
    assert len({first, more, data_hash(task)}) == 3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv"):
        data_hash(tasks["series"].cls(path=str(tmp_path / "none.csv")))


@dataclass(frozen=True)
class Table(Classify):
    split: str = ""  # whose last number is another
    name = "table"
    x_width = 1
    y_width = 2

    def load(self) -> dict[Split, Sequences]:
        return {s: Sequences.of([np.full((3, 1), s == self.split)] * 4, np.array([0, 1, 0, 1])) for s in SPLITS}


def test_every_split_counts() -> None:
    assert len({data_hash(Table(split)) for split in ("", *SPLITS)}) == 4
    assert data_hash(Table("test")) == data_hash(Table("test"))
    assert len({data_hash(Trail(length=n)) for n in (4, 5, 6)}) == 3


def test_settings_are_the_data_of_what_is_generated() -> None:
    assert data_hash(tasks["adding"].cls(length=50)) == "generated"
