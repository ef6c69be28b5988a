"""Compiled selective scan: the states live in registers and in the nearest cache, and only tiles of time are stored.

A thread owns a row of the batch and a block of channels. Time goes in tiles, whose inputs are laid out so that a vector
of channels lies next to its future; vector by vector and state by state the recurrence then runs through the tile with
its rate, state and sums in registers. What is kept for the backward pass is the state before each tile.

Backward, tile by tile from the end, runs each state's recurrence again, keeping its values and decays for as long as
the tile lasts, and then its adjoint, with mu_t the gradient that reaches h_{t-1}, u = dt x, e = exp(dt a):
    lam_t = c_t dy_t + mu_{t+1},   dc_t = sum_d dy_t h_t,   db_t = sum_d lam_t u_t,   du_t = sum_n b_t lam_t,
    mu_t = e_t lam_t,   q_t = mu_t h_{t-1},   ddt_t = sum_n q_t a + du_t x_t,   da = sum_t q_t dt_t,   dx_t = du_t dt_t.
Sums over channels are kept apart block by block and added in the order of blocks, so the numbers do not depend on the
threads. A reset cuts a tile in two: the part behind it begins at zero.

exp is 2^n 2^f with n whole and |f| <= 1/2, and 2^f - 1 a Taylor series. The decay is never rounded to one number: 2^n h
and 2^n (2^f - 1) h are added. For decays near 1 that keeps what rounding to 1 - 2^-24 k would lose step after step: at
1 - 1e-6 and 65,536 steps in float32 the plain loop is wrong by 4e-4. Decays below the least normal number are zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba.core import cgutils
from torch import Tensor

from .. import fresh
from ..compiled import in_numba as compiled
from ..opaque import opaque
from ..teams import in_numba as teams
from ..vectors.in_numba import BYTES, Lanes, code

TILE = 32  # steps: a tile of all that a block needs fits the first two caches
VECTORS = 4  # vectors of channels in a block

_compile = compiled.function


def _forward_body(v: Lanes, group: int, steps: Any, row: Any, dt: Any, u: Any, y: Any, a: Any, h: Any, b: Any, c: Any):
    """`group` states of one vector through `steps` steps: h changes in place, y grows by their part."""
    builder, each = v.builder, range(group)
    rate = [v.mul(v.load(v.at(a, a.type(g), BYTES)), v.full(1 / math.log(2))) for g in each]
    state = [v.variable(v.load(v.at(h, h.type(g), BYTES))) for g in each]
    with cgutils.for_range(builder, steps, intp=steps.type) as loop:
        t = loop.index
        dt_t, u_t, y_at = v.load(v.at(dt, t, BYTES)), v.load(v.at(u, t, BYTES)), v.at(y, t, BYTES)
        b_at, c_at, total = v.at(b, t, row), v.at(c, t, row), v.load(y_at)
        for g in each:
            one = b_at.type(g * v.size)
            push = v.mul(u_t, v.splat(builder.add(b_at, one)))
            new = v.decayed(v.exp2(v.mul(dt_t, rate[g])), builder.load(state[g]), push)
            builder.store(new, state[g])
            total = v.mad(new, v.splat(builder.add(c_at, one)), total)
        v.store(y_at, total)
    for g in each:
        v.store(v.at(h, h.type(g), BYTES), builder.load(state[g]))


def _backward_body(
    v: Lanes, group: int, steps: Any, row: Any, dt: Any, u: Any, dy: Any, a: Any, h: Any, b: Any, c: Any,
    mu: Any, da: Any, du: Any, ddt: Any, db: Any, dc: Any, seen: Any,
):  # fmt: skip
    """`group` states of one vector through `steps` steps and back: mu and da change in place, the others grow.

    h: the states before. db, dc: TILE vectors for each state. seen: scratch, the states at TILE + 1 times and both
    parts of the decays at TILE times, for each state.
    """
    builder, each, word = v.builder, range(group), steps.type
    tile, apart = TILE * BYTES, (3 * TILE + 1) * BYTES
    rates = [v.load(v.at(a, word(g), BYTES)) for g in each]
    scaled = [v.mul(rate, v.full(1 / math.log(2))) for rate in rates]
    states = [builder.add(seen, word(g * apart)) for g in each]
    decays = [builder.add(seen, word(g * apart + (TILE + 1) * BYTES)) for g in each]
    carry = [v.variable(v.load(v.at(h, word(g), BYTES))) for g in each]
    for g in each:
        v.store(states[g], builder.load(carry[g]))
    with cgutils.for_range(builder, steps, intp=word) as loop:
        t = loop.index
        dt_t, u_t, b_at = v.load(v.at(dt, t, BYTES)), v.load(v.at(u, t, BYTES)), v.at(b, t, row)
        for g in each:
            decay = v.exp2(v.mul(dt_t, scaled[g]))
            push = v.mul(u_t, v.splat(builder.add(b_at, word(g * v.size))))
            new = v.decayed(decay, builder.load(carry[g]), push)
            builder.store(new, carry[g])
            v.store(v.at(decays[g], t, BYTES), decay[0])
            v.store(builder.add(v.at(decays[g], t, BYTES), word(tile)), decay[1])
            v.store(builder.add(v.at(states[g], t, BYTES), word(BYTES)), new)
    reach = [v.variable(v.load(v.at(mu, word(g), BYTES))) for g in each]
    total = [v.variable(v.load(v.at(da, word(g), BYTES))) for g in each]
    with cgutils.for_range(builder, steps, intp=word) as loop:
        t = builder.sub(builder.sub(steps, word(1)), loop.index)
        dt_t, u_t, dy_t = (v.load(v.at(base, t, BYTES)) for base in (dt, u, dy))
        b_at, c_at = v.at(b, t, row), v.at(c, t, row)
        du_at, ddt_at = v.at(du, t, BYTES), v.at(ddt, t, BYTES)
        du_t, ddt_t = v.load(du_at), v.load(ddt_at)
        for g in each:
            one, before = word(g * v.size), v.at(states[g], t, BYTES)
            db_at, dc_at = (v.at(builder.add(base, word(g * tile)), t, BYTES) for base in (db, dc))
            lam = v.mad(dy_t, v.splat(builder.add(c_at, one)), builder.load(reach[g]))
            v.store(dc_at, v.mad(dy_t, v.load(builder.add(before, word(BYTES))), v.load(dc_at)))
            v.store(db_at, v.mad(lam, u_t, v.load(db_at)))
            du_t = v.mad(lam, v.splat(builder.add(b_at, one)), du_t)
            power = v.at(decays[g], t, BYTES)
            past = v.decayed((v.load(power), v.load(builder.add(power, word(tile)))), lam)
            builder.store(past, reach[g])
            q = v.mul(past, v.load(before))
            ddt_t = v.mad(q, rates[g], ddt_t)
            builder.store(v.mad(q, dt_t, builder.load(total[g])), total[g])
        v.store(du_at, du_t)
        v.store(ddt_at, ddt_t)
    for g in each:
        v.store(v.at(mu, word(g), BYTES), builder.load(reach[g]))
        v.store(v.at(da, word(g), BYTES), builder.load(total[g]))


def _sums_body(v: Lanes, steps: Any, row: Any, out: Any, vectors: Any):
    """out_t = the sum over the lanes of vector t; row: the bytes from one out to the next."""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        v.sum(v.at(out, loop.index, row), v.load(v.at(vectors, loop.index, BYTES)))


def _forward_by(group: int) -> Any:
    return code(lambda v, *rest: _forward_body(v, group, *rest), 7)


def _backward_by(group: int) -> Any:
    return code(lambda v, *rest: _backward_body(v, group, *rest), 14)


MANY, FEW = 4, 2  # states at a time, forward and backward: as many as there are registers for
_forward_many, _forward_one = _forward_by(MANY), _forward_by(1)
_backward_few, _backward_one = _backward_by(FEW), _backward_by(1)
_sums = code(_sums_body, 2)


@_compile
def _fill(tile, value):
    compiled.apart()
    tile = tile.reshape(tile.size)
    for i in range(tile.size):
        tile[i] = value


@_compile
def _copy(tile, source):
    compiled.apart()
    for v in range(tile.shape[0]):
        for n in range(tile.shape[1]):
            for l in range(tile.shape[2]):
                tile[v, n, l] = source[v, n, l]


@_compile
def _times(out, p, q):
    compiled.apart()
    for v in range(out.shape[0]):
        for t in range(out.shape[1]):
            for l in range(out.shape[2]):
                out[v, t, l] = p[v, t, l] * q[v, t, l]


@_compile
def _add_product(out, p, q):
    compiled.apart()
    for v in range(out.shape[0]):
        for t in range(out.shape[1]):
            for l in range(out.shape[2]):
                out[v, t, l] += p[v, t, l] * q[v, t, l]


@_compile
def _spread(tile, source, i, t0, t1, first):
    """source (B, T, D) at times t0 to t1 and channels from `first` on -> tile (vectors, TILE, lanes)."""
    compiled.apart()
    vectors, _, lanes = tile.shape
    for v in range(vectors):
        at = first + v * lanes
        for t in range(t1 - t0):
            for l in range(min(lanes, source.shape[2] - at)):
                tile[v, t, l] = source[i, t0 + t, at + l]


@_compile
def _gather(tile, target, i, t0, t1, first):
    """The way back."""
    compiled.apart()
    vectors, _, lanes = tile.shape
    for v in range(vectors):
        at = first + v * lanes
        for t in range(t1 - t0):
            for l in range(min(lanes, target.shape[2] - at)):
                target[i, t0 + t, at + l] = tile[v, t, l]


@_compile
def _spread_state(tile, source, first):
    """source (D, N) from channel `first` on -> tile (vectors, N, lanes)."""
    compiled.apart()
    vectors, states, lanes = tile.shape
    for v in range(vectors):
        at = first + v * lanes
        for l in range(min(lanes, source.shape[0] - at)):
            for n in range(states):
                tile[v, n, l] = source[at + l, n]


@_compile
def _gather_state(tile, target, first):
    compiled.apart()
    vectors, states, lanes = tile.shape
    for v in range(vectors):
        at = first + v * lanes
        for l in range(min(lanes, target.shape[0] - at)):
            for n in range(states):
                target[at + l, n] = tile[v, n, l]


@_compile
def _span_end(reset, i, t, t1):
    """The next reset after t, or t1."""
    t += 1
    if reset.shape[0] == 0:
        return t1
    while t < t1 and not reset[i, t]:
        t += 1
    return t


@_compile
def _cut(reset, i, t):
    return reset.shape[0] != 0 and reset[i, t] != 0


@_compile
def _forward_work(like, given, me):
    """One thread's share. carries: (B, blocks, tiles, vectors, N, lanes), the states before each tile."""
    compiled.apart()
    if teams.started(me):
        return
    x, dt, a, b, c, h0, reset, ends, y, last, carries = given
    batch, steps, _ = x.shape
    _, blocks, _, vectors, states, lanes = carries.shape
    rates, h = np.zeros((vectors, states, lanes), x.dtype), np.zeros((vectors, states, lanes), x.dtype)
    dts, us = np.zeros((vectors, TILE, lanes), x.dtype), np.zeros((vectors, TILE, lanes), x.dtype)
    ys = np.zeros((vectors, TILE, lanes), x.dtype)
    item, row = rates.itemsize, states * rates.itemsize
    for unit in teams.share(batch * blocks, me):
        i, block = unit // blocks, unit % blocks
        first = block * vectors * lanes
        _fill(rates, like)
        _fill(h, like)
        _fill(dts, like)
        _fill(us, like)
        _spread_state(rates, a, first)
        _spread_state(h, h0[i], first)
        for k in range((ends[i] + TILE - 1) // TILE):
            t0, t1 = k * TILE, min((k + 1) * TILE, ends[i])
            _copy(carries[i, block, k], h)
            _spread(dts, dt, i, t0, t1, first)
            _spread(us, x, i, t0, t1, first)
            _times(us, us, dts)
            _fill(ys, like)
            start = t0
            while start < t1:
                end, time = _span_end(reset, i, start, t1), (start - t0) * BYTES
                if _cut(reset, i, start):
                    _fill(h, like)
                for v in range(vectors):
                    tile, state, n = v * TILE * BYTES + time, v * states * BYTES, 0
                    while n < states:
                        here = ((i * steps + start) * states + n) * item
                        where = (
                            dts.ctypes.data + tile,
                            us.ctypes.data + tile,
                            ys.ctypes.data + tile,
                            rates.ctypes.data + state + n * BYTES,
                            h.ctypes.data + state + n * BYTES,
                            b.ctypes.data + here,
                            c.ctypes.data + here,
                        )
                        if n + MANY <= states:
                            _forward_many(like, end - start, row, where)
                            n += MANY
                        else:
                            _forward_one(like, end - start, row, where)
                            n += 1
                start = end
            _gather(ys, y, i, t0, t1, first)
        _gather_state(h, last[i], first)


@_compile
def _backward_work(like, given, me):
    """One thread's share. da: (B, D, N), db, dc: (B, blocks, T, N), still to be summed."""
    compiled.apart()
    if teams.started(me):
        return
    dy, d_last, x, dt, a, b, c, reset, ends, carries, dx, ddt, da, db, dc, dh0 = given
    batch, steps, _ = x.shape
    _, blocks, _, vectors, states, lanes = carries.shape
    rates, h = np.zeros((vectors, states, lanes), x.dtype), np.zeros((vectors, states, lanes), x.dtype)
    mu, das = np.zeros((vectors, states, lanes), x.dtype), np.zeros((vectors, states, lanes), x.dtype)
    xs, dts = np.zeros((vectors, TILE, lanes), x.dtype), np.zeros((vectors, TILE, lanes), x.dtype)
    us, dys = np.zeros((vectors, TILE, lanes), x.dtype), np.zeros((vectors, TILE, lanes), x.dtype)
    dus, ddts = np.zeros((vectors, TILE, lanes), x.dtype), np.zeros((vectors, TILE, lanes), x.dtype)
    dbs, dcs = np.zeros((FEW, TILE, lanes), x.dtype), np.zeros((FEW, TILE, lanes), x.dtype)
    seen, starts = np.zeros((FEW, 3 * TILE + 1, lanes), x.dtype), np.zeros(TILE + 1, np.int64)
    item, row = rates.itemsize, states * rates.itemsize
    for unit in teams.share(batch * blocks, me):
        i, block = unit // blocks, unit % blocks
        first = block * vectors * lanes
        _fill(rates, like)
        _fill(mu, like)
        _fill(das, like)
        _fill(xs, like)
        _fill(dts, like)
        _fill(dys, like)
        _spread_state(rates, a, first)
        _spread_state(mu, d_last[i], first)
        for k in range((ends[i] + TILE - 1) // TILE - 1, -1, -1):
            t0, t1 = k * TILE, min((k + 1) * TILE, ends[i])
            _spread(xs, x, i, t0, t1, first)
            _spread(dts, dt, i, t0, t1, first)
            _spread(dys, dy, i, t0, t1, first)
            _times(us, xs, dts)
            _fill(dus, like)
            _fill(ddts, like)
            spans, start = 0, t0
            while start < t1:
                starts[spans] = start
                start, spans = _span_end(reset, i, start, t1), spans + 1
            starts[spans] = t1
            for span in range(spans - 1, -1, -1):
                start, end = starts[span], starts[span + 1]
                time, cut = (start - t0) * BYTES, _cut(reset, i, start)
                if cut:
                    _fill(h, like)
                else:  # only a tile's first span can do without a reset
                    _copy(h, carries[i, block, k])
                n = 0
                while n < states:
                    group = FEW if n + FEW <= states else 1
                    here = ((i * steps + start) * states + n) * item
                    _fill(dbs, like)
                    _fill(dcs, like)
                    for v in range(vectors):
                        tile, state = v * TILE * BYTES + time, (v * states + n) * BYTES
                        where = (
                            dts.ctypes.data + tile,
                            us.ctypes.data + tile,
                            dys.ctypes.data + tile,
                            rates.ctypes.data + state,
                            h.ctypes.data + state,
                            b.ctypes.data + here,
                            c.ctypes.data + here,
                            mu.ctypes.data + state,
                            das.ctypes.data + state,
                            dus.ctypes.data + tile,
                            ddts.ctypes.data + tile,
                            dbs.ctypes.data,
                            dcs.ctypes.data,
                            seen.ctypes.data,
                        )
                        if group == FEW:
                            _backward_few(like, end - start, row, where)
                        else:
                            _backward_one(like, end - start, row, where)
                    for g in range(group):
                        at = (((i * blocks + block) * steps + start) * states + n + g) * item
                        _sums(like, end - start, row, (db.ctypes.data + at, dbs.ctypes.data + g * TILE * BYTES))
                        _sums(like, end - start, row, (dc.ctypes.data + at, dcs.ctypes.data + g * TILE * BYTES))
                    n += group
                if cut:
                    _fill(mu, like)
            _add_product(ddts, dus, xs)
            _times(dus, dus, dts)
            _gather(ddts, ddt, i, t0, t1, first)
            _gather(dus, dx, i, t0, t1, first)
        _gather_state(das, da[i], first)
        _gather_state(mu, dh0[i], first)


def _carries(x: Tensor, a: Tensor) -> Tensor:
    """Room for the states before each tile, of channels in whole vectors."""
    lanes = BYTES // x.element_size()
    vectors = max(1, min(VECTORS, -(-x.shape[2] // lanes)))
    blocks = -(-x.shape[2] // (vectors * lanes))
    return fresh.empty(x, len(x), blocks, -(-x.shape[1] // TILE), vectors, a.shape[1], lanes)


def _forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # nothing is written past a row's end
    y, last, carries = (
        fresh.empty(x, *x.shape).zero_(),
        h0.new_empty(h0.shape),
        _carries(x, a),
    )
    if not (x.numel() and a.numel()):
        return y, h0.clone(memory_format=torch.contiguous_format), carries
    arrays = teams.arrays(x, dt, a, b, c, h0, reset, ends, y, last, carries)
    teams.run(_forward_work, x, a.shape[1], len(x) * carries.shape[1], *arrays)
    return y, last, carries


def _backward(
    dy: Tensor, d_last: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h0: Tensor,
    reset: Tensor | None, ends: Tensor, carries: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx, ddt, dh0 = fresh.empty(x, *x.shape).zero_(), fresh.empty(x, *x.shape).zero_(), h0.new_empty(h0.shape)
    blocks = carries.shape[1]
    da, db, dc = (
        h0.new_zeros(h0.shape),
        fresh.empty(b, len(b), blocks, *b.shape[1:]).zero_(),
        fresh.empty(c, len(c), blocks, *c.shape[1:]).zero_(),
    )
    if x.numel() and a.numel():
        arrays = teams.arrays(dy, d_last, x, dt, a, b, c, reset, ends, carries, dx, ddt, da, db, dc, dh0)
        teams.run(_backward_work, x, a.shape[1], len(x) * blocks, *arrays)
    else:
        dh0 = d_last.clone(memory_format=torch.contiguous_format)
    return dx, ddt, da.sum(0), db.sum(1), dc.sum(1), dh0


def _like(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h0: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), h0.new_empty(h0.shape), _carries(x, a)


_scan = opaque(
    "selective_scan_numba", "cpu", "x dt a b c h0 reset? ends?", _forward, _backward, _like, results=2, kept=1
)


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
