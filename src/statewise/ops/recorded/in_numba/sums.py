"""Sums and maxima over some of a tensor's dimensions."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba.core import cgutils

from ...compiled import in_numba as compiled
from ...vectors import in_numba as vectors
from ...vectors.in_numba import BYTES, Lanes, code
from .places import LANES, floats

_compile = compiled.function

_fast = functools.partial(_compile, fastmath={"reassoc", "contract", "nsz"})  # NaN and infinity stay what they are
SUM, MAXIMUM = range(2)


@functools.partial(code, addresses=3)
def _sum_rows(v: Lanes, steps: Any, row: Any, to: Any, source: Any, vectors: Any) -> None:
    """The sums of rows of so many vectors, `row` bytes apart."""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        given, total = v.at(source, loop.index, row), v.variable(v.full(0.0))
        v.builder.store(v.full(0.0), total)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            v.builder.store(v.add(v.builder.load(total), v.load(v.at(given, each.index, BYTES))), total)
        v.sum(v.at(to, loop.index, 4), v.builder.load(total))


@_fast
def _row_sum(address, count):
    compiled.apart()
    row, total = floats(address, count), np.float32(0)
    for j in range(count):
        total += row[j]
    return total


@_compile
def reduce(like, table, i, bases, numbers, part, parts):
    """Places kept (k0, k1, k2), which the result has in this order, and places (r0, r1) that go."""
    compiled.apart()
    what = table[i, 3]
    out, source = bases[table[i, 4]] + table[i, 5], bases[table[i, 6]] + table[i, 7]
    k0, k1, k2, r0, r1 = table[i, 8], table[i, 9], table[i, 10], table[i, 11], table[i, 12]
    s0, s1, s2, t0, t1 = table[i, 13], table[i, 14], table[i, 15], table[i, 16], table[i, 17]
    factor = floats(numbers + table[i, 18], 1)[0]
    if what == SUM and s2 == 1 and t1 != 1:  # whole rows at a time
        for k in range(k0 * k1 * part // parts, k0 * k1 * (part + 1) // parts):
            at, to = source + 4 * (k // k1 * s0 + k % k1 * s1), out + 4 * k * k2
            vectors.zero(like, k2, (to,))
            for r in range(r0 * r1):
                vectors.add(like, k2, (to, to, at + 4 * (r // r1 * t0 + r % r1 * t1)))
            if factor != 1:
                row = floats(to, k2)
                for j in range(k2):
                    row[j] *= factor
        return
    total = k0 * k1 * k2
    start, stop = total * part // parts, total * (part + 1) // parts
    if what == SUM and k0 == 1 and k1 == 1 and r0 == 1 and t1 == 1 and r1 % LANES == 0:
        _sum_rows(like, stop - start, 4 * s2, (out + 4 * start, source + 4 * start * s2, r1 // LANES))
        if factor != 1:
            row = floats(out, total)
            for k in range(start, stop):
                row[k] *= factor
        return
    for k in range(start, stop):
        rest = k // k2
        at = source + 4 * (rest // k1 * s0 + rest % k1 * s1 + k % k2 * s2)
        if what == SUM:
            found = np.float32(0)
            for r in range(r0):
                if t1 == 1:
                    found += _row_sum(at + 4 * r * t0, r1)
                else:
                    for q in range(r1):
                        found += floats(at + 4 * (r * t0 + q * t1), 1)[0]
            found *= factor
        else:
            found = np.float32(-np.inf)
            for r in range(r0):
                for q in range(r1):
                    value = floats(at + 4 * (r * t0 + q * t1), 1)[0]
                    found = value if value > found or value != value else found
        floats(out + 4 * k, 1)[0] = found
