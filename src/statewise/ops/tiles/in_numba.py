"""Products of matrices that lie in the nearest caches, as vector code, for use within compiled loops.

A library's product costs a call, a new layout of its factors and a pass over memory for its result. A loop over chunks
of time whose matrices never leave the cache needs none of them: here ROWS rows by one vector of the result stay in
registers while its depth runs, and what a triangle leaves out is not computed. On the processor this was written on
(AVX-512) products of 64 x 64 run at 1.45 times the speed at which MKL multiplies large matrices.

A tile is a 2-D array with contiguous rows, filled up with zeros to whole vectors in both directions.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

from ..compiled import in_numba as compiled
from ..vectors import in_numba as vectors
from ..vectors.in_numba import BYTES, Lanes, code

LOG2 = math.log2(math.e)
LANES = 16  # tiles are filled up to a multiple of this
ROWS = 8 if binding.get_host_cpu_features().get("avx512f") else 4  # of vectors of a result in registers

_compile = compiled.function


def _product_body(
    v: Lanes, depth: Any, row: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, c: Any, c_row: Any, add: Any
) -> None:
    """ROWS rows of one vector of c = a b, or c + a b or c - a b where add is 1 or -1; strides in bytes."""
    builder, word = v.builder, depth.type
    sums = [v.variable(v.full(0.0)) for _ in range(ROWS)]
    rows = [v.at(a, word(i), a_row) for i in range(ROWS)]
    with cgutils.for_range(builder, depth, intp=word) as loop:
        here, along = v.load(v.at(b, loop.index, b_row)), builder.mul(loop.index, a_column)
        for i in range(ROWS):
            builder.store(v.mad(v.splat(builder.add(rows[i], along)), here, builder.load(sums[i])), sums[i])
    with builder.if_else(builder.icmp_signed("!=", add, word(0))) as (more, new):
        with more:
            sign = v.spread(builder.sitofp(add, v.scalar))
            for i in range(ROWS):
                at = v.at(c, word(i), c_row)
                v.store(at, v.mad(sign, builder.load(sums[i]), v.load(at)))
        with new:
            for i in range(ROWS):
                v.store(v.at(c, word(i), c_row), builder.load(sums[i]))


def _turn_body(v: Lanes, steps: Any, row: Any, x: Any, x_row: Any, out: Any, out_row: Any) -> None:
    """A square of one vector each way, transposed: ever larger parts change places."""
    word = steps.type
    rows = [v.load(v.at(x, word(i), x_row)) for i in range(v.count)]
    far = 1
    while far < v.count:
        for i in (i for i in range(v.count) if not i & far):
            low = [j if not j & far else v.count + j - far for j in range(v.count)]
            high = [j + far if not j & far else v.count + j for j in range(v.count)]
            rows[i], rows[i + far] = v.mix(rows[i], rows[i + far], low), v.mix(rows[i], rows[i + far], high)
        far *= 2
    for i in range(v.count):
        v.store(v.at(out, word(i), out_row), rows[i])


def _fetch_body(v: Lanes, steps: Any, row: Any, x: Any, size: Any) -> None:
    """Begin to bring rows of `size` bytes into the second cache."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    begin = v.builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        at = v.at(x, loop.index, row)
        with cgutils.for_range_slice(v.builder, size.type(0), size, size.type(BYTES), intp=size.type) as (offset, _):
            address = v.builder.inttoptr(v.builder.add(at, offset), byte)
            v.builder.call(begin, [address, word(0), word(2), word(1)])  # to read, not so near, data


def _put_body(v: Lanes, steps: Any, row: Any, x: Any, x_row: Any, out: Any, size: Any) -> None:
    """Rows of `size` bytes, in whole lines, past the caches: lines are not read first only to be overwritten."""
    flag = v.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        here, there = v.at(x, loop.index, x_row), v.at(out, loop.index, row)
        with cgutils.for_range_slice(v.builder, size.type(0), size, size.type(BYTES), intp=size.type) as (offset, _):
            to = v.builder.inttoptr(v.builder.add(there, offset), v.type.as_pointer())
            store = v.builder.store(v.load(v.builder.add(here, offset)), to, align=BYTES)
            store.set_metadata("nontemporal", flag)


def _dots_body(v: Lanes, steps: Any, row: Any, p: Any, q: Any, out: Any) -> None:
    """out_i = p_i . q_i"""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        total, i = v.variable(v.full(0.0)), v.builder.mul(loop.index, row)
        with cgutils.for_range_slice(v.builder, row.type(0), row, row.type(BYTES), intp=row.type) as (offset, _):
            p_i, q_i = (v.load(v.builder.add(base, v.builder.add(i, offset))) for base in (p, q))
            v.builder.store(v.mad(p_i, q_i, v.builder.load(total)), total)
        v.sum(v.at(out, loop.index, v.size), v.builder.load(total))


_product, _turn = code(_product_body, 8), code(_turn_body, 4)
_fetch, _put, _dots = code(_fetch_body, 2), code(_put_body, 4), code(_dots_body, 3)


@_compile
def up(n):
    return -(-n // LANES) * LANES


@_compile
def room(like, shape):
    """Zeros that begin with a line of memory: a vector that lies across two takes two loads."""
    compiled.apart()
    count = 1
    for n in shape:
        count *= n
    zeros = np.zeros(count + BYTES // 4, np.asarray(like).dtype)
    skip = -zeros.ctypes.data % BYTES // zeros.itemsize
    return zeros[skip : skip + count].reshape(shape)


@_compile
def window(like, add, rows, columns, depth, a, a_row, a_column, b, b_row, c, c_row):
    """c = a b by addresses and strides in bytes; columns in bytes too. add: 1 for c + a b, -1 for c - a b."""
    compiled.apart()
    for j in range(0, columns, BYTES):
        for i in range(0, rows, ROWS):
            _product(
                like, depth, 0, (a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, np.intp(add))
            )


@_compile
def product(like, add, c, a, b):
    """c = a b; add as in window."""
    row, item = b.shape[1] * b.itemsize, b.itemsize
    window(
        like, add, c.shape[0], row, b.shape[0], a.ctypes.data, a.shape[1] * item, item, b.ctypes.data, row,
        c.ctypes.data, row,
    )  # fmt: skip


@_compile
def turned_product(like, add, c, a, b):
    """c = a^T b; add as in window."""
    row, item = b.shape[1] * b.itemsize, b.itemsize
    window(
        like, add, c.shape[0], row, b.shape[0], a.ctypes.data, item, a.shape[1] * item, b.ctypes.data, row,
        c.ctypes.data, row,
    )  # fmt: skip


@_compile
def lower(like, c, a, b, each=1):
    """The lower triangle of c = a b, in whole blocks; the rest of c stays. each: columns by which a row adds to it."""
    compiled.apart()
    row, item = b.shape[1] * b.itemsize, b.itemsize
    a_row = a.shape[1] * item
    for i in range(0, c.shape[0], ROWS):
        end = min(row, ((i + ROWS) * each * item + BYTES - 1) // BYTES * BYTES)
        window(
            like, 0, ROWS, end, b.shape[0], a.ctypes.data + i * a_row, a_row, item, b.ctypes.data, row,
            c.ctypes.data + i * row, row,
        )  # fmt: skip


@_compile
def lower_product(like, add, c, a, b, each=1):
    """c = a b with a lower triangle a, zero beyond it; add as in window, each as in lower."""
    compiled.apart()
    row, item = b.shape[1] * b.itemsize, b.itemsize
    a_row = a.shape[1] * item
    for i in range(0, c.shape[0], ROWS):
        window(
            like, add, ROWS, row, min(b.shape[0], (i + ROWS) * each), a.ctypes.data + i * a_row, a_row, item,
            b.ctypes.data, row, c.ctypes.data + i * row, row,
        )  # fmt: skip


@_compile
def turned_lower_product(like, add, c, a, b, each=1):
    """c = a^T b, otherwise as lower_product."""
    compiled.apart()
    row, item = b.shape[1] * b.itemsize, b.itemsize
    a_row = a.shape[1] * item
    for j in range(0, c.shape[0], ROWS):
        i = j // each
        window(
            like, add, ROWS, row, b.shape[0] - i, a.ctypes.data + i * a_row + j * item, item, a_row,
            b.ctypes.data + i * row, row, c.ctypes.data + j * row, row,
        )  # fmt: skip


@_compile
def turn(like, out, x):
    """out = x^T."""
    side, row, out_row = BYTES // x.itemsize, x.shape[1] * x.itemsize, out.shape[1] * x.itemsize
    for i in range(0, x.shape[0], side):
        for j in range(0, x.shape[1], side):
            _turn(
                like, 0, 0,
                (x.ctypes.data + i * row + j * x.itemsize, row,
                 out.ctypes.data + j * out_row + i * x.itemsize, out_row),
            )  # fmt: skip


@_compile
def load(tile, x, b, start, steps, head):
    """Steps from `start` on of x (B, T, H, D); zero after `steps` of them."""
    for i in range(steps):
        for d in range(x.shape[3]):
            tile[i, d] = x[b, start + i, head, d]
    tile[steps:] = 0


@_compile
def save(x, tile, b, start, steps, head):
    """The way back."""
    for i in range(steps):
        for d in range(x.shape[3]):
            x[b, start + i, head, d] = tile[i, d]


@_compile
def fetch(like, x, b, start, steps, head):
    """Begin to bring steps of x (B, T, H, D) nearer, which will soon be loaded."""
    compiled.apart()
    if steps > 0:
        size = x.shape[3] * x.itemsize
        row = x.shape[2] * size
        _fetch(like, steps, row, (x.ctypes.data + (b * x.shape[1] + start) * row + head * size, size))


@_compile
def fetch_state(like, state):
    """The same for a state in one piece."""
    compiled.apart()
    _fetch(like, 1, 0, (state.ctypes.data, state.size * state.itemsize))


@_compile
def put(like, x, tile, b, start, steps, head):
    """save, past the caches where x would not stay in them. What does this ends with teams.settle()."""
    compiled.apart()
    size = x.shape[3] * x.itemsize
    row = x.shape[2] * size
    at = x.ctypes.data + (b * x.shape[1] + start) * row + head * size
    if x.size * x.itemsize < vectors.STREAM or at % BYTES or size % BYTES:
        save(x, tile, b, start, steps, head)
    else:
        _put(like, steps, row, (tile.ctypes.data, tile.shape[1] * x.itemsize, at, size))


@_compile
def copy(out, x):
    """out = x, matrices alike. Numba's own assignment compiles what it would say if they were not, for seconds."""
    for k in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[k, j] = x[k, j]


@_compile
def put_state(like, states, b, h, c, state):
    """states[b, h, c] = state, as put."""
    compiled.apart()
    size, out = state.size * state.itemsize, states[b, h, c]
    if states.size * states.itemsize < vectors.STREAM or out.ctypes.data % BYTES:
        copy(out, state)
    else:
        _put(like, 1, 0, (state.ctypes.data, 0, out.ctypes.data, size))


@_compile
def dots(like, out, p, q):
    """out_i = p_i . q_i"""
    compiled.apart()
    _dots(like, p.shape[0], p.shape[1] * p.itemsize, (p.ctypes.data, q.ctypes.data, out.ctypes.data))


@_compile
def pass_on(state, power, rest):
    """Rows of a state times their decays, or all times one, in two parts."""
    for k in range(state.shape[0]):
        p, r = power[k % power.shape[0]], rest[k % power.shape[0]]
        for x in range(state.shape[1]):
            state[k, x] = state[k, x] * p + state[k, x] * r


# ---- decays within a chunk


def grow(v: Lanes, at: Any, g: Any) -> Any:
    """The sums at `at` grow by g; e to them is returned in two parts."""
    total = v.builder.fadd(v.load(at), g)
    v.store(at, total)
    return v.exp2(total)


@functools.partial(code, addresses=4)
def _weigh(v: Lanes, steps: Any, row: Any, sums: Any, g: Any, weights: Any, out: Any):
    """out = weights e^sums over `steps` vectors, once the sums have grown by g."""
    from_g = v.splat(g)
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        at = [v.at(base, loop.index, BYTES) for base in (sums, weights, out)]
        v.store(at[2], v.decayed(grow(v, at[0], from_g), v.load(at[1])))


@functools.partial(code, addresses=2)
def exp2(v: Lanes, steps: Any, row: Any, x: Any, out: Any):
    """out = 2^x, and 2^x - out in the vector `row` bytes further on."""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        power, rest = v.exp2(v.load(v.at(x, loop.index, BYTES)))
        at = v.at(out, loop.index, BYTES)
        v.store(at, power)
        v.store(v.builder.add(at, row), rest)


@_compile
def factors(like, out, whole, logs):
    """From the logs (C) of decays in powers of 2: the factors (2, C) from a chunk's start to each step and from there
    to its end, and that of all of it (2, 1) in two parts."""
    compiled.apart()
    size = logs.shape[0]
    sums, parts = np.empty((2, size), logs.dtype), np.empty((2, 2, size), logs.dtype)
    upto, after = 0.0, 0.0
    for i in range(size):
        upto += logs[i]
        sums[0, i] = upto
        sums[1, size - 1 - i] = after
        after += logs[size - 1 - i]
    row = size * logs.itemsize
    for side in range(2):
        exp2(like, row // BYTES, row, (sums.ctypes.data + side * row, parts.ctypes.data + 2 * side * row))
        for i in range(size):
            out[side, i] = parts[side, 0, i] + parts[side, 1, i]
    whole[0, 0], whole[1, 0] = parts[0, 0, size - 1], parts[0, 1, size - 1]


@_compile
def scale(out, x, factors):
    for i in range(out.shape[0]):
        for d in range(out.shape[1]):
            out[i, d] = x[i, d] * factors[i]


@_compile
def weighed(like, out, weights, logs):
    """e^D times the weights (C, C) of a chunk, 0 above the diagonal."""
    compiled.apart()
    size, item = weights.shape[0], weights.itemsize
    lanes, row = BYTES // item, size * item
    sums = np.full(size, -np.inf, weights.dtype)
    for i in range(size):
        at = i * row
        _weigh(
            like, i // lanes + 1, row,
            (sums.ctypes.data, logs.ctypes.data + i * item, weights.ctypes.data + at, out.ctypes.data + at),
        )  # fmt: skip
        out[i, i] = weights[i, i]
        sums[i] = 0


@functools.partial(_compile, fastmath={"reassoc", "contract"})
def dot(p, q):
    total = p[0] * 0
    for i in range(p.shape[0]):
        total += p[i] * q[i]
    return total
