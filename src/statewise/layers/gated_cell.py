"""What Elman, GRU and LSTM have in common: heads, and Newton's method in place of the loop."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import UsageError, check_sizes, leaves
from ..ops.newton import Structure, newton
from ..ops.newton.structure import Linear, Step
from .para_gru import near_loop

Parallel = Literal["loop", "newton"]


def check_gated(name: str, width: int, hidden: int, heads: int, parallel: Parallel) -> None:
    check_sizes(name, width=width, hidden=hidden, heads=heads)
    if hidden % heads:
        raise UsageError(f"{name}: hidden {hidden} is not a multiple of heads {heads}")
    if parallel not in get_args(Parallel):
        raise UsageError(f"{name}: parallel {parallel!r}; expected one of {', '.join(get_args(Parallel))}")


def orthogonal_heads(gates: int, hidden: int, heads: int) -> nn.Parameter:
    """R of a cell whose gates hear the state, (gates * N, N); with heads (H, gates * N/H, N/H). Each block starts
    orthogonal: a gate's, of a head."""
    size = hidden // heads
    blocks = [nn.init.orthogonal_(torch.empty(size, size)) for _ in range(heads * gates)]
    r = torch.stack(blocks).view(heads, gates * size, size)
    return nn.Parameter(r[0] if heads == 1 else r)


def by_gate(r: Tensor, gates: int) -> Tensor:
    """R as (gates, H, N/H, N/H)."""
    r = r[None] if r.ndim == 2 else r
    return r.unflatten(1, (gates, -1)).transpose(0, 1)


def heard(r: Tensor, h: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """R h + b for each gate, (M, H, N/H). r (gates, H, N/H, N/H), h (M, N), bias (gates * N,)."""
    found = torch.einsum("ghjk,mhk->gmhj", r, h.unflatten(-1, r.shape[1:3]))
    return (found if bias is None else found + bias.to(h.dtype).view(len(r), 1, *r.shape[1:3])).unbind(0)


def through(slopes: list[Tensor], r: Tensor) -> Tensor:
    """sum_g diag(slope_g) R_g, (M, H, N/H, N/H): how what hears h by R h moves with h. Each slope is (M, H, N/H)."""
    return torch.einsum("gmhj,ghjk->mhjk", torch.stack(slopes), r)


def newton_scan(
    step: Step,
    linearise: Linear,
    structure: Structure,
    x: Tensor,
    state: Any,
    w_ih: Tensor,
    b_ih: Tensor | None,
    *,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Any]:
    """step over dim 1 of W x + b, (B, T, gates * N), for all times at once; as `newton`."""
    dtype = leaves(state)[0].dtype
    with torch.autocast(x.device.type, enabled=False):
        u = F.linear(x.to(dtype), w_ih.to(dtype), None if b_ih is None else b_ih.to(dtype))
        o, last, _ = newton(
            step, u, state, structure=structure, linearise=linearise, reset=reset, lengths=lengths,
            tolerance=near_loop(None, dtype),
        )  # fmt: skip
    return o, last
