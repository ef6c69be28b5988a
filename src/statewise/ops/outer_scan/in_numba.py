"""Chunks of time as in in_torch.py, each from its inputs to its outputs in the nearest caches.

A thread owns heads of a row, goes from chunk to chunk with their states, and does there all that a chunk needs: its
products (see tiles), which stop at the diagonal, and what lies between them. Memory is read once and written once. Kept
for the backward pass, which goes the other way, are the states between chunks.

One decay per head makes e^D row by row: the sums of the log decays since each step of the chunk grow by one term, and
their exponentials weigh the row. They are 0 where nothing is to pass, so a mask is not needed. Backward does it again
and sums rows and columns on the way for the gradient of the decays.

A decay per key is one factor per step and key, not rounded to one number (see selective_scan). In blocks of LEAF steps
pairs of steps are walked, the decays multiplied one by one; the rest of the weights, halving by halving, are products
about the middle of their block, the factors on rows of q and k being running products from there. Within a block, whose
few products are not carried on, the decays are rounded.

Rows of the next chunk are asked for while this one is worked on, and results that no cache would keep go past them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba.core import cgutils
from torch import Tensor

from .. import fresh
from ..compiled import in_numba as compiled
from ..contain import contained
from ..opaque import opaque
from ..teams import in_numba as teams
from ..tiles import in_numba as tiles
from ..vectors import in_numba as vectors
from ..vectors.in_numba import Lanes, code
from .edges import normal
from .in_torch import ARGUMENTS, by_loop

CHUNK = 64  # steps, by measurement
LEAF = 16  # steps in a block whose pairs are walked
ABREAST = 4  # vectors of keys whose running products are taken side by side
TOGETHER = 4  # heads of a group whose queries and keys are read once

_compile = compiled.function


@functools.partial(code, addresses=7)
def _weigh_both(
    v: Lanes, steps: Any, row: Any, sums: Any, g: Any, weights: Any, d_out: Any, total: Any, columns: Any, across: Any
):
    """Backward: d_out becomes the weights, total grows by the gradient of those without decay, columns and the one
    vector across by the gradient of the sums."""
    from_g, whole = v.splat(g), v.variable(v.full(0.0))
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
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
    compiled.apart()
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
    compiled.apart()
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
def _forward_units(like, given, me):
    """Units are rows of the batch by groups by parts of their heads. states: (B, H, chunks, keys, values), or none."""
    compiled.apart()
    if teams.started(me):
        return
    q, k, v, g, reset, state, size, o, last, states = given
    steps, groups, keys, heads, values = q.shape[1], q.shape[2], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // groups, tiles.up(keys), tiles.up(values)
    parts = -(-group // TOGETHER)
    qs, ks, kt = tiles.room(like, (size, wide)), tiles.room(like, (size, wide)), tiles.room(like, (wide, size))
    scaled, vs, os = tiles.room(like, (size, wide)), tiles.room(like, (size, high)), tiles.room(like, (size, high))
    both, weights = tiles.room(like, (size, size)), tiles.room(like, (size, size))
    logs, factors, whole = np.zeros(size, v.dtype), tiles.room(like, (2, size)), tiles.room(like, (2, 1))
    now = tiles.room(like, (TOGETHER, wide, high))
    units = q.shape[0] * groups * parts
    for u in teams.share(units, me):
        b, at = u // (groups * parts), u // parts % groups
        h0 = at * group + u % parts * TOGETHER
        h1 = min(h0 + TOGETHER, (at + 1) * group)
        now[:] = 0  # what fills up the tiles too: of the heads before, it may not be finite
        for h in range(h0, h1):
            tiles.copy(now[h - h0, :keys, :values], state[b, h])
        for c in range(-(-steps // size)):
            start = c * size
            here, after = min(size, steps - start), start + size
            more = min(size, steps - after)
            tiles.load(qs, q, b, start, here, at)
            tiles.load(ks, k, b, start, here, at)
            tiles.turn(like, kt, ks)
            tiles.fetch(like, q, b, after, more, at)
            tiles.lower(like, both, qs, kt)
            tiles.fetch(like, k, b, after, more, at)
            for h in range(h0, h1):
                s = now[h - h0]
                tiles.load(vs, v, b, start, here, h)
                tiles.fetch(like, v, b, after, more, h)
                _decays(like, logs, factors, whole, g, reset, b, start, here, h)
                tiles.weighed(like, weights, both, logs)
                tiles.lower_product(like, 0, os, weights, vs)
                tiles.scale(scaled, qs, factors[0])
                tiles.product(like, 1, os, scaled, s)
                tiles.put(like, o, os, b, start, here, h)
                if states.shape[0]:
                    tiles.put_state(like, states, b, h, c, s)
                tiles.scale(scaled, ks, factors[1])
                tiles.pass_on(s, whole[0], whole[1])
                tiles.turned_product(like, 1, s, scaled, vs)
        for h in range(h0, h1):
            tiles.copy(last[b, h], now[h - h0, :keys, :values])
    teams.settle()


@_compile
def _backward_units(like, given, me):
    """d_q, d_k: (B, T, groups * parts, keys), still to be summed over the parts."""
    compiled.apart()
    if teams.started(me):
        return
    d_o, d_last, q, k, v, g, reset, states, size, d_q, d_k, d_v, d_g, d_state = given
    steps, groups, keys, heads, values = q.shape[1], q.shape[2], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // groups, tiles.up(keys), tiles.up(values)
    parts = -(-group // TOGETHER)
    qs, ks, kt = tiles.room(like, (size, wide)), tiles.room(like, (size, wide)), tiles.room(like, (wide, size))
    q_, k_ = tiles.room(like, (size, wide)), tiles.room(like, (size, wide))
    dqs, dks = tiles.room(like, (size, wide)), tiles.room(like, (size, wide))
    dq_, dk_ = tiles.room(like, (size, wide)), tiles.room(like, (size, wide))
    vs, vt, dv = tiles.room(like, (size, high)), tiles.room(like, (high, size)), tiles.room(like, (size, high))
    do, turned = tiles.room(like, (size, high)), tiles.room(like, (high, wide))
    both, weights, total = (
        tiles.room(like, (size, size)), tiles.room(like, (size, size)), tiles.room(like, (size, size))
    )  # fmt: skip
    logs, factors, whole = np.zeros(size, v.dtype), tiles.room(like, (2, size)), tiles.room(like, (2, 1))
    later, ends, rows = np.zeros(size, v.dtype), tiles.room(like, (TOGETHER, wide, high)), np.zeros(wide, v.dtype)
    units = q.shape[0] * groups * parts
    for u in teams.share(units, me):
        b, at = u // (groups * parts), u // parts % groups
        h0 = at * group + u % parts * TOGETHER
        h1 = min(h0 + TOGETHER, (at + 1) * group)
        ends[:] = 0
        for h in range(h0, h1):
            tiles.copy(ends[h - h0, :keys, :values], d_last[b, h])
        for c in range(-(-steps // size) - 1, -1, -1):
            start = c * size
            here, before, more = min(size, steps - start), start - size, min(size, start)
            tiles.load(qs, q, b, start, here, at)
            tiles.load(ks, k, b, start, here, at)
            tiles.turn(like, kt, ks)
            tiles.fetch(like, q, b, before, more, at)
            tiles.lower(like, both, qs, kt)
            tiles.fetch(like, k, b, before, more, at)
            total[:] = 0
            dqs[:] = 0
            dks[:] = 0
            for h in range(h0, h1):
                s, end = states[b, h, c], ends[h - h0]
                tiles.load(vs, v, b, start, here, h)
                tiles.load(do, d_o, b, start, here, h)
                tiles.fetch(like, v, b, before, more, h)
                _decays(like, logs, factors, whole, g, reset, b, start, here, h)
                tiles.turn(like, vt, vs)
                tiles.lower(like, weights, do, vt)
                tiles.fetch(like, d_o, b, before, more, h)
                _weighed_back(like, weights, both, total, logs, later)
                tiles.scale(q_, qs, factors[0])
                tiles.scale(k_, ks, factors[1])
                tiles.turned_lower_product(like, 0, dv, weights, do)
                tiles.product(like, 1, dv, k_, end)
                tiles.put(like, d_v, dv, b, start, here, h)
                if c:
                    tiles.fetch_state(like, states[b, h, c - 1])
                tiles.turn(like, turned, s)
                tiles.product(like, 0, dq_, do, turned)
                tiles.turn(like, turned, end)
                tiles.product(like, 0, dk_, vs, turned)
                _add_scaled(dqs, dq_, factors[0])
                _add_scaled(dks, dk_, factors[1])
                if d_g.shape[3]:
                    _decays_back(
                        like, dq_, dk_, q_, k_, rows, factors[0, size - 1], logs, later, s, end, d_g, b, start, here, h
                    )  # fmt: skip
                tiles.pass_on(end, whole[0], whole[1])
                tiles.turned_product(like, 1, end, q_, do)
            tiles.lower_product(like, 1, dqs, total, ks)
            tiles.turned_lower_product(like, 1, dks, total, qs)
            part = at * parts + u % parts
            tiles.put(like, d_q, dqs, b, start, here, part)
            tiles.put(like, d_k, dks, b, start, here, part)
        for h in range(h0, h1):
            tiles.copy(d_state[b, h], ends[h - h0, :keys, :values])
    teams.settle()


@_compile
def _add_scaled(out, x, factors):
    for i in range(out.shape[0]):
        for d in range(out.shape[1]):
            out[i, d] += x[i, d] * factors[i]


@_compile
def _decays_back(like, dq_, dk_, q_, k_, whole, factor, g, later, starts, ends, d_g, b, start, steps, h):
    """d_g from what came through the states and, later, through the weights; whole: scratch, a row of the state."""
    compiled.apart()
    least = -126.5 if g.itemsize == 4 else -1022.5  # of log decays that are not 0
    tiles.dots(like, whole, starts, ends)
    so_far = later[0] * 0
    for i in range(whole.shape[0]):
        so_far += whole[i]
    so_far *= factor
    read, written = np.empty(g.shape[0], g.dtype), np.empty(g.shape[0], g.dtype)
    tiles.dots(like, read, q_, dq_)
    tiles.dots(like, written, k_, dk_)
    for i in range(steps):
        d_g[b, start + i, h, 0] = so_far  # and of the earlier ones
        so_far += written[i]
    beyond = later[0] * 0
    for step in range(steps):
        i = steps - 1 - step
        beyond += later[i] + read[i]
        d_g[b, start + i, h, 0] += beyond
        if g[i] < least:  # nothing passes, not the rounding of sums that cancel
            d_g[b, start + i, h, 0] = 0
            beyond = later[i] * 0


# ---- one decay per head and key


def _columns(v: Lanes, row: Any, body: Callable[[Any, int], None]) -> None:
    """body(offset, count) for the vectors of a row, several at a time: each has a chain of products to wait for."""
    word = row.type
    many = v.builder.udiv(row, word(vectors.BYTES))
    whole = v.builder.and_(many, word(-ABREAST))
    for count, first, last in ((ABREAST, word(0), whole), (1, whole, many)):
        with cgutils.for_range_slice(v.builder, first, last, word(count), intp=word) as (index, _):
            body(v.builder.mul(index, word(vectors.BYTES)), count)


def _beside(v: Lanes, address: Any, count: int) -> list[Any]:
    """The addresses of `count` vectors next to each other."""
    return [v.builder.add(address, address.type(n * vectors.BYTES)) for n in range(count)]


@functools.partial(code, addresses=4)
def _factors(v: Lanes, steps: Any, row: Any, g: Any, power: Any, rest: Any, total: Any):
    """e^g in two parts, and the sum of g in powers of 2."""

    def body(offset: Any, count: int) -> None:
        whole = [v.variable(v.full(0.0)) for _ in range(count)]
        with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
            at = v.at(offset, loop.index, row)
            rows = [_beside(v, v.builder.add(base, at), count) for base in (g, power, rest)]
            for sum_, from_, *to in zip(whole, *rows):
                log = v.builder.fmul(v.load(from_), v.full(tiles.LOG2))
                v.builder.store(v.builder.fadd(v.builder.load(sum_), log), sum_)
                for address, part in zip(to, v.exp2(log)):
                    v.store(address, part)
        for sum_, address in zip(whole, _beside(v, v.builder.add(total, offset), count)):
            v.store(address, v.builder.load(sum_))

    _columns(v, row, body)


def _along(
    v: Lanes, steps: Any, row: Any, back: bool, left: Any, bases: tuple[Any, ...],
    use: Callable[[Any, list[Any]], Any],
) -> None:  # fmt: skip
    """use(value, addresses of a step in each of bases) -> the next value, from the first step on or from the last
    back, for all vectors of a row. Values are found where they were left and are left there."""

    def body(offset: Any, count: int) -> None:
        slots = _beside(v, v.builder.add(left, offset), count)
        values = [v.variable(v.load(slot)) for slot in slots]
        starts = [v.builder.add(base, offset) for base in bases]
        with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
            i = v.builder.sub(v.builder.sub(steps, steps.type(1)), loop.index) if back else loop.index
            at = v.builder.mul(i, row)
            for value, *ats in zip(values, *(_beside(v, v.builder.add(start, at), count) for start in starts)):
                v.builder.store(use(v.builder.load(value), ats), value)
        for value, slot in zip(values, slots):
            v.store(slot, v.builder.load(value))

    _columns(v, row, body)


def _scaled_by(back: bool) -> Any:
    """out = x times the product of decays from the first step to each, or of those behind it."""

    def body(v: Lanes, steps: Any, row: Any, x: Any, out: Any, power: Any, rest: Any, left: Any) -> None:
        def use(product: Any, at: list[Any]) -> Any:
            new = v.decayed((v.load(at[2]), v.load(at[3])), product)
            v.store(at[1], v.mul(v.load(at[0]), product if back else new))
            return new

        _along(v, steps, row, back, left, (x, out, power, rest), use)

    return code(body, 5)


def _through_by(back: bool) -> Any:
    """out += the same product times dz."""

    def body(v: Lanes, steps: Any, row: Any, dz: Any, out: Any, power: Any, rest: Any, left: Any) -> None:
        def use(product: Any, at: list[Any]) -> Any:
            new = v.decayed((v.load(at[2]), v.load(at[3])), product)
            v.store(at[1], v.mad(v.load(at[0]), product if back else new, v.load(at[1])))
            return new

        _along(v, steps, row, back, left, (dz, out, power, rest), use)

    return code(body, 5)


def _across_by(back: bool) -> Any:
    """dg += the sum of z dz over the steps whose z a step's decay is in."""

    def body(v: Lanes, steps: Any, row: Any, z: Any, dz: Any, dg: Any, left: Any) -> None:
        def use(total: Any, at: list[Any]) -> Any:
            new = v.mad(v.load(at[0]), v.load(at[1]), total)
            v.store(at[2], v.builder.fadd(v.load(at[2]), total if back else new))
            return new

        _along(v, steps, row, not back, left, (z, dz, dg), use)

    return code(body, 4)


_upto, _after = _scaled_by(False), _scaled_by(True)
_through_upto, _through_after = _through_by(False), _through_by(True)
_across_upto, _across_after = _across_by(False), _across_by(True)


@functools.partial(code, addresses=3)
def _rounded(v: Lanes, steps: Any, row: Any, power: Any, rest: Any, out: Any):
    """Decays as one number each: within a leaf their rounding does not add up."""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        at = [v.at(base, loop.index, vectors.BYTES) for base in (power, rest, out)]
        v.store(at[2], v.builder.fadd(v.load(at[0]), v.load(at[1])))


@functools.partial(code, addresses=5)
def _leaf(v: Lanes, steps: Any, row: Any, q: Any, k: Any, decay: Any, out: Any, out_row: Any):
    """The weights within a leaf, 0 above the diagonal: a row goes back from step to step with its query."""
    word = row.type
    for i in range(LEAF):
        sums = [v.variable(v.full(0.0)) for _ in range(i + 1)]
        with cgutils.for_range_slice(v.builder, word(0), row, word(vectors.BYTES), intp=word) as (offset, _):
            at = [v.builder.add(base, offset) for base in (q, k, decay)]
            seen = v.load(v.at(at[0], word(i), row))
            for j in range(i, -1, -1):
                v.builder.store(v.mad(seen, v.load(v.at(at[1], word(j), row)), v.builder.load(sums[j])), sums[j])
                if j:
                    seen = v.mul(seen, v.load(v.at(at[2], word(j), row)))
        found = [v.builder.load(one) for one in sums]
        for j in range(0, LEAF, v.count):
            at = v.builder.add(v.at(out, word(i), out_row), word(j * v.size))
            v.store(at, v.sums(found[j : j + v.count]))


@functools.partial(code, addresses=8)
def _leaf_back(
    v: Lanes, steps: Any, row: Any, q: Any, k: Any, decay: Any, given: Any, given_row: Any, dq: Any, dk: Any, dg: Any
):
    """Backward, one vector of keys after another. In both halves every column goes ahead with its key and back with
    what reaches it; between them are products about the middle."""
    word, half = row.type, LEAF // 2
    with cgutils.for_range_slice(v.builder, word(0), row, word(vectors.BYTES), intp=word) as (offset, _):
        starts = [v.builder.add(base, offset) for base in (q, k, decay, dq, dk, dg)]
        at = [[v.at(start, word(i), row) for i in range(LEAF)] for start in starts]
        qs, ks, decays = ([v.load(a) for a in one] for one in at[:3])
        to_q, to_k, to_g = ([v.full(0.0)] * LEAF for _ in range(3))

        def weight(i: int, j: int) -> Any:
            return v.splat(v.builder.add(v.at(given, word(i), given_row), word(j * v.size)))

        for first in (0, half):
            last = first + half - 1
            for j in range(first, first + half):
                seen = {j: ks[j]}
                for i in range(j, last + 1):
                    if i > j:
                        seen[i] = v.mul(decays[i], seen[i - 1])
                    to_q[i] = v.mad(weight(i, j), seen[i], to_q[i])
                reaching = v.mul(weight(last, j), qs[last])
                for i in range(last, j, -1):
                    to_g[i] = v.mad(reaching, seen[i], to_g[i])
                    reaching = v.mad(decays[i], reaching, v.mul(weight(i - 1, j), qs[i - 1]))
                to_k[j] = reaching
        upto, after = {half: decays[half]}, {half - 1: v.full(1.0)}
        for n in range(1, half):
            upto[half + n] = v.mul(upto[half + n - 1], decays[half + n])
            after[half - 1 - n] = v.mul(after[half - n], decays[half - n])
        read = {i: v.mul(qs[i], upto[i]) for i in range(half, LEAF)}
        written = {j: v.mul(ks[j], after[j]) for j in range(half)}
        of_read, of_written = ({i: v.full(0.0) for i in side} for side in (read, written))
        for i in read:
            for j in written:
                of_read[i] = v.mad(weight(i, j), written[j], of_read[i])
                of_written[j] = v.mad(weight(i, j), read[i], of_written[j])
        total = v.full(0.0)
        for i in reversed(read):
            to_q[i] = v.mad(upto[i], of_read[i], to_q[i])
            total = v.mad(read[i], of_read[i], total)
            to_g[i] = v.builder.fadd(to_g[i], total)
        total = v.full(0.0)
        for j in range(half):
            to_g[j] = v.builder.fadd(to_g[j], total)
            total = v.mad(written[j], of_written[j], total)
            to_k[j] = v.mad(after[j], of_written[j], to_k[j])
        for grads, addresses in zip((to_q, to_k, to_g), at[3:]):
            for grad, address in zip(grads, addresses):
                v.store(address, v.builder.fadd(v.load(address), grad))


@_compile
def key_factors(like, power, rest, total, logs, g, reset, b, start, steps, h):
    """Both parts of a chunk's decays (C, keys), and the sums of their logs in powers of 2; logs: scratch."""
    compiled.apart()
    row = logs.shape[1] * logs.itemsize
    tiles.load(logs, g, b, start, steps, h)
    for i in range(steps):
        if reset.shape[0] and reset[b, start + i]:
            logs[i, : g.shape[3]] = -np.inf
    _factors(like, logs.shape[0], row, (logs.ctypes.data, power.ctypes.data, rest.ctypes.data, total.ctypes.data))


@_compile
def key_scales(like, x_, y_, levels, x, y, power, rest):
    """Rows of x, which read, from the start of the chunk, rows of y, which write, to its end; in levels (_, C, keys)
    about the middles of blocks."""
    compiled.apart()
    size, row = x.shape[0], x.shape[1] * x.itemsize
    left = np.empty((levels.shape[0] + 1, x.shape[1]), x.dtype)
    for back in range(2):
        left[:] = 1
        for leaf in range(0, size, LEAF):  # all that is to be made of its rows, while they are in the first cache
            i = size - LEAF - leaf if back else leaf
            at, p, r = i * row, power.ctypes.data + i * row, rest.ctypes.data + i * row
            if back:
                _after(like, LEAF, row, (y.ctypes.data + at, y_.ctypes.data + at, p, r, left.ctypes.data))
            else:
                _upto(like, LEAF, row, (x.ctypes.data + at, x_.ctypes.data + at, p, r, left.ctypes.data))
            for level in range(levels.shape[0]):
                half, of = LEAF << level, left.ctypes.data + (level + 1) * row
                out = levels.ctypes.data + level * size * row + at
                if back and not i & half:
                    _after(like, LEAF, row, (y.ctypes.data + at, out, p, r, of))
                elif not back and i & half:
                    _upto(like, LEAF, row, (x.ctypes.data + at, out, p, r, of))
                else:
                    left[level + 1] = 1


@_compile
def _one_number(like, power, rest):
    compiled.apart()
    decay = tiles.room(like, power.shape)
    _rounded(
        like, decay.size * decay.itemsize // vectors.BYTES, 0, (power.ctypes.data, rest.ctypes.data, decay.ctypes.data)
    )  # fmt: skip
    return decay


@_compile
def key_weights(like, weights, x, y, power, rest, of_x, of_y, turned):
    """What x_i reads of y_j, j <= i, from them and their levels; what is beyond a leaf above the diagonal stays."""
    compiled.apart()
    size, width, item = x.shape[0], x.shape[1], x.itemsize
    row, block, half = width * item, size * item, LEAF
    for level in range(of_x.shape[0]):
        tiles.turn(like, turned, of_y[level])
        for i in range(0, size, 2 * half):
            tiles.window(
                like, 0, half, half * item, width, of_x.ctypes.data + level * size * row + (i + half) * row, row, item,
                turned.ctypes.data + i * item, block, weights.ctypes.data + (i + half) * block + i * item, block,
            )  # fmt: skip
        half *= 2
    decay = _one_number(like, power, rest)
    for i in range(0, size, LEAF):
        at = i * row
        _leaf(
            like, LEAF, row,
            (x.ctypes.data + at, y.ctypes.data + at, decay.ctypes.data + at,
             weights.ctypes.data + i * block + i * item, block),
        )  # fmt: skip


@_compile
def key_between(like, add, d_x, d_y, d_weights, of_x, of_y):
    """The gradients of the levels, from those of the weights: later halves of d_x, earlier ones of d_y."""
    compiled.apart()
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
    compiled.apart()
    size, row = x_.shape[0], x_.shape[1] * x_.itemsize
    products, sums = np.empty((2, levels.shape[0] + 1, x_.shape[1]), x_.dtype)
    for back in range(2):
        products[:], sums[:] = 1, 0
        if back:
            for d in range(whole.shape[0]):
                sums[0, d] = whole[d]
        for leaf in range(0, size, LEAF):
            i = size - LEAF - leaf if back else leaf
            at, p, r = i * row, power.ctypes.data + i * row, rest.ctypes.data + i * row
            x, dx, y, dy = x_.ctypes.data + at, dx_.ctypes.data + at, y_.ctypes.data + at, dy_.ctypes.data + at
            to_x, to_y, to_g = d_x.ctypes.data + at, d_y.ctypes.data + at, d_g.ctypes.data + at
            if back:
                _through_after(like, LEAF, row, (dy, to_y, p, r, products.ctypes.data))
                _across_upto(like, LEAF, row, (x, dx, to_g, sums.ctypes.data))
            else:
                _through_upto(like, LEAF, row, (dx, to_x, p, r, products.ctypes.data))
                _across_after(like, LEAF, row, (y, dy, to_g, sums.ctypes.data))
            for level in range(levels.shape[0]):
                later, apart, of = i & (LEAF << level), level * size * row + at, (level + 1) * row
                z, dz = levels.ctypes.data + apart, d_levels.ctypes.data + apart
                product, total = products.ctypes.data + of, sums.ctypes.data + of
                if later and back:
                    _across_upto(like, LEAF, row, (z, dz, to_g, total))
                elif later:
                    _through_upto(like, LEAF, row, (dz, to_x, p, r, product))
                elif back:
                    _through_after(like, LEAF, row, (dz, to_y, p, r, product))
                else:
                    _across_after(like, LEAF, row, (z, dz, to_g, total))
                if (later != 0) == (back != 0):
                    products[level + 1] = 1
                else:
                    sums[level + 1] = 0


@_compile
def key_leaves(like, d_x, d_y, d_g, x, y, power, rest, d_weights):
    """They grow by what the weights within leaves give."""
    compiled.apart()
    size, item, row = x.shape[0], x.itemsize, x.shape[1] * x.itemsize
    block, decay = size * item, _one_number(like, power, rest)
    for i in range(0, size, LEAF):
        at = i * row
        _leaf_back(
            like, LEAF, row,
            (x.ctypes.data + at, y.ctypes.data + at, decay.ctypes.data + at,
             d_weights.ctypes.data + i * block + i * item, block,
             d_x.ctypes.data + at, d_y.ctypes.data + at, d_g.ctypes.data + at),
        )  # fmt: skip


@_compile
def key_levels(size):
    """How many times a chunk is halved before leaves."""
    count = 0
    while LEAF << count < size:
        count += 1
    return count


@_compile
def _forward_keys(like, given, me):
    """Units are rows of the batch by heads."""
    compiled.apart()
    if teams.started(me):
        return
    q, k, v, g, reset, state, size, o, last, states = given
    steps, keys, heads, values = q.shape[1], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // q.shape[2], tiles.up(keys), tiles.up(values)
    levels = tiles.room(like, (key_levels(size), size, wide))
    qs, ks, q_, k_ = (
        tiles.room(like, (size, wide)), tiles.room(like, (size, wide)),
        tiles.room(like, (size, wide)), tiles.room(like, (size, wide)),
    )  # fmt: skip
    power, rest, logs = (
        tiles.room(like, (size, wide)), tiles.room(like, (size, wide)), tiles.room(like, (size, wide))
    )  # fmt: skip
    turned, weights = tiles.room(like, (wide, size)), tiles.room(like, (size, size))
    vs, os, s = tiles.room(like, (size, high)), tiles.room(like, (size, high)), tiles.room(like, (wide, high))
    total, whole, row = np.zeros(wide, v.dtype), tiles.room(like, (2, wide)), wide * v.itemsize
    units = q.shape[0] * heads
    for u in teams.share(units, me):
        b, h = u // heads, u % heads
        s[:] = 0
        tiles.copy(s[:keys, :values], state[b, h])
        for c in range(-(-steps // size)):
            start = c * size
            here, after = min(size, steps - start), start + size
            more = min(size, steps - after)
            tiles.load(qs, q, b, start, here, h // group)
            tiles.load(ks, k, b, start, here, h // group)
            tiles.load(vs, v, b, start, here, h)
            key_factors(like, power, rest, total, logs, g, reset, b, start, here, h)
            tiles.fetch(like, q, b, after, more, h // group)
            key_scales(like, q_, k_, levels, qs, ks, power, rest)
            tiles.fetch(like, k, b, after, more, h // group)
            key_weights(like, weights, qs, ks, power, rest, levels, levels, turned)
            tiles.fetch(like, v, b, after, more, h)
            tiles.exp2(like, row // vectors.BYTES, row, (total.ctypes.data, whole.ctypes.data))
            tiles.lower_product(like, 0, os, weights, vs)
            tiles.fetch(like, g, b, after, more, h)
            tiles.product(like, 1, os, q_, s)
            tiles.put(like, o, os, b, start, here, h)
            if states.shape[0]:
                tiles.put_state(like, states, b, h, c, s)
            tiles.pass_on(s, whole[0], whole[1])
            tiles.turned_product(like, 1, s, k_, vs)
        tiles.copy(last[b, h], s[:keys, :values])
    teams.settle()


@_compile
def _backward_keys(like, given, me):
    """d_q, d_k: (B, T, heads, keys), still to be summed over the heads of a group."""
    compiled.apart()
    if teams.started(me):
        return
    d_o, d_last, q, k, v, g, reset, states, size, d_q, d_k, d_v, d_g, d_state = given
    steps, keys, heads, values = q.shape[1], q.shape[3], v.shape[2], v.shape[3]
    group, wide, high = heads // q.shape[2], tiles.up(keys), tiles.up(values)
    levels = tiles.room(like, (key_levels(size), size, wide))
    between = tiles.room(like, levels.shape)
    qs, ks, q_, k_ = (
        tiles.room(like, (size, wide)), tiles.room(like, (size, wide)),
        tiles.room(like, (size, wide)), tiles.room(like, (size, wide)),
    )  # fmt: skip
    power, rest, logs = (
        tiles.room(like, (size, wide)), tiles.room(like, (size, wide)), tiles.room(like, (size, wide))
    )  # fmt: skip
    dq_, dk_ = tiles.room(like, (size, wide)), tiles.room(like, (size, wide))
    turned, weights, d_weights = (
        tiles.room(like, (wide, size)), tiles.room(like, (size, size)), tiles.room(like, (size, size))
    )  # fmt: skip
    vs, vt, dv = tiles.room(like, (size, high)), tiles.room(like, (high, size)), tiles.room(like, (size, high))
    do, end, st = tiles.room(like, (size, high)), tiles.room(like, (wide, high)), tiles.room(like, (high, wide))
    grads = tiles.room(like, (3, size, wide))
    total, whole, row = np.zeros(wide, v.dtype), tiles.room(like, (2, wide)), wide * v.itemsize
    units = q.shape[0] * heads
    for u in teams.share(units, me):
        b, h = u // heads, u % heads
        end[:] = 0
        tiles.copy(end[:keys, :values], d_last[b, h])
        for c in range(-(-steps // size) - 1, -1, -1):
            start, s = c * size, states[b, h, c]
            here, before, more = min(size, steps - start), start - size, min(size, start)
            tiles.load(qs, q, b, start, here, h // group)
            tiles.load(ks, k, b, start, here, h // group)
            tiles.load(vs, v, b, start, here, h)
            tiles.load(do, d_o, b, start, here, h)
            key_factors(like, power, rest, total, logs, g, reset, b, start, here, h)
            tiles.fetch(like, q, b, before, more, h // group)
            key_scales(like, q_, k_, levels, qs, ks, power, rest)
            tiles.fetch(like, k, b, before, more, h // group)
            key_weights(like, weights, qs, ks, power, rest, levels, levels, turned)
            tiles.fetch(like, v, b, before, more, h)
            tiles.exp2(like, row // vectors.BYTES, row, (total.ctypes.data, whole.ctypes.data))
            tiles.turned_lower_product(like, 0, dv, weights, do)
            tiles.fetch(like, g, b, before, more, h)
            tiles.product(like, 1, dv, k_, end)
            tiles.put(like, d_v, dv, b, start, here, h)
            if c:
                tiles.fetch_state(like, states[b, h, c - 1])
            tiles.turn(like, vt, vs)
            tiles.lower(like, d_weights, do, vt)
            tiles.turn(like, st, s)
            tiles.product(like, 0, dq_, do, st)
            tiles.fetch(like, d_o, b, before, more, h)
            tiles.turn(like, st, end)
            tiles.product(like, 0, dk_, vs, st)
            tiles.dots(like, total, s, end)
            for i in range(keys):
                total[i] *= whole[0, i] + whole[1, i]
            grads[:] = 0
            key_between(like, 0, between, between, d_weights, levels, levels)
            key_through(
                like, grads[0], grads[1], grads[2], q_, k_, dq_, dk_, levels, between, power, rest, total
            )  # fmt: skip
            key_leaves(like, grads[0], grads[1], grads[2], qs, ks, power, rest, d_weights)
            tiles.put(like, d_q, grads[0], b, start, here, h)
            tiles.put(like, d_k, grads[1], b, start, here, h)
            tiles.put(like, d_g, grads[2], b, start, here, h)
            tiles.pass_on(end, whole[0], whole[1])
            tiles.turned_product(like, 1, end, q_, do)
        tiles.copy(d_state[b, h], end[:keys, :values])
    teams.settle()


_FORWARD = {"scalar": _forward_units, "key": _forward_keys}
_BACKWARD = {"scalar": _backward_units, "key": _backward_keys}


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
        fresh.empty(v, *v.shape),
        fresh.empty(state, *state.shape),
        fresh.empty(state, shape[0] if keep else 0, *shape[1:]),
    )
    if not (v.numel() and q.numel()):
        return o.zero_(), last.copy_(state), states
    given = v.new_empty(*v.shape[:3], 0) if g is None else g
    before, after = teams.arrays(q, k, v, given, reset, state), teams.arrays(o, last, states)
    teams.run(_FORWARD[kind], v, 1, len(v) * q.shape[2] * _parts(q, v, kind), *before, size, *after)
    return o, last, states


def _backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
    reset: Tensor | None, kind: str, states: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, parts = _sizes(q, v)[0], _parts(q, v, kind)
    d_q, d_k = (fresh.empty(q, *q.shape[:2], q.shape[2] * parts, q.shape[3]) for _ in range(2))
    d_v, d_state = fresh.empty(v, *v.shape), fresh.empty(d_last, *d_last.shape)
    given = v.new_empty(*v.shape[:3], 0) if g is None else g
    d_g = fresh.empty(given, *given.shape)
    if v.numel() and q.numel():
        before = teams.arrays(d_o, d_last, q, k, v, given, reset, states)
        after = teams.arrays(d_q, d_k, d_v, d_g, d_state)
        teams.run(_BACKWARD[kind], v, 1, len(v) * q.shape[2] * parts, *before, size, *after)
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
