"""Where operands lie: strips of numbers in memory, in registers, or spread by strides over a tensor.

Addresses are integers. A row of the table says of each operand how it lies, from which base, how many bytes on, and
with which strides.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ...compiled import in_numba as compiled
from ...vectors import in_numba as vectors
from ...vectors.in_numba import Lanes, code

BYTES = vectors.BYTES  # of a vector
LANES = 16  # numbers in a vector
STRIP = 1024  # numbers that go through a group of operations at a time
REGISTERS = 24  # strips of a thread: what passes between operations, and what had to be laid out for them
OUT, FIRST, OPERAND = 2, 9, 7  # where in a row the result stands, the first operand, and words from one to the next
ABSENT, PLAIN, SPREAD, REGISTER = range(4)  # operands: in memory in the order of the places, in another, in a register
_compile = compiled.function


def pointer_to(kind: ir.Type, number: Any) -> Any:
    """Compiled f(address): a pointer to numbers of this kind."""

    @intrinsic
    def pointer(context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], kind.as_pointer())

        return types.CPointer(number)(types.intp), generate

    return pointer


_float_at = pointer_to(ir.FloatType(), types.float32)


@_compile
def floats(address, count):
    return numba.carray(_float_at(address), (count,))


@functools.partial(code, addresses=3)
def _repeat_rows(v: Lanes, steps: Any, row: Any, to: Any, source: Any, vectors: Any) -> None:
    """Each of `steps` numbers, `row` bytes apart, in so many vectors."""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        value, at = v.splat(v.at(source, loop.index, row)), v.at(to, v.builder.mul(loop.index, vectors), BYTES)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            v.store(v.at(at, each.index, BYTES), value)


@functools.partial(code, addresses=3)
def _copy_rows(v: Lanes, steps: Any, row: Any, to: Any, source: Any, vectors: Any) -> None:
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        given, at = v.at(source, loop.index, row), v.at(to, v.builder.mul(loop.index, vectors), BYTES)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            v.store(v.at(at, each.index, BYTES), v.load(v.at(given, each.index, BYTES)))


@_compile
def indices(start, dims):
    """Where in four dimensions, of which the first may be of any size, so many places from the beginning are."""
    d1, d2, d3 = dims
    rest = start // d3
    return rest // d2 // d1, rest // d2 % d1, rest % d2, start % d3


@_compile
def _carried(i0, i1, i2, dims):
    """A row's indices, the last of which may be one too far."""
    d1, d2, _ = dims
    if i2 == d2:
        i2, i1 = 0, i1 + 1
        if i1 == d1:
            i1, i0 = 0, i0 + 1
    return i0, i1, i2


@_compile
def gather(like, to, source, start, count, dims, strides):
    """count places from `start` on, of a tensor with these strides, in a row."""
    compiled.apart()
    s0, s1, s2, s3 = strides
    if s0 == 0 and s1 == 0 and s2 == 0 and s3 == 0:
        start, dims = 0, (dims[0], dims[1], count)
    _, d2, d3 = dims
    whole = d3 % LANES == 0 and start % d3 == 0 and count % d3 == 0 and (s3 == 0 or s3 == 1)
    i0, i1, i2, i3 = indices(start, dims)
    done = 0
    while done < count:
        at = source + 4 * (i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3)
        if whole:  # rows of whole vectors, as many as follow each other
            rows = min(d2 - i2, (count - done) // d3)
            if s3 == 0:
                _repeat_rows(like, rows, 4 * s2, (to + 4 * done, at, d3 // LANES))
            else:
                _copy_rows(like, rows, 4 * s2, (to + 4 * done, at, d3 // LANES))
            i0, i1, i2 = _carried(i0, i1, i2 + rows, dims)
            done += rows * d3
            continue
        run = min(d3 - i3, count - done)
        row = floats(to + 4 * done, run)
        if s3 == 0:
            value = floats(at, 1)[0]
            for j in range(run):
                row[j] = value
        elif s3 == 1:
            given = floats(at, run)
            for j in range(run):
                row[j] = given[j]
        else:
            for j in range(run):
                row[j] = floats(at + 4 * j * s3, 1)[0]
        i0, i1, i2 = _carried(i0, i1, i2 + 1, dims)
        done, i3 = done + run, 0


@_compile
def scatter(like, to, source, start, count, dims, strides):
    """The way back."""
    compiled.apart()
    s0, s1, s2, s3 = strides
    i0, i1, i2, i3 = indices(start, dims)
    done = 0
    while done < count:
        at, run = to + 4 * (i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3), min(dims[2] - i3, count - done)
        if s3 == 1 and run % LANES == 0:
            _copy_rows(like, 1, 0, (at, source + 4 * done, run // LANES))
        else:
            given = floats(source + 4 * done, run)
            for j in range(run):
                floats(at + 4 * j * s3, 1)[0] = given[j]
        i0, i1, i2 = _carried(i0, i1, i2 + 1, dims)
        done, i3 = done + run, 0


@_compile
def strides(table, i, at):
    return table[i, at + 3], table[i, at + 4], table[i, at + 5], table[i, at + 6]


@_compile
def operand(like, table, i, at, bases, scratch, spare, start, count, dims):
    """The address of an operand's strip, laid out in a spare one where it must be."""
    mode, base = table[i, at], table[i, at + 1]
    if mode == ABSENT:
        return 0
    if mode == REGISTER:
        return scratch + 4 * STRIP * base
    source = bases[base] + table[i, at + 2]
    if mode == PLAIN and count % LANES == 0:
        return source + 4 * start
    to = scratch + 4 * STRIP * (REGISTERS + spare)
    if mode == PLAIN:
        gather(like, to, source + 4 * start, 0, count, (1, 1, count), (0, 0, 0, 1))
    else:
        gather(like, to, source, start, count, dims, strides(table, i, at))
    return to
