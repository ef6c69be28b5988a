"""Linear scans of a sequence that is cut over ranks. They exchange two states' worth of numbers each, no inputs.

What a chunk does to the state before it is an affine map, S -> M S + c: c is the state after the chunk from the zero
state, M the product of its decays. Every rank scans its own chunk for (M, c), all gather those of all, each composes
the maps of the chunks before its own into the state that its chunk starts from, and scans again from there.

Gradients take the same way back: the exchange's gradient is the sum over ranks of what each says of (M_j, c_j), so the
gradients are those of the sum of all ranks' losses. Backward is collective as forward is: each rank must call it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core import UsageError, clear_past_end, past_end
from .dispatch import Op, routed


@dataclass(frozen=True)
class Line:
    """The ranks of a process group in the order of their chunks. None is the default group."""

    group: Any = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def gather(self, own: Tensor) -> Tensor:
        """(n,) real -> (ranks, n)."""
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        return torch.stack(found)

    def add(self, t: Tensor) -> Tensor:
        """The sum over ranks."""
        t = t.clone()
        dist.all_reduce(t, group=self.group)
        return t


class Rehearsal(Line):
    """The second of two ranks whose first did the same: finds out whether a layer can be cut, without other ranks."""

    rank, size = 1, 2  # type: ignore[assignment]

    def gather(self, own: Tensor) -> Tensor:
        return torch.stack([own, own])


@contextlib.contextmanager
def across_ranks(line: Line) -> Iterator[None]:
    """Within the block every scan takes its inputs for this rank's chunk of a longer sequence.

    The state that goes in counts on rank 0 alone; the state that comes out is that after the last rank's chunk, on
    every rank. Chunks may differ in length; none may be empty. lengths are those within the chunk.
    Raises UsageError for an op that is not linear in its state.
    """
    with routed(lambda op: partial(scan_across, op, line)):
        yield


def scan_across(op: Op, line: Line, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """op(*args, **kwargs) for this rank's chunk. As `across_ranks` says."""
    if op.name not in _MAPS:
        raise UsageError(f"{op.name} is not linear in its state; across ranks run {', '.join(_MAPS)}")
    call = inspect.signature(op.reference).bind(*args, **kwargs).arguments
    name = "h0" if "h0" in call else "state"
    state = call[name]
    with routed(None):
        start = state if line.rank == 0 else torch.zeros_like(state)
        m, c = _MAPS[op.name](op, call | {name: start})
        before, after = hand_on(line, state, m, c, dense=op.name in _DENSE)
        out, _ = op(**call | {name: before})
    return out, after


def hand_on(line: Line, state: Tensor, m: Tensor, c: Tensor, *, dense: bool) -> tuple[Tensor, Tensor]:
    """The states before this rank's chunk and after the last one, where a chunk maps S to m S + c.

    m: of the shape of c or one that broadcasts to it, times S elementwise; dense: (..., N, N) for S (..., N, V).
    state: the one before the first chunk; c of the first rank must include it. What other ranks give is not read.
    """
    if torch.is_grad_enabled() and not (m.requires_grad or c.requires_grad):
        c = c.detach().requires_grad_()  # all ranks have the same graph, or one would wait in backward for ever
    ms, cs = _Gather.apply(line, m, c)
    after = before = cs[0]
    for j in range(1, line.size):
        if j == line.rank:
            before = after
        after = _through(ms[j], after, dense) + cs[j]
    first = torch.tensor(line.rank == 0, device=c.device)
    return torch.where(first, state, before), after  # on rank 0 too y depends on the exchange, with a gradient of zero


def _through(m: Tensor, state: Tensor, dense: bool) -> Tensor:
    """m S; what was infinite or NaN and is forgotten whole is gone, as after a reset."""
    unread = (m == 0).all(-2)[..., None] if dense else m == 0
    state = state.masked_fill(unread & ~state.isfinite(), 0)
    return m @ state if dense else m * state


class _Gather(torch.autograd.Function):
    """Tensors of one real dtype -> the same of all ranks, stacked; backward sums what all ranks say of one's own."""

    @staticmethod
    def forward(ctx: Any, line: Line, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.line = line
        return _unpack(line.gather(_pack(tensors, 0)), tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = ctx.line.add(_pack(grads, 1))[ctx.line.rank]
        return None, *_unpack(found, [g[0] for g in grads])


def _pack(tensors: Any, start: int) -> Tensor:
    """Real and imaginary parts of all, flat from dim `start` on."""
    flat = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return torch.cat([t.flatten(start) for t in flat], start)


def _unpack(packed: Tensor, like: Any) -> tuple[Tensor, ...]:
    """(..., n) back into tensors shaped as those in like, behind whatever stands in front of n."""
    sizes = [t.numel() * (2 if t.is_complex() else 1) for t in like]
    found = []
    for part, t in zip(packed.split(sizes, -1), like, strict=True):
        shape = (*packed.shape[:-1], *t.shape)
        found.append(torch.view_as_complex(part.reshape(*shape, 2)) if t.is_complex() else part.reshape(shape))
    return tuple(found)


# ---- the map of a chunk: (op, its arguments by name) -> m and c


def _of_linear(op: Op, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    silent = call | {"x": torch.zeros_like(call["x"]), "h0": torch.ones_like(call["h0"])}
    return op(**silent)[1], op(**call)[1]


def _of_outer(op: Op, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    v, g, state = call["v"], call.get("log_decay"), call["state"]
    g = state.new_zeros(1, 1) if g is None else g.to(state.dtype)
    g = g.expand(torch.broadcast_shapes(g.shape, (*v.shape[:3], 1, 1)))
    return _decay_of(g, call), op(**call)[1]


def _of_selective(op: Op, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dt, a = call["dt"].to(call["state"].dtype), call["a"].to(call["state"].dtype)
    return _decay_of(dt[..., None], call, a), op(**call)[1]


def _of_delta(op: Op, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """In one scan: columns beside the values in which nothing is written and that start from the identity end as M."""
    v, state = call["v"], call["state"]
    keys, values = state.shape[-2:]
    one = torch.eye(keys, dtype=state.dtype, device=state.device).expand(*state.shape[:-1], keys)
    wider = {"v": torch.cat([v, v.new_zeros(*v.shape[:-1], keys)], -1), "state": torch.cat([state, one], -1)}
    last = op(**call | wider)[1]
    return last[..., values:], last[..., :values]


def _decay_of(log_decay: Tensor, call: dict[str, Any], times: Tensor | None = None) -> Tensor:
    """exp of the sum over dim 1, times `times`; zero in rows that a reset cuts."""
    reset, lengths = call.get("reset"), call.get("lengths")
    if lengths is not None:
        lengths = lengths.to(log_decay.device)
        log_decay = clear_past_end(log_decay, lengths)
        reset = None if reset is None else reset & ~past_end(lengths, reset.shape[1])
    total = log_decay.sum(1)
    decay = (total if times is None else total * times).exp()
    return decay if reset is None else decay.masked_fill(reset.any(1).view(-1, *[1] * (decay.ndim - 1)), 0)


_Map = Callable[[Op, dict[str, Any]], tuple[Tensor, Tensor]]
_DENSE = ("delta_scan", "dplr_scan")
_MAPS: dict[str, _Map] = {
    "linear_scan": _of_linear,
    "outer_scan": _of_outer,
    "selective_scan": _of_selective,
    "delta_scan": _of_delta,
    "dplr_scan": _of_delta,
}
