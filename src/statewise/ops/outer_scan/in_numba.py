"""Chunks of time as in in_torch.py, each from its inputs to its outputs in the nearest caches.

A thread owns heads of a row, goes from chunk to chunk with their states, and does there all that a chunk needs: its
products (see tiles), which stop at the diagonal, and what lies between them. Memory is read once and written once. Kept
for the backward pass, which goes the other way, are the states between chunks.

One decay per head makes e^D row by row: the sums of the log decays since each step of the chunk grow by one term, and
their exponentials weigh the row. They are 0 where nothing is to pass, so a mask is not needed. Backward does it again
and sums rows and columns on the way for the gradient of the decays.

A decay per key is one factor per step and key, never rounded to one number (see selective_scan). In blocks of LEAF
steps every pair of steps is walked, the decays multiplied one by one; the rest of the weights, halving by halving, are
products about the middle of their block, the factors on rows of q and k being running products from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..contain import contained
from ..linear_scan import in_numba as threads
from ..opaque import opaque
from ..selective_scan import in_numba as vectors
from ..selective_scan.in_numba import _Lanes
from ..tiles import in_numba as tiles
from .edges import normal
from .in_torch import ARGUMENTS, by_loop

CHUNK = 64  # steps, by measurement
LEAF = 16  # steps in a block whose pairs are walked
TOGETHER = 4  # heads of a group whose queries and keys are read once

_compile, _code = threads._compile, vectors._code


@functools.partial(_code, addresses=7)
def _weigh_both(
    v: _Lanes, steps: Any, row: Any, sums: Any, g: Any, weights: Any, d_out: Any, total: Any, columns: Any, across: Any
):
    """Backward: d_out becomes the weights, total grows by the gradient of those without decay, columns and the one
    vector across by the gradient of the sums."""
    from_g, whole = v.splat(g), v.variable(v.full(0.0))
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        at = [v.at(base, loop.index, vectors.BYTES) for base in (sums, weights, d_out, total, columns)]
        decay = tiles.grow(v, at[0], from_g)
        weight, given = v.decayed(decay, v.load(at[1])), v.load(at[2])
        v.store(at[2], weight)
        v.store(at[3], v.builder.fadd(v.load(at[3]), v.decayed(decay, given)))
        both = v.builder.fmul(weight, given)
        v.store(at[4], v.builder.fadd(v.load(at[4]), both))
        v.builder.store(v.builder.fadd(v.builder.load(whole), both), whole)
    v.sum(across, v.builder.load(whole))


# ---- one decay per head, or none


@_compile
def _decays(like, logs, factors, whole, g, reset, b, start, steps, h):
    """The logs (C) of a chunk's decays in powers of 2, the factors (2, C) from its start and to its end, and that of
    all of it in two parts."""
    threads._apart()
    for i in range(logs.shape[0]):
        logs[i] = g[b, start + i, h, 0] * tiles.LOG2 if i < steps and g.shape[3] else 0
        if i < steps and reset.shape[0] and reset[b, start + i]:
            logs[i] = -np.inf
    tiles.factors(like, factors, whole, logs)


@_compile
def _weighed_back(like, given, weights, total, logs, later):
    """given (C, C), the gradient of the weighed weights, becomes these; total grows by the gradient of the weights.

    later: (C), the gradient of the sums of the decays from each step on.
    """
    threads._apart()
    size, item = weights.shape[0], weights.itemsize
    lanes, row = vectors.BYTES // item, size * item
    sums, columns = np.full(size, -np.inf, weights.dtype), np.zeros(size, weights.dtype)
    for i in range(size):
        own, at = given[i, i], i * row
        _weigh_both(
            like, i // lanes + 1, row,
            (sums.ctypes.data, logs.ctypes.data + i * item, weights.ctypes.data + at, given.ctypes.data + at,
             total.ctypes.data + at, columns.ctypes.data, later.ctypes.data + i * item),
        )  # fmt: skip
        total[i, i] += own
        given[i, i] = weights[i, i]
        sums[i] = 0
    for i in range(size):
        later[i] -= columns[i]


@_compile
def _forward_units(like, q, k, v, g, reset, state, size, o, last, states, worker, workers):
    """Units are rows of the batch by groups by parts of their heads. states: (B, H, chunks, keys, values), or none."""
    threads._apart()
    steps, groups, keys, heads, values = q.shape[1], q.shape[2], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // groups, tiles.up(keys), tiles.up(values)
    parts = -(-group // TOGETHER)
    qs, ks, kt = np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype), np.zeros((wide, size), v.dtype)
    scaled, vs, os = np.zeros((size, wide), v.dtype), np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype)
    both, weights = np.zeros((size, size), v.dtype), np.zeros((size, size), v.dtype)
    logs, factors, whole = np.zeros(size, v.dtype), np.zeros((2, size), v.dtype), np.zeros((2, 1), v.dtype)
    now = np.zeros((TOGETHER, wide, high), v.dtype)
    units = q.shape[0] * groups * parts
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        b, at = u // (groups * parts), u // parts % groups
        h0 = at * group + u % parts * TOGETHER
        h1 = min(h0 + TOGETHER, (at + 1) * group)
        now[:] = 0  # what fills up the tiles too: of the heads before, it may not be finite
        for h in range(h0, h1):
            now[h - h0, :keys, :values] = state[b, h]
        for c in range(-(-steps // size)):
            start = c * size
            here = min(size, steps - start)
            tiles.load(qs, q, b, start, here, at)
            tiles.load(ks, k, b, start, here, at)
            tiles.turn(like, kt, ks)
            tiles.lower(like, both, qs, kt)
            for h in range(h0, h1):
                s = now[h - h0]
                tiles.load(vs, v, b, start, here, h)
                _decays(like, logs, factors, whole, g, reset, b, start, here, h)
                tiles.weighed(like, weights, both, logs)
                tiles.lower_product(like, 0, os, weights, vs)
                tiles.scale(scaled, qs, factors[0])
                tiles.product(like, 1, os, scaled, s)
                tiles.save(o, os, b, start, here, h)
                if states.shape[0]:
                    states[b, h, c] = s
                tiles.scale(scaled, ks, factors[1])
                tiles.pass_on(s, whole[0], whole[1])
                tiles.turned_product(like, 1, s, scaled, vs)
        for h in range(h0, h1):
            last[b, h] = now[h - h0, :keys, :values]


@_compile
def _backward_units(
    like, d_o, d_last, q, k, v, g, reset, states, size, d_q, d_k, d_v, d_g, d_state, worker, workers
):  # fmt: skip
    """d_q, d_k: (B, T, groups * parts, keys), still to be summed over the parts."""
    threads._apart()
    steps, groups, keys, heads, values = q.shape[1], q.shape[2], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // groups, tiles.up(keys), tiles.up(values)
    parts = -(-group // TOGETHER)
    qs, ks, kt = np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype), np.zeros((wide, size), v.dtype)
    q_, k_ = np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype)
    dqs, dks = np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype)
    dq_, dk_ = np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype)
    vs, vt, dv = np.zeros((size, high), v.dtype), np.zeros((high, size), v.dtype), np.zeros((size, high), v.dtype)
    do, turned = np.zeros((size, high), v.dtype), np.zeros((high, wide), v.dtype)
    both, weights, total = (
        np.zeros((size, size), v.dtype), np.zeros((size, size), v.dtype), np.zeros((size, size), v.dtype)
    )  # fmt: skip
    logs, factors, whole = np.zeros(size, v.dtype), np.zeros((2, size), v.dtype), np.zeros((2, 1), v.dtype)
    later, ends = np.zeros(size, v.dtype), np.zeros((TOGETHER, wide, high), v.dtype)
    units = q.shape[0] * groups * parts
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        b, at = u // (groups * parts), u // parts % groups
        h0 = at * group + u % parts * TOGETHER
        h1 = min(h0 + TOGETHER, (at + 1) * group)
        ends[:] = 0
        for h in range(h0, h1):
            ends[h - h0, :keys, :values] = d_last[b, h]
        for c in range(-(-steps // size) - 1, -1, -1):
            start = c * size
            here = min(size, steps - start)
            tiles.load(qs, q, b, start, here, at)
            tiles.load(ks, k, b, start, here, at)
            tiles.turn(like, kt, ks)
            tiles.lower(like, both, qs, kt)
            total[:] = 0
            dqs[:] = 0
            dks[:] = 0
            for h in range(h0, h1):
                s, end = states[b, h, c], ends[h - h0]
                tiles.load(vs, v, b, start, here, h)
                tiles.load(do, d_o, b, start, here, h)
                _decays(like, logs, factors, whole, g, reset, b, start, here, h)
                tiles.turn(like, vt, vs)
                tiles.lower(like, weights, do, vt)
                _weighed_back(like, weights, both, total, logs, later)
                tiles.scale(q_, qs, factors[0])
                tiles.scale(k_, ks, factors[1])
                tiles.turned_lower_product(like, 0, dv, weights, do)
                tiles.product(like, 1, dv, k_, end)
                tiles.save(d_v, dv, b, start, here, h)
                tiles.turn(like, turned, s)
                tiles.product(like, 0, dq_, do, turned)
                tiles.turn(like, turned, end)
                tiles.product(like, 0, dk_, vs, turned)
                _finish(dqs, dks, dq_, dk_, q_, k_, factors, logs, later, s, end, d_g, b, start, here, h)
                tiles.pass_on(end, whole[0], whole[1])
                tiles.turned_product(like, 1, end, q_, do)
            tiles.lower_product(like, 1, dqs, total, ks)
            tiles.turned_lower_product(like, 1, dks, total, qs)
            part = at * parts + u % parts
            tiles.save(d_q, dqs, b, start, here, part)
            tiles.save(d_k, dks, b, start, here, part)
        for h in range(h0, h1):
            d_state[b, h] = ends[h - h0, :keys, :values]


@_compile
def _finish(d_q, d_k, dq_, dk_, q_, k_, factors, g, later, starts, ends, d_g, b, start, steps, h):
    """What came through the states joins d_q and d_k (C, K), and everything d_g, if there is one."""
    threads._apart()
    size, keys = d_q.shape
    for i in range(size):
        upto, after = factors[0, i], factors[1, i]
        for d in range(keys):
            d_q[i, d] += dq_[i, d] * upto
        for d in range(keys):
            d_k[i, d] += dk_[i, d] * after
    if d_g.shape[3] == 0:
        return
    least = -126.5 if d_q.itemsize == 4 else -1022.5  # of log decays that are not 0
    whole = tiles.dot(starts.reshape(starts.size), ends.reshape(ends.size)) * factors[0, size - 1]
    for i in range(steps):
        later[i] += tiles.dot(q_[i], dq_[i])
        d_g[b, start + i, h, 0] = whole  # and of the earlier ones
        whole += tiles.dot(k_[i], dk_[i])
    beyond = later[0] * 0
    for step in range(steps):
        i = steps - 1 - step
        beyond += later[i]
        d_g[b, start + i, h, 0] += beyond
        if g[i] < least:  # nothing passes, not the rounding of sums that cancel
            d_g[b, start + i, h, 0] = 0
            beyond = later[i] * 0


# ---- one decay per head and key


@functools.partial(_code, addresses=4)
def _factors(v: _Lanes, steps: Any, row: Any, g: Any, power: Any, rest: Any, total: Any):
    """2^g in two parts, and the sum of g."""
    whole = v.variable(v.full(0.0))
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        log = v.load(v.at(g, loop.index, row))
        v.builder.store(v.builder.fadd(v.builder.load(whole), log), whole)
        for base, part in zip((power, rest), v.exp2(log)):
            v.store(v.at(base, loop.index, row), part)
    v.store(total, v.builder.load(whole))


def _decayed(v: _Lanes, value: Any, i: Any, row: Any, power: Any, rest: Any) -> Any:
    return v.decayed((v.load(v.at(power, i, row)), v.load(v.at(rest, i, row))), value)


def _running(
    v: _Lanes, steps: Any, row: Any, power: Any, rest: Any, back: bool, use: Callable[[Any, Any], None]
) -> None:
    """use(i, the product of decays from the first step to i), or that of those behind i, from the last step back."""
    product = v.variable(v.full(1.0))
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        i = v.builder.sub(v.builder.sub(steps, steps.type(1)), loop.index) if back else loop.index
        so_far = v.builder.load(product)
        new = _decayed(v, so_far, i, row, power, rest)
        v.builder.store(new, product)
        use(i, so_far if back else new)


def _scaled_by(back: bool) -> Any:
    def body(v: _Lanes, steps: Any, row: Any, x: Any, power: Any, rest: Any, out: Any) -> None:
        def use(i: Any, product: Any) -> None:
            v.store(v.at(out, i, row), v.mul(v.load(v.at(x, i, row)), product))

        _running(v, steps, row, power, rest, back, use)

    return _code(body, 4)


def _through_by(back: bool) -> Any:
    """out += the product of decays times dx; dg += the sum of x dx over the steps whose x a step's decay is in, from
    what stands in `total`."""

    def body(
        v: _Lanes, steps: Any, row: Any, x: Any, dx: Any, power: Any, rest: Any, out: Any, dg: Any, total: Any
    ) -> None:
        def use(i: Any, product: Any) -> None:
            at = v.at(out, i, row)
            v.store(at, v.mad(v.load(v.at(dx, i, row)), product, v.load(at)))

        _running(v, steps, row, power, rest, back, use)
        sum_ = v.variable(v.load(total))
        with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
            i = loop.index if back else v.builder.sub(v.builder.sub(steps, steps.type(1)), loop.index)
            old = v.builder.load(sum_)
            new = v.mad(v.load(v.at(x, i, row)), v.load(v.at(dx, i, row)), old)
            v.builder.store(new, sum_)
            at = v.at(dg, i, row)
            v.store(at, v.builder.fadd(v.load(at), old if back else new))

    return _code(body, 7)


_upto, _after = _scaled_by(False), _scaled_by(True)
_through_upto, _through_after = _through_by(False), _through_by(True)


@functools.partial(_code, addresses=7)
def _column(v: _Lanes, steps: Any, row: Any, q: Any, k: Any, power: Any, rest: Any, seen: Any, out: Any, out_row: Any):
    """The weights of the first of `steps` steps in each of them; seen: scratch, a row."""
    word = steps.type
    many = v.builder.udiv(row, word(vectors.BYTES))
    with vectors.cgutils.for_range(v.builder, many, intp=word) as loop:
        v.store(v.at(seen, loop.index, vectors.BYTES), v.load(v.at(k, loop.index, vectors.BYTES)))
    with vectors.cgutils.for_range(v.builder, steps, intp=word) as step:
        total = v.variable(v.full(0.0))
        q_i, power_i, rest_i = (v.at(base, step.index, row) for base in (q, power, rest))
        first = v.builder.icmp_signed("==", step.index, word(0))
        with vectors.cgutils.for_range(v.builder, many, intp=word) as loop:
            at = v.at(seen, loop.index, vectors.BYTES)
            old = v.load(at)
            new = v.builder.select(first, old, _decayed(v, old, loop.index, word(vectors.BYTES), power_i, rest_i))
            v.store(at, new)
            here = v.load(v.at(q_i, loop.index, vectors.BYTES))
            v.builder.store(v.mad(here, new, v.builder.load(total)), total)
        v.sum(v.at(out, step.index, out_row), v.builder.load(total))


@functools.partial(_code, addresses=10)
def _column_back(
    v: _Lanes, steps: Any, row: Any, q: Any, k: Any, power: Any, rest: Any, seen: Any, given: Any, given_row: Any,
    dq: Any, dk: Any, dg: Any,
):  # fmt: skip
    """Backward of _column for one vector of keys; seen: scratch, `steps` vectors."""
    word, value = steps.type, v.variable(v.load(k))
    v.store(seen, v.load(k))
    more = v.builder.sub(steps, word(1))
    with vectors.cgutils.for_range(v.builder, more, intp=word) as loop:
        i = v.builder.add(loop.index, word(1))
        new = _decayed(v, v.builder.load(value), i, row, power, rest)
        v.builder.store(new, value)
        v.store(v.at(seen, i, vectors.BYTES), new)
    v.builder.store(v.full(0.0), value)

    def arrive(i: Any) -> tuple[Any, Any]:
        weight, at, then = v.splat(v.at(given, i, given_row)), v.at(dq, i, row), v.load(v.at(seen, i, vectors.BYTES))
        v.store(at, v.mad(weight, then, v.load(at)))
        return v.mad(weight, v.load(v.at(q, i, row)), v.builder.load(value)), then

    with vectors.cgutils.for_range(v.builder, more, intp=word) as loop:
        i = v.builder.sub(more, loop.index)
        mu, then = arrive(i)
        at = v.at(dg, i, row)
        v.store(at, v.mad(mu, then, v.load(at)))
        v.builder.store(_decayed(v, mu, i, row, power, rest), value)
    mu, _ = arrive(word(0))
    v.store(dk, v.builder.fadd(mu, v.load(dk)))


@_compile
def key_factors(like, power, rest, total, logs, g, reset, b, start, steps, h):
    """Both parts of a chunk's decays (C, keys), and the sums of their logs in powers of 2; logs: scratch."""
    threads._apart()
    row = logs.shape[1] * logs.itemsize
    logs[:] = 0
    if g.shape[3]:
        tiles.load(logs, g, b, start, steps, h)
    for i in range(steps):
        for d in range(logs.shape[1]):
            logs[i, d] *= tiles.LOG2
        if reset.shape[0] and reset[b, start + i]:
            logs[i] = -np.inf
    for at in range(0, row, vectors.BYTES):
        _factors(
            like, logs.shape[0], row,
            (logs.ctypes.data + at, power.ctypes.data + at, rest.ctypes.data + at, total.ctypes.data + at),
        )  # fmt: skip


@_compile
def key_scales(like, x_, y_, levels, x, y, power, rest):
    """Rows of x, which read, from the start of the chunk, rows of y, which write, to its end; in levels (_, C, keys)
    about the middles of blocks."""
    threads._apart()
    size, row = x.shape[0], x.shape[1] * x.itemsize
    for at in range(0, row, vectors.BYTES):
        p, r = power.ctypes.data + at, rest.ctypes.data + at
        _upto(like, size, row, (x.ctypes.data + at, p, r, x_.ctypes.data + at))
        _after(like, size, row, (y.ctypes.data + at, p, r, y_.ctypes.data + at))
        half = LEAF
        for level in range(levels.shape[0]):
            out = levels.ctypes.data + level * size * row + at
            for i in range(0, size, 2 * half):
                low, mid = i * row, (i + half) * row
                _after(like, half, row, (y.ctypes.data + at + low, p + low, r + low, out + low))
                _upto(like, half, row, (x.ctypes.data + at + mid, p + mid, r + mid, out + mid))
            half *= 2


@_compile
def key_weights(like, weights, x, y, power, rest, of_x, of_y, turned):
    """What x_i reads of y_j, j <= i, from them and their levels."""
    threads._apart()
    size, width, item = x.shape[0], x.shape[1], x.itemsize
    row, block, seen, half = width * item, size * item, np.empty(width, x.dtype), LEAF
    weights[:] = 0
    for level in range(of_x.shape[0]):
        tiles.turn(like, turned, of_y[level])
        for i in range(0, size, 2 * half):
            tiles.window(
                like, 0, half, half * item, width, of_x.ctypes.data + level * size * row + (i + half) * row, row, item,
                turned.ctypes.data + i * item, block, weights.ctypes.data + (i + half) * block + i * item, block,
            )  # fmt: skip
        half *= 2
    for j in range(size):
        at = j * row
        _column(
            like, LEAF - j % LEAF, row,
            (x.ctypes.data + at, y.ctypes.data + at, power.ctypes.data + at, rest.ctypes.data + at, seen.ctypes.data,
             weights.ctypes.data + j * block + j * item, block),
        )  # fmt: skip


@_compile
def key_between(like, add, d_x, d_y, d_weights, of_x, of_y):
    """The gradients of the levels, from those of the weights: later halves of d_x, earlier ones of d_y."""
    threads._apart()
    size, item, half = of_x.shape[1], of_x.itemsize, LEAF
    row, block = of_x.shape[2] * item, size * item
    for level in range(of_x.shape[0]):
        apart = level * size * row
        for i in range(0, size, 2 * half):
            low, mid = apart + i * row, apart + (i + half) * row
            given = d_weights.ctypes.data + (i + half) * block + i * item
            tiles.window(
                like, add, half, row, half, given, block, item, of_y.ctypes.data + low, row,
                d_x.ctypes.data + mid, row,
            )  # fmt: skip
            tiles.window(
                like, add, half, row, half, given, item, block, of_x.ctypes.data + mid, row,
                d_y.ctypes.data + low, row,
            )  # fmt: skip
        half *= 2


@_compile
def key_through(like, d_x, d_y, d_g, x_, y_, dx_, dy_, levels, d_levels, power, rest, whole):
    """d_x, d_y and that of the logs grow by what the scaled rows and the levels give; whole: the gradient of all
    the logs of the chunk."""
    threads._apart()
    size, row = x_.shape[0], x_.shape[1] * x_.itemsize
    zero = np.zeros(vectors.BYTES // x_.itemsize, x_.dtype).ctypes.data
    for at in range(0, row, vectors.BYTES):
        p, r, dg = power.ctypes.data + at, rest.ctypes.data + at, d_g.ctypes.data + at
        dx, dy = d_x.ctypes.data + at, d_y.ctypes.data + at
        _through_upto(
            like, size, row, (x_.ctypes.data + at, dx_.ctypes.data + at, p, r, dx, dg, whole.ctypes.data + at)
        )  # fmt: skip
        _through_after(like, size, row, (y_.ctypes.data + at, dy_.ctypes.data + at, p, r, dy, dg, zero))
        half = LEAF
        for level in range(levels.shape[0]):
            z, dz = levels.ctypes.data + level * size * row + at, d_levels.ctypes.data + level * size * row + at
            for i in range(0, size, 2 * half):
                low, mid = i * row, (i + half) * row
                _through_upto(like, half, row, (z + mid, dz + mid, p + mid, r + mid, dx + mid, dg + mid, zero))
                _through_after(like, half, row, (z + low, dz + low, p + low, r + low, dy + low, dg + low, zero))
            half *= 2


@_compile
def key_leaves(like, d_x, d_y, d_g, x, y, power, rest, d_weights):
    """They grow by what the weights within leaves give."""
    threads._apart()
    size, item, row = x.shape[0], x.itemsize, x.shape[1] * x.itemsize
    seen, block = np.empty((LEAF, vectors.BYTES // item), x.dtype), size * item
    for at in range(0, row, vectors.BYTES):
        for j in range(size):
            here = at + j * row
            _column_back(
                like, LEAF - j % LEAF, row,
                (x.ctypes.data + here, y.ctypes.data + here, power.ctypes.data + here, rest.ctypes.data + here,
                 seen.ctypes.data, d_weights.ctypes.data + j * block + j * item, block,
                 d_x.ctypes.data + here, d_y.ctypes.data + here, d_g.ctypes.data + here),
            )  # fmt: skip


@_compile
def key_levels(size):
    """How many times a chunk is halved before leaves."""
    count = 0
    while LEAF << count < size:
        count += 1
    return count


@_compile
def _forward_keys(like, q, k, v, g, reset, state, size, o, last, states, worker, workers):
    """Units are rows of the batch by heads."""
    threads._apart()
    steps, keys, heads, values = q.shape[1], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // q.shape[2], tiles.up(keys), tiles.up(values)
    levels = np.zeros((key_levels(size), size, wide), v.dtype)
    qs, ks, q_, k_ = (
        np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype),
        np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype),
    )  # fmt: skip
    power, rest, logs = (
        np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype)
    )  # fmt: skip
    turned, weights = np.zeros((wide, size), v.dtype), np.zeros((size, size), v.dtype)
    vs, os, s = np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype), np.zeros((wide, high), v.dtype)
    total, whole, row = np.zeros(wide, v.dtype), np.zeros((2, wide), v.dtype), wide * v.itemsize
    units = q.shape[0] * heads
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        b, h = u // heads, u % heads
        s[:] = 0
        s[:keys, :values] = state[b, h]
        for c in range(-(-steps // size)):
            start = c * size
            here = min(size, steps - start)
            tiles.load(qs, q, b, start, here, h // group)
            tiles.load(ks, k, b, start, here, h // group)
            tiles.load(vs, v, b, start, here, h)
            key_factors(like, power, rest, total, logs, g, reset, b, start, here, h)
            key_scales(like, q_, k_, levels, qs, ks, power, rest)
            key_weights(like, weights, qs, ks, power, rest, levels, levels, turned)
            tiles.exp2(like, row // vectors.BYTES, row, (total.ctypes.data, whole.ctypes.data))
            tiles.lower_product(like, 0, os, weights, vs)
            tiles.product(like, 1, os, q_, s)
            tiles.save(o, os, b, start, here, h)
            if states.shape[0]:
                states[b, h, c] = s
            tiles.pass_on(s, whole[0], whole[1])
            tiles.turned_product(like, 1, s, k_, vs)
        last[b, h] = s[:keys, :values]


@_compile
def _backward_keys(
    like, d_o, d_last, q, k, v, g, reset, states, size, d_q, d_k, d_v, d_g, d_state, worker, workers
):  # fmt: skip
    """d_q, d_k: (B, T, heads, keys), still to be summed over the heads of a group."""
    threads._apart()
    steps, keys, heads, values = q.shape[1], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // q.shape[2], tiles.up(keys), tiles.up(values)
    levels = np.zeros((key_levels(size), size, wide), v.dtype)
    between = np.zeros(levels.shape, v.dtype)
    qs, ks, q_, k_ = (
        np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype),
        np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype),
    )  # fmt: skip
    power, rest, logs = (
        np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype)
    )  # fmt: skip
    dq_, dk_ = np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype)
    turned, weights, d_weights = (
        np.zeros((wide, size), v.dtype), np.zeros((size, size), v.dtype), np.zeros((size, size), v.dtype)
    )  # fmt: skip
    vs, vt, dv = np.zeros((size, high), v.dtype), np.zeros((high, size), v.dtype), np.zeros((size, high), v.dtype)
    do, end, st = np.zeros((size, high), v.dtype), np.zeros((wide, high), v.dtype), np.zeros((high, wide), v.dtype)
    grads = np.zeros((3, size, wide), v.dtype)
    total, whole, row = np.zeros(wide, v.dtype), np.zeros((2, wide), v.dtype), wide * v.itemsize
    units = q.shape[0] * heads
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        b, h = u // heads, u % heads
        end[:] = 0
        end[:keys, :values] = d_last[b, h]
        for c in range(-(-steps // size) - 1, -1, -1):
            start, s = c * size, states[b, h, c]
            here = min(size, steps - start)
            tiles.load(qs, q, b, start, here, h // group)
            tiles.load(ks, k, b, start, here, h // group)
            tiles.load(vs, v, b, start, here, h)
            tiles.load(do, d_o, b, start, here, h)
            key_factors(like, power, rest, total, logs, g, reset, b, start, here, h)
            key_scales(like, q_, k_, levels, qs, ks, power, rest)
            key_weights(like, weights, qs, ks, power, rest, levels, levels, turned)
            tiles.exp2(like, row // vectors.BYTES, row, (total.ctypes.data, whole.ctypes.data))
            tiles.turned_lower_product(like, 0, dv, weights, do)
            tiles.product(like, 1, dv, k_, end)
            tiles.save(d_v, dv, b, start, here, h)
            tiles.turn(like, vt, vs)
            tiles.lower(like, d_weights, do, vt)
            tiles.turn(like, st, s)
            tiles.product(like, 0, dq_, do, st)
            tiles.turn(like, st, end)
            tiles.product(like, 0, dk_, vs, st)
            for i in range(keys):
                total[i] = tiles.dot(s[i], end[i]) * (whole[0, i] + whole[1, i])
            grads[:] = 0
            key_between(like, 0, between, between, d_weights, levels, levels)
            key_through(
                like, grads[0], grads[1], grads[2], q_, k_, dq_, dk_, levels, between, power, rest, total
            )  # fmt: skip
            key_leaves(like, grads[0], grads[1], grads[2], qs, ks, power, rest, d_weights)
            tiles.save(d_q, grads[0], b, start, here, h)
            tiles.save(d_k, grads[1], b, start, here, h)
            tiles.save(d_g, grads[2], b, start, here, h)
            tiles.pass_on(end, whole[0], whole[1])
            tiles.turned_product(like, 1, end, q_, do)
        d_state[b, h] = end[:keys, :values]


@functools.partial(_compile, parallel=True)
def _forward_units_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _forward_units(like, *arrays, np.int64(worker), workers)


@functools.partial(_compile, parallel=True)
def _forward_keys_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _forward_keys(like, *arrays, np.int64(worker), workers)


@functools.partial(_compile, parallel=True)
def _backward_units_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _backward_units(like, *arrays, np.int64(worker), workers)


@functools.partial(_compile, parallel=True)
def _backward_keys_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _backward_keys(like, *arrays, np.int64(worker), workers)


_FORWARD = {"scalar": (_forward_units, _forward_units_together), "key": (_forward_keys, _forward_keys_together)}
_BACKWARD = {"scalar": (_backward_units, _backward_units_together), "key": (_backward_keys, _backward_keys_together)}


def _sizes(q: Tensor, v: Tensor) -> tuple[int, tuple[int, ...]]:
    """Steps of a chunk, and the shape of the states between chunks."""
    size = tiles.LANES
    while size < CHUNK and size < v.shape[1]:
        size *= 2
    up = tiles.up.py_func
    return size, (v.shape[0], v.shape[2], -(-v.shape[1] // size), up(q.shape[3]), up(v.shape[3]))


def _parts(q: Tensor, v: Tensor, kind: str) -> int:
    """Into how many parts the heads of a group go."""
    group = v.shape[2] // max(1, q.shape[2])
    return group if kind == "key" else -(-group // TOGETHER)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str, *, keep: bool
) -> tuple[Tensor, ...]:
    size, shape = _sizes(q, v)
    o, last, states = (
        v.new_empty(v.shape),
        state.new_empty(state.shape),
        state.new_empty(shape if keep else (0, *shape[1:])),
    )
    if not (v.numel() and q.numel()):
        return o.zero_(), last.copy_(state), states
    given = v.new_empty(*v.shape[:3], 0) if g is None else g
    before, after = vectors._arrays(q, k, v, given, reset, state), vectors._arrays(o, last, states)
    vectors._run(*_FORWARD[kind], v, 1, len(v) * q.shape[2] * _parts(q, v, kind), *before, size, *after)
    return o, last, states


def _backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
    reset: Tensor | None, kind: str, states: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, parts = _sizes(q, v)[0], _parts(q, v, kind)
    d_q, d_k = (q.new_empty(*q.shape[:2], q.shape[2] * parts, q.shape[3]) for _ in range(2))
    d_v, d_state = v.new_empty(v.shape), d_last.new_empty(d_last.shape)
    given = v.new_empty(*v.shape[:3], 0) if g is None else g
    d_g = given.new_empty(given.shape)
    if v.numel() and q.numel():
        before = vectors._arrays(d_o, d_last, q, k, v, given, reset, states)
        after = vectors._arrays(d_q, d_k, d_v, d_g, d_state)
        vectors._run(*_BACKWARD[kind], v, 1, len(v) * q.shape[2] * parts, *before, size, *after)
    else:
        for t in (d_q, d_k, d_v, d_g):
            t.zero_()
        d_state.copy_(d_last)
    if parts > 1:
        d_q, d_k = (t.unflatten(2, (-1, parts)).sum(3) for t in (d_q, d_k))
    return *([d_q, d_k, d_v] if g is None else [d_q, d_k, d_v, d_g]), d_state


def _like(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str
) -> tuple[Tensor, ...]:
    spoilt = v.new_empty(v.shape[:2], dtype=torch.bool)
    return v.new_empty(v.shape), state.new_empty(state.shape), spoilt, state.new_empty(_sizes(q, v)[1])


_contained = contained(ARGUMENTS, _forward, _backward, by_loop)
_run = opaque("outer_scan_numba", "cpu", ARGUMENTS, *_contained[:2], _like, results=2, kept=2, alone=_contained[2])


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v, g, *rest = normal(q, k, v, log_decay, state, reset, lengths)
    wide = [t if t is None else t.to(state.dtype).contiguous() for t in (q, k, v, g)]
    o, last = _run(*wide, *rest)
    return o.to(v.dtype), last
