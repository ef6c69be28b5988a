"""Functions of vectors of float32, without a library: to a few roundings of torch's own, NaN and infinity included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ...vectors.in_numba import BYTES, Lanes
from .places import LANES

LEAST, MOST = -87.33, 88.37  # what e^z takes as normal numbers


def _exp_parts(v: Lanes, z: Any) -> tuple[Any, Any]:
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
    exponent = b.add(b.bitcast(shifted, v.bits), v.words(127))
    power = b.bitcast(b.shl(exponent, v.words(23)), v.type)
    return power, b.fmul(power, b.fmul(rest, f))


def _edges(v: Lanes, z: Any, found: Any, below: float) -> Any:
    """What was found for e^z or e^z - 1 where it is normal; infinite above, NaN for NaN."""
    b = v.builder
    found = b.select(b.fcmp_unordered(">", z, v.full(MOST)), b.fmul(z, v.full(math.inf)), found)
    return b.select(b.fcmp_ordered("<", z, v.full(LEAST)), v.full(below), found)


def exp(v: Lanes, z: Any) -> Any:
    power, rest = _exp_parts(v, z)
    return _edges(v, z, v.builder.fadd(power, rest), 0.0)


def _expm1(v: Lanes, z: Any) -> Any:
    power, rest = _exp_parts(v, z)
    return _edges(v, z, v.builder.fadd(v.builder.fsub(power, v.full(1.0)), rest), -1.0)


def _negative(v: Lanes, x: Any) -> Any:
    return v.builder.fsub(v.full(-0.0), x)


def _size_of(v: Lanes, x: Any) -> Any:
    bits = v.builder.and_(v.builder.bitcast(x, v.bits), v.words(0x7FFFFFFF))
    return v.builder.bitcast(bits, v.type)


def _log1p_of_exp(v: Lanes, z: Any) -> Any:
    """log(1 + e^z) for z <= 0: 2 artanh(y / (2 + y)), y = e^z."""
    b, y = v.builder, exp(v, z)
    s = b.fdiv(y, v.add(y, v.full(2.0)))
    square = v.mul(s, s)
    series = v.full(1 / 15)
    for k in range(13, 0, -2):
        series = v.mad(series, square, v.full(1 / k))
    return v.mul(v.mul(v.full(2.0), s), series)


def _softplus(v: Lanes, x: Any) -> Any:
    above = v.builder.select(v.builder.fcmp_ordered("<", x, v.full(0.0)), v.full(0.0), x)
    return v.add(above, _log1p_of_exp(v, _negative(v, _size_of(v, x))))


def _sigmoid(v: Lanes, x: Any) -> Any:
    return v.builder.fdiv(v.full(1.0), v.add(v.full(1.0), exp(v, _negative(v, x))))


def _tanh(v: Lanes, x: Any) -> Any:
    b, less = v.builder, _expm1(v, v.mul(v.full(-2.0), _size_of(v, x)))
    size = b.fdiv(_negative(v, less), b.fadd(less, v.full(2.0)))
    return b.select(b.fcmp_ordered("<", x, v.full(0.0)), _negative(v, size), size)


def _at_least(v: Lanes, x: Any, least: Any) -> Any:
    return v.builder.select(v.builder.fcmp_ordered("<", x, least), least, x)


def _at_most(v: Lanes, x: Any, most: Any) -> Any:
    return v.builder.select(v.builder.fcmp_ordered(">", x, most), most, x)


def larger(v: Lanes, x: Any, y: Any) -> Any:
    """NaN where either is."""
    b = v.builder
    found = b.select(b.fcmp_ordered("<", x, y), y, x)
    return b.select(b.fcmp_unordered("uno", y, y), y, found)


def _logaddexp(v: Lanes, x: Any, y: Any) -> Any:
    b, most = v.builder, larger(v, x, y)
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


def _series(v: Lanes, factors: tuple[float, ...], x: Any) -> Any:
    found = v.full(factors[-1])
    for factor in reversed(factors[:-1]):
        found = v.mad(found, x, v.full(factor))
    return found


def _erf(v: Lanes, x: Any) -> Any:
    b, square = v.builder, v.mul(x, x)
    near = v.mul(x, _series(v, ERF_NEAR, square))
    far = b.fsub(v.full(1.0), exp(v, _series(v, ERF_FAR, _at_most(v, _size_of(v, x), v.full(4.0)))))
    far = b.select(b.fcmp_ordered("<", x, v.full(0.0)), _negative(v, far), far)
    return b.select(b.fcmp_ordered("<", square, v.full(NEAR)), near, far)


def _gelu(v: Lanes, x: Any) -> Any:
    half = v.mul(x, v.full(0.5))
    return v.mad(half, _erf(v, v.mul(x, v.full(0.5**0.5))), half)


# the parts of pi / 2; times a whole number below 2^50 the first, rounded once, leaves float64 the rest of a float32
QUARTER = math.pi / 2, 6.123233995736766e-17
FAR = 2.0**50


def _turn(v: Lanes, x: Any, quarters: int) -> Any:
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
    number = b.add(b.trunc(b.bitcast(shifted, words), v.bits), v.words(quarters))
    square = v.mul(r, r)
    sin = v.mul(r, _series(v, tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(6)), square))
    cos = _series(v, tuple((-1) ** k / math.factorial(2 * k) for k in range(7)), square)
    odd = b.icmp_signed("!=", b.and_(number, v.words(1)), v.words(0))
    found = b.select(odd, cos, sin)
    negative = b.icmp_signed("!=", b.and_(number, v.words(2)), v.words(0))
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


def _log(v: Lanes, x: Any) -> Any:
    """e log 2 + 2 artanh(f / (2 + f)) of x = 2^e (1 + f), 1 + f from sqrt(1/2) to sqrt(2)."""
    b = v.builder
    small = b.fcmp_ordered("<", x, v.full(2.0**-126))
    bits = b.bitcast(b.select(small, v.mul(x, v.full(2.0**24)), x), v.bits)
    e = b.ashr(b.sub(bits, v.words(0x3F3504F3)), v.words(23))  # of sqrt(1/2)
    f = b.fsub(b.bitcast(b.sub(bits, b.shl(e, v.words(23))), v.type), v.full(1.0))
    e = b.fsub(b.sitofp(e, v.type), b.select(small, v.full(24.0), v.full(0.0)))
    s = b.fdiv(f, b.fadd(f, v.full(2.0)))
    found = v.mul(v.mul(v.full(2.0), s), _series(v, tuple(1 / k for k in range(1, 14, 2)), v.mul(s, s)))
    found = v.mad(e, v.full(0.693359375), v.mad(e, v.full(-2.12194440054690583e-4), found))
    found = b.select(b.fcmp_ordered("<", x, v.full(0.0)), v.full(math.nan), found)
    found = b.select(b.fcmp_ordered("==", x, v.full(0.0)), v.full(-math.inf), found)
    return b.select(b.fcmp_ordered("<", x, v.full(math.inf)), found, x)


def _log1p(v: Lanes, x: Any) -> Any:
    """log(1 + x), by how much 1 + x was rounded."""
    b = v.builder
    whole = b.fadd(x, v.full(1.0))
    rounded = b.fsub(whole, v.full(1.0))
    found = b.fmul(_log(v, whole), b.fdiv(x, rounded))
    plain = b.or_(b.fcmp_ordered("==", rounded, v.full(0.0)), b.fcmp_ordered("==", x, v.full(math.inf)))
    found = b.select(plain, x, found)
    return b.select(b.fcmp_ordered("==", x, v.full(-1.0)), v.full(-math.inf), found)


def _sign(v: Lanes, x: Any) -> Any:
    b = v.builder
    below = b.select(b.fcmp_ordered("<", x, v.full(0.0)), v.full(-1.0), v.full(0.0))
    return b.select(b.fcmp_ordered(">", x, v.full(0.0)), v.full(1.0), below)


def _smaller(v: Lanes, x: Any, y: Any) -> Any:
    return _negative(v, larger(v, _negative(v, x), _negative(v, y)))


def _tanh_adjoint(v: Lanes, g: Any, y: Any) -> Any:
    return v.builder.fmul(g, v.mad(_negative(v, y), y, v.full(1.0)))


def _sigmoid_adjoint(v: Lanes, g: Any, y: Any) -> Any:
    return v.builder.fmul(v.builder.fmul(g, y), v.builder.fsub(v.full(1.0), y))


def _root(v: Lanes, x: Any) -> Any:
    kind = ir.FunctionType(v.type, [v.type])
    return v.builder.call(cgutils.get_or_insert_function(v.builder.module, kind, "llvm.sqrt.v16f32"), [x])


def _choose(v: Lanes, condition: Any, yes: Any, no: Any) -> Any:
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
    "maximum": (2, lambda v, x, y, p, q: larger(v, x, y)),
    "reciprocal": (1, lambda v, x, p, q: v.builder.fdiv(v.full(1.0), x)),
    "rsqrt": (1, lambda v, x, p, q: v.builder.fdiv(v.full(1.0), _root(v, x))),
    "sqrt": (1, lambda v, x, p, q: _root(v, x)),
    "abs": (1, lambda v, x, p, q: _size_of(v, x)),
    "clamp": (1, lambda v, x, p, q: _at_most(v, _at_least(v, x, p), q)),
    "exp": (1, lambda v, x, p, q: exp(v, x)),
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
def apply(context, like, operation, vectors, where):
    """where: the addresses of the result, of three operands (those that there are count) and of p and q."""

    def generate(context, builder, signature, args):
        v, (_, operation, vectors, where) = Lanes(builder, args_like), args
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
