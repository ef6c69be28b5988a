"""put and grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest

from statewise.core import Unknown, grid, put, put_all


@dataclass(frozen=True)
class Train:
    lr: float = 1e-3
    steps: int = 10


@dataclass(frozen=True)
class Experiment:
    train: Train = Train()
    args: Any = field(default_factory=lambda: MappingProxyType({"hidden": 4}))


def test_put_changes_a_copy_by_path():
    base = Experiment()
    assert put(base, "train.lr", 0.1) == Experiment(Train(lr=0.1), base.args) and base.train.lr == 1e-3
    assert put(base, "args.taps", 3).args == {"hidden": 4, "taps": 3}


@pytest.mark.parametrize("path, said", [
    ("trian.lr", "no field 'trian'; near: train"), ("train.stpes", "near: steps"),
    ("train.lr.x", "float has no field 'x'"),
    ("args.x.y", "no entry 'x'"), ("", "no field ''"),
])  # fmt: skip
def test_put_names_what_is_near(path, said):
    with pytest.raises(Unknown, match=said):
        put(Experiment(), path, 1)


@dataclass(frozen=True)
class Lengths:
    shortest: int = 1
    longest: int = 2

    def __post_init__(self):
        if self.shortest > self.longest:
            raise ValueError("shortest above longest")


def test_fields_that_only_fit_together_change_together():
    made = put_all({"of": Lengths(), "x": 1}, {"of.shortest": 5, "of.longest": 7, "x": 2})
    assert made == {"of": Lengths(5, 7), "x": 2}
    with pytest.raises(ValueError, match="shortest above longest"):
        put({"of": Lengths()}, "of.shortest", 5)
    with pytest.raises(Unknown, match="near: longest"):
        put_all(Lengths(), {"shortest": 1, "longset": 2})
    ((one, both),) = [list(grid(Lengths(), {"shortest": [1, 6], "longest": [8]}))]
    assert (one, both) == (Lengths(1, 8), Lengths(6, 8))


def test_grid_is_the_product_last_path_fastest():
    got = [(e.train.lr, e.train.steps) for e in grid(Experiment(), {"train.lr": [1, 2], "train.steps": [3, 4]})]
    assert got == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert list(grid(Train(), {})) == [Train()] and list(grid(Train(), {"lr": []})) == []
