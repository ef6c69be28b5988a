"""put and grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest

from statewise.core import Unknown, grid, put


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


def test_grid_is_the_product_last_path_fastest():
    got = [(e.train.lr, e.train.steps) for e in grid(Experiment(), {"train.lr": [1, 2], "train.steps": [3, 4]})]
    assert got == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert list(grid(Train(), {})) == [Train()] and list(grid(Train(), {"lr": []})) == []
