"""Compiled loops over time that run at the speed of memory.

A time step is one row of channels, handled in vectors; the state is carried in a row of its own, in the nearest
cache. Large results are stored past the caches, so a line is not read first only to be overwritten. Threads share out
the batch and wide blocks of channels. Where there are several for each row they share out time: whoever claims a tile
first runs it from zero for its end and its product of decays, which brings it into the cache, waits for the state
before it, publishes the state after it, and only then runs it for good. Memory is still read once and written once.
Claims go forward in time, so a thread waits only for tiles that are already being worked on.

Backward is one pass, with mu_t the gradient that reaches h_{t-1}:
    lam_t = g_t + mu_{t+1},   dx_t = lam_t,   da_t = lam_t conj(h_{t-1}),   mu_t = conj(a_t) lam_t,   dh_0 = mu_1.

Pointers are integers and vectors are written as LLVM code, so that no aliasing checks stand in the inner loop and any
strides will do. Products and sums are rounded one by one, so the numbers are those of the reference, bit for bit,
except where time was shared out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from .adjoint import differentiable
from .edges import at_lengths, normal

TILE = 1 << 18  # bytes of a and x in a tile of time: they stay in the second-level cache between its two passes
BLOCK = 4096  # channels in a row: a, x and two rows of h fit the first-level cache
NARROW = 512  # channels below which a part of a row is read far slower than the whole
SHORTEST = 64  # steps in a tile, at least
LINE = 64  # bytes of a cache line
STREAM = 1 << 22  # bytes from which on results go past the caches: they would not stay there
ALONE = 2  # threads for each row up to which one runs it alone: sharing out time runs every tile twice
SMALL = 1 << 15  # elements below which a second thread costs more than it brings


class _Lanes:
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
        return self._shuffle(value, [i % width for i in range(self.size)])

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
        real, imag = self._shuffle(p, [i & ~1 for i in each]), self._shuffle(p, [i | 1 for i in each])
        swapped = self._shuffle(q, [i ^ 1 for i in each])
        cross = self.builder.fmul(imag, swapped)
        sign = ir.Constant(self.type, [1.0, -1.0] * (self.size // 2) if conj else [-1.0, 1.0] * (self.size // 2))
        return self.builder.fadd(self.builder.fmul(real, q), self.builder.fmul(cross, sign))

    def _shuffle(self, value: Any, order: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _rowwise(body: Callable[..., None], down: bool = False) -> Any:
    """Compiled f(like, n, (row, ...)): the body's code over n channels; rows are addresses, like gives the dtype.

    down: from the last channel to the first. Where time runs backwards, memory is then walked without a turn, which is
    what the processor foresees: at rows of 512 bytes this is twice as fast.
    """
    rows = len(inspect.signature(body).parameters) - 1

    @intrinsic
    def run(context: Any, like: Any, n: Any, addresses: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size = (like.bitwidth) // 8
            pointers = cgutils.unpack_tuple(builder, args[2], rows)
            start, word = ir.Constant(args[1].type, 0), args[1].type
            parts = []
            for count in (16, 4, 1):
                stop = builder.and_(args[1], ir.Constant(word, -count))
                parts.append((ir.Constant(word, count), start, stop))
                start = stop
            for step, start, stop in reversed(parts) if down else parts:
                with cgutils.for_range_slice(builder, start, stop, step, intp=word) as (index, _):
                    if down:
                        index = builder.sub(builder.sub(builder.add(start, stop), step), index)
                    offset = builder.mul(index, ir.Constant(word, size))
                    body(_Lanes(builder, like, step.constant, offset), *pointers)
            return context.get_dummy_value()

        return types.void(like, types.intp, types.UniTuple(types.intp, rows)), generate

    return run


def _recur_by(put: Callable[..., None]) -> Any:
    def body(v, h, carry, a, x):
        new = v.add(v.mul(v.load(a), v.load(carry)), v.load(x))
        v.store(carry, new)  # a row of its own: rows of h leave the first-level cache as they are written
        put(v, h, new)

    return _rowwise(body)


_recur, _recur_stream = _recur_by(_Lanes.store), _recur_by(_Lanes.stream)


@_rowwise
def _combine(v, past, product, into, end):
    v.store(past, v.add(v.mul(v.load(product), v.load(into)), v.load(end)))


@_rowwise
def _advance(v, end, product, a, x):
    decay = v.load(a)
    v.store(end, v.add(v.mul(decay, v.load(end)), v.load(x)))
    v.store(product, v.mul(decay, v.load(product)))


def _adjoint_by(put: Callable[..., None]) -> Any:
    def body(v, dx, da, mu, a, g, before):
        lam = v.add(v.load(g), v.load(mu))
        put(v, dx, lam)
        put(v, da, v.mul(v.load(before), lam, conj=True))
        v.store(mu, v.mul(v.load(a), lam, conj=True))

    return _rowwise(body, down=True)


_adjoint, _adjoint_stream = _adjoint_by(_Lanes.store), _adjoint_by(_Lanes.stream)
_rowwise_down = functools.partial(_rowwise, down=True)


@_rowwise_down
def _adjoint_summed(v, dx, da, mu, a, g, before):
    lam = v.add(v.load(g), v.load(mu))
    v.store(dx, lam)
    v.store(da, v.add(v.load(da), v.mul(v.load(before), lam, conj=True)))
    v.store(mu, v.mul(v.load(a), lam, conj=True))


@_rowwise_down
def _adjoint_advance(v, mu, product, a, g):
    decay = v.load(a)
    v.store(mu, v.mul(decay, v.add(v.load(g), v.load(mu)), conj=True))
    v.store(product, v.mul(decay, v.load(product), conj=True))


@_rowwise
def _sum(v, out, p, q):
    v.store(out, v.add(v.load(p), v.load(q)))


@_rowwise
def _copy(v, out, p):
    v.store(out, v.load(p))


@_rowwise
def _spread(v, out, p):
    v.store(out, v.first(p))


@_rowwise
def _zero(v, out):
    v.store(out, v.full(0.0))


@_rowwise
def _one(v, out):
    v.store(out, v.full(1.0))


@intrinsic
def _byte(context, address):
    def generate(context, builder, signature, args):
        value = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.zext(value, ir.IntType(64))

    return types.intp(types.intp), generate


@intrinsic
def _real(context, like, address):
    real = like.underlying_float if isinstance(like, types.Complex) else like

    def generate(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[1], context.get_value_type(real).as_pointer()))

    return real(like, types.intp), generate


@intrinsic
def _claim(context, address):
    """Take the next number off a counter that all threads share."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "acq_rel")

    return types.intp(types.intp), generate


@intrinsic
def _is_set(context, address):
    def generate(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.intp(types.intp), generate


@intrinsic
def _set(context, address):
    """Let other threads see everything written before."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        builder.store_atomic(word(1), builder.inttoptr(args[0], word.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _settle(context):
    """Have the stores that went past the caches done before anything else is."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield(context):
    """Let another thread have the processor, if one wants it: it may be the one that is waited for."""

    def generate(context, builder, signature, args):
        if sys.platform != "win32":
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _apart(context):
    """Keep the function that calls this out of its callers, and small: compiling takes a third of the time."""

    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), generate


class _Problem(NamedTuple):
    """Sizes, addresses, and strides in bytes (0: the same again). Rows of channels are contiguous."""

    item: int  # bytes of a channel
    real: int  # bytes of a real number
    batch: int
    steps: int
    width: int
    block: int  # channels that one thread handles as a row; all of them where time is shared out
    tile: int  # steps in a tile of time
    tiles: int
    share_time: int
    a: int
    a_batch: int
    a_time: int
    a_channel: int  # 0: one decay for the whole row
    x: int  # backward: the gradient of h
    x_batch: int
    x_time: int
    reset: int  # (B, T) bytes, or 0
    h0: int  # (B, width)
    h: int  # (B, T, width)
    dx: int  # (B, T, width)
    da: int  # (B, T, width), or (B, tiles, width) where it is summed
    sum_da: int  # one sum per tile of time is wanted
    stream: int  # whether results go past the caches
    carries: int  # (B, tiles + 1, width): h before each tile; backward: mu after it
    flags: int  # (B, tiles + 1) words, that a carry is known; then one word, the counter of claims
    rows: int  # per thread, four rows of `width`


def _compile(function: Callable[..., Any], **options: Any) -> Any:
    """numba.njit, cached beside its file, else in the user's cache directory, else not at all.

    Numba takes a cache for fresh as long as the file of the function is what it was. Code of other files is compiled
    into it: here they count too.
    """
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # no directory can be written
        return numba.njit(nogil=True, error_model="numpy", **options)(function)
    cache = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache is not None:
        cache._source_stamp = _stamp(function.__module__)
    return compiled


@functools.cache
def _stamp(module: str) -> tuple[tuple[int, int], ...]:
    """Times and sizes of the module's file and of those of compiled code that it imports, and so on."""
    found = [sys.modules[module]]
    for one in found:  # grows
        names = (n for n in vars(one).values() if isinstance(n, ModuleType) and n.__name__.endswith("in_numba"))
        found += [n for n in dict.fromkeys(names) if n not in found]
    files = [os.stat(one.__file__) for one in found if one.__file__]
    return tuple((f.st_mtime_ns, f.st_size) for f in files)


@_compile
def _rows(like, q, b, t, start):
    """Addresses of row t of a, of x or g, and of every (B, T, width) array, from channel `start`."""
    first = start * q.item
    a = q.a + b * q.a_batch + t * q.a_time + first * q.a_channel
    x = q.x + b * q.x_batch + t * q.x_time + first
    return a, x, (b * q.steps + t) * q.width * q.item + first


@_compile
def _cut(q, b, t):
    return q.reset != 0 and _byte(q.reset + b * q.steps + t) != 0


@_compile
def _finite(like, q, row):
    _apart()
    for i in range(q.width * q.item // q.real):
        value = _real(like, row + i * q.real)
        if value - value != 0:
            return False
    return True


@_compile
def _forward_span(like, q, b, start, n, t0, t1, carry, scratch):
    """Rows t0 to t1 of h; carry, the state before a row and then after it, changes in place."""
    _apart()
    row = q.width * q.item
    a, x, at = _rows(like, q, b, t0, start)
    h = q.h + at
    plain = q.reset == 0 and q.a_channel != 0
    for t in range(t0, t1):
        decay = a
        if not plain:
            if _cut(q, b, t):
                _zero(like, n, (carry,))
                decay = carry
            elif q.a_channel == 0:
                _spread(like, n, (scratch, a))
                decay = scratch
        if q.stream:
            _recur_stream(like, n, (h, carry, decay, x))
        else:
            _recur(like, n, (h, carry, decay, x))
        h, a, x = h + row, a + q.a_time, x + q.x_time
    if q.stream:
        _settle()


@_compile
def _forward_summary(like, q, b, t0, t1, end, product, spread):
    """The state at t1 if that at t0 were zero, and the product of decays. True if a reset makes the past irrelevant."""
    _apart()
    cut = False
    _zero(like, q.width, (end,))
    _one(like, q.width, (product,))
    for t in range(t0, t1):
        a, x, _ = _rows(like, q, b, t, 0)
        if _cut(q, b, t):
            _copy(like, q.width, (end, x))
            _zero(like, q.width, (product,))
            cut = True
            continue
        if q.a_channel == 0:
            _spread(like, q.width, (spread, a))
            a = spread
        _advance(like, q.width, (end, product, a, x))
    return cut


@_compile
def _backward_span(like, q, b, start, n, k, mu, scratch):
    """The rows of tile k of dx and da, last to first; mu, the gradient carried from row to row, changes in place."""
    _apart()
    spread = scratch + q.width * q.item
    da_sum = q.da + ((b * q.tiles + k) * q.width + start) * q.item
    if q.sum_da:
        _zero(like, n, (da_sum,))
    for t in range(min(q.steps, (k + 1) * q.tile) - 1, k * q.tile - 1, -1):
        a, g, at = _rows(like, q, b, t, start)
        if _cut(q, b, t):
            _sum(like, n, (q.dx + at, g, mu))
            _zero(like, n, (mu,))
            if not q.sum_da:
                _zero(like, n, (q.da + at,))
            continue
        if q.a_channel == 0:
            _spread(like, n, (spread, a))
            a = spread
        before = q.h + at - q.width * q.item if t else q.h0 + (b * q.width + start) * q.item
        if q.sum_da:
            _adjoint_summed(like, n, (q.dx + at, da_sum, mu, a, g, before))
        elif q.stream:
            _adjoint_stream(like, n, (q.dx + at, q.da + at, mu, a, g, before))
        else:
            _adjoint(like, n, (q.dx + at, q.da + at, mu, a, g, before))
    if q.stream:
        _settle()


@_compile
def _backward_summary(like, q, b, k, mu, product, spread):
    _apart()
    cut = False
    _zero(like, q.width, (mu,))
    _one(like, q.width, (product,))
    for t in range(min(q.steps, (k + 1) * q.tile) - 1, k * q.tile - 1, -1):
        if _cut(q, b, t):
            _zero(like, q.width, (mu,))
            _zero(like, q.width, (product,))
            cut = True
            continue
        a, g, _ = _rows(like, q, b, t, 0)
        if q.a_channel == 0:
            _spread(like, q.width, (spread, a))
            a = spread
        _adjoint_advance(like, q.width, (mu, product, a, g))
    return cut


@_compile
def _slot(q, b, k):
    """Address of carry k of row b."""
    return q.carries + (b * (q.tiles + 1) + k) * q.width * q.item


@_compile
def _flag(q, b, k):
    return q.flags + (b * (q.tiles + 1) + k) * 8


@_compile
def _forward_work(like, q, worker, workers):
    """One thread's share: a part of batch and channels over all time, or tiles of time until none is left."""
    _apart()
    row = q.width * q.item
    scratch = q.rows + worker * 4 * row
    carry, end, product = scratch + row, scratch + 2 * row, scratch + 3 * row
    if not q.share_time:
        blocks = (q.width + q.block - 1) // q.block
        units = q.batch * blocks
        for unit in range(units * worker // workers, units * (worker + 1) // workers):
            b, start = unit // blocks, unit % blocks * q.block
            n, first = min(q.block, q.width - start), start * q.item
            _copy(like, n, (carry, _slot(q, b, 0) + first))
            _forward_span(like, q, b, start, n, 0, q.steps, carry, scratch)
            _copy(like, n, (_slot(q, b, q.tiles) + first, carry))
        return
    while True:
        unit = _claim(_flag(q, q.batch, 0))
        if unit >= q.batch * q.tiles:
            return
        b, k = unit % q.batch, unit // q.batch
        into, past = _slot(q, b, k), _slot(q, b, k + 1)
        t0, t1 = k * q.tile, min(q.steps, (k + 1) * q.tile)
        cut = _forward_summary(like, q, b, t0, t1, end, product, scratch + row)
        known = _carry_on(like, q, cut, past, product, end, into, _flag(q, b, k), _flag(q, b, k + 1))
        _copy(like, q.width, (carry, into))
        _forward_span(like, q, b, 0, q.width, t0, t1, carry, scratch)
        if not known or k == q.tiles - 1:
            _copy(like, q.width, (past, carry))
            _set(_flag(q, b, k + 1))


@_compile
def _backward_work(like, q, worker, workers):
    _apart()
    row = q.width * q.item
    scratch = q.rows + worker * 4 * row
    mu, product = scratch + 2 * row, scratch + 3 * row
    if not q.share_time:
        blocks = (q.width + q.block - 1) // q.block
        units = q.batch * blocks
        for unit in range(units * worker // workers, units * (worker + 1) // workers):
            b, start = unit // blocks, unit % blocks * q.block
            n, first = min(q.block, q.width - start), start * q.item
            _copy(like, n, (mu, _slot(q, b, q.tiles) + first))
            for k in range(q.tiles - 1, -1, -1):
                _backward_span(like, q, b, start, n, k, mu, scratch)
            _copy(like, n, (_slot(q, b, 0) + first, mu))
        return
    while True:
        unit = _claim(_flag(q, q.batch, 0))
        if unit >= q.batch * q.tiles:
            return
        b, k = unit % q.batch, q.tiles - 1 - unit // q.batch
        into, past = _slot(q, b, k + 1), _slot(q, b, k)
        cut = _backward_summary(like, q, b, k, mu, product, scratch + row)
        known = _carry_on(like, q, cut, past, product, mu, into, _flag(q, b, k + 1), _flag(q, b, k))
        _copy(like, q.width, (mu, into))
        _backward_span(like, q, b, 0, q.width, k, mu, scratch)
        if not known or k == 0:
            _copy(like, q.width, (past, mu))
            _set(_flag(q, b, k))


@_compile
def _carry_on(like, q, cut, past, product, end, into, flag_into, flag_past):
    """Wait for the carry into a tile and publish the one past it. False if that is only known once the tile is done."""
    _apart()
    while _is_set(flag_into) == 0:
        _yield()
    if cut:
        _copy(like, q.width, (past, end))
    else:
        _combine(like, q.width, (past, product, into, end))
    # the product of decays may leave the range of numbers where the state itself does not
    known = _finite(like, q, past)
    if known:
        _set(flag_past)
    return known


@functools.partial(_compile, parallel=True)
def _forward_together(like, q, workers):
    for worker in numba.prange(workers):
        _forward_work(like, q, np.int64(worker), workers)


@functools.partial(_compile, parallel=True)
def _backward_together(like, q, workers):
    for worker in numba.prange(workers):
        _backward_work(like, q, np.int64(worker), workers)


_one_at_a_time = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked, _one_at_a_time
    _forked, _one_at_a_time = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _workers(elements: int) -> int:
    """Threads to use: torch's number, one for little work or in a forked child, where thread pools are lost."""
    return 1 if elements < SMALL or _forked else min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def _run(like: Any, q: _Problem, backward: bool, workers: int) -> None:
    if workers == 1:
        (_backward_work if backward else _forward_work)(like, q, 0, 1)
        return
    on_threads(_backward_together if backward else _forward_together, like, q, workers)


def on_threads(together: Callable[..., None], like: Any, q: Any, workers: int) -> None:
    """together(like, q, workers), a loop that numba shares out; q: a tuple of what the workers get."""
    numba.set_num_threads(workers)  # of this Python thread
    with contextlib.nullcontext() if _many_callers() else _one_at_a_time:
        together(like, q, workers)


def _many_callers() -> bool:
    """Whether the thread pool that numba picked may be entered by several Python threads at once."""
    try:
        return numba.threading_layer() != "workqueue"
    except ValueError:  # none was picked yet
        return False


def _solve(
    a: Tensor, x: Tensor, start: Tensor, h0: Tensor, h: Tensor, dx: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fill h; or, given dx, fill dx from x = g. start: the first carry. Returns the last carry, and da (B, *, N)."""
    batch, steps = x.shape[:2]
    width, item, backward = math.prod(x.shape[2:]), x.element_size(), dx is not None
    workers, blocks = _workers(x.numel()), -(-width // BLOCK)
    while batch * blocks < workers and width >= 2 * NARROW * blocks:
        blocks += 1
    share_time = batch * blocks * ALONE < workers
    sum_da = backward and a.shape[1] == 1
    tile = max(SHORTEST, TILE // (2 * width * item)) if share_time or sum_da else steps
    tiles = -(-steps // tile)
    workers = max(1, min(workers, batch * (tiles if share_time else blocks)))

    a, x, h0 = _rows_of(a), _rows_of(x), _rows_of(h0[:, None])
    reset = None if reset is None else reset.contiguous()
    da = x.new_empty(batch, (tiles if sum_da else steps) if backward else 0, width)
    carries, rows = x.new_empty(batch, tiles + 1, width), x.new_empty(workers, 4, width)
    flags = torch.zeros(batch * (tiles + 1) + 1, dtype=torch.int64)
    first, last = (tiles, 0) if backward else (0, tiles)
    carries[:, first] = start.reshape(batch, width)
    flags[first : -1 : tiles + 1] = 1
    q = _Problem(
        item=item,
        real=item // 2 if x.is_complex() else item,
        batch=batch,
        steps=steps,
        width=width,
        block=-(-width // blocks),
        tile=tile,
        tiles=tiles,
        share_time=int(share_time),
        a=a.data_ptr(),
        a_batch=a.stride(0) * item if a.shape[0] > 1 else 0,
        a_time=a.stride(1) * item if a.shape[1] > 1 else 0,
        a_channel=int(a.shape[2] == width),
        x=x.data_ptr(),
        x_batch=x.stride(0) * item,
        x_time=x.stride(1) * item,
        reset=0 if reset is None else reset.data_ptr(),
        h0=h0.data_ptr(),
        h=h.data_ptr(),
        dx=0 if dx is None else dx.data_ptr(),
        da=da.data_ptr(),
        sum_da=int(sum_da),
        stream=int(_streams(width, -(-width // blocks), [h] if dx is None else [dx, da])),
        carries=carries.data_ptr(),
        flags=flags.data_ptr(),
        rows=rows.data_ptr(),
    )
    _run(_LIKE[x.dtype], q, backward, workers)
    return carries[:, last].clone(), da


def _streams(width: int, block: int, results: list[Tensor]) -> bool:
    """Results larger than the caches would only push other things out. Their rows must begin where a line begins."""
    return all(
        r.numel() * r.element_size() >= STREAM
        and r.data_ptr() % LINE == 0
        and width * r.element_size() % LINE == 0
        and block * r.element_size() % LINE == 0
        for r in results
    )


_LIKE = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.complex64: np.complex64(0),
    torch.complex128: np.complex128(0),
}


def _rows_of(t: Tensor) -> Tensor:
    """(B, T, N...) as (B, T, width) with contiguous rows; a view where that is possible."""
    t = t.resolve_conj().resolve_neg().reshape(*t.shape[:2], -1 if t.numel() else math.prod(t.shape[2:]))
    return t if t.shape[2] == 1 or t.stride(2) == 1 else t.contiguous()


def _decays(a: Tensor, x: Tensor) -> Tensor:
    """a, with its channels laid out in full unless there are all of them or one."""
    one = math.prod(a.shape[2:]) == 1
    return a if one or a.shape[2:] == x.shape[2:] else a.expand(*a.shape[:2], *x.shape[2:])


def _forward(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape)
    if not x.numel():
        return h, h0.clone()
    last, _ = _solve(_decays(a, x), x, h0, h0, h, None, reset)
    return h, last.view(h0.shape)


def _backward(
    g: Tensor, g_last: Tensor, a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx = h.new_empty(h.shape)
    if not h.numel():
        return torch.zeros_like(a), dx, g_last.clone()
    d_h0, da = _solve(_decays(a, h), g, g_last, h0, h.contiguous(), dx, reset)
    da = da.view(len(h), -1, *h.shape[2:])
    if da.shape[1] != h.shape[1]:
        da = da.sum(1, keepdim=True)
    return da.sum_to_size(a.shape).contiguous(), dx, d_h0.view(h0.shape)


_scan = differentiable("linear_scan_numba", "cpu", _forward, _backward)


def scan(
    a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    a, x, reset, dtype = *normal(a, x, h0, reset, lengths), x.dtype
    h, last = _scan(a, x.to(h0.dtype), h0, reset)
    return h.to(dtype), last if lengths is None else at_lengths(h, h0, lengths)
