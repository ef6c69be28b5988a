"""Code of vectors, for the compiled loops of all ops: written as LLVM's own, since Numba would not make it.

Addresses are integers, so that no aliasing checks stand in a loop and any strides will do. Two kinds of vectors:
`Lanes`, one vector, real, products and sums rounded once where the processor can; and `Row`, any number of channels,
also complex ones, products and sums rounded one by one, so that numbers are those of a plain loop, bit for bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BYTES = 64  # of a vector
LINE = 64  # bytes of a cache line
STREAM = 1 << 22  # bytes from which on results go past the caches: they would not stay there


class Lanes:
    """Code for one vector of BYTES bytes."""

    def __init__(self, builder: Any, like: Any):
        self.builder, self.double, self.size = builder, like.bitwidth == 64, like.bitwidth // 8
        self.count = BYTES // self.size
        self.scalar = ir.DoubleType() if self.double else ir.FloatType()
        self.bits = ir.VectorType(ir.IntType(like.bitwidth), self.count)
        self.type = ir.VectorType(self.scalar, self.count)

    def at(self, base: Any, index: Any, stride: Any) -> Any:
        """base + index * stride, in bytes."""
        stride = stride if isinstance(stride, ir.Value) else base.type(stride)
        return self.builder.add(base, self.builder.mul(index, stride))

    def load(self, address: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, self.type.as_pointer()), align=self.size)

    def store(self, address: Any, value: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, self.type.as_pointer()), align=self.size)

    def splat(self, address: Any) -> Any:
        """One number, in every lane."""
        return self.spread(self.builder.load(self.builder.inttoptr(address, self.scalar.as_pointer()), align=self.size))

    def spread(self, value: Any) -> Any:
        first = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), value, ir.IntType(32)(0))
        return self.shuffle(first, [0] * self.count)

    def full(self, value: float) -> Any:
        return ir.Constant(self.type, [value] * self.count)

    def add(self, p: Any, q: Any) -> Any:
        return self.builder.fadd(p, q, flags=("contract",))

    def mul(self, p: Any, q: Any) -> Any:
        return self.builder.fmul(p, q, flags=("contract",))

    def mad(self, p: Any, q: Any, r: Any) -> Any:
        """p q + r, rounded once where the processor can."""
        return self.add(self.mul(p, q), r)

    def sum(self, address: Any, value: Any) -> None:
        """Store the sum over the lanes, halves first."""
        count = self.count
        while count > 1:
            count //= 2
            value = self.builder.fadd(
                self.shuffle(value, list(range(count))), self.shuffle(value, list(range(count, 2 * count)))
            )
        value = self.builder.extract_element(value, ir.IntType(32)(0))
        self.builder.store(value, self.builder.inttoptr(address, self.scalar.as_pointer()), align=self.size)

    def sums(self, values: list[Any]) -> Any:
        """The sums over the lanes of up to `count` values, one after the other, then zeros."""
        none, far = self.full(0.0), self.count // 2
        found = values + [none] * (self.count - len(values))
        while far:
            # lanes are in blocks of 2 far: in each, the halves of one value are added, then those of another
            low = [i if not i & far else self.count + i - far for i in range(self.count)]
            high = [i + far if not i & far else self.count + i for i in range(self.count)]
            pairs = zip(found[:far], found[far : 2 * far])
            found = [
                none if p is none and q is none else self.builder.fadd(self.mix(p, q, low), self.mix(p, q, high))
                for p, q in pairs
            ]
            far //= 2
        return found[0]

    def exp2(self, z: Any) -> tuple[Any, Any]:
        """2^z in two parts, to be multiplied and added: a power of 2 and the rest, both 0 below the normal numbers."""
        mantissa, terms, range_ = (52, 13, 1023) if self.double else (23, 7, 127)
        least = self.full(-float(range_))
        low = self.builder.select(self.builder.fcmp_ordered("<", z, least), least, z)
        shift = self.full(1.5 * 2.0**mantissa)  # added, it leaves the nearest whole number in the lowest bits
        shifted = self.builder.fadd(low, shift)
        f = self.builder.fsub(low, self.builder.fsub(shifted, shift))
        series = [math.log(2) ** k / math.factorial(k) for k in range(1, terms + 1)]
        rest = self.full(series[-1])
        for k in reversed(series[:-1]):
            rest = self.mad(rest, f, self.full(k))
        exponent = self.builder.add(self.builder.bitcast(shifted, self.bits), self.words(range_))
        power = self.builder.bitcast(self.builder.shl(exponent, self.words(mantissa)), self.type)
        rest = self.builder.fmul(power, self.builder.fmul(rest, f))
        small = self.builder.fcmp_ordered("<", z, self.full(range_ + 0.5))
        return self.builder.select(small, power, self.builder.fmul(z, self.full(math.inf))), rest

    def decayed(self, decay: tuple[Any, Any], value: Any, more: Any = None) -> Any:
        power, rest = decay
        rest = self.mul(rest, value) if more is None else self.mad(rest, value, more)
        return self.mad(power, value, rest)

    def words(self, value: int) -> Any:
        return ir.Constant(self.bits, [value] * self.count)

    def variable(self, value: Any) -> Any:
        slot = cgutils.alloca_once(self.builder, self.type)
        self.builder.store(value, slot)
        return slot

    def mix(self, p: Any, q: Any, order: list[int]) -> Any:
        """Lanes of p, or of q from `count` on, in this order."""
        return self.builder.shuffle_vector(p, q, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))

    def shuffle(self, value: Any, order: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def code(body: Any, addresses: int) -> Any:
    """Compiled f(like, steps, row, (address, ...)) of the body's code; like gives the dtype, row a number of bytes."""

    @intrinsic
    def run(context: Any, like: Any, steps: Any, row: Any, where: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            body(Lanes(builder, like), args[1], args[2], *cgutils.unpack_tuple(builder, args[3], addresses))
            return context.get_dummy_value()

        return types.void(like, types.intp, types.intp, types.UniTuple(types.intp, addresses)), generate

    return run


class Row:
    """Vector code for `count` channels at byte `offset` of each row."""

    def __init__(self, builder: Any, like: Any, count: int, offset: Any):
        self.builder, self.offset, self.complex = builder, offset, isinstance(like, types.Complex)
        real = like.underlying_float if self.complex else like
        self.scalar = ir.FloatType() if real.bitwidth == 32 else ir.DoubleType()
        self.align, self.size = real.bitwidth // 8, count * (2 if self.complex else 1)
        self.type = ir.VectorType(self.scalar, self.size)

    def _at(self, row: Any, offset: Any, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(row, offset), kind.as_pointer())

    def load(self, row: Any) -> Any:
        return self.builder.load(self._at(row, self.offset, self.type), align=self.align)

    def store(self, row: Any, value: Any) -> None:
        self.builder.store(value, self._at(row, self.offset, self.type), align=self.align)

    def stream(self, row: Any, value: Any) -> None:
        """Store past the caches, where a whole line is at hand: it is not read first only to be overwritten."""
        whole = self.size * self.align % LINE == 0
        align = LINE if whole else self.align
        store = self.builder.store(value, self._at(row, self.offset, self.type), align=align)
        if whole:
            flag = self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
            store.set_metadata("nontemporal", flag)

    def first(self, row: Any) -> Any:
        """The first channel of the row, in every lane."""
        width = 2 if self.complex else 1
        kind = ir.VectorType(self.scalar, width)
        value = self.builder.load(self._at(row, ir.Constant(row.type, 0), kind), align=self.align)
        return self.shuffle(value, [i % width for i in range(self.size)])

    def full(self, value: float) -> Any:
        if self.complex:
            return ir.Constant(self.type, [value, 0.0] * (self.size // 2))
        return ir.Constant(self.type, [value] * self.size)

    def add(self, p: Any, q: Any) -> Any:
        return self.builder.fadd(p, q)

    def mul(self, p: Any, q: Any, conj: bool = False) -> Any:
        """p q, or conj(p) q. Complex numbers lie as (re, im) pairs."""
        if not self.complex:
            return self.builder.fmul(p, q)
        each = range(self.size)
        real, imag = self.shuffle(p, [i & ~1 for i in each]), self.shuffle(p, [i | 1 for i in each])
        swapped = self.shuffle(q, [i ^ 1 for i in each])
        cross = self.builder.fmul(imag, swapped)
        sign = ir.Constant(self.type, [1.0, -1.0] * (self.size // 2) if conj else [-1.0, 1.0] * (self.size // 2))
        return self.builder.fadd(self.builder.fmul(real, q), self.builder.fmul(cross, sign))

    def shuffle(self, value: Any, order: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def rowwise(body: Callable[..., None]) -> Any:
    """Compiled f(like, n, (row, ...)): the body's code over n channels; rows are addresses, like gives the dtype."""
    rows = len(inspect.signature(body).parameters) - 1

    @intrinsic
    def run(context: Any, like: Any, n: Any, addresses: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointers, word = cgutils.unpack_tuple(builder, args[2], rows), args[1].type
            start = ir.Constant(word, 0)
            for count in (16, 4, 1):
                stop = builder.and_(args[1], ir.Constant(word, -count))
                with cgutils.for_range_slice(builder, start, stop, ir.Constant(word, count), intp=word) as (index, _):
                    offset = builder.mul(index, ir.Constant(word, like.bitwidth // 8))
                    body(Row(builder, like, count, offset), *pointers)
                start = stop
            return context.get_dummy_value()

        return types.void(like, types.intp, types.UniTuple(types.intp, rows)), generate

    return run


@rowwise
def add(v, out, p, q):
    v.store(out, v.add(v.load(p), v.load(q)))


@rowwise
def copy(v, out, p):
    v.store(out, v.load(p))


@rowwise
def spread(v, out, p):
    v.store(out, v.first(p))


@rowwise
def zero(v, out):
    v.store(out, v.full(0.0))


@rowwise
def one(v, out):
    v.store(out, v.full(1.0))


@intrinsic
def byte(context, address):
    def generate(context, builder, signature, args):
        value = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.zext(value, ir.IntType(64))

    return types.intp(types.intp), generate


@intrinsic
def int32(context, address):
    def generate(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], ir.IntType(32).as_pointer()))

    return types.int32(types.intp), generate


@intrinsic
def real(context, like, address):
    real = like.underlying_float if isinstance(like, types.Complex) else like

    def generate(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[1], context.get_value_type(real).as_pointer()))

    return real(like, types.intp), generate
