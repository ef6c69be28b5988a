"""Products with weights of float32, bfloat16 and int8, each read once; and rows of an embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from ...compiled import in_numba as compiled
from ...teams import in_numba as teams
from ...vectors.in_numba import Lanes, code
from .places import LANES, floats

UNROLL = 8  # sums at a time, which do not wait for each other
STREAMS = 4  # rows at a time where weights need no conversion
_compile = compiled.function


def _weights(v: Lanes, kind: str, address: Any) -> Any:
    """A vector of weights as float32."""
    if kind == "float32":
        return v.load(address)
    builder, bits = v.builder, 8 if kind == "int8" else 16
    kept = ir.VectorType(ir.IntType(bits), LANES)
    raw = builder.load(builder.inttoptr(address, kept.as_pointer()), align=bits // 8)
    if kind == "int8":
        return builder.sitofp(builder.sext(raw, v.bits), v.type)
    return builder.bitcast(builder.shl(builder.zext(raw, v.bits), v.words(16)), v.type)


def _dot_by(kind: str, size: int, rows: int = 1) -> Any:
    """Products of rows of weights, `row` bytes apart, with x (depth,), depth >= LANES; of results likewise `apart`."""
    unroll = UNROLL // rows

    def body(v: Lanes, depth: Any, row: Any, w: Any, x: Any, out: Any, apart: Any) -> None:
        builder, word = v.builder, depth.type
        sums = [[v.variable(v.full(0.0)) for _ in range(unroll)] for _ in range(rows)]
        starts = [v.at(w, word(r), row) for r in range(rows)]

        def add(k: Any, u: int, own: Any = None) -> None:
            here = v.load(v.at(x, k, 4))
            here = here if own is None else builder.select(own, here, v.full(0.0))
            for r in range(rows):
                weights = _weights(v, kind, v.at(starts[r], k, size))
                weights = weights if own is None else builder.select(own, weights, v.full(0.0))
                builder.store(v.mad(weights, here, builder.load(sums[r][u])), sums[r][u])

        start = word(0)
        for count in dict.fromkeys((unroll, 1)):
            stop = builder.and_(depth, word(-count * LANES))
            with cgutils.for_range_slice(builder, start, stop, word(count * LANES), intp=word) as (k, _):
                for u in range(count):
                    add(builder.add(k, word(u * LANES)), u)
            start = stop
        with builder.if_then(builder.icmp_signed("!=", start, depth)):  # the last vector, without what is counted
            last = builder.sub(depth, word(LANES))
            counted = builder.trunc(builder.sub(start, last), ir.IntType(32))
            first = builder.insert_element(ir.Constant(v.bits, ir.Undefined), counted, ir.IntType(32)(0))
            own = builder.icmp_signed(">=", ir.Constant(v.bits, list(range(LANES))), v.shuffle(first, [0] * LANES))
            add(last, 0, own)
        for r in range(rows):
            total = builder.load(sums[r][0])
            for other in sums[r][1:]:
                total = v.add(total, builder.load(other))
            v.sum(v.at(out, word(r), apart), total)

    return code(body, 4)


_dot_float32, _dot_int8, _dot_bfloat16 = _dot_by("float32", 4), _dot_by("int8", 1), _dot_by("bfloat16", 2)
_dots_float32 = _dot_by("float32", 4, STREAMS)


@intrinsic
def _small(context, like, address, size):
    """A weight of 1 or 2 bytes."""

    def generate(context, builder, signature, args):
        _, address, size = args
        byte, half, word = ir.IntType(8), ir.IntType(16), ir.IntType(32)
        whole = builder.load(builder.inttoptr(address, byte.as_pointer()))
        with builder.if_else(builder.icmp_signed("==", size, size.type(1))) as (one, two):
            with one:
                from_int8 = builder.sitofp(whole, ir.FloatType())
                after_one = builder.block
            with two:
                raw = builder.load(builder.inttoptr(address, half.as_pointer()), align=2)
                from_half = builder.bitcast(builder.shl(builder.zext(raw, word), word(16)), ir.FloatType())
                after_two = builder.block
        found = builder.phi(ir.FloatType())
        found.add_incoming(from_int8, after_one)
        found.add_incoming(from_half, after_two)
        return found

    return types.float32(types.float32, types.intp, types.intp), generate


@_compile
def _weight(w, size, index):
    if size == 4:
        return floats(w, index + 1)[index]
    return _small(np.float32(0), w + index * size, size)


@_compile
def _short_dots(w, size, x, y, start, stop, depth, batch, columns):
    """Rows shorter than a vector."""
    compiled.apart()
    for b in range(batch):
        to, given = floats(y + 4 * b * columns, columns), floats(x + 4 * b * depth, depth)
        for n in range(start, stop):
            total = np.float32(0)
            for k in range(depth):
                total += _weight(w, size, n * depth + k) * given[k]
            to[n] = total


@_compile
def multiply(like, w, size, scale, bias, x, y, start, stop, depth, batch, columns):
    """y (batch, columns) = x (batch, depth) w^T scale + bias for rows start to stop of w, of `size` bytes a weight."""
    compiled.apart()
    row = size * depth
    if depth < LANES:
        _short_dots(w, size, x, y, start, stop, depth, batch, columns)
    elif size == 4:
        apart = (stop - start) // STREAMS  # a processor reads faster in several places at once
        for n in range(start, start + apart):
            for b in range(batch):
                at = w + n * row, x + 4 * b * depth, y + 4 * (b * columns + n), 4 * apart
                _dots_float32(like, depth, apart * row, at)
        for n in range(start + STREAMS * apart, stop):
            for b in range(batch):
                _dot_float32(like, depth, 0, (w + n * row, x + 4 * b * depth, y + 4 * (b * columns + n), 0))
    elif size == 2:
        for n in range(start, stop):
            for b in range(batch):
                _dot_bfloat16(like, depth, 0, (w + n * row, x + 4 * b * depth, y + 4 * (b * columns + n), 0))
    else:
        for n in range(start, stop):
            for b in range(batch):
                _dot_int8(like, depth, 0, (w + n * row, x + 4 * b * depth, y + 4 * (b * columns + n), 0))
    for b in range(batch):
        to = floats(y + 4 * b * columns, columns)
        if scale:
            by = floats(scale, columns)
            for n in range(start, stop):
                to[n] *= by[n]
        if bias:
            more = floats(bias, columns)
            for n in range(start, stop):
                to[n] += more[n]


@_compile
def _product_work(like, given, me):
    if teams.started(me):
        return
    w, size, scale, x, y, depth, batch, columns = given
    share = teams.share(columns, me)
    multiply(like, w, size, scale, 0, x, y, share.start, share.stop, depth, batch, columns)


def product(w: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """x (B, K) float32, w (N, K) float32, bfloat16 or int8, scale (N,) float32, all contiguous -> y (B, N)."""
    (batch, depth), columns = x.shape, len(w)
    y = torch.empty(batch, columns)
    at = 0 if scale is None else scale.data_ptr()
    given = w.data_ptr(), w.element_size(), at, x.data_ptr(), y.data_ptr(), depth, batch, columns
    teams.call(_product_work, np.float32(0), given, teams.workers(w.numel()), (w, scale, x, y))
    return y


@intrinsic
def _id(context, address, size):
    def generate(context, builder, signature, args):
        address, size = args
        long, short = ir.IntType(64), ir.IntType(32)
        with builder.if_else(builder.icmp_signed("==", size, size.type(8))) as (yes, no):
            with yes:
                from_long = builder.load(builder.inttoptr(address, long.as_pointer()), align=8)
                after_long = builder.block
            with no:
                from_short = builder.sext(builder.load(builder.inttoptr(address, short.as_pointer()), align=4), long)
                after_short = builder.block
        found = builder.phi(long)
        found.add_incoming(from_long, after_long)
        found.add_incoming(from_short, after_short)
        return found

    return types.intp(types.intp, types.intp), generate


@_compile
def look_up(table, i, bases):
    """Rows of an embedding. False for an id out of range."""
    compiled.apart()
    ids, size, count = bases[table[i, 3]] + table[i, 4], table[i, 5], table[i, 6]
    w, item, scale, rows, width = table[i, 7], table[i, 8], table[i, 9], table[i, 10], table[i, 11]
    out = bases[table[i, 12]] + table[i, 13]
    for b in range(count):
        found = _id(ids + b * size, size)
        if found < 0 or found >= rows:
            return False
        row = floats(out + 4 * b * width, width)
        for j in range(width):
            row[j] = _weight(w, item, found * width + j)
        if scale:
            by = floats(scale, rows)[found]
            for j in range(width):
                row[j] *= by
    return True
