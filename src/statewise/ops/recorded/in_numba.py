"""Recorded steps, compiled: a table of instructions over vectors in memory, and products that read weights once.

A step at batch 1 is hundreds of small operations between the products that take its time, and Python costs more than
any of them. Here one call runs them all. Operations on the same places go strip by strip, so what passes between them
stays in the nearest cache. Threads share out products and what else is large: the first one goes through the table and
opens each such instruction, whoever is free claims a part of it, and the first waits only for parts that were claimed.

Pointers are integers. Rows of the table, in words: see `rows`, which writes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from ..compiled import in_numba as compiled
from ..linear_scan import in_numba as rowwise
from ..selective_scan import in_numba as lanes  # by name, so that its file counts for the cache of compiled code
from ..selective_scan.in_numba import _code, _Lanes
from ..teams import in_numba as teams

BYTES = lanes.BYTES  # of a vector
LANES = 16  # numbers in a vector
STRIP = 1024  # numbers that go through a group of operations at a time
REGISTERS = 24  # strips of a thread: what passes between operations, and what had to be laid out for them
UNROLL = 8  # sums at a time, which do not wait for each other
STREAMS = 4  # rows at a time where weights need no conversion
AHEAD = 3 << 18  # bytes of weights that are fetched before their product begins: they fit the second-level cache
PIECE = 32  # lines of them between two looks at the flag
PATIENCE = 4000  # looks at a flag before another thread is let in

_compile = compiled.function
_fast = functools.partial(_compile, fastmath={"reassoc", "contract", "nsz"})  # NaN and infinity stay what they are


# ---- products


def _weights(v: _Lanes, kind: str, address: Any) -> Any:
    """A vector of weights as float32."""
    if kind == "float32":
        return v.load(address)
    builder, bits = v.builder, 8 if kind == "int8" else 16
    kept = ir.VectorType(ir.IntType(bits), LANES)
    raw = builder.load(builder.inttoptr(address, kept.as_pointer()), align=bits // 8)
    if kind == "int8":
        return builder.sitofp(builder.sext(raw, v.bits), v.type)
    return builder.bitcast(builder.shl(builder.zext(raw, v.bits), v._bits(16)), v.type)


def _dot_by(kind: str, size: int, rows: int = 1) -> Any:
    """Products of rows of weights, `row` bytes apart, with x (depth,), depth >= LANES; of results likewise `apart`."""
    unroll = UNROLL // rows

    def body(v: _Lanes, depth: Any, row: Any, w: Any, x: Any, out: Any, apart: Any) -> None:
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
            own = builder.icmp_signed(">=", ir.Constant(v.bits, list(range(LANES))), v._shuffle(first, [0] * LANES))
            add(last, 0, own)
        for r in range(rows):
            total = builder.load(sums[r][0])
            for other in sums[r][1:]:
                total = v.add(total, builder.load(other))
            v.sum(v.at(out, word(r), apart), total)

    return _code(body, 4)


_dot_float32, _dot_int8, _dot_bfloat16 = _dot_by("float32", 4), _dot_by("int8", 1), _dot_by("bfloat16", 2)
_dots_float32 = _dot_by("float32", 4, STREAMS)


@intrinsic
def _pointer(context, address):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.intp), generate


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
def _floats(address, count):
    return numba.carray(_pointer(address), (count,))


@_compile
def _weight(w, size, index):
    if size == 4:
        return _floats(w, index + 1)[index]
    return _small(np.float32(0), w + index * size, size)


@_compile
def _short_dots(w, size, x, y, start, stop, depth, batch, columns):
    """Rows shorter than a vector."""
    compiled.apart()
    for b in range(batch):
        to, given = _floats(y + 4 * b * columns, columns), _floats(x + 4 * b * depth, depth)
        for n in range(start, stop):
            total = np.float32(0)
            for k in range(depth):
                total += _weight(w, size, n * depth + k) * given[k]
            to[n] = total


@_compile
def products(like, w, size, scale, bias, x, y, start, stop, depth, batch, columns):
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
        to = _floats(y + 4 * b * columns, columns)
        if scale:
            by = _floats(scale, columns)
            for n in range(start, stop):
                to[n] *= by[n]
        if bias:
            more = _floats(bias, columns)
            for n in range(start, stop):
                to[n] += more[n]


@_compile
def _product_work(like, given, me):
    if teams.started(me):
        return
    w, size, scale, x, y, depth, batch, columns = given
    share = teams.share(columns, me)
    products(like, w, size, scale, 0, x, y, share.start, share.stop, depth, batch, columns)


def product(w: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """x (B, K) float32, w (N, K) float32, bfloat16 or int8, scale (N,) float32, all contiguous -> y (B, N)."""
    (batch, depth), columns = x.shape, len(w)
    y = torch.empty(batch, columns)
    at = 0 if scale is None else scale.data_ptr()
    given = w.data_ptr(), w.element_size(), at, x.data_ptr(), y.data_ptr(), depth, batch, columns
    teams.call(_product_work, np.float32(0), given, teams.workers(w.numel()), (w, scale, x, y))
    return y


# ---- operations on vectors


LEAST, MOST = -87.33, 88.37  # what e^z takes as normal numbers


def _exp(v: _Lanes, z: Any) -> tuple[Any, Any]:
    """e^z in two parts, to be added: a power of 2 and the rest. For z from LEAST to MOST."""
    b = v.builder
    shift = v.full(1.5 * 2.0**23)  # added, it leaves the nearest whole number in the lowest bits
    shifted = b.fadd(b.fmul(z, v.full(1 / math.log(2))), shift)
    whole = b.fsub(shifted, shift)
    f = v.mad(whole, v.full(-0.693359375), z)  # the first part of log 2 has few bits: the product is exact
    f = v.mad(whole, v.full(2.12194440054690583e-4), f)
    series = [1 / math.factorial(k) for k in range(1, 8)]
    rest = v.full(series[-1])
    for k in reversed(series[:-1]):
        rest = v.mad(rest, f, v.full(k))
    exponent = b.add(b.bitcast(shifted, v.bits), v._bits(127))
    power = b.bitcast(b.shl(exponent, v._bits(23)), v.type)
    return power, b.fmul(power, b.fmul(rest, f))


def _edges(v: _Lanes, z: Any, found: Any, below: float) -> Any:
    """What was found for e^z or e^z - 1 where it is normal; infinite above, NaN for NaN."""
    b = v.builder
    found = b.select(b.fcmp_unordered(">", z, v.full(MOST)), b.fmul(z, v.full(math.inf)), found)
    return b.select(b.fcmp_ordered("<", z, v.full(LEAST)), v.full(below), found)


def _exp_of(v: _Lanes, z: Any) -> Any:
    power, rest = _exp(v, z)
    return _edges(v, z, v.builder.fadd(power, rest), 0.0)


def _expm1(v: _Lanes, z: Any) -> Any:
    power, rest = _exp(v, z)
    return _edges(v, z, v.builder.fadd(v.builder.fsub(power, v.full(1.0)), rest), -1.0)


def _negative(v: _Lanes, x: Any) -> Any:
    return v.builder.fsub(v.full(-0.0), x)


def _size_of(v: _Lanes, x: Any) -> Any:
    bits = v.builder.and_(v.builder.bitcast(x, v.bits), v._bits(0x7FFFFFFF))
    return v.builder.bitcast(bits, v.type)


def _log1p_of_exp(v: _Lanes, z: Any) -> Any:
    """log(1 + e^z) for z <= 0: 2 artanh(y / (2 + y)), y = e^z."""
    b, y = v.builder, _exp_of(v, z)
    s = b.fdiv(y, v.add(y, v.full(2.0)))
    square = v.mul(s, s)
    series = v.full(1 / 15)
    for k in range(13, 0, -2):
        series = v.mad(series, square, v.full(1 / k))
    return v.mul(v.mul(v.full(2.0), s), series)


def _softplus(v: _Lanes, x: Any) -> Any:
    above = v.builder.select(v.builder.fcmp_ordered("<", x, v.full(0.0)), v.full(0.0), x)
    return v.add(above, _log1p_of_exp(v, _negative(v, _size_of(v, x))))


def _sigmoid(v: _Lanes, x: Any) -> Any:
    return v.builder.fdiv(v.full(1.0), v.add(v.full(1.0), _exp_of(v, _negative(v, x))))


def _tanh(v: _Lanes, x: Any) -> Any:
    b, less = v.builder, _expm1(v, v.mul(v.full(-2.0), _size_of(v, x)))
    size = b.fdiv(_negative(v, less), b.fadd(less, v.full(2.0)))
    return b.select(b.fcmp_ordered("<", x, v.full(0.0)), _negative(v, size), size)


def _at_least(v: _Lanes, x: Any, least: Any) -> Any:
    return v.builder.select(v.builder.fcmp_ordered("<", x, least), least, x)


def _at_most(v: _Lanes, x: Any, most: Any) -> Any:
    return v.builder.select(v.builder.fcmp_ordered(">", x, most), most, x)


def _larger(v: _Lanes, x: Any, y: Any) -> Any:
    """NaN where either is."""
    b = v.builder
    found = b.select(b.fcmp_ordered("<", x, y), y, x)
    return b.select(b.fcmp_unordered("uno", y, y), y, found)


def _logaddexp(v: _Lanes, x: Any, y: Any) -> Any:
    b, most = v.builder, _larger(v, x, y)
    apart = _size_of(v, b.fsub(x, y))  # NaN where both are the same infinity
    apart = b.select(b.fcmp_ordered("==", x, y), v.full(0.0), apart)
    return b.fadd(most, _log1p_of_exp(v, _negative(v, apart)))


# erf: x times a polynomial of x^2 up to NEAR, then 1 - exp of one of |x|; both are Chebyshev fits, off by 2e-7 at most
NEAR = 0.9
ERF_NEAR = (
    1.12837917, -0.376126387, 0.112837867, -0.0268657214, 0.00522198761, -0.000850010773, 0.000113984864,
    -1.00955675e-05,
)  # fmt: skip
ERF_FAR = (
    0.000334540859, -1.13031767, -0.631625999, -0.110338149, 0.0266227383, -0.00485932046, 0.000628239634,
    -5.217786e-05, 2.30780125e-06, -3.16354122e-08,
)  # fmt: skip


def _series(v: _Lanes, factors: tuple[float, ...], x: Any) -> Any:
    found = v.full(factors[-1])
    for factor in reversed(factors[:-1]):
        found = v.mad(found, x, v.full(factor))
    return found


def _erf(v: _Lanes, x: Any) -> Any:
    b, square = v.builder, v.mul(x, x)
    near = v.mul(x, _series(v, ERF_NEAR, square))
    far = b.fsub(v.full(1.0), _exp_of(v, _series(v, ERF_FAR, _at_most(v, _size_of(v, x), v.full(4.0)))))
    far = b.select(b.fcmp_ordered("<", x, v.full(0.0)), _negative(v, far), far)
    return b.select(b.fcmp_ordered("<", square, v.full(NEAR)), near, far)


def _gelu(v: _Lanes, x: Any) -> Any:
    half = v.mul(x, v.full(0.5))
    return v.mad(half, _erf(v, v.mul(x, v.full(0.5**0.5))), half)


# the parts of pi / 2; times a whole number below 2^50 the first, rounded once, leaves float64 the rest of a float32
QUARTER = math.pi / 2, 6.123233995736766e-17
FAR = 2.0**50


def _turn(v: _Lanes, x: Any, quarters: int) -> Any:
    """sin(x + quarters pi / 2)."""
    b, doubles, words = v.builder, ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.IntType(64), LANES)
    full = lambda value: ir.Constant(doubles, [value] * LANES)
    kind = ir.FunctionType(doubles, [doubles] * 3)
    fma = cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f64")  # rounded once
    wide, shift = b.fpext(x, doubles), full(1.5 * 2.0**52)  # added, it leaves the nearest whole number in the last bits
    shifted = b.fadd(b.fmul(wide, full(2 / math.pi)), shift)
    whole = b.fsub(shifted, shift)
    for part in QUARTER:
        wide = b.call(fma, [whole, full(-part), wide])
    r = b.fptrunc(wide, v.type)
    number = b.add(b.trunc(b.bitcast(shifted, words), v.bits), v._bits(quarters))
    square = v.mul(r, r)
    sin = v.mul(r, _series(v, tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(6)), square))
    cos = _series(v, tuple((-1) ** k / math.factorial(2 * k) for k in range(7)), square)
    odd = b.icmp_signed("!=", b.and_(number, v._bits(1)), v._bits(0))
    found = b.select(odd, cos, sin)
    negative = b.icmp_signed("!=", b.and_(number, v._bits(2)), v._bits(0))
    result = v.variable(b.select(negative, _negative(v, found), found))
    far = b.bitcast(b.fcmp_ordered(">=", _size_of(v, x), v.full(FAR)), ir.IntType(LANES))
    with b.if_then(b.icmp_signed("!=", far, far.type(0)), likely=False):  # numbers that only a library turns right
        one = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        each = cgutils.get_or_insert_function(b.module, one, f"llvm.{'cos' if quarters else 'sin'}.f32")
        slow = ir.Constant(v.type, ir.Undefined)
        for lane in range(LANES):
            index = ir.IntType(32)(lane)
            slow = b.insert_element(slow, b.call(each, [b.extract_element(x, index)]), index)
        b.store(slow, result)
    return b.load(result)


def _log(v: _Lanes, x: Any) -> Any:
    """e log 2 + 2 artanh(f / (2 + f)) of x = 2^e (1 + f), 1 + f from sqrt(1/2) to sqrt(2)."""
    b = v.builder
    small = b.fcmp_ordered("<", x, v.full(2.0**-126))
    bits = b.bitcast(b.select(small, v.mul(x, v.full(2.0**24)), x), v.bits)
    e = b.ashr(b.sub(bits, v._bits(0x3F3504F3)), v._bits(23))  # of sqrt(1/2)
    f = b.fsub(b.bitcast(b.sub(bits, b.shl(e, v._bits(23))), v.type), v.full(1.0))
    e = b.fsub(b.sitofp(e, v.type), b.select(small, v.full(24.0), v.full(0.0)))
    s = b.fdiv(f, b.fadd(f, v.full(2.0)))
    found = v.mul(v.mul(v.full(2.0), s), _series(v, tuple(1 / k for k in range(1, 14, 2)), v.mul(s, s)))
    found = v.mad(e, v.full(0.693359375), v.mad(e, v.full(-2.12194440054690583e-4), found))
    found = b.select(b.fcmp_ordered("<", x, v.full(0.0)), v.full(math.nan), found)
    found = b.select(b.fcmp_ordered("==", x, v.full(0.0)), v.full(-math.inf), found)
    return b.select(b.fcmp_ordered("<", x, v.full(math.inf)), found, x)


def _log1p(v: _Lanes, x: Any) -> Any:
    """log(1 + x), by how much 1 + x was rounded."""
    b = v.builder
    whole = b.fadd(x, v.full(1.0))
    rounded = b.fsub(whole, v.full(1.0))
    found = b.fmul(_log(v, whole), b.fdiv(x, rounded))
    plain = b.or_(b.fcmp_ordered("==", rounded, v.full(0.0)), b.fcmp_ordered("==", x, v.full(math.inf)))
    found = b.select(plain, x, found)
    return b.select(b.fcmp_ordered("==", x, v.full(-1.0)), v.full(-math.inf), found)


def _sign(v: _Lanes, x: Any) -> Any:
    b = v.builder
    below = b.select(b.fcmp_ordered("<", x, v.full(0.0)), v.full(-1.0), v.full(0.0))
    return b.select(b.fcmp_ordered(">", x, v.full(0.0)), v.full(1.0), below)


def _smaller(v: _Lanes, x: Any, y: Any) -> Any:
    return _negative(v, _larger(v, _negative(v, x), _negative(v, y)))


def _tanh_adjoint(v: _Lanes, g: Any, y: Any) -> Any:
    return v.builder.fmul(g, v.mad(_negative(v, y), y, v.full(1.0)))


def _sigmoid_adjoint(v: _Lanes, g: Any, y: Any) -> Any:
    return v.builder.fmul(v.builder.fmul(g, y), v.builder.fsub(v.full(1.0), y))


def _root(v: _Lanes, x: Any) -> Any:
    kind = ir.FunctionType(v.type, [v.type])
    return v.builder.call(cgutils.get_or_insert_function(v.builder.module, kind, "llvm.sqrt.v16f32"), [x])


def _choose(v: _Lanes, condition: Any, yes: Any, no: Any) -> Any:
    return v.builder.select(v.builder.fcmp_unordered("!=", condition, v.full(0.0)), yes, no)


def _compared(how: str) -> tuple[int, Callable[..., Any]]:
    return 2, lambda v, x, y, p, q: v.builder.select(v.builder.fcmp_ordered(how, x, y), v.full(1.0), v.full(0.0))


def _compared_with_p(how: str) -> tuple[int, Callable[..., Any]]:
    return 1, lambda v, x, p, q: v.builder.select(v.builder.fcmp_ordered(how, x, p), v.full(1.0), v.full(0.0))


# name: how many operands, and f(v, *operands, p, q) with the numbers p and q in every lane
OPERATIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "copy": (1, lambda v, x, p, q: x),
    "affine": (1, lambda v, x, p, q: v.mad(p, x, q)),
    "add": (2, lambda v, x, y, p, q: v.mad(p, y, x)),
    "mul": (2, lambda v, x, y, p, q: v.builder.fmul(x, y)),
    "div": (2, lambda v, x, y, p, q: v.builder.fdiv(x, y)),
    "addcmul": (3, lambda v, x, y, z, p, q: v.mad(v.builder.fmul(p, y), z, x)),
    "maximum": (2, lambda v, x, y, p, q: _larger(v, x, y)),
    "reciprocal": (1, lambda v, x, p, q: v.builder.fdiv(v.full(1.0), x)),
    "rsqrt": (1, lambda v, x, p, q: v.builder.fdiv(v.full(1.0), _root(v, x))),
    "sqrt": (1, lambda v, x, p, q: _root(v, x)),
    "abs": (1, lambda v, x, p, q: _size_of(v, x)),
    "clamp": (1, lambda v, x, p, q: _at_most(v, _at_least(v, x, p), q)),
    "exp": (1, lambda v, x, p, q: _exp_of(v, x)),
    "expm1": (1, lambda v, x, p, q: _expm1(v, x)),
    "sigmoid": (1, lambda v, x, p, q: _sigmoid(v, x)),
    "silu": (1, lambda v, x, p, q: v.mul(x, _sigmoid(v, x))),
    "tanh": (1, lambda v, x, p, q: _tanh(v, x)),
    "softplus": (1, lambda v, x, p, q: _softplus(v, x)),
    "log_sigmoid": (1, lambda v, x, p, q: _negative(v, _softplus(v, _negative(v, x)))),
    "gelu": (1, lambda v, x, p, q: _gelu(v, x)),
    "logaddexp": (2, lambda v, x, y, p, q: _logaddexp(v, x, y)),
    "gt": _compared(">"),
    "ge": _compared(">="),
    "lt": _compared("<"),
    "le": _compared("<="),
    "eq": _compared("=="),
    "gt p": _compared_with_p(">"),
    "ge p": _compared_with_p(">="),
    "lt p": _compared_with_p("<"),
    "le p": _compared_with_p("<="),
    "eq p": _compared_with_p("=="),
    "where": (3, lambda v, x, y, z, p, q: _choose(v, x, y, z)),
    "sin": (1, lambda v, x, p, q: _turn(v, x, 0)),
    "cos": (1, lambda v, x, p, q: _turn(v, x, 1)),
    "log": (1, lambda v, x, p, q: _log(v, x)),
    "log1p": (1, lambda v, x, p, q: _log1p(v, x)),
    "sign": (1, lambda v, x, p, q: _sign(v, x)),
    "minimum": (2, lambda v, x, y, p, q: _smaller(v, x, y)),
    "tanh adjoint": (2, lambda v, x, y, p, q: _tanh_adjoint(v, x, y)),
    "sigmoid adjoint": (2, lambda v, x, y, p, q: _sigmoid_adjoint(v, x, y)),
}
CODES = {name: code for code, name in enumerate(OPERATIONS)}


@intrinsic
def _apply(context, like, operation, vectors, where):
    """where: the addresses of the result, of three operands (those that there are count) and of p and q."""

    def generate(context, builder, signature, args):
        v, (_, operation, vectors, where) = _Lanes(builder, args_like), args
        out, *operands, numbers = cgutils.unpack_tuple(builder, where, 5)
        end = builder.append_basic_block("end")
        switch = builder.switch(operation, end)
        for name, (count, f) in OPERATIONS.items():
            block = builder.append_basic_block(name)
            switch.add_case(operation.type(CODES[name]), block)
            with builder.goto_block(block):
                p, q = v.splat(numbers), v.splat(builder.add(numbers, numbers.type(4)))
                with cgutils.for_range(builder, vectors, intp=vectors.type) as loop:
                    values = [v.load(v.at(operand, loop.index, BYTES)) for operand in operands[:count]]
                    v.store(v.at(out, loop.index, BYTES), f(v, *values, p, q))
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    args_like = like
    return types.void(like, types.intp, types.intp, types.UniTuple(types.intp, 5)), generate


# ---- instructions

GROUP, PRODUCT, REDUCTION, LOOKUP, EXACT, TILES, ATTEND, JOIN = range(8)  # tiles are run by `recorded_loop`
WIDTH = 32  # words of a row of the table
NEXT = 31  # word of a row that names the row of the next product
OUT, FIRST, OPERAND = 2, 9, 7  # where in a row the result stands, the first operand, and words from one to the next
ABSENT, PLAIN, SPREAD, REGISTER = range(4)  # operands: in memory in the order of the places, in another, in a register
SUM, MAXIMUM = range(2)


@functools.partial(_code, addresses=3)
def _repeat_rows(v: _Lanes, steps: Any, row: Any, to: Any, source: Any, vectors: Any) -> None:
    """Each of `steps` numbers, `row` bytes apart, in so many vectors."""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        value, at = v.splat(v.at(source, loop.index, row)), v.at(to, v.builder.mul(loop.index, vectors), BYTES)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            v.store(v.at(at, each.index, BYTES), value)


@functools.partial(_code, addresses=3)
def _copy_rows(v: _Lanes, steps: Any, row: Any, to: Any, source: Any, vectors: Any) -> None:
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        given, at = v.at(source, loop.index, row), v.at(to, v.builder.mul(loop.index, vectors), BYTES)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            v.store(v.at(at, each.index, BYTES), v.load(v.at(given, each.index, BYTES)))


@functools.partial(_code, addresses=3)
def _sum_rows(v: _Lanes, steps: Any, row: Any, to: Any, source: Any, vectors: Any) -> None:
    """The sums of rows of so many vectors, `row` bytes apart."""
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        given, total = v.at(source, loop.index, row), v.variable(v.full(0.0))
        v.builder.store(v.full(0.0), total)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            v.builder.store(v.add(v.builder.load(total), v.load(v.at(given, each.index, BYTES))), total)
        v.sum(v.at(to, loop.index, 4), v.builder.load(total))


@_compile
def _indices(start, dims):
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
def _gather(like, to, source, start, count, dims, strides):
    """count places from `start` on, of a tensor with these strides, in a row."""
    compiled.apart()
    s0, s1, s2, s3 = strides
    if s0 == 0 and s1 == 0 and s2 == 0 and s3 == 0:
        start, dims = 0, (dims[0], dims[1], count)
    _, d2, d3 = dims
    whole = d3 % LANES == 0 and start % d3 == 0 and count % d3 == 0 and (s3 == 0 or s3 == 1)
    i0, i1, i2, i3 = _indices(start, dims)
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
        row = _floats(to + 4 * done, run)
        if s3 == 0:
            value = _floats(at, 1)[0]
            for j in range(run):
                row[j] = value
        elif s3 == 1:
            given = _floats(at, run)
            for j in range(run):
                row[j] = given[j]
        else:
            for j in range(run):
                row[j] = _floats(at + 4 * j * s3, 1)[0]
        i0, i1, i2 = _carried(i0, i1, i2 + 1, dims)
        done, i3 = done + run, 0


@_compile
def _scatter(like, to, source, start, count, dims, strides):
    """The way back."""
    compiled.apart()
    s0, s1, s2, s3 = strides
    i0, i1, i2, i3 = _indices(start, dims)
    done = 0
    while done < count:
        at, run = to + 4 * (i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3), min(dims[2] - i3, count - done)
        if s3 == 1 and run % LANES == 0:
            _copy_rows(like, 1, 0, (at, source + 4 * done, run // LANES))
        else:
            given = _floats(source + 4 * done, run)
            for j in range(run):
                _floats(at + 4 * j * s3, 1)[0] = given[j]
        i0, i1, i2 = _carried(i0, i1, i2 + 1, dims)
        done, i3 = done + run, 0


@_compile
def _strides(table, i, at):
    return table[i, at + 3], table[i, at + 4], table[i, at + 5], table[i, at + 6]


@_compile
def _operand(like, table, i, at, bases, scratch, spare, start, count, dims):
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
        _gather(like, to, source + 4 * start, 0, count, (1, 1, count), (0, 0, 0, 1))
    else:
        _gather(like, to, source, start, count, dims, _strides(table, i, at))
    return to


@_compile
def _strip(like, table, i, bases, numbers, scratch, start, count):
    """All operations of a group on count places from `start` on."""
    compiled.apart()
    dims = table[i, 5], table[i, 6], table[i, 7]
    vectors = (count + LANES - 1) // LANES
    for m in range(i + 1, i + 1 + table[i, 2]):
        a = _operand(like, table, m, FIRST, bases, scratch, 0, start, count, dims)
        b = _operand(like, table, m, FIRST + OPERAND, bases, scratch, 1, start, count, dims)
        c = _operand(like, table, m, FIRST + 2 * OPERAND, bases, scratch, 2, start, count, dims)
        mode, base = table[m, OUT], table[m, OUT + 1]
        if mode == REGISTER:
            out = scratch + 4 * STRIP * base
        elif mode == PLAIN and count % LANES == 0:
            out = bases[base] + table[m, OUT + 2] + 4 * start
        else:
            out = scratch + 4 * STRIP * (REGISTERS + 3)
        _apply(like, table[m, 0], vectors, (out, a, b, c, numbers + table[m, 1]))
        if mode == PLAIN and count % LANES != 0:
            to = bases[base] + table[m, OUT + 2] + 4 * start
            _gather(like, to, out, 0, count, (1, 1, count), (0, 0, 0, 1))
        elif mode == SPREAD:
            _scatter(like, bases[base] + table[m, OUT + 2], out, start, count, dims, _strides(table, m, OUT))


@_fast
def _row_sum(address, count):
    compiled.apart()
    row, total = _floats(address, count), np.float32(0)
    for j in range(count):
        total += row[j]
    return total


@_compile
def _reduce(like, table, i, bases, numbers, part, parts):
    """Places kept (k0, k1, k2), which the result has in this order, and places (r0, r1) that go."""
    compiled.apart()
    what = table[i, 3]
    out, source = bases[table[i, 4]] + table[i, 5], bases[table[i, 6]] + table[i, 7]
    k0, k1, k2, r0, r1 = table[i, 8], table[i, 9], table[i, 10], table[i, 11], table[i, 12]
    s0, s1, s2, t0, t1 = table[i, 13], table[i, 14], table[i, 15], table[i, 16], table[i, 17]
    factor = _floats(numbers + table[i, 18], 1)[0]
    if what == SUM and s2 == 1 and t1 != 1:  # whole rows at a time
        for k in range(k0 * k1 * part // parts, k0 * k1 * (part + 1) // parts):
            at, to = source + 4 * (k // k1 * s0 + k % k1 * s1), out + 4 * k * k2
            rowwise._zero(like, k2, (to,))
            for r in range(r0 * r1):
                rowwise._sum(like, k2, (to, to, at + 4 * (r // r1 * t0 + r % r1 * t1)))
            if factor != 1:
                row = _floats(to, k2)
                for j in range(k2):
                    row[j] *= factor
        return
    total = k0 * k1 * k2
    start, stop = total * part // parts, total * (part + 1) // parts
    if what == SUM and k0 == 1 and k1 == 1 and r0 == 1 and t1 == 1 and r1 % LANES == 0:
        _sum_rows(like, stop - start, 4 * s2, (out + 4 * start, source + 4 * start * s2, r1 // LANES))
        if factor != 1:
            row = _floats(out, total)
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
                        found += _floats(at + 4 * (r * t0 + q * t1), 1)[0]
            found *= factor
        else:
            found = np.float32(-np.inf)
            for r in range(r0):
                for q in range(r1):
                    value = _floats(at + 4 * (r * t0 + q * t1), 1)[0]
                    found = value if value > found or value != value else found
        _floats(out + 4 * k, 1)[0] = found


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
def _look_up(table, i, bases):
    """Rows of an embedding. False for an id out of range."""
    compiled.apart()
    ids, size, count = bases[table[i, 3]] + table[i, 4], table[i, 5], table[i, 6]
    w, item, scale, rows, width = table[i, 7], table[i, 8], table[i, 9], table[i, 10], table[i, 11]
    out = bases[table[i, 12]] + table[i, 13]
    for b in range(count):
        found = _id(ids + b * size, size)
        if found < 0 or found >= rows:
            return False
        row = _floats(out + 4 * b * width, width)
        for j in range(width):
            row[j] = _weight(w, item, found * width + j)
        if scale:
            by = _floats(scale, rows)[found]
            for j in range(width):
                row[j] *= by
    return True


KINDS = {"float32": 1, "float64": 2, "int64": 3, "int32": 4}  # of an operand, where 0 is none
SIZES = 0, 4, 8, 8, 4
_EXACTLY = "copy add mul div where clamp maximum minimum eq gt ge lt le cos sin exp pow gather argmax"
EXACTLY = {name: code for code, name in enumerate(_EXACTLY.split())}
_COPY, _ADD, _MUL, _DIV, _WHERE, _CLAMP, _MAXIMUM, _MINIMUM, _EQ, _GT = range(10)
_GE, _LT, _LE, _COS, _SIN, _EXP, _POW, _GATHER, _ARGMAX = range(10, 19)


def _number_at(kind: ir.Type, number: Any) -> Any:
    @intrinsic
    def pointer(context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], kind.as_pointer())

        return types.CPointer(number)(types.intp), generate

    return pointer


_double_at, _long_at = _number_at(ir.DoubleType(), types.float64), _number_at(ir.IntType(64), types.int64)
_int_at = _number_at(ir.IntType(32), types.int32)


@_compile
def _taken(kind, address):
    """A number as float64."""
    if kind == 1:
        return np.float64(_floats(address, 1)[0])
    if kind == 2:
        return numba.carray(_double_at(address), (1,))[0]
    if kind == 3:
        return np.float64(numba.carray(_long_at(address), (1,))[0])
    if kind == 4:
        return np.float64(numba.carray(_int_at(address), (1,))[0])
    return 0.0


@_compile
def _given(kind, address, value):
    if kind == 1:
        _floats(address, 1)[0] = np.float32(value)
    elif kind == 2:
        numba.carray(_double_at(address), (1,))[0] = value
    elif kind == 3:
        numba.carray(_long_at(address), (1,))[0] = np.int64(value)
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
    best, found = _floats(at, 1)[0], 0
    for k in range(1, count):
        value = _floats(at + 4 * k * step, 1)[0]
        if value > best or (value != value and best == best):
            best, found = value, k
    return np.float64(found)


@_compile
def _exact(table, i, bases, numbers):
    """A group of one operation, whose operands say of what kind they are."""
    compiled.apart()
    what, pq = table[i + 1, 0], numbers + table[i + 1, 1]
    p, q = _taken(2, pq), _taken(2, pq + 8)
    d1, d2, d3 = table[i, 5], table[i, 6], table[i, 7]
    to, out = _place(table, i + 1, OUT, bases)
    kind_x, x = _place(table, i + 1, FIRST, bases)
    kind_y, y = _place(table, i + 1, FIRST + OPERAND, bases)
    kind_z, z = _place(table, i + 1, FIRST + 2 * OPERAND, bases)
    size_o, size_x, size_y, size_z = SIZES[to], SIZES[kind_x], SIZES[kind_y], SIZES[kind_z]
    o0, o1, o2, o3 = _strides(table, i + 1, OUT)
    x0, x1, x2, x3 = _strides(table, i + 1, FIRST)
    y0, y1, y2, y3 = _strides(table, i + 1, FIRST + OPERAND)
    z0, z1, z2, z3 = _strides(table, i + 1, FIRST + 2 * OPERAND)
    for row in range(table[i, 4] * d1 * d2):
        i0, i1, i2, _ = _indices(row, (d1, d2, 1))
        at_o, at_x = i0 * o0 + i1 * o1 + i2 * o2, i0 * x0 + i1 * x1 + i2 * x2
        at_y, at_z = i0 * y0 + i1 * y1 + i2 * y2, i0 * z0 + i1 * z1 + i2 * z2
        for k in range(d3):
            here = x + size_x * (at_x + k * x3)
            if what == _ARGMAX:
                value = _first_of_most(here, np.int64(p), np.int64(q))
            else:
                other = _taken(kind_y, y + size_y * (at_y + k * y3))
                if what == _GATHER:
                    value = _taken(kind_x, here + size_x * np.int64(p) * np.int64(other))
                else:
                    third = _taken(kind_z, z + size_z * (at_z + k * z3))
                    value = _exactly(what, _taken(kind_x, here), other, third, p)
            _given(to, out + size_o * (at_o + k * o3), value)


@functools.partial(_code, addresses=3)
def _look_at(v: _Lanes, steps: Any, row: Any, at: Any, bad: Any, vectors: Any) -> None:
    """`bad` becomes NaN where one of `steps` rows of so many vectors is not finite. They are in the cache then."""
    found = v.variable(v.load(bad))
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        here = v.at(at, loop.index, row)
        with cgutils.for_range(v.builder, vectors, intp=steps.type) as each:
            value = v.load(v.at(here, each.index, BYTES))
            v.builder.store(v.mad(value, v.full(0.0), v.builder.load(found)), found)
    v.store(bad, v.builder.load(found))


def _most(v: _Lanes, x: Any) -> Any:
    """The largest of a vector, in every lane; NaN where one is."""
    count = v.count
    while count > 1:
        count //= 2
        x = _larger(v, x, v._shuffle(x, [(i + count) % v.count for i in range(v.count)]))
    return x


@functools.partial(_code, addresses=8)
def _attend_to(
    v: _Lanes,
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
    most = _larger(v, before, _most(v, score))
    weight, fade = _exp_of(v, b.fsub(score, most)), _exp_of(v, b.fsub(before, most))
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
    asked, state = _floats(q, size), _floats(found, size + 2)
    for j in range(count):
        key, value = _floats(k + j * row, size), _floats(v + j * away, size)
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
    row, found = _floats(at, count), False
    for c in range(count):
        found |= not np.isfinite(row[c])
    return found


@_compile
def _attend(like, table, i, bases, scratch, part):
    """A part of the rows of keys and values that each of the batch sees, LANES at a time."""
    compiled.apart()
    parts = table[i, 1]
    q, k, v = bases[table[i, 3]] + table[i, 4], bases[table[i, 5]] + table[i, 6], bases[table[i, 9]] + table[i, 10]
    k_next, k_row, v_next, v_row = table[i, 7], table[i, 8], table[i, 11], table[i, 12]
    position, apart, kind = bases[table[i, 13]] + table[i, 14], table[i, 15], table[i, 16]
    batch, rows, groups, heads, size = table[i, 19], table[i, 20], table[i, 21], table[i, 22], table[i, 23]
    partial = bases[table[i, 17]] + table[i, 18] + 4 * part * batch * heads * (size + 2)
    spare, scale = _floats(scratch, 3 * LANES), np.float32(1 / math.sqrt(size))
    spare[2 * LANES] = scale
    whole = size % LANES == 0
    for b in range(batch):
        seen = min(np.int64(_taken(kind, position + b * apart)), rows - 1) + 1
        first = rows - seen
        start, stop = first + seen * part // parts, first + seen * (part + 1) // parts
        bad = False
        for n in range(LANES):
            spare[LANES + n] = 0
        own = partial + 4 * b * heads * (size + 2)
        state = _floats(own, heads * (size + 2))
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
def _join(table, i, bases):
    """What the parts gave, as one."""
    compiled.apart()
    parts, partial, y = table[i, 3], bases[table[i, 4]] + table[i, 5], bases[table[i, 6]] + table[i, 7]
    rows, size = table[i, 8], table[i, 9]
    given = _floats(partial, parts * rows * (size + 2))
    for r in range(rows):
        most, total, to = np.float32(-np.inf), np.float32(0), _floats(y + 4 * r * size, size)
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


@_compile
def _part(like, table, i, bases, numbers, scratch, part):
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
        products(like, table[i, 4], table[i, 3], table[i, 5], bias, x, y, start, stop, depth, batch, columns)
    elif kind == EXACT:
        _exact(table, i, bases, numbers)
    elif kind == ATTEND:
        _attend(like, table, i, bases, scratch, part)
    elif kind == JOIN:
        _join(table, i, bases)
    else:
        _reduce(like, table, i, bases, numbers, part, parts)


@intrinsic
def _put(context, address, value):
    """Let other threads see the value, and everything written before."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        builder.store_atomic(args[1], builder.inttoptr(args[0], word.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@functools.partial(_code, addresses=1)
def _fetch(v: _Lanes, steps: Any, row: Any, address: Any) -> None:
    """Have so many cache lines brought near."""
    builder, word, byte = v.builder, ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    with cgutils.for_range(builder, steps, intp=steps.type) as loop:
        at = builder.inttoptr(v.at(address, loop.index, rowwise.LINE), byte)
        builder.call(fetch, [at, word(0), word(2), word(1)])


OPENED, ROLE, WRONG, CLAIMS = 0, 1, 2, 3  # words of flags; from CLAIMS on two for each row: parts claimed, parts done
CLOSED = -1


@_compile
def _share(like, table, i, bases, numbers, scratch, flags):
    """Parts of instruction i until none is left."""
    claims = flags + 8 * (CLAIMS + 2 * i)
    while True:
        part: Any = teams.claim(claims)
        if part >= table[i, 1]:
            return
        _part(like, table, i, bases, numbers, scratch, part)
        teams.claim(claims + 8)


@_compile
def _wait(count):
    if count > PATIENCE:
        teams.give_way()
        return 0
    return count + 1


@_compile
def _lead(like, table, bases, numbers, scratch, flags, workers):
    compiled.apart()
    i = 0
    while i < table.shape[0]:
        if table[i, 0] == LOOKUP:
            if not _look_up(table, i, bases):
                _put(flags + 8 * WRONG, 1)
                break
        elif workers == 1 or table[i, 1] == 1:
            for part in range(table[i, 1]):
                _part(like, table, i, bases, numbers, scratch, part)
        else:
            _put(flags + 8 * OPENED, i + 1)
            _share(like, table, i, bases, numbers, scratch, flags)
            looks = 0
            while teams.is_set(flags + 8 * (CLAIMS + 2 * i + 1)) < table[i, 1]:
                looks = _wait(looks)
        i += 1 + table[i, 2]
    _put(flags + 8 * OPENED, CLOSED)


@_compile
def _next_weights(table, i):
    """From where to where the weights of the next product lie, as far as they are fetched ahead."""
    following = table[i, NEXT]
    if following < 0:
        return 0, 0
    start = table[following, 4]
    return start, start + min(AHEAD, table[following, 3] * table[following, 12] * table[following, 14])


@_compile
def _follow(like, table, bases, numbers, scratch, flags):
    compiled.apart()
    seen, looks = 0, 0
    ahead, end = _next_weights(table, 0)
    while True:
        opened = teams.is_set(flags + 8 * OPENED)
        if opened == CLOSED:
            return
        if opened != seen:
            _share(like, table, opened - 1, bases, numbers, scratch, flags)
            seen, looks = opened, 0
            ahead, end = _next_weights(table, opened - 1)
        elif ahead < end:  # meanwhile memory has nothing to do
            _fetch(like, PIECE, 0, (ahead,))
            ahead += PIECE * rowwise.LINE
        else:
            looks = _wait(looks)


@_compile
def _work(like, given, me):
    compiled.apart()
    if teams.started(me):
        return
    table, bases, numbers, scratch, flags = given
    own = scratch + me[0] * 4 * STRIP * (REGISTERS + 4)
    if teams.claim(flags + 8 * ROLE) == 0:
        _lead(like, table, bases, numbers, own, flags, me[1])
    else:
        _follow(like, table, bases, numbers, own, flags)


def run(
    table: np.ndarray, bases: np.ndarray, numbers: int, scratch: int, flags: np.ndarray, workers: int, held: object
) -> bool:
    """All instructions of a table. False for an id out of range.

    numbers, scratch: addresses; flags: words, all 0, of this call alone; held: what has the addresses.
    """
    given = table, bases, numbers, scratch, flags.ctypes.data
    teams.call(_work, np.float32(0), given, workers, (held, flags))
    return not flags[WRONG]
