"""States as trees."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError, clone, detach, join, leaves, names, nbytes, select, tree_map, wide


class Pair(NamedTuple):
    h: Tensor
    rest: tuple


def tree() -> Pair:
    return Pair(torch.randn(3, 2), (torch.arange(3), None, (torch.randn(3, 2, 4, dtype=torch.complex64), ())))


def test_names_and_leaves_correspond():
    assert names(tree()) == ["h", "rest.0", "rest.2.0"] and [leaf.ndim for leaf in leaves(tree())] == [2, 1, 3]
    assert names(torch.ones(1)) == ["state"] and names(None) == [] and names(()) == []


def test_map_keeps_the_kind_of_every_node():
    got = tree_map(lambda leaf: leaf + 1, tree())
    assert type(got) is Pair and type(got.rest) is tuple and got.rest[1] is None and got.rest[2][1] == ()
    assert got.rest[0].tolist() == [1, 2, 3]


def test_map_refuses_trees_of_unequal_shape():
    with pytest.raises(ValueError):
        tree_map(lambda a, b: a, (torch.ones(1), torch.ones(1)), (torch.ones(1),))


@pytest.mark.parametrize("bad", [{"h": torch.ones(1)}, "ab", 3, (torch.ones(1), 2.0)])
def test_what_is_no_state_is_named(bad):
    with pytest.raises(UsageError, match=r"holds a (dict|str|int|float)"):
        leaves(bad)
    with pytest.raises(UsageError, match="holds a"):
        names(bad)


def test_join_undoes_select():
    state = tree()
    parts = [select(state, torch.tensor([row])) for row in range(3)]
    for a, b in zip(leaves(join(parts)), leaves(state), strict=True):
        assert torch.equal(a, b)


def test_clone_has_storage_of_its_own_and_detach_cuts():
    state = tree_map(lambda leaf: leaf.requires_grad_() if leaf.is_floating_point() else leaf, tree())
    copy = clone(state)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(leaves(copy), leaves(state), strict=True))
    assert copy.h.requires_grad and not detach(copy).h.requires_grad


def test_nbytes_adds_up_leaves():
    assert nbytes(tree()) == 3 * 2 * 4 + 3 * 8 + 3 * 2 * 4 * 8


def test_wide_is_never_narrower_than_float32():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert wide(dtype) == torch.float32
    assert wide(torch.float64) == torch.float64
