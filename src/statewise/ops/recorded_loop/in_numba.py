"""The loop over time, compiled: a recorded step, run for a few rows of the batch at a time, with no Python between.

A step reads and writes memory of its own: dense rows that stay in the nearest caches. Inputs are copied there a tile of
time at once, since the rows of the batch lie far apart; outputs and states go to their places likewise, and after each
step the new state becomes the old one. Rows that a reset cuts take the fresh state, or backwards end their adjoint;
rows that have ended keep their state, and their adjoint is zero, so that nothing is added up for them. Each thread runs
all times of its rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..compiled import in_numba as compiled
from ..products import in_numba as products
from ..recorded import in_numba as recorded
from ..teams import in_numba as teams
from ..vectors import in_numba as vectors

_compile = compiled.function
_within = functools.partial(_compile, inline="always")  # what these call is compiled into each of their callers anew
PANEL, DEEP = products.PANEL, products.DEEP
LIKE = np.float32(0)
SCRATCH = 4 * recorded.STRIP * (recorded.REGISTERS + 4)  # bytes that a thread's steps need
BASE, ROW, AT = range(3)  # words of a port: which memory of the step, bytes of a row, where the whole lies
FRESH, KEEP, OUT, LAST = range(3, 7)  # of a state's: the state of a reset, (B, T), what the step makes, the last one


class Call(NamedTuple):
    table: Any  # the step
    numbers: int
    bases: Any  # (groups, memories)
    moves: Any  # (n, 2): memory that is another one at the next step of a tile, and how many bytes away
    advance: Any  # (n, 2): memory of which the caller has all times, likewise
    inputs: Any  # (ports, words) of what is (B, T, row)
    outputs: Any
    states: Any  # of (B, row)
    rows: int  # of a group
    steps: int
    tile: int  # steps
    reset: int  # (B, T) bytes, or 0
    lengths: int  # (B,) int32, or 0
    back: int  # whether time runs backwards
    scratch: int  # of each thread, SCRATCH bytes


@_compile
def _tiles(like, table, i, bases):
    """y = x w + bias."""
    compiled.apart()
    panel, x, y = bases[table[i, 3]], bases[table[i, 4]] + table[i, 5], bases[table[i, 6]] + table[i, 7]
    depth, batch, columns = table[i, 8], table[i, 9], table[i, 10]
    for start in range(0, columns, PANEL // 4):
        count = min(PANEL // 4, columns - start)
        to, row = y + 4 * start, 4 * columns
        if count < PANEL // 4:
            to, row = bases[table[i, 13]] + table[i, 14], PANEL
        for first in range(0, depth, DEEP):
            deep, at = min(DEEP, depth - first), x + 4 * first
            products.multiply(like, batch, deep, first, at, 4 * depth, 4, panel + first * PANEL, PANEL, to, row)
        if count < PANEL // 4:
            for b in range(batch):
                vectors.copy(like, count, (y + 4 * (b * columns + start), to + b * PANEL))
        panel += depth * PANEL
    if table[i, 11] >= 0:
        bias = bases[table[i, 11]] + table[i, 12]
        for b in range(batch):
            vectors.add(like, columns, (y + 4 * b * columns, y + 4 * b * columns, bias))


@_within
def _step(like, table, bases, numbers, scratch):
    i = 0
    while i < table.shape[0]:
        if table[i, 0] == recorded.TILES:
            _tiles(like, table, i, bases)
        else:
            for part in range(table[i, 1]):
                recorded.run_part(table, i, bases, numbers, scratch, part)
        i += 1 + table[i, 2]


@_compile
def _ended(q, b, t):
    return q.lengths != 0 and t >= vectors.int32(q.lengths + 4 * b)


@_compile
def _cut(q, b, t):
    return q.reset != 0 and vectors.byte(q.reset + b * q.steps + t) != 0


@_compile
def _fetch(like, q, bases, first, t, count, by):
    """Inputs of a tile of time."""
    compiled.apart()
    for p in range(q.inputs.shape[0]):
        size = q.inputs[p, ROW]
        for b in range(q.rows):
            to, at = bases[q.inputs[p, BASE]] + b * size, q.inputs[p, AT] + ((first + b) * q.steps + t) * size
            for _ in range(count):
                vectors.copy(like, size // 4, (to, at))
                to, at = to + q.rows * size, at + by * size


@_compile
def _put(like, q, b, t, count, by, to, at, size):
    """One row of a tile to its places; zeros where it has ended."""
    for k in range(count):
        if _ended(q, b, t + by * k):
            vectors.zero(like, size // 4, (to,))
        else:
            vectors.copy(like, size // 4, (to, at))
        to, at = to + by * size, at + q.rows * size


@_compile
def _store(like, q, bases, first, t, count, by):
    """Outputs and states of a tile of time; the state after it comes first in the next."""
    compiled.apart()
    for p in range(q.outputs.shape[0]):
        size = q.outputs[p, ROW]
        for b in range(q.rows):
            to = q.outputs[p, AT] + ((first + b) * q.steps + t) * size
            _put(like, q, first + b, t, count, by, to, bases[q.outputs[p, BASE]] + b * size, size)
    for p in range(q.states.shape[0]):
        size, home = q.states[p, ROW], bases[q.states[p, BASE]]
        if q.states[p, KEEP] == 0:
            continue
        for b in range(q.rows):
            to, at = q.states[p, KEEP] + ((first + b) * q.steps + t) * size, home + b * size
            if q.back:
                _put(like, q, first + b, t, count, by, to, at, size)
            else:
                for k in range(count):
                    vectors.copy(like, size // 4, (to + k * size, at + k * q.rows * size))
        vectors.copy(like, q.rows * size // 4, (home, home + count * q.rows * size))


@_compile
def _start_fresh(like, q, bases, first, t):
    compiled.apart()
    for p in range(q.states.shape[0]):
        size, to = q.states[p, ROW], bases[q.states[p, BASE]]
        for b in range(q.rows):
            if _cut(q, first + b, t) and not _ended(q, first + b, t):
                vectors.copy(like, size // 4, (to + b * size, q.states[p, FRESH] + (first + b) * size))


@_compile
def _carry(like, q, bases, first, t):
    """What the step at t made of the states becomes what the next one starts from."""
    compiled.apart()
    for p in range(q.states.shape[0]):
        size, now, given = q.states[p, ROW], bases[q.states[p, BASE]], bases[q.states[p, OUT]]
        to = now if q.states[p, KEEP] == 0 else now + q.rows * size
        if q.lengths == 0 and (q.reset == 0 or not q.back):
            vectors.copy(like, q.rows * size // 4, (to, given))
            continue
        for b in range(q.rows):
            if _ended(q, first + b, t):
                if q.back and not _ended(
                    q, first + b, t - 1
                ):  # the adjoint of the last state enters where the row ends
                    vectors.copy(like, size // 4, (to + b * size, q.states[p, AT] + (first + b) * size))
                elif to != now:
                    vectors.copy(like, size // 4, (to + b * size, now + b * size))
                continue
            vectors.copy(like, size // 4, (to + b * size, given + b * size))
            if q.back and _cut(q, first + b, t):
                fresh = q.states[p, FRESH] + (first + b) * size
                vectors.add(like, size // 4, (fresh, fresh, to + b * size))
                vectors.zero(like, size // 4, (to + b * size,))


@_compile
def _move(bases, by, times):
    for i in range(by.shape[0]):
        bases[by[i, 0]] += by[i, 1] * times


@_within
def _rows(like, q, bases, first, scratch):
    """All times of some rows."""
    by = -1 if q.back else 1
    for p in range(q.states.shape[0]):
        size, to = q.states[p, ROW], bases[q.states[p, BASE]]
        for b in range(q.rows):
            if q.back and _ended(q, first + b, q.steps - 1):
                vectors.zero(like, size // 4, (to + b * size,))
            else:
                vectors.copy(like, size // 4, (to + b * size, q.states[p, AT] + (first + b) * size))
    for start in range(0, q.steps, q.tile):
        count, begin = min(q.tile, q.steps - start), q.steps - 1 - start if q.back else start
        _fetch(like, q, bases, first, begin, count, by)
        for k in range(count):
            t = begin + by * k
            if q.reset != 0 and not q.back:
                _start_fresh(like, q, bases, first, t)
            _step(like, q.table, bases, q.numbers, scratch)
            _carry(like, q, bases, first, t)
            _move(bases, q.moves, 1)
            _move(bases, q.advance, 1)
        _move(bases, q.moves, -count)
        _store(like, q, bases, first, begin, count, by)
    for p in range(q.states.shape[0]):
        size = q.states[p, ROW]
        vectors.copy(like, q.rows * size // 4, (q.states[p, LAST] + first * size, bases[q.states[p, BASE]]))


@_compile
def _work(like, q, me):
    compiled.apart()
    if teams.started(me):
        return
    for group in teams.share(q.bases.shape[0], me):
        _rows(like, q, q.bases[group], group * q.rows, q.scratch + me[0] * SCRATCH)


def run(q: Call, workers: int, held: object) -> None:
    """held: what q holds addresses of."""
    teams.call(_work, LIKE, q, workers, (q, held))


def workers(groups: int) -> int:
    """Threads for so many groups of rows."""
    return min(groups, teams.available())


def owners(groups: int, workers: int) -> list[int]:
    """Which thread has each group."""
    return [w for w in range(workers) for _ in range(groups * w // workers, groups * (w + 1) // workers)]
