"""The scan on a GPU: one program per batch row and block of channels walks through time, the state in registers.

Backward is one pass the other way, with mu_t the gradient that reaches h_{t-1}:
    lam_t = g_t + mu_{t+1},   dx_t = lam_t,   da_t = lam_t conj(h_{t-1}),   mu_t = conj(a_t) lam_t,   dh_0 = mu_1.

Offsets are 64-bit. Complex numbers are read as pairs of reals. Tested in interpreter mode only: not yet run on a GPU,
so the block of channels is a guess, and time is not yet shared out where batch and channels are few.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adjoint import differentiable
from .edges import at_lengths, normal

BLOCK = 64  # channels of a program


@triton.jit
def _load(row, n, mask, COMPLEX: tl.constexpr):
    """Channels n of a row as real and imaginary parts."""
    if COMPLEX:
        return tl.load(row + 2 * n, mask=mask, other=0.0), tl.load(row + 2 * n + 1, mask=mask, other=0.0)
    else:  # noqa: RET505 - known when it is compiled: one branch is all there is
        value = tl.load(row + n, mask=mask, other=0.0)
        return value, value


@triton.jit
def _store(row, n, mask, real, imag, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(row + 2 * n, real, mask=mask)
        tl.store(row + 2 * n + 1, imag, mask=mask)
    else:
        tl.store(row + n, real, mask=mask)


@triton.jit
def _mul(p, p_, q, q_, COMPLEX: tl.constexpr):
    if COMPLEX:
        return p * q - p_ * q_, p * q_ + p_ * q
    else:  # noqa: RET505
        return p * q, p_


@triton.jit
def _forward_kernel(
    a, x, h0, reset, h, last, steps, width,
    a_batch, a_time, a_channel,
    HAS_RESET: tl.constexpr, COMPLEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, PER = tl.program_id(0).to(tl.int64), 2 if COMPLEX else 1
    n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < width
    state, state_ = _load(h0 + b * width * PER, n, mask, COMPLEX)
    t = b * 0
    while t < steps:
        row = (b * steps + t) * width * PER
        u, u_ = _load(x + row, n, mask, COMPLEX)
        d, d_ = _load(a + (b * a_batch + t * a_time) * PER, n * a_channel, mask, COMPLEX)
        past, past_ = _mul(d, d_, state, state_, COMPLEX)
        if HAS_RESET:
            cut = tl.load(reset + b * steps + t) != 0
            past, past_ = tl.where(cut, 0.0, past), tl.where(cut, 0.0, past_)
        state, state_ = past + u, past_ + u_
        _store(h + row, n, mask, state, state_, COMPLEX)
        t += 1
    _store(last + b * width * PER, n, mask, state, state_, COMPLEX)


@triton.jit
def _backward_kernel(
    g, g_last, a, h, h0, reset, da, dx, dh0, steps, width,
    a_batch, a_time, a_channel,
    HAS_RESET: tl.constexpr, SUM: tl.constexpr, COMPLEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, PER = tl.program_id(0).to(tl.int64), 2 if COMPLEX else 1
    n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < width
    mu, mu_ = _load(g_last + b * width * PER, n, mask, COMPLEX)
    total, total_ = tl.zeros_like(mu), tl.zeros_like(mu)
    t = b * 0 + steps - 1
    while t >= 0:
        row = (b * steps + t) * width * PER
        u, u_ = _load(g + row, n, mask, COMPLEX)
        lam, lam_ = u + mu, u_ + mu_
        _store(dx + row, n, mask, lam, lam_, COMPLEX)
        if t > 0:
            before, before_ = _load(h + row - width * PER, n, mask, COMPLEX)
        else:
            before, before_ = _load(h0 + b * width * PER, n, mask, COMPLEX)
        d, d_ = _load(a + (b * a_batch + t * a_time) * PER, n * a_channel, mask, COMPLEX)
        slope, slope_ = _mul(before, -before_, lam, lam_, COMPLEX)
        mu, mu_ = _mul(d, -d_, lam, lam_, COMPLEX)
        if HAS_RESET:
            cut = tl.load(reset + b * steps + t) != 0
            slope, slope_ = tl.where(cut, 0.0, slope), tl.where(cut, 0.0, slope_)
            mu, mu_ = tl.where(cut, 0.0, mu), tl.where(cut, 0.0, mu_)
        if SUM:
            total, total_ = total + slope, total_ + slope_
        else:
            _store(da + row, n, mask, slope, slope_, COMPLEX)
        t -= 1
    if SUM:
        _store(da + b * width * PER, n, mask, total, total_, COMPLEX)
    _store(dh0 + b * width * PER, n, mask, mu, mu_, COMPLEX)


def _reals(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _flags(reset: Tensor | None, other: Tensor) -> Tensor:
    """Bytes; where there is no reset, any address will do."""
    return _reals(other) if reset is None else reset.contiguous().view(torch.uint8)


def _decays(a: Tensor, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """a, and its strides over batch, time and channels, in channels."""
    one = math.prod(a.shape[2:]) == 1
    a = (a if one or a.shape[2:] == x.shape[2:] else a.expand(*a.shape[:2], *x.shape[2:])).resolve_conj()
    a = a.reshape(*a.shape[:2], -1)
    if a.stride(2) != 1:
        a = a.contiguous()
    strides = (a.stride(0) if a.shape[0] > 1 else 0, a.stride(1) if a.shape[1] > 1 else 0, 0 if one else 1)
    return a, strides


def _forward(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape)
    if not x.numel():
        return h, h0.clone()
    x, h0 = x.resolve_conj().contiguous(), h0.resolve_conj().contiguous()
    (a, strides), width, last = _decays(a, x), math.prod(x.shape[2:]), torch.empty_like(h0)
    _forward_kernel[len(x), triton.cdiv(width, BLOCK)](
        *map(_reals, (a, x, h0)),
        _flags(reset, x),
        _reals(h),
        _reals(last),
        x.shape[1],
        width,
        *strides,
        HAS_RESET=reset is not None,
        COMPLEX=x.is_complex(),
        BLOCK=BLOCK,
    )
    return h, last


def _backward(
    g: Tensor, g_last: Tensor, a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_h0 = h.new_empty(h.shape), h0.new_empty(h0.shape)
    if not h.numel():
        return torch.zeros_like(a), dx, g_last.clone()
    g, g_last, h, h0 = (t.resolve_conj().contiguous() for t in (g, g_last, h, h0))
    (decay, strides), width, sum_da = _decays(a, h), math.prod(h.shape[2:]), a.shape[1] == 1
    da = h.new_empty(len(h), 1 if sum_da else h.shape[1], *h.shape[2:])
    _backward_kernel[len(h), triton.cdiv(width, BLOCK)](
        *map(_reals, (g, g_last, decay, h, h0)),
        _flags(reset, h),
        *map(_reals, (da, dx, d_h0)),
        h.shape[1],
        width,
        *strides,
        HAS_RESET=reset is not None,
        SUM=sum_da,
        COMPLEX=h.is_complex(),
        BLOCK=BLOCK,
    )
    return da.sum_to_size(a.shape).contiguous(), dx, d_h0


# cpu: interpreter mode
_scan = differentiable("linear_scan_triton", ("cuda", "xpu", "cpu"), _forward, _backward)


def scan(
    a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    a, x, reset, dtype = *normal(a, x, h0, reset, lengths), x.dtype
    h, last = _scan(a, x.to(h0.dtype), h0, reset)
    return h.to(dtype), last if lengths is None else at_lengths(h, h0, lengths)
