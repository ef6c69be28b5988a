"""States are trees: tensors (batch first), None, tuples and NamedTuples of states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .errors import UsageError

S = TypeVar("S")


def tree_map(f: Callable[..., Any], *trees: Any) -> Any:
    """Apply f to corresponding leaves of equally shaped trees; the result has the first tree's structure."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return f(*trees)
    if not isinstance(first, tuple | list):
        raise UsageError(f"a state holds a {type(first).__name__}; expected tensors, None, tuples or NamedTuples")
    parts = [tree_map(f, *group) for group in zip(*trees, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, depth first."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def names(tree: Any, prefix: str = "") -> list[str]:
    """A dotted path for every leaf, in the order of `leaves`: field names where there are some, else positions."""
    if tree is None:
        return []
    if isinstance(tree, Tensor):
        return [prefix or "state"]
    if not isinstance(tree, tuple | list):
        raise UsageError(f"a state holds a {type(tree).__name__}; expected tensors, None, tuples or NamedTuples")
    keys = tree._fields if hasattr(tree, "_fields") else map(str, range(len(tree)))
    dot = f"{prefix}." if prefix else ""
    return [n for key, part in zip(keys, tree, strict=True) for n in names(part, dot + key)]


def detach(state: S) -> S:
    """The same numbers with the past cut off: truncated back-propagation through time."""
    return tree_map(Tensor.detach, state)


def clone(state: S) -> S:
    """A copy with storage of its own."""
    return tree_map(Tensor.clone, state)


def select(state: S, rows: Tensor) -> S:
    """Keep, repeat or reorder batch rows: what forking a stream and beam search need from a state."""
    return tree_map(lambda leaf: leaf.index_select(0, rows), state)


def join(states: list[S]) -> S:
    """States of several batches as the state of one batch."""
    if not states:
        raise UsageError("join: no states; expected at least one")
    return tree_map(lambda *rows: torch.cat(rows, 0), *states)


def where(rows: Tensor, yes: S, no: S) -> S:
    """Row by row, one state or the other. rows (B,) bool."""
    return tree_map(lambda y, n: torch.where(rows.view(-1, *[1] * (n.ndim - 1)), y, n), yes, no)


class Cost(NamedTuple):
    """What a layer adds to the training loss beside its answers, as a part of its state: the sum over the steps so far.

    Training minimises the task's loss plus the mean cost of a step. No answer depends on it, a reset does not clear it,
    and steps past a row's end cost nothing.
    """

    total: Tensor  # (B,)


class Load(NamedTuple):
    """How a row's steps have used E experts, as a part of a state: sums over the steps so far, as of a Cost.

    Its total is sum_e f_e owed_e, where f_e is the share of e in all that the rows of the batch took: dear is what all
    take. Only `owed` has a gradient.
    """

    taken: Tensor  # (B, E) how often each was taken
    owed: Tensor  # (B, E) what the steps owe, were that expert all that any step takes


def costs(state: Any, everywhere: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    """The total (B,) of every Cost and every Load in a state.

    everywhere: from what this batch took to what was taken in all, where several processes have parts of a batch.
    """
    if isinstance(state, Cost):
        return [state.total]
    if isinstance(state, Load):
        taken = everywhere(state.taken.detach().sum(0))
        return [state.owed @ (taken / taken.sum().clamp_min(1))]
    if not isinstance(state, tuple | list):
        return []
    return [total for part in state for total in costs(part, everywhere)]


def settled(state: S) -> S:
    """The same state with every Cost and Load at zero."""
    if isinstance(state, Cost | Load):
        return tree_map(torch.zeros_like, state)  # type: ignore[no-any-return]
    if not isinstance(state, tuple | list):
        return state
    parts = [settled(part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def nbytes(state: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and decays for parameters of `dtype`: float32, or wider where the parameters are.

    In bfloat16 0.999 is 1.0 and a million steps are noise, so no state is ever narrower.
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
