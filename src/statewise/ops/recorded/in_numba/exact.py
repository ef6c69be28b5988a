"""Operations number by number, for positions, ids and what else is not float32."""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba.core import types

from ...compiled import in_numba as compiled
from .places import FIRST, OPERAND, OUT, floats, indices, pointer_to, strides

_compile = compiled.function

KINDS = {"float32": 1, "float64": 2, "int64": 3, "int32": 4}  # of an operand, where 0 is none
SIZES = 0, 4, 8, 8, 4
_EXACTLY = "copy add mul div where clamp maximum minimum eq gt ge lt le cos sin exp pow gather argmax"
EXACTLY = {name: code for code, name in enumerate(_EXACTLY.split())}
_COPY, _ADD, _MUL, _DIV, _WHERE, _CLAMP, _MAXIMUM, _MINIMUM, _EQ, _GT = range(10)
_GE, _LT, _LE, _COS, _SIN, _EXP, _POW, _GATHER, _ARGMAX = range(10, 19)


_double_at, long_at = pointer_to(ir.DoubleType(), types.float64), pointer_to(ir.IntType(64), types.int64)
_int_at = pointer_to(ir.IntType(32), types.int32)


@_compile
def taken(kind, address):
    """A number as float64."""
    if kind == 1:
        return np.float64(floats(address, 1)[0])
    if kind == 2:
        return numba.carray(_double_at(address), (1,))[0]
    if kind == 3:
        return np.float64(numba.carray(long_at(address), (1,))[0])
    if kind == 4:
        return np.float64(numba.carray(_int_at(address), (1,))[0])
    return 0.0


@_compile
def _given(kind, address, value):
    if kind == 1:
        floats(address, 1)[0] = np.float32(value)
    elif kind == 2:
        numba.carray(_double_at(address), (1,))[0] = value
    elif kind == 3:
        numba.carray(long_at(address), (1,))[0] = np.int64(value)
    else:
        numba.carray(_int_at(address), (1,))[0] = np.int32(value)


@_compile
def _exactly(what, x, y, z, p):
    if what == _ADD:
        return x + p * y
    if what == _MUL:
        return x * y
    if what == _DIV:
        return x / y
    if what == _WHERE:
        return y if x != 0 else z
    if what == _CLAMP:
        least = y if x < y else x
        return z if least > z else least
    if what == _MAXIMUM:
        return y if x < y or y != y else x
    if what == _MINIMUM:
        return y if x > y or y != y else x
    if what == _EQ:
        return 1.0 if x == y else 0.0
    if what == _GT:
        return 1.0 if x > y else 0.0
    if what == _GE:
        return 1.0 if x >= y else 0.0
    if what == _LT:
        return 1.0 if x < y else 0.0
    if what == _LE:
        return 1.0 if x <= y else 0.0
    if what == _COS:
        return math.cos(x)
    if what == _SIN:
        return math.sin(x)
    if what == _EXP:
        return math.exp(x)
    if what == _POW:
        return x**y
    return x


@_compile
def _place(table, i, at, bases):
    base = table[i, at + 1]
    return table[i, at], bases[base] + table[i, at + 2]


@_compile
def _first_of_most(at, step, count):
    best, found = floats(at, 1)[0], 0
    for k in range(1, count):
        value = floats(at + 4 * k * step, 1)[0]
        if value > best or (value != value and best == best):
            best, found = value, k
    return np.float64(found)


@_compile
def compute(table, i, bases, numbers):
    """A group of one operation, whose operands say of what kind they are."""
    compiled.apart()
    what, pq = table[i + 1, 0], numbers + table[i + 1, 1]
    p, q = taken(2, pq), taken(2, pq + 8)
    d1, d2, d3 = table[i, 5], table[i, 6], table[i, 7]
    to, out = _place(table, i + 1, OUT, bases)
    kind_x, x = _place(table, i + 1, FIRST, bases)
    kind_y, y = _place(table, i + 1, FIRST + OPERAND, bases)
    kind_z, z = _place(table, i + 1, FIRST + 2 * OPERAND, bases)
    size_o, size_x, size_y, size_z = SIZES[to], SIZES[kind_x], SIZES[kind_y], SIZES[kind_z]
    o0, o1, o2, o3 = strides(table, i + 1, OUT)
    x0, x1, x2, x3 = strides(table, i + 1, FIRST)
    y0, y1, y2, y3 = strides(table, i + 1, FIRST + OPERAND)
    z0, z1, z2, z3 = strides(table, i + 1, FIRST + 2 * OPERAND)
    for row in range(table[i, 4] * d1 * d2):
        i0, i1, i2, _ = indices(row, (d1, d2, 1))
        at_o, at_x = i0 * o0 + i1 * o1 + i2 * o2, i0 * x0 + i1 * x1 + i2 * x2
        at_y, at_z = i0 * y0 + i1 * y1 + i2 * y2, i0 * z0 + i1 * z1 + i2 * z2
        for k in range(d3):
            here = x + size_x * (at_x + k * x3)
            if what == _ARGMAX:
                value = _first_of_most(here, np.int64(p), np.int64(q))
            else:
                other = taken(kind_y, y + size_y * (at_y + k * y3))
                if what == _GATHER:
                    value = taken(kind_x, here + size_x * np.int64(p) * np.int64(other))
                else:
                    third = taken(kind_z, z + size_z * (at_z + k * z3))
                    value = _exactly(what, taken(kind_x, here), other, third, p)
            _given(to, out + size_o * (at_o + k * o3), value)
