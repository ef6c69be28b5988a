"""The selective scan on a GPU: one program per batch row and block of channels, all its states in registers.

Kept for the backward pass are the states before each tile of time. Backward goes tile by tile from the end: it runs the
tile again, leaving its states in a scratch of one tile, and then its adjoint (see in_numba.py for the equations). Sums
over channels are kept apart block by block, so results are the same every time.

Offsets are 64-bit. Tested in interpreter mode only: not yet run on a GPU, so the block and the tile are guesses, and
time is not yet shared out where batch and channels are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..opaque import opaque

BLOCK = 32  # channels of a program
TILE = 32  # steps


@triton.jit
def _rest(z, TERMS: tl.constexpr):
    """exp(z) - 1, by its series where z is small: float32 has few numbers near 1."""
    series = z * 0 + 1
    for i in tl.static_range(TERMS - 1):
        series = 1 + series * z * (1.0 / (TERMS - i))
    return tl.where(tl.abs(z) < 0.5, series * z, tl.exp(z) - 1)


@triton.jit
def _forward_kernel(
    x, dt, a, b, c, h0, reset, ends, y, last, carries, steps, width, states, tiles,
    HAS_RESET: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0).to(tl.int64), tl.arange(0, STATES)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own, each = d < width, n < states
    mask, grid = own[:, None] & each[None, :], d[:, None] * states + n[None, :]
    rate = tl.load(a + grid, mask=mask, other=0.0)
    h = tl.load(h0 + i * width * states + grid, mask=mask, other=0.0)
    end = tl.load(ends + i)
    t = i * 0
    while t < end:
        if t % TILE == 0:
            tl.store(carries + (i * tiles + t // TILE) * width * states + grid, h, mask=mask)
        at = i * steps + t
        if HAS_RESET:
            h = tl.where(tl.load(reset + at) != 0, 0.0, h)
        dt_t = tl.load(dt + at * width + d, mask=own, other=0.0)
        u_t = dt_t * tl.load(x + at * width + d, mask=own, other=0.0)
        b_t = tl.load(b + at * states + n, mask=each, other=0.0)
        c_t = tl.load(c + at * states + n, mask=each, other=0.0)
        h = h + (_rest(dt_t[:, None] * rate, TERMS) * h + u_t[:, None] * b_t[None, :])
        tl.store(y + at * width + d, tl.sum(h * c_t[None, :], 1), mask=own)
        t += 1
    tl.store(last + i * width * states + grid, h, mask=mask)


@triton.jit
def _backward_kernel(
    dy, d_last, x, dt, a, b, c, reset, ends, carries, seen, dx, ddt, da, db, dc, dh0,
    steps, width, states, tiles, blocks,
    HAS_RESET: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    i, block, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, STATES)
    d = block * BLOCK + tl.arange(0, BLOCK)
    own, each = d < width, n < states
    mask, grid = own[:, None] & each[None, :], d[:, None] * states + n[None, :]
    rate = tl.load(a + grid, mask=mask, other=0.0)
    mu = tl.load(d_last + i * width * states + grid, mask=mask, other=0.0)
    total = tl.zeros_like(mu)
    end = tl.load(ends + i)
    k = (end + TILE - 1) // TILE - 1
    while k >= 0:
        h = tl.load(carries + (i * tiles + k) * width * states + grid, mask=mask, other=0.0)
        t, stop = k * TILE, tl.minimum((k + 1) * TILE, end)
        while t < stop:
            at = i * steps + t
            if HAS_RESET:
                h = tl.where(tl.load(reset + at) != 0, 0.0, h)
            tl.store(seen + (i * TILE + t % TILE) * width * states + grid, h, mask=mask)
            dt_t = tl.load(dt + at * width + d, mask=own, other=0.0)
            u_t = dt_t * tl.load(x + at * width + d, mask=own, other=0.0)
            b_t = tl.load(b + at * states + n, mask=each, other=0.0)
            h = h + (_rest(dt_t[:, None] * rate, TERMS) * h + u_t[:, None] * b_t[None, :])
            t += 1
        tl.debug_barrier()
        t = stop - 1
        while t >= k * TILE:
            at = i * steps + t
            before = tl.load(seen + (i * TILE + t % TILE) * width * states + grid, mask=mask, other=0.0)
            dt_t = tl.load(dt + at * width + d, mask=own, other=0.0)
            x_t = tl.load(x + at * width + d, mask=own, other=0.0)
            dy_t = tl.load(dy + at * width + d, mask=own, other=0.0)
            b_t = tl.load(b + at * states + n, mask=each, other=0.0)
            c_t = tl.load(c + at * states + n, mask=each, other=0.0)
            rest, u_t = _rest(dt_t[:, None] * rate, TERMS), dt_t * x_t
            now = before + (rest * before + u_t[:, None] * b_t[None, :])
            lam = dy_t[:, None] * c_t[None, :] + mu
            part = ((i * blocks + block) * steps + t) * states + n
            tl.store(dc + part, tl.sum(tl.where(own[:, None], dy_t[:, None] * now, 0.0), 0), mask=each)
            tl.store(db + part, tl.sum(tl.where(own[:, None], lam * u_t[:, None], 0.0), 0), mask=each)
            du_t = tl.sum(lam * b_t[None, :], 1)
            mu = lam + rest * lam
            slope = mu * before
            if HAS_RESET:
                cut = tl.load(reset + at) != 0
                mu, slope = tl.where(cut, 0.0, mu), tl.where(cut, 0.0, slope)
            total += slope * dt_t[:, None]
            tl.store(ddt + at * width + d, tl.sum(slope * rate, 1) + du_t * x_t, mask=own)
            tl.store(dx + at * width + d, du_t * dt_t, mask=own)
            t -= 1
        tl.debug_barrier()
        k -= 1
    tl.store(da + i * width * states + grid, total, mask=mask)
    tl.store(dh0 + i * width * states + grid, mu, mask=mask)


def _options(x: Tensor, states: int, reset: Tensor | None) -> dict[str, int | bool]:
    block = min(BLOCK, triton.next_power_of_2(x.shape[2]))
    terms = 17 if x.dtype == torch.float64 else 9
    wide = triton.next_power_of_2(states)
    return dict(HAS_RESET=reset is not None, TERMS=terms, TILE=TILE, BLOCK=block, STATES=wide)


def _bytes(reset: Tensor | None, other: Tensor) -> Tensor:
    """Where there is no reset, any address will do."""
    return other if reset is None else reset.contiguous().view(torch.uint8)


def _carries(x: Tensor, h0: Tensor) -> Tensor:
    return h0.new_empty(len(x), -(-x.shape[1] // TILE), *h0.shape[1:])


def _forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, dt, a, b, c, h0 = (t.contiguous() for t in (x, dt, a, b, c, h0))
    y, last, carries = x.new_zeros(x.shape), h0.new_empty(h0.shape), _carries(x, h0)  # past a row's end y stays 0
    if not (x.numel() and a.numel()):
        return y, h0.clone(), carries
    (batch, steps, width), states = x.shape, a.shape[1]
    options = _options(x, states, reset)
    _forward_kernel[batch, triton.cdiv(width, options["BLOCK"])](
        x, dt, a, b, c, h0, _bytes(reset, x), ends, y, last, carries,
        steps, width, states, carries.shape[1], **options,
    )  # fmt: skip
    return y, last, carries


def _backward(
    dy: Tensor, d_last: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h0: Tensor,
    reset: Tensor | None, ends: Tensor, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    dy, d_last, x, dt, a, b, c = (t.contiguous() for t in (dy, d_last, x, dt, a, b, c))
    dx, ddt = x.new_zeros(x.shape), x.new_zeros(x.shape)
    (batch, steps, width), states = x.shape, a.shape[1]
    if not (x.numel() and a.numel()):
        return dx, ddt, torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(c), d_last.clone()
    options = _options(x, states, reset)
    blocks = triton.cdiv(width, options["BLOCK"])
    da, dh0, seen = (
        d_last.new_empty(d_last.shape),
        d_last.new_empty(d_last.shape),
        x.new_empty(batch, TILE, width, states),
    )
    db, dc = (x.new_zeros(batch, blocks, steps, states) for _ in range(2))
    _backward_kernel[batch, blocks](
        dy, d_last, x, dt, a, b, c, _bytes(reset, x), ends, carries, seen, dx, ddt, da, db, dc, dh0,
        steps, width, states, carries.shape[1], blocks, **options,
    )  # fmt: skip
    return dx, ddt, da.sum(0), db.sum(1), dc.sum(1), dh0


def _like(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), h0.new_empty(h0.shape), _carries(x, h0)


_scan = opaque(
    "selective_scan_triton", ("cuda", "xpu", "cpu"), "x dt a b c h0 reset? ends?", _forward, _backward, _like,
    results=2, kept=1,
)  # fmt: skip  # cpu: interpreter mode


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, *,
    reset: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = [t.to(state.dtype) for t in (x, dt, a, b, c)]
    if lengths is None:
        ends = torch.full((len(x),), x.shape[1], device=x.device)
    else:
        ends = lengths.to(x.device, torch.int64)
    y, last = _scan(*wide, state, reset, ends)
    return y.to(x.dtype), last
