"""The loop over time, compiled: a recorded step, run for a few rows of the batch at a time, with no Python between.

A step reads and writes memory of its own: dense rows that stay in the nearest caches. Before it, inputs at t are copied
there; after it, outputs go to their places, and the new state becomes the old one. Rows that a reset cuts take the
fresh state, or backwards end their adjoint; rows that have ended keep theirs. Each thread runs all times of its rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..compiled import in_numba as compiled
from ..linear_scan import in_numba as rowwise
from ..products import in_numba as products
from ..recorded import in_numba as recorded
from ..teams import in_numba as teams

_compile = compiled.function
PANEL, DEEP = products.PANEL, products.DEEP
LIKE = np.float32(0)
SCRATCH = 4 * recorded.STRIP * (recorded.REGISTERS + 4)  # bytes that a thread's steps need
BASE, ROW, AT = range(3)  # words of a port: which memory of the step, bytes of a row, where the whole lies
FRESH, KEEP, OUT, LAST = range(3, 7)  # of a state's: the state of a reset, (B, T), what the step makes, the last one


class Call(NamedTuple):
    table: Any  # the step
    numbers: int
    bases: Any  # (groups, memories)
    advance: Any  # (memories,), bytes from one time to the next
    inputs: Any  # (ports, words) of what is (B, T, row)
    outputs: Any
    states: Any  # of (B, row)
    batch: int
    rows: int  # of a group
    steps: int
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
                rowwise._copy(like, count, (y + 4 * (b * columns + start), to + b * PANEL))
        panel += depth * PANEL
    if table[i, 11] >= 0:
        bias = bases[table[i, 11]] + table[i, 12]
        for b in range(batch):
            rowwise._sum(like, columns, (y + 4 * b * columns, y + 4 * b * columns, bias))


@_compile
def _step(like, table, bases, numbers, scratch):
    compiled.apart()
    i = 0
    while i < table.shape[0]:
        if table[i, 0] == recorded.TILES:
            _tiles(like, table, i, bases)
        else:
            for part in range(table[i, 1]):
                recorded._part(like, table, i, bases, numbers, scratch, part)
        i += 1 + table[i, 2]


@_compile
def _ended(q, b, t):
    return q.lengths != 0 and t >= rowwise._bits(q.lengths + 4 * b)


@_compile
def _cut(q, b, t):
    return q.reset != 0 and rowwise._byte(q.reset + b * q.steps + t) != 0


@_compile
def _before(like, q, bases, first, rows, t):
    """Inputs and states for the step at t; what they are is kept."""
    compiled.apart()
    for p in range(q.inputs.shape[0]):
        size, to = q.inputs[p, ROW], bases[q.inputs[p, BASE]]
        for b in range(rows):
            at = q.inputs[p, AT] + ((first + b) * q.steps + t) * size
            rowwise._copy(like, size // 4, (to + b * size, at))
    for p in range(q.states.shape[0]):
        size, to = q.states[p, ROW], bases[q.states[p, BASE]]
        for b in range(rows):
            if not q.back and _cut(q, first + b, t) and not _ended(q, first + b, t):
                rowwise._copy(like, size // 4, (to + b * size, q.states[p, FRESH] + (first + b) * size))
            if q.states[p, KEEP] != 0:
                keep = q.states[p, KEEP] + ((first + b) * q.steps + t) * size
                if q.back and _ended(q, first + b, t):
                    rowwise._zero(like, size // 4, (keep,))
                else:
                    rowwise._copy(like, size // 4, (keep, to + b * size))


@_compile
def _after(like, q, bases, first, rows, t):
    """Outputs and the next states of the step at t."""
    compiled.apart()
    for p in range(q.outputs.shape[0]):
        size, given = q.outputs[p, ROW], bases[q.outputs[p, BASE]]
        for b in range(rows):
            to = q.outputs[p, AT] + ((first + b) * q.steps + t) * size
            if _ended(q, first + b, t):
                rowwise._zero(like, size // 4, (to,))
            else:
                rowwise._copy(like, size // 4, (to, given + b * size))
    for p in range(q.states.shape[0]):
        size, to, given = q.states[p, ROW], bases[q.states[p, BASE]], bases[q.states[p, OUT]]
        for b in range(rows):
            if _ended(q, first + b, t):
                continue
            rowwise._copy(like, size // 4, (to + b * size, given + b * size))
            if q.back and _cut(q, first + b, t):
                fresh = q.states[p, FRESH] + (first + b) * size
                rowwise._sum(like, size // 4, (fresh, fresh, to + b * size))
                rowwise._zero(like, size // 4, (to + b * size,))


@_compile
def _work(like, q, me):
    compiled.apart()
    if teams.started(me):
        return
    scratch = q.scratch + me[0] * SCRATCH
    for group in teams.share(q.bases.shape[0], me):
        bases, first = q.bases[group], group * q.rows
        rows = min(q.rows, q.batch - first)
        for p in range(q.states.shape[0]):
            size = q.states[p, ROW]
            rowwise._copy(like, rows * size // 4, (bases[q.states[p, BASE]], q.states[p, AT] + first * size))
        for k in range(q.steps):
            t = q.steps - 1 - k if q.back else k
            _before(like, q, bases, first, rows, t)
            _step(like, q.table, bases, q.numbers, scratch)
            _after(like, q, bases, first, rows, t)
            for m in range(q.advance.shape[0]):
                bases[m] += q.advance[m]
        for p in range(q.states.shape[0]):
            size = q.states[p, ROW]
            rowwise._copy(like, rows * size // 4, (q.states[p, LAST] + first * size, bases[q.states[p, BASE]]))


def run(q: Call, workers: int, held: object) -> None:
    """held: what q holds addresses of."""
    teams.call(_work, LIKE, q, workers, (q, held))


def workers(groups: int) -> int:
    """Threads for so many groups of rows."""
    return min(groups, teams.available())
