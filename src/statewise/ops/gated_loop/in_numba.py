"""Compiled loops over time: what is recurrent in registers and the nearest caches, all the rest as large products.

The inputs of the gates are one product over all of time. A step is then h R^T, in tiles of rows by columns whose sums
stay in registers, R laid out in panels of a tile's width; and the cell, unit by unit, on vectors. The gates overwrite
their inputs and are what backward needs. Backward walks time with the gradients of the gates and R; what they mean for
weights and inputs are again products over all of time.

Threads share out heads and rows of the batch, which know nothing of each other. Where there are too few of those they
share out the units of a row: then each wants all of h_{t-1}, and they wait for each other once a step.

A row that has ended is passed over; a reset hands it other memory to read the past from: zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from ..compiled import in_numba as compiled
from ..fresh import empty
from ..opaque import opaque
from ..products import in_numba as products
from ..products.in_numba import PANEL
from ..teams import in_numba as teams
from ..vectors import in_numba as vectors
from .cells import fresh_slstm
from .in_aten import jordan_by

BYTES = vectors.BYTES  # of a vector
NEAR = 1 << 23  # bytes of a stretch's gates: the third-level cache holds them and what else is wanted
PAD = 64  # bytes between rows of h, or rows a power of 2 apart would share a few lines of the cache
ALONE = 1 << 20  # multiplications below which a second thread costs more than it brings

_compile = compiled.function


class _Problem(NamedTuple):
    """Sizes, addresses, and strides in bytes. The class of the tuple says which cell it is."""

    item: int  # bytes of a number
    batch: int
    steps: int  # of h and all that is kept: the times from one row of the batch to the next
    stretch: int  # steps to be walked, which begin where the addresses of these point
    width: int  # N
    heads: int
    gates: int
    parts: int  # tensors of the state
    groups: int  # of rows
    members: int  # threads that share the units of a row
    teams: int
    units: int  # of a member
    panels: int
    keep: int  # forward: whether the gates are to overwrite their inputs and more is to be kept for each step
    x: int  # forward: (B, stretch, G N), the gates' inputs, then the gates; backward: their gradients
    gates_at: int  # backward: (B, T, G N)
    w: int  # (H, members, panels, rows of a panel, its columns)
    outer: int  # (G N,), added to the gates' inputs
    inner: int  # (N,), inside the product with r
    leak: int  # one number
    h: int  # (B, T, N)
    more: int  # (parts, B, T, N), what else backward needs, the state's other parts first; T is 1 if not to be kept
    more_gap: int
    spare: int  # per thread, (G N,): what need not be kept goes there
    first: int  # (S, B, N) the state before the first step
    fresh: int  # (S, N) the state that a reset leaves
    zero: int  # (G N,)
    reset: int  # (B, T) bytes, or 0
    ends: int  # (B,) words
    dh: int  # backward: (B, T, N)
    d_last: int  # (S, B, N)
    d_first: int  # (S, B, N)
    d_more: int  # (B, stretch, N), the gradient of what the bias is added to
    near: int  # per team, twice: a row of h or of the gates' gradients for each row
    near_row: int
    near_size: int
    sums: int  # per thread, the product of a step
    sums_row: int
    sums_size: int
    side: int  # per thread, (rows, parts, units): gradients that go back in time beside the product's
    side_row: int
    side_size: int
    meeting: int  # per team, a line of the cache: how often someone came


class ElmanTanh(_Problem): ...


class ElmanRelu(_Problem): ...


class LeakyTanh(_Problem): ...


class LeakyRelu(_Problem): ...


class Gru(_Problem): ...


class Lstm(_Problem): ...


class SlstmSigmoid(_Problem): ...


class SlstmExp(_Problem): ...


# ---- the cells


class _Units(vectors.Lanes):
    """Vector code for `count` units at byte `offset` of each row."""

    def __init__(self, builder: Any, like: Any, count: int, offset: Any):
        super().__init__(builder, like)
        self.count, self.offset = count, offset
        self.bits = ir.VectorType(ir.IntType(like.bitwidth), count)
        self.type = ir.VectorType(self.scalar, count)

    def read(self, row: Any, part: int = 0, gap: Any = None) -> _Number:
        return _Number(self, self.load(self._place(row, part, gap)))

    def write(self, value: _Number, row: Any, part: int = 0, gap: Any = None) -> None:
        self.store(self._place(row, part, gap), value.value)

    def one(self, address: Any) -> _Number:
        return _Number(self, self.splat(address))

    def _place(self, row: Any, part: int, gap: Any) -> Any:
        here = self.builder.add(row, self.offset)
        return self.at(here, here.type(part), gap) if part else here


class _Number:
    """A vector of numbers in code that is being written."""

    def __init__(self, v: _Units, value: Any):
        self.v, self.value = v, value

    def _of(self, other: _Number | float) -> Any:
        return other.value if isinstance(other, _Number) else self.v.full(float(other))

    def __add__(self, other: _Number | float) -> _Number:
        return _Number(self.v, self.v.add(self.value, self._of(other)))

    def __mul__(self, other: _Number | float) -> _Number:
        return _Number(self.v, self.v.mul(self.value, self._of(other)))

    def __sub__(self, other: _Number | float) -> _Number:
        return _Number(self.v, self.v.builder.fsub(self.value, self._of(other), flags=("contract",)))

    def __rsub__(self, other: float) -> _Number:
        return _Number(self.v, self.v.builder.fsub(self._of(other), self.value, flags=("contract",)))

    def __truediv__(self, other: _Number | float) -> _Number:
        return _Number(self.v, self.v.builder.fdiv(self.value, self._of(other)))

    def __rtruediv__(self, other: float) -> _Number:
        return _Number(self.v, self.v.builder.fdiv(self._of(other), self.value))

    def __neg__(self) -> _Number:
        return self * -1.0

    def where(self, relation: str, bound: _Number | float, yes: _Number | float, no: _Number | float) -> _Number:
        """yes where `self relation bound`, else no: so too where there is a NaN."""
        holds = self.v.builder.fcmp_ordered(relation, self.value, self._of(bound))
        return _Number(self.v, self.v.builder.select(holds, self._of(yes), self._of(no)))

    def abs(self) -> _Number:
        return self.where("<", 0.0, -self, self)

    def exp(self) -> _Number:
        z, most = self * (1 / np.log(2)), 1022.0 if self.v.double else 126.0
        power, rest = self.v.exp2(z.where(">", most, most, z).value)
        return _Number(self.v, self.v.add(power, rest))

    def sigmoid(self) -> _Number:
        return 1.0 / ((-self).exp() + 1.0)

    def tanh(self) -> _Number:
        """-m / (2 + m) with m = e^(-2|x|) - 1, from the two parts of the exponential: exact near 0 too."""
        power, rest = self.v.exp2((self.abs() * (-2 / np.log(2))).value)
        less = _Number(self.v, self.v.builder.fadd(self.v.builder.fsub(power, self.v.full(1.0)), rest))
        size = less / (less + 2.0)
        return self.where("<", 0.0, size, -size)

    def log1p(self) -> _Number:
        """log(1 + x) for x from 0 to 1: 2 artanh(x / (2 + x))."""
        s = self / (self + 2.0)
        square, terms = s * s, 17 if self.v.double else 8
        total = square * 0.0 + 1 / (2 * terms + 1)
        for k in reversed(range(terms)):
            total = total * square + 1 / (2 * k + 1)
        return total * s * 2.0


class _Here(NamedTuple):
    """Forward: where a row of units finds things at one step, and the bytes from one gate, or part, to the next."""

    gates: Any
    gate_gap: Any
    kept: Any  # where the gates go
    sums: Any
    sum_gap: Any
    outer: Any
    inner: Any
    leak: Any
    before: Any  # h_{t-1}
    after: Any  # h_t, near
    out: Any  # h_t, for good
    more: Any
    more_gap: Any
    past: Any  # the state's other parts at t - 1
    past_gap: Any


class _Back(NamedTuple):
    """The same of backward."""

    gates: Any
    gate_gap: Any
    leak: Any
    out: Any
    before: Any
    more: Any
    more_gap: Any
    past: Any
    past_gap: Any
    dh: Any
    sums: Any  # the gradient of h_t that comes by way of t + 1
    side: Any  # and that of the other parts
    side_gap: Any
    to: Any  # where those for t - 1 go
    to_gap: Any
    d_gates: Any
    d_near: Any  # the same, near: of the product with R
    near_gap: Any
    d_more: Any


def _pre(v: _Units, at: _Here, gate: int) -> _Number:
    return _given(v, at, gate) + v.read(at.sums, gate, at.sum_gap)


def _given(v: _Units, at: _Here, gate: int) -> _Number:
    return v.read(at.gates, gate, at.gate_gap) + v.read(at.outer, gate, at.gate_gap)


def _settle(v: _Units, at: _Here, h: _Number, *gates: _Number) -> None:
    for g, gate in enumerate(gates):
        v.write(gate, at.kept, g, at.gate_gap)
    v.write(h, at.after)
    v.write(h, at.out)


def _hand_back(v: _Units, at: _Back, *grads: _Number) -> None:
    for g, grad in enumerate(grads):
        v.write(grad, at.d_gates, g, at.gate_gap)
        v.write(grad, at.d_near, g, at.near_gap)


def _elman(act: Callable[[_Number], _Number], leaky: bool) -> Callable[[_Units, _Here], None]:
    def forward(v: _Units, at: _Here) -> None:
        new = act(_pre(v, at, 0))
        if leaky:
            leak, before = v.one(at.leak), v.read(at.before)
            v.write(new, at.kept)
            new = before * (1.0 - leak) + leak * new
        _settle(v, at, new)

    return forward


def _elman_back(slope: Callable[[_Number], _Number], leaky: bool) -> Callable[[_Units, _Back], None]:
    def backward(v: _Units, at: _Back) -> None:
        dh = v.read(at.dh) + v.read(at.sums)
        if leaky:
            dh, leak = dh + v.read(at.side), v.one(at.leak)
            v.write(dh * (1.0 - leak), at.to)
            dh = dh * leak
        _hand_back(v, at, dh * slope(v.read(at.gates if leaky else at.out)))

    return backward


def _relu(x: _Number) -> _Number:
    return x.where("<", 0.0, 0.0, x)


def _step(y: _Number) -> _Number:
    return y.where(">", 0.0, 1.0, 0.0)


def _flatness(y: _Number) -> _Number:
    return 1.0 - y * y


def _gru(v: _Units, at: _Here) -> None:
    r, z = _pre(v, at, 0).sigmoid(), _pre(v, at, 1).sigmoid()
    heard = v.read(at.sums, 2, at.sum_gap) + v.read(at.inner)
    n = (_given(v, at, 2) + r * heard).tanh()
    v.write(heard, at.more)
    _settle(v, at, n + z * (v.read(at.before) - n), r, z, n)


def _gru_back(v: _Units, at: _Back) -> None:
    r, z, n = (v.read(at.gates, g, at.gate_gap) for g in range(3))
    dh = v.read(at.dh) + (v.read(at.sums) + v.read(at.side))
    v.write(dh * z, at.to)
    dz = dh * (v.read(at.before) - n) * (z * (1.0 - z))
    dn = dh * (1.0 - z) * _flatness(n)
    dr = dn * v.read(at.more) * (r * (1.0 - r))
    _hand_back(v, at, dr, dz)
    v.write(dn, at.d_gates, 2, at.gate_gap)
    v.write(dn * r, at.d_near, 2, at.near_gap)
    v.write(dn * r, at.d_more)


def _lstm(v: _Units, at: _Here) -> None:
    i, f, o = (_pre(v, at, g).sigmoid() for g in (0, 1, 3))
    g = _pre(v, at, 2).tanh()
    c = f * v.read(at.past) + i * g
    v.write(c, at.more)
    _settle(v, at, o * c.tanh(), i, f, g, o)


def _lstm_back(v: _Units, at: _Back) -> None:
    i, f, g, o = (v.read(at.gates, k, at.gate_gap) for k in range(4))
    shown = v.read(at.more).tanh()
    dh = v.read(at.dh) + v.read(at.sums)
    dc = v.read(at.side) + dh * o * _flatness(shown)
    v.write(dc * f, at.to)
    _hand_back(
        v, at, dc * g * (i * (1.0 - i)), dc * v.read(at.past) * (f * (1.0 - f)), dc * i * _flatness(g),
        dh * shown * (o * (1.0 - o)),
    )  # fmt: skip


def _slstm(exponential: bool) -> Callable[[_Units, _Here], None]:
    def forward(v: _Units, at: _Here) -> None:
        i, f, o = _pre(v, at, 0), _pre(v, at, 1), _pre(v, at, 3).sigmoid()
        z = _pre(v, at, 2).tanh()
        c, n, m = (v.read(at.past, part, at.past_gap) for part in range(3))
        log, slope = (f, f * 0.0 + 1.0) if exponential else (_log_sigmoid(f), (-f).sigmoid())
        kept = log + m
        new = i.where(">", kept, i, kept)
        write, keep = (i - new).exp(), (kept - new).exp()
        c, n = keep * c + write * z, keep * n + write
        for part, value in enumerate((c, n, new, slope)):
            v.write(value, at.more, part, at.more_gap)
        _settle(v, at, o * c / n, write, keep, z, o)

    return forward


def _log_sigmoid(x: _Number) -> _Number:
    return x.where("<", 0.0, x, 0.0) - (-x.abs()).exp().log1p()


def _slstm_back(v: _Units, at: _Back) -> None:
    write, keep, z, o = (v.read(at.gates, g, at.gate_gap) for g in range(4))
    c, n, _, slope = (v.read(at.more, part, at.more_gap) for part in range(4))
    dc, dn, dm = (v.read(at.side, part, at.side_gap) for part in range(3))
    dh, shown = v.read(at.dh) + v.read(at.sums), c / n
    pull = dh * o / n
    dc, dn = dc + pull, dn - pull * shown
    d_write, d_keep = (dc * z + dn) * write, (dc * v.read(at.past) + dn * v.read(at.past, 1, at.past_gap)) * keep
    dm = dm - d_write - d_keep
    # of write and keep one is 1: the larger one gave m, and keep where they are equal
    di, dl = keep.where("<", 1.0, d_write + dm, d_write), keep.where("<", 1.0, d_keep, d_keep + dm)
    for part, value in enumerate((dc * keep, dn * keep, dl)):
        v.write(value, at.to, part, at.to_gap)
    _hand_back(v, at, di, dl * slope, dc * write * _flatness(z), dh * shown * (o * (1.0 - o)))


class _Cell(NamedTuple):
    problem: type[_Problem]
    gates: int
    parts: int  # tensors of the state
    more: int  # tensors that forward keeps beside the gates
    side: int  # gradients that go back in time beside the product's
    forward: Callable[[_Units, _Here], None]
    backward: Callable[[_Units, _Back], None]


CELLS = {
    "elman_tanh": _Cell(ElmanTanh, 1, 1, 0, 0, _elman(_Number.tanh, False), _elman_back(_flatness, False)),
    "elman_relu": _Cell(ElmanRelu, 1, 1, 0, 0, _elman(_relu, False), _elman_back(_step, False)),
    "leaky_tanh": _Cell(LeakyTanh, 1, 1, 0, 1, _elman(_Number.tanh, True), _elman_back(_flatness, True)),
    "leaky_relu": _Cell(LeakyRelu, 1, 1, 0, 1, _elman(_relu, True), _elman_back(_step, True)),
    "gru": _Cell(Gru, 3, 1, 1, 1, _gru, _gru_back),
    "lstm": _Cell(Lstm, 4, 2, 1, 1, _lstm, _lstm_back),
    "slstm_sigmoid": _Cell(SlstmSigmoid, 4, 4, 4, 3, _slstm(False), _slstm_back),
    "slstm_exp": _Cell(SlstmExp, 4, 4, 4, 3, _slstm(True), _slstm_back),
}
_BY_PROBLEM = {cell.problem: cell for cell in CELLS.values()}


def _cellwise(name: str, places: type[_Here] | type[_Back]) -> Any:
    """Compiled f(like, problem, units, places): the cell's code over the units of a row."""
    count = len(places._fields)

    @intrinsic
    def run(context: Any, like: Any, problem: Any, units: Any, where: Any) -> Any:
        body = getattr(_BY_PROBLEM[problem.instance_class], name)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = args[2].type
            at = places(*cgutils.unpack_tuple(builder, args[3], count))
            lanes = BYTES * 8 // like.bitwidth
            whole = builder.and_(args[2], ir.Constant(word, -lanes))
            for step, start, stop in ((lanes, word(0), whole), (1, whole, args[2])):
                with cgutils.for_range_slice(builder, start, stop, word(step), intp=word) as (index, _):
                    offset = builder.mul(index, word(like.bitwidth // 8))
                    body(_Units(builder, like, step, offset), at)
            return context.get_dummy_value()

        return types.void(like, problem, types.intp, types.UniTuple(types.intp, count)), generate

    return run


_forward_row, _backward_row = _cellwise("forward", _Here), _cellwise("backward", _Back)


# ---- the loops


@intrinsic
def _fetch(context, address, size):
    """Have so many bytes brought into the second-level cache."""

    def generate(context, builder, signature, args):
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        with cgutils.for_range_slice(builder, args[1].type(0), args[1], args[1].type(64), intp=args[1].type) as (i, _):
            at = builder.inttoptr(builder.add(args[0], i), pointer)
            builder.call(fetch, [at, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@_compile
def _multiply(like, q, rows, depth, a, panel, out):
    """The product of a step: out (rows, columns) = a (rows, depth) @ the panels side by side."""
    for p in range(q.panels):
        products.multiply(like, rows, depth, 0, a, q.near_row, q.item, panel, PANEL, out + p * PANEL, q.sums_row)
        panel += depth * PANEL


@_compile
def _meet(q, team, goal):
    """Wait until this many have come here. Returns the goal of the next time."""
    if q.members > 1:
        at, turns = q.meeting + team * 64, 0
        teams.claim(at)
        while teams.is_set(at) < goal:
            turns += 1
            if turns % 1024 == 0:
                teams.give_way()
    return goal + q.members


@_compile
def _word(address):
    return teams.is_set(address)


@_compile
def _resets(q, b, t):
    return q.reset != 0 and vectors.byte(q.reset + b * q.steps + t) != 0


@_compile
def _longest(q, r0, r1):
    longest = 0
    for b in range(r0, r1):
        longest = max(longest, _word(q.ends + b * 8))
    return longest


@_compile
def _forward_task(like, q, team, member, head, r0, r1, goal):
    """Rows r0 to r1 of one head through all of time; of the head this member's units."""
    compiled.apart()
    thread, item, row = team * q.members + member, q.item, q.width * q.item
    size = q.units * q.members
    at, mine = (head * size + member * q.units) * item, member * q.units * item
    near, sums = q.near + team * 2 * q.near_size, q.sums + thread * q.sums_size
    panel = q.w + (head * q.members + member) * q.panels * size * PANEL
    first_gap, longest = q.batch * row, _longest(q, r0, r1)
    for b in range(r0, r1):
        first = q.fresh if _resets(q, b, 0) else q.first + b * row
        vectors.copy(like, q.units, (near + (b - r0) * q.near_row + mine, first + at))
    goal = _meet(q, team, goal)
    here, there = near, near + q.near_size
    for t in range(longest):
        _multiply(like, q, r1 - r0, size, here, panel, sums)
        for b in range(r0, r1):
            now = (b * q.steps + t) * row + at
            if t >= _word(q.ends + b * 8):
                continue
            gates = q.x + (b * q.stretch + t) * row * q.gates + at
            more, kept = q.more + now, gates
            past, past_gap = more - row, q.more_gap
            if not q.keep:
                more, kept = q.more + b * row + at, q.spare + thread * row * q.gates
                past = more
            if _resets(q, b, t):
                past, past_gap = q.fresh + row + at, row
            elif t == 0:
                past, past_gap = q.first + first_gap + b * row + at, first_gap
            after = there + (b - r0) * q.near_row + mine
            where = (
                gates,
                row,
                kept,
                sums + (b - r0) * q.sums_row,
                q.units * item,
                q.outer + at,
                q.inner + at,
                q.leak,
                here + (b - r0) * q.near_row + mine,
                after,
                q.h + now,
                more,
                q.more_gap,
                past,
                past_gap,
            )
            _forward_row(like, q, q.units, where)
            if t + 1 < q.stretch:  # the processor does not foresee that all rows will be wanted a step further
                for g in range(q.gates):
                    _fetch(gates + (q.gates + g) * row, q.units * item)
            if t + 1 < q.stretch and _resets(q, b, t + 1):
                vectors.copy(like, q.units, (after, q.fresh + at))
        goal = _meet(q, team, goal)
        here, there = there, here
    for b in range(r0, r1):
        for t in range(_word(q.ends + b * 8), q.stretch):
            vectors.zero(like, q.units, (q.h + (b * q.steps + t) * row + at,))
    return goal


@_compile
def _backward_task(like, q, team, member, head, r0, r1, goal):
    compiled.apart()
    thread, item, row = team * q.members + member, q.item, q.width * q.item
    size = q.units * q.members
    at, mine = (head * size + member * q.units) * item, member * q.units * item
    near, sums = q.near + team * 2 * q.near_size, q.sums + thread * q.sums_size
    side, side_gap = q.side + thread * q.side_size, q.units * item
    panel = q.w + (head * q.members + member) * q.panels * size * q.gates * PANEL
    first_gap, longest = q.batch * row, _longest(q, r0, r1)
    for b in range(r0, r1):
        for t in range(_word(q.ends + b * 8), q.stretch):
            for g in range(q.gates):
                vectors.zero(like, q.units, (q.x + ((b * q.stretch + t) * q.gates + g) * row + at,))
            if q.d_more != 0:
                vectors.zero(like, q.units, (q.d_more + (b * q.stretch + t) * row + at,))
    goal = _meet(q, team, goal)  # of rows before these, someone may still be reading what is near
    here, there = near, near + q.near_size
    for t in range(longest - 1, -1, -1):
        for b in range(r0, r1):
            now, end = (b * q.steps + t) * row + at, _word(q.ends + b * 8)
            if t >= end:
                continue
            before, past, past_gap = q.h + now - row, q.more + now - row, q.more_gap
            if _resets(q, b, t):
                before, past, past_gap = q.fresh + at, q.fresh + row + at, row
            elif t == 0:
                before = q.first + b * row + at
                past, past_gap = before + first_gap, first_gap
            to = side + (b - r0) * q.side_row
            later, others, others_gap = sums + (b - r0) * q.sums_row, to, side_gap
            if t == end - 1:
                later, others, others_gap = q.d_last + b * row + at, q.zero + at, 0
                if q.parts > 1:
                    others, others_gap = later + first_gap, first_gap
            elif _resets(q, b, t + 1):
                later, others, others_gap = q.zero + at, q.zero + at, 0
            gates = q.gates_at + (b * q.steps + t) * row * q.gates + at
            d_gates = q.x + (b * q.stretch + t) * row * q.gates + at
            where = (
                gates,
                row,
                q.leak,
                q.h + now,
                before,
                q.more + now,
                q.more_gap,
                past,
                past_gap,
                q.dh + now,
                later,
                others,
                others_gap,
                to,
                side_gap,
                d_gates,
                here + (b - r0) * q.near_row + mine,
                size * item,
                q.d_more + (b * q.stretch + t) * row + at,
            )
            _backward_row(like, q, q.units, where)
            if t > 0:
                for g in range(1, q.gates + 1):
                    _fetch(gates - g * row, q.units * item)
                    _fetch(d_gates - g * row, q.units * item)
                for each in (q.dh + now, before, past):
                    _fetch(each - row, q.units * item)
        goal = _meet(q, team, goal)
        _multiply(like, q, r1 - r0, size * q.gates, here, panel, sums)
        here, there = there, here
    for b in range(r0, r1):
        later, others, others_gap = sums + (b - r0) * q.sums_row, side + (b - r0) * q.side_row, side_gap
        if _word(q.ends + b * 8) == 0:
            later, others, others_gap = q.d_last + b * row + at, q.zero + at, 0
            if q.parts > 1:
                others, others_gap = later + first_gap, first_gap
        elif _resets(q, b, 0):
            later, others, others_gap = q.zero + at, q.zero + at, 0
        to = q.d_first + b * row + at
        if q.parts == 1 and q.side_row != 0:
            vectors.add(like, q.units, (to, later, others))
        else:
            vectors.copy(like, q.units, (to, later))
        for part in range(1, q.parts):
            vectors.copy(like, q.units, (to + part * first_gap, others + (part - 1) * others_gap))
    return goal


@_compile
def _forward_work(like, q, me):
    """One thread's share."""
    if teams.started(me):
        return
    thread = me[0]
    team, goal = thread // q.members, q.members
    for task in range(team, q.groups * q.heads, q.teams):
        group, head = task // q.heads, task % q.heads
        r0, r1 = q.batch * group // q.groups, q.batch * (group + 1) // q.groups
        goal = _forward_task(like, q, team, thread % q.members, head, r0, r1, goal)


@_compile
def _backward_work(like, q, me):
    if teams.started(me):
        return
    thread = me[0]
    team, goal = thread // q.members, q.members
    for task in range(team, q.groups * q.heads, q.teams):
        group, head = task // q.heads, task % q.heads
        r0, r1 = q.batch * group // q.groups, q.batch * (group + 1) // q.groups
        goal = _backward_task(like, q, team, thread % q.members, head, r0, r1, goal)


# ---- sharing out


class _Plan(NamedTuple):
    groups: int  # of rows
    members: int  # threads that share the units of a row
    teams: int


@functools.lru_cache(256)
def _plan(
    batch: int, steps: int, heads: int, size: int, gates: int, item: int, together: bool, available: int
) -> _Plan:  # fmt: skip
    """The fastest for so many threads, by the step that is foreseen for each. together: whether they may wait."""
    if batch * steps * heads * size * size * gates < ALONE:
        return _Plan(min(batch, 1), 1, 1)
    plans = []
    for members in range(1, available + 1):
        if members == 1 or (together and size % (members * 16) == 0):
            groups = min(batch, -(-(available // members) // heads))
            plans.append(_Plan(groups, members, min(available // members, groups * heads)))
    return min(plans, key=lambda plan: _foreseen(plan, batch, heads, size, gates, item))


def _foreseen(plan: _Plan, batch: int, heads: int, size: int, gates: int, item: int) -> float:
    """Nanoseconds of a step. Numbers of the processor that this was written on; only what they say of one plan beside
    another matters."""
    rows, rounds = -(-batch // plan.groups), -(-plan.groups * heads // plan.teams)
    shared = size * size * gates * item // plan.members  # bytes of R
    speed = next(speed for most, speed in ((1 << 15, 160), (3 << 18, 95), (math.inf, 70)) if shared <= most)
    product = max(rows * shared / 226, shared / speed)  # as fast as it multiplies, or as R comes from its cache
    cell = 0.44 * rows * gates * size * item / plan.members
    lines = rows * size * item / 64 * (1 + gates) / 2 * (1 - 1 / plan.members)  # that another thread has written
    return rounds * (product + cell + (700 + 15 * lines if plan.members > 1 else 0))


def _walk(
    cell: _Cell, w_hh: Tensor, outer: Tensor | None, inner: Tensor | None, leak: float, h: Tensor, more: Tensor,
    reset: Tensor | None, ends: Tensor, *, keep: bool = True, back: tuple[Tensor, Tensor] | None = None,
    alone: bool = False,
) -> Callable[..., None]:  # fmt: skip
    """run(start, x, first) fills x (B, count, G N) with the gates, and h and more, from time `start` on.

    Given back = (gates, dh) it is run(start, x, first, d_last, d_first, d_more), which fills x and the last two. first
    and d_last are of the state before the stretch and after it. alone: by one thread.
    """
    batch, steps, width = h.shape
    heads, size, item = len(w_hh), w_hh.shape[2], h.element_size()
    available = 1 if alone else teams.available()
    plan = _plan(batch, steps, heads, size, cell.gates, item, teams.can_wait(), available)
    units = size // plan.members
    blocks = w_hh.reshape(heads, cell.gates, size, size)
    if back is None:
        w = blocks.unflatten(2, (plan.members, units)).permute(0, 2, 4, 1, 3).flatten(3)
    else:
        w = blocks.unflatten(3, (plan.members, units)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    w = products.panels(w)
    rows, workers = -(-batch // plan.groups), plan.members * plan.teams
    depth = w.shape[3]
    near_row, sums_row, side_row = depth * item + PAD, w.shape[2] * PANEL + PAD, cell.side * units * item
    sizes = plan.teams * 2 * rows * near_row, workers * rows * sums_row, workers * rows * side_row
    near, sums, side = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
    zero, meeting = h.new_zeros(cell.gates * width), torch.zeros(plan.teams * 8, dtype=torch.int64)
    gates, dh = (None, None) if back is None else back
    fixed = dict(
        w=w, outer=zero if outer is None else outer.contiguous(), inner=zero if inner is None else inner.contiguous(),
        leak=h.new_full((1,), leak), spare=h.new_empty(workers, cell.gates * width) if back is None else None,
        fresh=torch.cat(fresh_slstm(1, width, like=h)) if cell.parts == 4 else h.new_zeros(cell.parts + 1, width),
        zero=zero, near=near, sums=sums, side=side, meeting=meeting,
    )  # fmt: skip
    if not keep:
        fixed["more"] = more
    gates = gates if gates is not None and gates.numel() else None  # where h is the gate there are none
    timed = dict(h=h, more=more if keep else None, reset=reset, gates_at=gates, dh=dh)
    work = _forward_work if back is None else _backward_work
    problem = functools.partial(
        cell.problem, item=item, batch=batch, steps=steps, width=width, heads=heads, gates=cell.gates,
        parts=cell.parts, groups=plan.groups, members=plan.members, teams=plan.teams, units=units, panels=w.shape[2],
        keep=int(keep), more_gap=batch * more.shape[2] * width * item, near_row=near_row, near_size=rows * near_row,
        sums_row=sums_row, sums_size=rows * sums_row, side_row=side_row, side_size=rows * side_row,
    )  # fmt: skip

    def run(
        start: int, x: Tensor, first: Tensor, d_last: Tensor | None = None, d_first: Tensor | None = None,
        d_more: Tensor | None = None,
    ) -> None:  # fmt: skip
        count = x.shape[1]
        given = dict(
            x=x, first=first, d_last=d_last, d_first=d_first, d_more=d_more, ends=(ends - start).clamp(0, count)
        )
        here = {name: t.narrow(t.ndim - 2 + (t is reset), start, count) for name, t in timed.items() if t is not None}
        meeting.zero_()
        at = dict.fromkeys(timed) | fixed | given | here
        q = problem(stretch=count, **{name: 0 if t is None else t.data_ptr() for name, t in at.items()})
        if not teams.call(work, products.LIKE[h.dtype], q, workers, at, waits=plan.members > 1):
            again = _walk(
                cell, w_hh, outer, inner, leak, h, more, reset, ends, keep=keep, back=back, alone=True
            )  # fmt: skip
            again(start, x, first, d_last, d_first, d_more)

    return run


def _stretch(batch: int, steps: int, row: int) -> int:
    """Steps whose gates, `row` bytes for each row of the batch, stay in the caches, or all of a little more."""
    few = max(1, NEAR // max(1, batch * row))
    return few if few * 3 // 2 < steps else steps


def _forward(
    x: Tensor, w_ih: Tensor | None, w_hh: Tensor, outer: Tensor | None, inner: Tensor | None,
    first: Tensor, reset: Tensor | None, ends: Tensor, kind: str, leak: float, keep: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """outer (G N,): added to the gates' inputs. inner (N,): of a GRU, inside the product with r. first: (S, B, N)."""
    cell, (batch, steps), width = CELLS[kind], x.shape[:2], first.shape[2]
    stretch = steps if keep or w_ih is None else _stretch(batch, steps, cell.gates * width * x.element_size())
    laid = None if w_ih is None else products.panels(w_ih.T)
    in_place = stretch == steps and cell.gates == 1 and not cell.side
    gates = h = _gates(x, w_ih, laid) if stretch == steps else x[:, :0]
    if not in_place:
        h = empty(x, batch, steps, width)
    more = empty(x, cell.more, batch, steps if keep else 1, width)
    before, reset = first.contiguous(), None if reset is None else reset.contiguous()
    if batch * steps == 0:
        return h, first.clone(), gates.new_empty(0) if in_place else gates, more
    run = _walk(cell, w_hh, outer, inner, leak, h, more, reset, ends, keep=keep)
    if stretch == steps:
        run(0, gates, before)
    else:
        for start in range(0, steps, stretch):
            run(start, _gates(x[:, start : start + stretch], w_ih, laid), before)
            before = torch.cat([h[None, :, min(start + stretch, steps) - 1], more[: cell.parts - 1, :, 0]])
    rows, at = torch.arange(batch), (ends - 1).clamp(min=0)
    parts = [h[rows, at], *more[: cell.parts - 1, rows, at if keep else 0]]
    last = torch.where((ends > 0)[:, None], torch.stack(parts), first)
    return h, last, gates.new_empty(0) if in_place else gates, more


def _gates(x: Tensor, w_ih: Tensor | None, laid: Tensor | None) -> Tensor:
    """The inputs of the gates."""
    if w_ih is None:
        return empty(x, *x.shape).copy_(x)
    return products.by(x.flatten(0, 1), w_ih.T, laid).unflatten(0, x.shape[:2])


def _backward(
    dh: Tensor, d_last: Tensor, x: Tensor, w_ih: Tensor | None, w_hh: Tensor, outer: Tensor | None,
    inner: Tensor | None, first: Tensor, reset: Tensor | None, ends: Tensor, kind: str, leak: float, h: Tensor,
    last: Tensor, gates: Tensor, more: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """From stretch to stretch, last to first: the gradients of the gates are wanted no longer than that."""
    cell, (batch, steps), width = CELLS[kind], x.shape[:2], first.shape[2]
    high, item, dense = cell.gates * width, x.element_size(), len(w_hh) == 1
    stretch = steps if w_ih is None else _stretch(batch, steps, high * item)
    room = empty(x, batch * stretch * high)
    dx = empty(x, *x.shape) if w_ih is not None else room.view(x.shape)
    by_x = None if w_ih is None else torch.zeros_like(w_ih)
    by_h, total, by_inner = torch.zeros_like(w_hh), x.new_zeros(high), x.new_zeros(width)
    d_first, first, reset = d_last.clone(), first.contiguous(), None if reset is None else reset.contiguous()
    laid = None if w_ih is None else products.panels(w_ih)
    if batch * steps:
        run = _walk(cell, w_hh, outer, inner, leak, h, more, reset, ends, back=(gates, dh.contiguous()))
    for start in reversed(range(0, steps if batch else 0, max(1, stretch))):
        stop = min(start + stretch, steps)
        now, count = slice(start, stop), stop - start
        found = torch.cat([h[None, :, start - 1], more[: cell.parts - 1, :, start - 1]]) if start else first
        d_last, d_first = d_first, torch.empty_like(first)
        d_gates = room[: batch * count * high].view(batch, count, high)
        d_more = x.new_empty(batch, count, width) if kind == "gru" else None
        run(start, d_gates, found, d_last, d_first, d_more)
        flat, before = d_gates.flatten(0, 1), _before(h[:, now], found[0], None if reset is None else reset[:, now])
        heard = [flat] if d_more is None else [flat[:, : 2 * width], d_more.flatten(0, 1)]
        at_once = dense and d_more is None
        part_x, part_h, part = products.sums(
            flat, x[:, now].flatten(0, 1) if by_x is not None else before[:, :0], before if at_once else None
        )
        total += part
        by_h += part_h[None] if at_once else _outer(heard, before, len(w_hh))
        if w_ih is not None and by_x is not None:
            by_x += part_x
            dx[:, now] = products.by(flat, w_ih, laid).view(batch, count, -1)
        if d_more is not None:
            by_inner += heard[1].sum(0)
    grads = [dx, by_x, by_h, None if outer is None else total, None if inner is None else by_inner, d_first]
    return tuple(g for g in grads if g is not None)


def _before(h: Tensor, first: Tensor, reset: Tensor | None) -> Tensor:
    """(B count, N), the state that each step found."""
    before = empty(h, *h.shape)
    torch.cat([first[:, None], h[:, :-1]], 1, out=before)
    if reset is not None:
        before.masked_fill_(reset[..., None], 0)
    return before.flatten(0, 1)


def _outer(grads: list[Tensor], h: Tensor, heads: int) -> Tensor:
    """The sum over rows of grads h^T, head by head."""
    if heads == 1:
        return torch.cat([products.sums(g, h)[0] for g in grads])[None]
    of_heads = lambda t: t.unflatten(1, (heads, -1)).transpose(0, 1)
    width = h.shape[1]
    each = [one for g in grads for one in g.split(width, 1)]
    return torch.cat([of_heads(g).mT @ of_heads(h) for g in each], 1)


def _like(
    x: Tensor, w_ih: Tensor | None, w_hh: Tensor, outer: Tensor | None, inner: Tensor | None,
    first: Tensor, reset: Tensor | None, ends: Tensor, kind: str, leak: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    cell, width = CELLS[kind], first.shape[2]
    h = x.new_empty(*x.shape[:2], width)
    kept = cell.gates * width if cell.gates > 1 or cell.side else 0
    gates = x.new_empty(*x.shape[:2], kept) if kept else x.new_empty(0)
    return h, first.new_empty(first.shape), gates, x.new_empty(cell.more, *h.shape)


_loop = opaque(
    "gated_loop_numba", "cpu", "x w_ih? w_hh outer? inner? first reset? ends kind:str leak:float", _forward, _backward,
    _like, results=2, kept=2, keep_results=True, alone=functools.partial(_forward, keep=False),
)  # fmt: skip


def _call(
    kind: str, x: Tensor, state: tuple[Tensor, ...], w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, reset: Tensor | None, lengths: Tensor | None, leak: float = 1.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, inside = state[0].dtype, None
    if kind == "gru" and b_hh is not None:
        outside, inside = b_hh.split([2 * len(b_hh) // 3, len(b_hh) // 3])
        inside, b_hh = inside.to(dtype), F.pad(outside, (0, len(inside)))
    given = [b.to(dtype) for b in (b_ih, b_hh) if b is not None]
    bias = given[0] + given[1] if len(given) == 2 else given[0] if given else None
    ends = torch.full(x.shape[:1], x.shape[1]) if lengths is None else lengths.to(x.device, torch.int64)
    h, last = _loop(
        x.to(dtype), None if w_ih is None else w_ih.to(dtype), (w_hh[None] if w_hh.ndim == 2 else w_hh).to(dtype),
        bias, inside, torch.stack(state), reset, ends, kind, leak,
    )  # fmt: skip
    return h.to(x.dtype), *(last.unbind(0) if len(state) == 1 else (s.clone() for s in last))  # no shared storage


def elman(
    x: Tensor, h0: Tensor, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    *, nonlinearity: str = "tanh", leak: float = 1.0, reset: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    kind = ("elman_" if leak == 1 else "leaky_") + nonlinearity
    return _call(kind, x, (h0,), w_ih, w_hh, b_ih, b_hh, reset, lengths, leak)


jordan = jordan_by(elman)


def gru(
    x: Tensor, h0: Tensor, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    *, reset: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _call("gru", x, (h0,), w_ih, w_hh, b_ih, b_hh, reset, lengths)


def lstm(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, w_hr: Tensor | None = None, *, reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _call("lstm", x, (h0, c0), w_ih, w_hh, b_ih, b_hh, reset, lengths)


def slstm(
    x: Tensor, h0: Tensor, c0: Tensor, n0: Tensor, m0: Tensor, w_ih: Tensor | None, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *, forget: str = "sigmoid", reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _call(f"slstm_{forget}", x, (h0, c0, n0, m0), w_ih, w_hh, b_ih, b_hh, reset, lengths)
