"""Softmax attention of one step over a window of keys and values, in parts that are joined."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from ...compiled import in_numba as compiled
from ...vectors.in_numba import BYTES, Lanes, code
from .exact import taken
from .functions import exp, larger
from .places import LANES, floats

_compile = compiled.function


@functools.partial(code, addresses=3)
def _look_at(v: Lanes, steps: Any, row: Any, at: Any, bad: Any, vectors: Any) -> None:
    """`bad` becomes NaN where one of `steps` rows of so many vectors is not finite. They are in the cache then."""
    found = v.variable(v.load(bad))
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        here = v.at(at, loop.index, row)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            value = v.load(v.at(here, each.index, BYTES))
            v.builder.store(v.mad(value, v.full(0.0), v.builder.load(found)), found)
    v.store(bad, v.builder.load(found))


def _most(v: Lanes, x: Any) -> Any:
    """The largest of a vector, in every lane; NaN where one is."""
    count = v.count
    while count > 1:
        count //= 2
        x = larger(v, x, v.shuffle(x, [(i + count) % v.count for i in range(v.count)]))
    return x


@functools.partial(code, addresses=8)
def _attend_to(
    v: Lanes,
    steps: Any,
    row: Any,
    q: Any,
    k: Any,
    values: Any,
    away: Any,
    found: Any,
    s: Any,
    vectors: Any,
    scale: Any,
) -> None:
    """One head and up to LANES rows of keys, `row` bytes apart, and of values, `away` bytes apart.

    found: the largest score so far, the sum of weights, and the sum of weighted values, which is so many vectors.
    """
    b, word = v.builder, steps.type
    loops = functools.partial(cgutils.for_range, b, intp=word)
    v.store(s, v.full(-math.inf))
    with loops(steps) as loop:
        at, total = v.at(k, loop.index, row), v.variable(v.full(0.0))
        b.store(v.full(0.0), total)
        with loops(vectors) as each:
            product = v.mad(v.load(v.at(q, each.index, BYTES)), v.load(v.at(at, each.index, BYTES)), b.load(total))
            b.store(product, total)
        v.sum(v.at(s, loop.index, 4), b.load(total))
    score = b.fmul(v.load(s), v.splat(scale))
    before = v.splat(found)
    most = larger(v, before, _most(v, score))
    weight, fade = exp(v, b.fsub(score, most)), exp(v, b.fsub(before, most))
    v.store(s, weight)
    sum_at, first = b.add(found, word(4)), ir.IntType(32)(0)
    one = ir.Constant(ir.VectorType(ir.IntType(1), v.count), [1] + [0] * (v.count - 1))
    v.sum(sum_at, b.select(one, v.mad(v.splat(sum_at), fade, weight), weight))
    b.store(b.extract_element(most, first), b.inttoptr(found, v.scalar.as_pointer()), align=4)
    out = b.add(found, word(8))
    with loops(vectors) as each:
        offset = b.mul(each.index, word(BYTES))
        to, source = b.add(out, offset), b.add(values, offset)
        total = v.variable(v.full(0.0))
        b.store(v.mul(v.load(to), fade), total)
        with loops(steps) as loop:
            product = v.mad(v.splat(v.at(s, loop.index, 4)), v.load(v.at(source, loop.index, away)), b.load(total))
            b.store(product, total)
        v.store(to, b.load(total))


@_compile
def _attend_slowly(q, k, v, count, row, away, size, scale, found):
    """The same for a head whose size is no whole vectors."""
    asked, state = floats(q, size), floats(found, size + 2)
    for j in range(count):
        key, value = floats(k + j * row, size), floats(v + j * away, size)
        score = np.float32(0)
        for c in range(size):
            score += asked[c] * key[c]
        score *= scale
        most = state[0] if score <= state[0] else score
        fade, weight = np.exp(state[0] - most), np.exp(score - most)
        state[0], state[1] = most, state[1] * fade + weight
        for c in range(size):
            state[2 + c] = state[2 + c] * fade + weight * value[c]


@_compile
def _not_finite(at, count):
    row, found = floats(at, count), False
    for c in range(count):
        found |= not np.isfinite(row[c])
    return found


@_compile
def attend(like, table, i, bases, scratch, part):
    """A part of the rows of keys and values that each of the batch sees, LANES at a time."""
    compiled.apart()
    parts = table[i, 1]
    q, k, v = bases[table[i, 3]] + table[i, 4], bases[table[i, 5]] + table[i, 6], bases[table[i, 9]] + table[i, 10]
    k_next, k_row, v_next, v_row = table[i, 7], table[i, 8], table[i, 11], table[i, 12]
    position, apart, kind = bases[table[i, 13]] + table[i, 14], table[i, 15], table[i, 16]
    batch, rows, groups, heads, size = table[i, 19], table[i, 20], table[i, 21], table[i, 22], table[i, 23]
    partial = bases[table[i, 17]] + table[i, 18] + 4 * part * batch * heads * (size + 2)
    spare, scale = floats(scratch, 3 * LANES), np.float32(1 / math.sqrt(size))
    spare[2 * LANES] = scale
    whole = size % LANES == 0
    for b in range(batch):
        seen = min(np.int64(taken(kind, position + b * apart)), rows - 1) + 1
        first = rows - seen
        start, stop = first + seen * part // parts, first + seen * (part + 1) // parts
        bad = False
        for n in range(LANES):
            spare[LANES + n] = 0
        own = partial + 4 * b * heads * (size + 2)
        state = floats(own, heads * (size + 2))
        for h in range(heads):
            for c in range(size + 2):
                state[h * (size + 2) + c] = 0
            state[h * (size + 2)] = -np.inf
        for j in range(start, stop, LANES):
            count = min(LANES, stop - j)
            keys, values = k + b * k_next + j * k_row, v + b * v_next + j * v_row
            if whole:
                _look_at(like, count, k_row, (keys, scratch + 4 * LANES, groups * size // LANES))
                _look_at(like, count, v_row, (values, scratch + 4 * LANES, groups * size // LANES))
            else:
                for n in range(count):
                    bad |= _not_finite(keys + n * k_row, groups * size) or _not_finite(
                        values + n * v_row, groups * size
                    )
            for h in range(heads):
                at, away, found = h * groups // heads * size * 4, b * heads + h, own + 4 * h * (size + 2)
                asked = q + 4 * away * size
                if whole:
                    to = (asked, keys + at, values + at, v_row, found, scratch, size // LANES, scratch + 8 * LANES)
                    _attend_to(like, count, k_row, to)
                else:
                    _attend_slowly(asked, keys + at, values + at, count, k_row, v_row, size, scale, found)
        for n in range(LANES):
            bad |= spare[LANES + n] != 0  # 0 times what is not finite is NaN
        if bad:
            for h in range(heads):
                state[h * (size + 2)] = np.nan


@_compile
def join(table, i, bases):
    """What the parts gave, as one."""
    compiled.apart()
    parts, partial, y = table[i, 3], bases[table[i, 4]] + table[i, 5], bases[table[i, 6]] + table[i, 7]
    rows, size = table[i, 8], table[i, 9]
    given = floats(partial, parts * rows * (size + 2))
    for r in range(rows):
        most, total, to = np.float32(-np.inf), np.float32(0), floats(y + 4 * r * size, size)
        for part in range(parts):
            score = given[(part * rows + r) * (size + 2)]
            most = score if not score <= most else most
            if most != most:
                break
        for c in range(size):
            to[c] = 0
        for part in range(parts):
            at = (part * rows + r) * (size + 2)
            if given[at + 1] == 0 and most == most:  # it saw nothing
                continue
            weight = np.exp(given[at] - most)
            total += weight * given[at + 1]
            for c in range(size):
                to[c] += weight * given[at + 2 + c]
        for c in range(size):
            to[c] /= total
