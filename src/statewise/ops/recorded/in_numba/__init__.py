"""Recorded steps, compiled: a table of instructions over vectors in memory, and products that read weights once.

A step at batch 1 is hundreds of small operations between the products that take its time, and Python costs more than
any of them. Here one call runs them all. Operations on the same places go strip by strip, so what passes between them
stays in the nearest cache. Threads share out products and what else is large: the first one goes through the table and
opens each such instruction, whoever is free claims a part of it, and the first waits only for parts that were claimed.

Pointers are integers. Rows of the table, in words: see `rows`, which writes them.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ...compiled import in_numba as compiled
from ...teams import in_numba as teams
from ...vectors import in_numba as vectors
from ...vectors.in_numba import Lanes, code
from . import attention, exact, functions, places, products, sums
from .places import FIRST, LANES, OPERAND, OUT, PLAIN, REGISTER, REGISTERS, SPREAD, STRIP

AHEAD = 3 << 18  # bytes of weights that are fetched before their product begins: they fit the second-level cache
PIECE = 32  # lines of them between two looks at the flag
PATIENCE = 4000  # looks at a flag before another thread is let in

_compile = compiled.function

# ---- instructions

GROUP, PRODUCT, REDUCTION, LOOKUP, EXACT, TILES, ATTEND, JOIN = range(8)  # tiles are run by `recorded_loop`
WIDTH = 32  # words of a row of the table
NEXT = 31  # word of a row that names the row of the next product
ENTRY = 30  # word of a row that has the address of the code for its kind
LIKE = np.float32(0)  # what the vectors are of
FINE, OUT_OF_RANGE = 0, 1  # what code gives


@_compile
def _strip(like, table, i, bases, numbers, scratch, start, count):
    """All operations of a group on count places from `start` on."""
    compiled.apart()
    dims = table[i, 5], table[i, 6], table[i, 7]
    vectors = (count + LANES - 1) // LANES
    for m in range(i + 1, i + 1 + table[i, 2]):
        a = places.operand(like, table, m, FIRST, bases, scratch, 0, start, count, dims)
        b = places.operand(like, table, m, FIRST + OPERAND, bases, scratch, 1, start, count, dims)
        c = places.operand(like, table, m, FIRST + 2 * OPERAND, bases, scratch, 2, start, count, dims)
        mode, base = table[m, OUT], table[m, OUT + 1]
        if mode == REGISTER:
            out = scratch + 4 * STRIP * base
        elif mode == PLAIN and count % LANES == 0:
            out = bases[base] + table[m, OUT + 2] + 4 * start
        else:
            out = scratch + 4 * STRIP * (REGISTERS + 3)
        functions.apply(like, table[m, 0], vectors, (out, a, b, c, numbers + table[m, 1]))
        if mode == PLAIN and count % LANES != 0:
            to = bases[base] + table[m, OUT + 2] + 4 * start
            places.gather(like, to, out, 0, count, (1, 1, count), (0, 0, 0, 1))
        elif mode == SPREAD:
            at = bases[base] + table[m, OUT + 2]
            places.scatter(like, at, out, start, count, dims, places.strides(table, m, OUT))


@_compile
def _read(table, rows, bases):
    """A table and addresses of memory, by their own."""
    return numba.carray(exact.long_at(table), (rows, WIDTH)), numba.carray(exact.long_at(bases), (1,))  # and more


def _group(table_, rows, i, bases_, numbers, scratch, part):
    table, bases = _read(table_, rows, bases_)
    strips, parts = (table[i, 3] + STRIP - 1) // STRIP, table[i, 1]
    for k in range(strips * part // parts, strips * (part + 1) // parts):
        start = k * STRIP
        _strip(LIKE, table, i, bases, numbers, scratch, start, min(STRIP, table[i, 3] - start))
    return FINE


def _product(table_, rows, i, bases_, numbers, scratch, part):
    table, bases = _read(table_, rows, bases_)
    bias = bases[table[i, 6]] + table[i, 7] if table[i, 6] >= 0 else 0
    x, y = bases[table[i, 8]] + table[i, 9], bases[table[i, 10]] + table[i, 11]
    depth, batch, columns = table[i, 12], table[i, 13], table[i, 14]
    start, stop = columns * part // table[i, 1], columns * (part + 1) // table[i, 1]
    products.multiply(LIKE, table[i, 4], table[i, 3], table[i, 5], bias, x, y, start, stop, depth, batch, columns)
    return FINE


def _reduction(table_, rows, i, bases_, numbers, scratch, part):
    table, bases = _read(table_, rows, bases_)
    sums.reduce(LIKE, table, i, bases, numbers, part, table[i, 1])
    return FINE


def _look_up(table_, rows, i, bases_, numbers, scratch, part):
    table, bases = _read(table_, rows, bases_)
    return FINE if products.look_up(table, i, bases) else OUT_OF_RANGE


def _exact(table_, rows, i, bases_, numbers, scratch, part):
    table, bases = _read(table_, rows, bases_)
    exact.compute(table, i, bases, numbers)
    return FINE


def _attend(table_, rows, i, bases_, numbers, scratch, part):
    table, bases = _read(table_, rows, bases_)
    attention.attend(LIKE, table, i, bases, scratch, part)
    return FINE


def _join(table_, rows, i, bases_, numbers, scratch, part):
    table, bases = _read(table_, rows, bases_)
    attention.join(table, i, bases)
    return FINE


_RUN = {
    GROUP: _group, PRODUCT: _product, REDUCTION: _reduction, LOOKUP: _look_up, EXACT: _exact, ATTEND: _attend,
    JOIN: _join,
}  # fmt: skip


def entry(kind: int) -> int:
    """The address of the code for instructions of this kind, which is compiled where it is asked for first."""
    address: Any = compiled.entry(_RUN[kind], 7).address if kind in _RUN else 0
    return int(address)


@_compile
def run_part(table, i, bases, numbers, scratch, part):
    """One part of instruction i."""
    words = table.ctypes.data, table.shape[0], i, bases.ctypes.data, numbers, scratch, part
    return compiled.reach(table[i, ENTRY], words)


@intrinsic
def _put(context, address, value):
    """Let other threads see the value, and everything written before."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        builder.store_atomic(args[1], builder.inttoptr(args[0], word.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@functools.partial(code, addresses=1)
def _fetch(v: Lanes, steps: Any, row: Any, address: Any) -> None:
    """Have so many cache lines brought near."""
    builder, word, byte = v.builder, ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    with cgutils.for_range(builder, steps, intp=steps.type) as loop:
        at = builder.inttoptr(v.at(address, loop.index, vectors.LINE), byte)
        builder.call(fetch, [at, word(0), word(2), word(1)])


OPENED, ROLE, WRONG, CLAIMS = 0, 1, 2, 3  # words of flags; from CLAIMS on two for each row: parts claimed, parts done
CLOSED = -1


@_compile
def _wait(count):
    if count > PATIENCE:
        teams.give_way()
        return 0
    return count + 1


@_compile
def _next_weights(table, i):
    """From where to where the weights of the next product lie, as far as they are fetched ahead."""
    following = table[i, NEXT]
    if following < 0:
        return 0, 0
    start = table[following, 4]
    return start, start + min(AHEAD, table[following, 3] * table[following, 12] * table[following, 14])


@_compile
def _work(like, given, me):
    """One thread's way through a table: who comes first leads, and opens instructions whose parts all may claim.

    In one function, since what it calls is compiled into each caller anew.
    """
    compiled.apart()
    if teams.started(me):
        return
    table, bases, numbers, scratch, flags = given
    own = scratch + me[0] * 4 * STRIP * (REGISTERS + 4)
    leads = teams.claim(flags + 8 * ROLE) == 0
    i, looks = 0, 0
    ahead, end = _next_weights(table, 0)
    while True:
        shared = True
        if leads:
            if i >= table.shape[0]:
                _put(flags + 8 * OPENED, CLOSED)
                return
            shared = me[1] > 1 and table[i, 1] > 1
            if shared:
                _put(flags + 8 * OPENED, i + 1)
        else:
            opened = teams.is_set(flags + 8 * OPENED)
            if opened == CLOSED:
                return
            if opened == i:  # what was shared last, or nothing yet
                if ahead < end:  # meanwhile memory has nothing to do
                    _fetch(like, PIECE, 0, (ahead,))
                    ahead += PIECE * vectors.LINE
                else:
                    looks = _wait(looks)
                continue
            i, looks = opened, 0
        row = i if leads else i - 1
        claims = flags + 8 * (CLAIMS + 2 * row)
        part = teams.claim(claims) if shared else 0
        while part < table[row, 1]:
            if run_part(table, row, bases, numbers, own, part) != FINE:
                _put(flags + 8 * WRONG, 1)
                _put(flags + 8 * OPENED, CLOSED)
                return
            if shared:
                teams.claim(claims + 8)
                part = teams.claim(claims)
            else:
                part += 1
        if leads:
            while shared and teams.is_set(claims + 8) < table[row, 1]:
                looks = _wait(looks)
            i += 1 + table[i, 2]
        else:
            ahead, end = _next_weights(table, row)


def run(
    table: np.ndarray, bases: np.ndarray, numbers: int, scratch: int, flags: np.ndarray, workers: int, held: object
) -> bool:
    """All instructions of a table. False for an id out of range.

    numbers, scratch: addresses; flags: words, all 0, of this call alone; held: what has the addresses.
    """
    given = table, bases, numbers, scratch, flags.ctypes.data
    teams.call(_work, LIKE, given, workers, (held, flags))
    return not flags[WRONG]
