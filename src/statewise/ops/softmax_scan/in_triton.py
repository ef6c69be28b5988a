"""The running averages on a GPU: one program per row, head and block of values walks through time.

Backward is one pass the other way; `in_numba` has its equations. Where values are in several blocks, each finds its
part of the gradients to score and u. For log_sum_exp_scan a program has a block of channels, m and u such that
z = m + log u, and on the way back, with G_t the gradient that reaches z_t:
    G_t = dz_t + exp(z_t - z_{t+1}) G_{t+1},   dx_t = exp(x_t - z_t) G_t,   dz_0 = exp(z_0 - z_1) G_1.

Offsets are 64-bit. Tested in interpreter mode only: compiled for GPUs, but not yet run on one, so blocks are guesses,
and time is not yet shared out where rows and heads are few.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import tree_map
from ..opaque import opaque
from . import SoftmaxState

BLOCK = 128  # values, or channels, of a program at most


@triton.jit
def _share(u):
    """1 / u; as long as nothing has weight, whatever is finite."""
    return 1.0 / tl.where(u == 0, 1.0, u)


@triton.jit
def _forward_kernel(
    score, v, m0, u0, w0, reset, ends, o, m1, u1, w1, ms, us, steps, heads, values,
    LOWEST: tl.constexpr, HAS_RESET: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * V + tl.arange(0, V)
    b, h, mask = row // heads, row % heads, n < values
    m, u = tl.load(m0 + row), tl.load(u0 + row)
    w = tl.load(w0 + row * values + n, mask=mask, other=0.0)
    t, end = b * 0, tl.load(ends + b)
    while t < end:
        at = (b * steps + t) * heads + h
        s = tl.load(score + at)
        if HAS_RESET:
            cut = tl.load(reset + b * steps + t) != 0
            m, u, w = tl.where(cut, LOWEST, m), tl.where(cut, 0.0, u), tl.where(cut, 0.0, w)
        top = tl.where(s <= m, m, s)  # a NaN goes on
        old, new = tl.exp(m - top), tl.exp(s - top)
        m, u = top, old * u + new
        w = old * w + new * tl.load(v + at * values + n, mask=mask, other=0.0)
        tl.store(o + at * values + n, w * _share(u), mask=mask)
        tl.store(ms + at, m)
        tl.store(us + at, u)
        t += 1
    tl.store(m1 + row, m)
    tl.store(u1 + row, u)
    tl.store(w1 + row * values + n, w, mask=mask)


@triton.jit
def _backward_kernel(
    do, du1, dw1, score, v, m0, reset, ends, o, ms, us, dscore, dv, du0, dw0, steps, heads, values, blocks,
    HAS_RESET: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * V + tl.arange(0, V)
    b, h, mask, part = row // heads, row % heads, n < values, tl.program_id(1)
    to_u = tl.where(part == 0, tl.load(du1 + row), 0.0)
    to_w = tl.load(dw1 + row * values + n, mask=mask, other=0.0)
    t = tl.load(ends + b) - 1
    while t >= 0:
        at = (b * steps + t) * heads + h
        m, u = tl.load(ms + at), tl.load(us + at)
        g = tl.load(do + at * values + n, mask=mask, other=0.0) * _share(u)
        average = tl.load(o + at * values + n, mask=mask, other=0.0)
        to_u -= tl.where(u == 0, 0.0, tl.sum(g * average, 0))
        to_w += g
        new = tl.exp(tl.load(score + at) - m)
        now = tl.load(v + at * values + n, mask=mask, other=0.0)
        tl.store(dscore + at * blocks + part, new * (tl.sum(to_w * now, 0) + to_u))
        tl.store(dv + at * values + n, new * to_w, mask=mask)
        if t > 0:
            before = tl.load(ms + at - heads)
        else:
            before = tl.load(m0 + row)
        old = tl.exp(before - m)
        to_u, to_w = old * to_u, old * to_w
        if HAS_RESET:
            cut = tl.load(reset + b * steps + t) != 0
            to_u, to_w = tl.where(cut, 0.0, to_u), tl.where(cut, 0.0, to_w)
        t -= 1
    tl.store(du0 + row * blocks + part, to_u)
    tl.store(dw0 + row * values + n, to_w, mask=mask)


@triton.jit
def _log_forward_kernel(
    x, z0, reset, ends, z, last, steps, width,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, HAS_RESET: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    b, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * V + tl.arange(0, V)
    mask = n < width
    now = tl.load(z0 + b * width + n, mask=mask, other=0.0)
    m = tl.where(now <= LOWEST, LOWEST, tl.where(now >= HIGHEST, HIGHEST, now))
    u = tl.exp(now - m)
    t, end = b * 0, tl.load(ends + b)
    while t < end:
        at = (b * steps + t) * width + n
        s = tl.load(x + at, mask=mask, other=0.0)
        if HAS_RESET:
            cut = tl.load(reset + b * steps + t) != 0
            m, u = tl.where(cut, LOWEST, m), tl.where(cut, 0.0, u)
        top = tl.where(s <= m, m, tl.where(s >= HIGHEST, HIGHEST, s))
        m, u = top, tl.exp(m - top) * u + tl.exp(s - top)
        now = m + tl.log(u)
        tl.store(z + at, now, mask=mask)
        t += 1
    tl.store(last + b * width + n, now, mask=mask)


@triton.jit
def _falloff(before, after):
    """exp(before - after), 0 where both are -inf."""
    return tl.where(before == after, tl.where(before - before == 0, 1.0, 0.0), tl.exp(before - after))


@triton.jit
def _log_backward_kernel(
    g, g_last, x, z0, reset, ends, z, dx, dz0, steps, width,
    HAS_RESET: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    b, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * V + tl.arange(0, V)
    mask = n < width
    carry = tl.load(g_last + b * width + n, mask=mask, other=0.0)
    t = tl.load(ends + b) - 1
    while t >= 0:
        at = (b * steps + t) * width + n
        now = tl.load(z + at, mask=mask, other=0.0)
        carry += tl.load(g + at, mask=mask, other=0.0)
        tl.store(dx + at, carry * _falloff(tl.load(x + at, mask=mask, other=0.0), now), mask=mask)
        if t > 0:
            before = tl.load(z + at - width, mask=mask, other=0.0)
        else:
            before = tl.load(z0 + b * width + n, mask=mask, other=0.0)
        carry *= _falloff(before, now)
        if HAS_RESET:
            carry = tl.where(tl.load(reset + b * steps + t) != 0, 0.0, carry)
        t -= 1
    tl.store(dz0 + b * width + n, carry, mask=mask)


def _flags(reset: Tensor | None, other: Tensor) -> Tensor:
    """Bytes; where there is no reset, any address will do."""
    return other if reset is None else reset.contiguous().view(torch.uint8)


def _blocks(count: int) -> tuple[int, int]:
    """How many blocks, of how many numbers. One where there is nothing, for there are still scores."""
    size = min(BLOCK, triton.next_power_of_2(max(count, 1)))
    return max(1, triton.cdiv(count, size)), size


def _forward(
    score: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, ...]:
    score, v, m, u, w = (t.contiguous() for t in (score, v, m, u, w))
    (_, steps, heads, values), (blocks, size) = v.shape, _blocks(v.shape[3])
    o, last = v.new_zeros(v.shape), tuple(torch.empty_like(t) for t in (m, u, w))
    ms, us = torch.empty_like(score), torch.empty_like(score)
    if m.numel():
        _forward_kernel[m.numel(), blocks](
            score, v, m, u, w, _flags(reset, v), ends, o, *last, ms, us, steps, heads, values,
            LOWEST=torch.finfo(m.dtype).min, HAS_RESET=reset is not None, V=size,
        )  # fmt: skip
    return o, *last, ms, us


def _backward(
    do: Tensor, dm1: Tensor, du1: Tensor, dw1: Tensor,
    score: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor, reset: Tensor | None, ends: Tensor,
    o: Tensor, m1: Tensor, u1: Tensor, w1: Tensor, ms: Tensor, us: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    do, du1, dw1, score, v, m = (t.contiguous() for t in (do, du1, dw1, score, v, m))
    (_, steps, heads, values), (blocks, size) = v.shape, _blocks(v.shape[3])
    dscore, dv = score.new_zeros(*score.shape, blocks), v.new_zeros(v.shape)
    du, dw = m.new_empty(*m.shape, blocks), m.new_empty(w.shape)
    if m.numel():
        _backward_kernel[m.numel(), blocks](
            do, du1, dw1, score, v, m, _flags(reset, v), ends, o, ms, us, dscore, dv, du, dw, steps, heads, values,
            blocks, HAS_RESET=reset is not None, V=size,
        )  # fmt: skip
    du = du.sum(-1)
    fresh = torch.zeros_like(ends, dtype=torch.bool) if reset is None else reset[:, 0]
    dm = (u * du + (w * dw).sum(-1)).masked_fill(fresh[:, None], 0)
    return dscore.sum(-1), dv, torch.where((ends == 0)[:, None], dm1, dm), du, dw


def _like(
    score: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (v, m, u, w, score, score))


def _log_forward(x: Tensor, z0: Tensor, reset: Tensor | None, ends: Tensor) -> tuple[Tensor, ...]:
    x, z0, info = x.contiguous(), z0.contiguous(), torch.finfo(x.dtype)
    z, last, width = torch.zeros_like(x), z0.clone(), math.prod(x.shape[2:])
    blocks, size = _blocks(width)
    if x.numel():
        _log_forward_kernel[len(x), blocks](
            x, z0, _flags(reset, x), ends, z, last, x.shape[1], width,
            LOWEST=info.min, HIGHEST=info.max, HAS_RESET=reset is not None, V=size,
        )  # fmt: skip
    return z, last


def _log_backward(
    g: Tensor, g_last: Tensor, x: Tensor, z0: Tensor, reset: Tensor | None, ends: Tensor, z: Tensor, last: Tensor
) -> tuple[Tensor, ...]:
    g, g_last, x, z0 = (t.contiguous() for t in (g, g_last, x, z0))
    dx, dz0, width = torch.zeros_like(x), g_last.clone(), math.prod(x.shape[2:])
    blocks, size = _blocks(width)
    if x.numel():
        _log_backward_kernel[len(x), blocks](
            g, g_last, x, z0, _flags(reset, x), ends, z, dx, dz0, x.shape[1], width,
            HAS_RESET=reset is not None, V=size,
        )  # fmt: skip
    return dx, dz0


def _log_like(x: Tensor, z0: Tensor, reset: Tensor | None, ends: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), z0.new_empty(z0.shape)


_scan = opaque(
    "softmax_scan_triton", ("cuda", "xpu", "cpu"), "score v m u w reset? ends", _forward, _backward, _like,
    results=4, kept=2, keep_results=True,
)  # fmt: skip  # cpu: interpreter mode
_log_scan = opaque(
    "log_sum_exp_scan_triton", ("cuda", "xpu", "cpu"), "x z0 reset? ends", _log_forward, _log_backward, _log_like,
    results=2, kept=0, keep_results=True,
)  # fmt: skip


def _ends(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return torch.full((x.shape[0],), x.shape[1], device=x.device)
    return lengths.to(x.device, torch.int64).contiguous()


def softmax_scan(
    score: Tensor, v: Tensor, state: SoftmaxState, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, SoftmaxState]:
    dtype = state.u.dtype
    if v.shape[1] == 0:
        return v, tree_map(Tensor.clone, state)
    o, m, u, w = _scan(score.to(dtype), v.to(dtype), *state, reset, _ends(v, lengths))
    if lengths is None:
        m = m.detach()
    return o.to(v.dtype), SoftmaxState(m, u, w)


def log_sum_exp_scan(
    x: Tensor, z0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    z, last = _log_scan(x.to(z0.dtype), z0, reset, _ends(x, lengths))
    return z, last
