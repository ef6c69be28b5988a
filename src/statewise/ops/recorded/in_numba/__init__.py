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
def run_part(like, table, i, bases, numbers, scratch, part):
    """One part of instruction i."""
    compiled.apart()
    kind, parts = table[i, 0], table[i, 1]
    if kind == GROUP:
        strips = (table[i, 3] + STRIP - 1) // STRIP
        for k in range(strips * part // parts, strips * (part + 1) // parts):
            start = k * STRIP
            _strip(like, table, i, bases, numbers, scratch, start, min(STRIP, table[i, 3] - start))
    elif kind == PRODUCT:
        bias = bases[table[i, 6]] + table[i, 7] if table[i, 6] >= 0 else 0
        x, y = bases[table[i, 8]] + table[i, 9], bases[table[i, 10]] + table[i, 11]
        depth, batch, columns = table[i, 12], table[i, 13], table[i, 14]
        start, stop = columns * part // parts, columns * (part + 1) // parts
        products.multiply(like, table[i, 4], table[i, 3], table[i, 5], bias, x, y, start, stop, depth, batch, columns)
    elif kind == EXACT:
        exact.compute(table, i, bases, numbers)
    elif kind == ATTEND:
        attention.attend(like, table, i, bases, scratch, part)
    elif kind == JOIN:
        attention.join(table, i, bases)
    else:
        sums.reduce(like, table, i, bases, numbers, part, parts)


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
            if i < table.shape[0] and table[i, 0] == LOOKUP:
                if products.look_up(table, i, bases):
                    i += 1
                    continue
                _put(flags + 8 * WRONG, 1)
                i = table.shape[0]
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
            run_part(like, table, row, bases, numbers, own, part)
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
    teams.call(_work, np.float32(0), given, workers, (held, flags))
    return not flags[WRONG]
