"""Layers whose memory one linear op carries: which op, which leaf of the state, and what moves and fills it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import RecurrentLayer, UsageError, leaves, names, tree_map
from ..ops import Op
from ..ops.dispatch import routed

S = TypeVar("S")


@dataclass(frozen=True)
class Carrier:
    """How a linear op S_t = A_t S_{t-1} + U_t names its arguments."""

    state: str
    written: str  # U_t is zero where this is zero
    insert: str  # U_t is in proportion to this; of a delta rule it also says how much the old value fades
    decay: str  # the logarithm of the decay, or what it is in proportion to; the decay itself of linear_scan


CARRIERS = {
    "outer_scan": Carrier("state", "v", "k", "log_decay"),
    "delta_scan": Carrier("state", "v", "beta", "log_decay"),
    "dplr_scan": Carrier("state", "v", "k", "log_decay"),
    "selective_scan": Carrier("state", "x", "b", "a"),
    "linear_scan": Carrier("h0", "x", "x", "a"),
}


@dataclass(frozen=True)
class Memory:
    """Where a layer keeps its memory."""

    op: str
    leaf: int  # among the leaves of the state
    name: str  # of that leaf
    shape: tuple[int, ...]  # without the batch
    decays: bool  # the op is given a decay


@contextmanager
def intercept(handler: Callable[[Op, dict[str, Any]], Any]) -> Iterator[None]:
    """Within the block every call of an op is handler(op, arguments by name); what the handler calls runs as ever."""

    def route(op: Op) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            named = inspect.signature(op.reference).bind(*args, **kwargs).arguments
            with routed(None):
                return handler(op, dict(named))

        return call

    with routed(route):
        yield


def memory_of(layer: RecurrentLayer[Any]) -> Memory:
    """Found by running the layer for one step. Raises UsageError for a layer whose memory no single linear op carries:
    GRU, attention, layers with a running maximum (mlstm, aaren), convolutions (s4)."""
    name = type(layer).__name__
    if layer.vocab:
        raise UsageError(f"{name} is a model of ids; change its layers: statewise.interpret.change")
    weight = next(layer.parameters())
    dtype = weight.real.dtype if weight.is_complex() else weight.dtype
    before = layer.initial_state(1)
    calls: list[tuple[str, dict[str, Any]]] = []

    def note(op: Op, arguments: dict[str, Any]) -> Any:
        calls.append((op.name, arguments))
        return op(**arguments)

    with torch.no_grad(), intercept(note):
        layer(torch.zeros(1, 1, layer.width, dtype=dtype, device=weight.device), before)
    if len(calls) != 1 or calls[0][0] not in CARRIERS:
        called = ", ".join(op for op, _ in calls) or "no op"
        raise UsageError(f"{name} calls {called} in a step; expected one of {', '.join(CARRIERS)}, once")
    op, arguments = calls[0]
    given = arguments[CARRIERS[op].state]
    for i, (leaf_name, leaf) in enumerate(zip(names(before), leaves(before), strict=True)):
        if leaf is given:
            return Memory(op, i, leaf_name, tuple(leaf.shape[1:]), arguments.get(CARRIERS[op].decay) is not None)
    raise UsageError(f"{name} does not keep what {op} carries as it is: no leaf of {', '.join(names(before))} is that")


def memory_leaf(state: Any, memory: Memory) -> Tensor:
    return leaves(state)[memory.leaf]


def with_memory(state: S, memory: Memory, value: Tensor) -> S:
    """The state with another tensor in the place of the memory."""
    parts = iter([value if i == memory.leaf else leaf for i, leaf in enumerate(leaves(state))])
    return tree_map(lambda _: next(parts), state)  # type: ignore[no-any-return]


def carried(op: Op, arguments: Mapping[str, Any], state: Tensor) -> Tensor:
    """A_T ... A_1 S: what the steps of this call leave of a memory S when they write nothing."""
    names = CARRIERS[op.name]
    nothing = torch.zeros_like(arguments[names.written])
    left: Tensor = op(**{**arguments, names.written: nothing, names.state: state})[1]
    return left


def scaled(op: Op, arguments: Mapping[str, Any], *, decay: float, insert: float) -> dict[str, Any]:
    """The arguments with decay times the logarithm of the decay, and insert times what is written."""
    names, found = CARRIERS[op.name], dict(arguments)
    if insert != 1:
        found[names.insert] = insert * found[names.insert]
    g = found.get(names.decay)
    if decay != 1 and g is not None:
        found[names.decay] = _power(g, decay) if op.name == "linear_scan" else decay * g
    return found


def _power(a: Tensor, exponent: float) -> Tensor:
    """a with its modulus raised to a power; its angle or sign stays."""
    size = a.abs()
    return torch.where(size == 0, torch.zeros_like(a), a * size.where(size > 0, 1).pow(exponent - 1))


def by_heads(leaf: Tensor, *, window: bool = False) -> Tensor:
    """(B, H, K, V) -> (B, H, n) real; a leaf with fewer dimensions counts as one head. window: it is (B, T, H, K)."""
    leaf = leaf.transpose(1, 2) if window else leaf
    rows = leaf.flatten(2) if leaf.ndim >= 4 else leaf.flatten(1)[:, None]
    return torch.view_as_real(rows).flatten(2) if rows.is_complex() else rows
