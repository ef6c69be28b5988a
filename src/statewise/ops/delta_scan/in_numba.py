"""The delta rule by chunks of time, each from its inputs to its outputs in the nearest caches.

With the letters of in_torch.py and N = beta R, a thread goes from chunk to chunk with the states of its heads:
    R = V - exp(G) K S - tril(K K^T . D, -1) N   from the first row on, in blocks,
    O = exp(G) Q S + tril(Q K^T . D) N,   S' = exp(G_C) S + (exp(G_C - G) K)^T N.
No inverse is formed. Kept for the backward pass, which solves the transposed system, are R and the states between
chunks.

Decays per key, and a b^T in place of beta k k^T, are as in dplr_in_torch.py. A row of a is a query of the step before,
so q and a read k and b in the same way: all four kinds of weights are made at once. In blocks of LEAF steps every pair
of steps is walked, the decays multiplied one by one and never rounded to one number (see selective_scan); the rest,
halving by halving, are products about the middle of their block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils
from torch import Tensor

from .. import fresh
from ..compiled import in_numba as compiled
from ..contain import contained
from ..opaque import opaque
from ..teams import in_numba as teams
from ..tiles import in_numba as tiles
from ..tiles.in_numba import LOG2
from ..vectors import in_numba as vectors
from ..vectors.in_numba import Lanes, code
from . import dplr_in_torch, in_torch
from .chunks import CUT
from .in_torch import ARGUMENTS, by_loop

_compile = compiled.function
ROWS = 64  # corrections in a chunk


@functools.partial(code, addresses=5)
def _copy_rows(v: Lanes, steps: Any, row: Any, x: Any, x_row: Any, out: Any, out_row: Any, ahead: Any) -> None:
    """`steps` rows of `row` bytes; those `ahead` bytes further on are asked for."""
    word, builder = steps.type, v.builder
    pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    with cgutils.for_range(builder, steps, intp=word) as step:
        source, target = v.at(x, step.index, x_row), v.at(out, step.index, out_row)
        with cgutils.for_range(builder, builder.udiv(row, word(vectors.BYTES)), intp=word) as loop:
            at = builder.mul(loop.index, word(vectors.BYTES))
            here = builder.add(source, at)
            v.store(builder.add(target, at), v.load(here))
            builder.call(prefetch, [builder.inttoptr(builder.add(here, ahead), pointer), flag(0), flag(3), flag(1)])


@_compile
def _fetch(like, tile, x, b, start, steps, h, ahead):
    """tiles.load, and what the next chunk wants, `ahead` steps on, is asked for from memory."""
    row, along = x.shape[3] * x.itemsize, x.shape[2] * x.shape[3] * x.itemsize
    if row % vectors.BYTES:
        tiles.load(tile, x, b, start, steps, h)
        return
    at = x.ctypes.data + (b * x.shape[1] + start) * along + h * row
    _copy_rows(like, steps, row, (at, along, tile.ctypes.data, tile.shape[1] * tile.itemsize, ahead * along))
    tile[steps:] = 0


# ---- one decay per head, or none


@_compile
def _logs(logs, g, each, b, start, steps, h):
    """Of the decays before each correction, in powers of 2."""
    for i in range(logs.shape[0]):
        logs[i] = g[b, start + i // each, h] * LOG2 if g.shape[2] and i % each == 0 and i // each < steps else 0


@_compile
def _betas(betas, beta, b, start, steps, h):
    for i in range(betas.shape[0]):
        betas[i] = beta[b, start + i, h] if i < steps else 0


@_compile
def _weigh(kk, qk, decay, each):
    """What corrections see of corrections, times -decay below the diagonal; what queries see of them, times decay."""
    for i in range(kk.shape[0]):
        for j in range(kk.shape[1]):
            kk[i, j] *= -decay[i, j]
        kk[i, i] = 0
    for i in range(qk.shape[0]):
        for j in range(qk.shape[1]):
            qk[i, j] *= decay[i * each + each - 1, j]


@_compile
def _scale(x, factors):
    """Rows of x times their factors, in place."""
    for i in range(x.shape[0]):
        factor = factors[i]
        for d in range(x.shape[1]):
            x[i, d] *= factor


@functools.partial(_compile, fastmath={"reassoc", "contract"})
def _dots(out, x, y):
    """Of each row of x with that of y."""
    for i in range(x.shape[0]):
        total = x[i, 0] * 0
        for d in range(x.shape[1]):
            total += x[i, d] * y[i, d]
        out[i] = total


@_compile
def _add(x, y):
    """x += y."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] += y[i, j]


@_compile
def _scores(like, kk, qk, decay, qs, ks, kt, ones, logs, each):
    """What a correction sees of those before it, with a minus (C, C), and a query of all up to it (C / each, C)."""
    compiled.apart()
    tiles.weighed(like, decay, ones, logs)
    tiles.turn(like, kt, ks)
    tiles.lower(like, kk, ks, kt)
    tiles.lower(like, qk, qs, kt, each)
    _weigh(kk, qk, decay, each)


def _triangle_by(back: bool, scaled: bool) -> Any:
    """ROWS rows, all in registers: x_r += sum_{j < r} weights_rj z_j from the first on, z = betas x or x; or its
    adjoint, x_j += sum_{r > j} weights_rj z_r from the last on."""

    def body(v: Lanes, steps: Any, row: Any, weights: Any, weights_row: Any, x: Any, *more: Any) -> None:
        word = steps.type

        def weight(r: int, j: int) -> Any:
            return v.splat(v.builder.add(v.at(weights, word(r), weights_row), word(j * v.size)))

        def finish(at: Any, r: int, value: Any) -> Any:
            if not scaled:
                return value
            betas, z = more
            value = v.mul(value, v.splat(v.at(betas, word(r), v.size)))
            v.store(v.builder.add(v.at(z, word(r), row), at), value)
            return value

        with cgutils.for_range(v.builder, steps, intp=word) as loop:
            at = v.builder.mul(loop.index, word(vectors.BYTES))
            places = [v.builder.add(v.at(x, word(r), row), at) for r in range(tiles.ROWS)]
            xs = [v.load(place) for place in places]
            zs: list[Any] = []
            for r in reversed(range(tiles.ROWS)) if back else range(tiles.ROWS):
                for j in range(r):
                    if not back:
                        xs[r] = v.mad(weight(r, j), zs[j], xs[r])
                zs.append(finish(at, r, xs[r]))
                for j in range(r):
                    if back:
                        xs[j] = v.mad(weight(r, j), zs[-1], xs[j])
            for place, value in zip(places, xs):
                v.store(place, value)

    return code(body, 5 if scaled else 3)


_solve_rows, _solve_rows_back = _triangle_by(False, True), _triangle_by(True, True)
_read_rows, _read_rows_back = _triangle_by(False, False), _triangle_by(True, False)


@_compile
def _solve(like, missing, new, kk, betas):
    """missing becomes the solution of missing = missing + kk new, new = beta missing, from the first row on."""
    compiled.apart()
    size, item = missing.shape[0], missing.itemsize
    row, block = missing.shape[1] * item, size * item
    for i in range(0, size, tiles.ROWS):
        at = kk.ctypes.data + i * block
        tiles.window(
            like, 1, tiles.ROWS, row, i, at, block, item, new.ctypes.data, row, missing.ctypes.data + i * row, row
        )  # fmt: skip
        _solve_rows(
            like, row // vectors.BYTES, row,
            (at + i * item, block, missing.ctypes.data + i * row, betas.ctypes.data + i * item,
             new.ctypes.data + i * row),
        )  # fmt: skip


@_compile
def _solve_back(like, given, y, kk, betas):
    """The adjoint, from the last row on: given, the gradient of new, becomes all of it, and y that of missing."""
    compiled.apart()
    size, item = given.shape[0], given.itemsize
    row, block = given.shape[1] * item, size * item
    for last in range(size, 0, -tiles.ROWS):
        i = last - tiles.ROWS
        tiles.window(
            like, 1, tiles.ROWS, row, size - last, kk.ctypes.data + last * block + i * item, item, block,
            y.ctypes.data + last * row, row, given.ctypes.data + i * row, row,
        )  # fmt: skip
        _solve_rows_back(
            like, row // vectors.BYTES, row,
            (kk.ctypes.data + i * block + i * item, block, given.ctypes.data + i * row, betas.ctypes.data + i * item,
             y.ctypes.data + i * row),
        )  # fmt: skip


@_compile
def _forward_work(like, given, me):
    """Units are rows of the batch by heads; missed: what the corrections found missing, (B, n T, H, V), or nothing."""
    compiled.apart()
    if teams.started(me):
        return
    q, k, v, beta, g, state, tokens, each, o, last, states, missed = given
    steps, heads, keys, values, size = q.shape[1], q.shape[2], q.shape[3], v.shape[3], tokens * each
    wide, high = tiles.up(keys), tiles.up(values)
    qs, ks, kt = np.zeros((tokens, wide), v.dtype), np.zeros((size, wide), v.dtype), np.zeros((wide, size), v.dtype)
    scaled, new = np.zeros((size, wide), v.dtype), np.zeros((size, high), v.dtype)
    rs, os, s = np.zeros((size, high), v.dtype), np.zeros((tokens, high), v.dtype), np.zeros((wide, high), v.dtype)
    kk, qk = np.zeros((size, size), v.dtype), np.zeros((tokens, size), v.dtype)
    decay, ones = np.zeros((size, size), v.dtype), np.ones((size, size), v.dtype)
    logs, betas = np.zeros(size, v.dtype), np.zeros(size, v.dtype)
    factors, whole = np.zeros((2, size), v.dtype), np.zeros((2, 1), v.dtype)
    units = q.shape[0] * heads
    for u in teams.share(units, me):
        b, h = u // heads, u % heads
        s[:] = 0  # what fills up the tile too: of the head before, it may not be finite
        tiles.copy(s[:keys, :values], state[b, h])
        for c in range(-(-steps // tokens)):
            start = c * tokens
            here = min(tokens, steps - start)
            _fetch(like, qs, q, b, start, here, h, tokens)
            _fetch(like, ks, k, b, start * each, here * each, h, size)
            _fetch(like, rs, v, b, start * each, here * each, h, size)
            _betas(betas, beta, b, start * each, here * each, h)
            _logs(logs, g, each, b, start, here, h)
            tiles.factors(like, factors, whole, logs)
            _scores(like, kk, qk, decay, qs, ks, kt, ones, logs, each)
            tiles.scale(scaled, ks, factors[0])
            tiles.product(like, -1, rs, scaled, s)
            _solve(like, rs, new, kk, betas)
            if states.shape[0]:
                tiles.copy(states[b, h, c], s)
                tiles.save(missed, rs, b, start * each, here * each, h)
            _scale(qs, factors[0, each - 1 :: each])
            tiles.lower_product(like, 0, os, qk, new, each)
            tiles.product(like, 1, os, qs, s)
            tiles.save(o, os, b, start, here, h)
            tiles.pass_on(s, whole[0], whole[1])
            tiles.scale(scaled, ks, factors[1])
            tiles.turned_product(like, 1, s, scaled, new)
        tiles.copy(last[b, h], s[:keys, :values])


@_compile
def _backward_work(like, given, me):
    compiled.apart()
    if teams.started(me):
        return
    d_o, d_last, q, k, v, beta, g, states, missed, tokens, each, d_q, d_k, d_v, d_beta, d_g, d_state = given
    steps, heads, keys, values, size = q.shape[1], q.shape[2], q.shape[3], v.shape[3], tokens * each
    wide, high = tiles.up(keys), tiles.up(values)
    qs, ks, kt = np.zeros((tokens, wide), v.dtype), np.zeros((size, wide), v.dtype), np.zeros((wide, size), v.dtype)
    q_, k_, dqs = np.zeros((tokens, wide), v.dtype), np.zeros((size, wide), v.dtype), np.zeros((tokens, wide), v.dtype)
    read, write = np.zeros((size, wide), v.dtype), np.zeros((size, wide), v.dtype)
    rs, new, turned = np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype), np.zeros((high, size), v.dtype)
    d_new, y, do = np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype), np.zeros((tokens, high), v.dtype)
    end, st = np.zeros((wide, high), v.dtype), np.zeros((high, wide), v.dtype)
    kk, qk = np.zeros((size, size), v.dtype), np.zeros((tokens, size), v.dtype)
    decay, ones = np.zeros((size, size), v.dtype), np.ones((size, size), v.dtype)
    logs, betas, later = np.zeros(size, v.dtype), np.zeros(size, v.dtype), np.zeros(tokens)
    of_q, of_read, of_write = np.zeros(tokens, v.dtype), np.zeros(size, v.dtype), np.zeros(size, v.dtype)
    factors, whole = np.zeros((2, size), v.dtype), np.zeros((2, 1), v.dtype)
    units = q.shape[0] * heads
    for u in teams.share(units, me):
        b, h = u // heads, u % heads
        end[:] = 0
        tiles.copy(end[:keys, :values], d_last[b, h])
        for c in range(-(-steps // tokens) - 1, -1, -1):
            start, s = c * tokens, states[b, h, c]
            here = min(tokens, steps - start)
            _fetch(like, qs, q, b, start, here, h, -tokens)
            _fetch(like, do, d_o, b, start, here, h, -tokens)
            _fetch(like, ks, k, b, start * each, here * each, h, -size)
            _fetch(like, rs, missed, b, start * each, here * each, h, -size)
            _betas(betas, beta, b, start * each, here * each, h)
            _logs(logs, g, each, b, start, here, h)
            tiles.factors(like, factors, whole, logs)
            _scores(like, kk, qk, decay, qs, ks, kt, ones, logs, each)
            tiles.scale(new, rs, betas)
            tiles.scale(k_, ks, factors[1])
            tiles.turned_lower_product(like, 0, d_new, qk, do, each)
            tiles.product(like, 1, d_new, k_, end)
            _solve_back(like, d_new, y, kk, betas)
            tiles.save(d_v, y, b, start * each, here * each, h)
            _dots(of_read, d_new, rs)
            for i in range(here * each):
                d_beta[b, start * each + i, h] = of_read[i]
            tiles.turn(like, turned, new)  # kk and qk become the gradients of k k^T and q k^T
            tiles.lower(like, kk, y, turned)
            tiles.lower(like, qk, do, turned, each)
            _weigh(kk, qk, decay, each)
            tiles.turn(like, st, s)
            tiles.product(like, 0, dqs, do, st)
            tiles.product(like, 0, read, y, st)
            tiles.turn(like, st, end)
            tiles.product(like, 0, write, new, st)
            _scale(read, -factors[0])
            _scale(write, factors[1])
            crossing = tiles.dot(s.reshape(s.size), end.reshape(end.size)) * (whole[0, 0] + whole[1, 0])
            crossing += tiles.dot(ks.reshape(ks.size), write.reshape(write.size))
            _scale(dqs, factors[0, each - 1 :: each])
            tiles.scale(q_, qs, factors[0, each - 1 :: each])
            tiles.lower_product(like, 1, dqs, qk, ks, each)
            tiles.lower_product(like, 1, read, kk, ks)
            tiles.turned_lower_product(like, 1, write, kk, ks)
            tiles.turned_lower_product(like, 1, write, qk, qs, each)
            tiles.save(d_q, dqs, b, start, here, h)
            if d_g.shape[2]:
                _dots(of_q, qs, dqs)
                _dots(of_read, ks, read)
                _dots(of_write, ks, write)
                for i in range(tokens):
                    later[i] = of_q[i]
                for i in range(size):
                    later[i // each] += of_read[i] - of_write[i]
                beyond = 0.0 + crossing
                for step in range(here):
                    i = here - 1 - step
                    beyond += later[i]
                    d_g[b, start + i, h] = beyond
                    if logs[i * each] <= CUT * LOG2:  # nothing passes, not the rounding of sums that cancel
                        d_g[b, start + i, h] = 0
                        beyond = 0.0
            _add(read, write)
            tiles.save(d_k, read, b, start * each, here * each, h)
            tiles.scale(k_, ks, factors[0])
            tiles.pass_on(end, whole[0], whole[1])
            tiles.turned_product(like, 1, end, q_, do)
            tiles.turned_product(like, -1, end, k_, y)
        tiles.copy(d_state[b, h], end[:keys, :values])


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Steps of a chunk, corrections of a step, and the shape of the states between chunks."""
    each = k.shape[1] // q.shape[1]
    tokens, most = tiles.LANES, max(tiles.LANES, ROWS // each)
    while 2 * tokens <= most and tokens < q.shape[1]:
        tokens *= 2
    up = tiles.up.py_func
    return tokens, each, (len(q), q.shape[2], -(-q.shape[1] // tokens), up(q.shape[3]), up(v.shape[3]))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor, *, keep: bool
) -> tuple[Tensor, ...]:
    tokens, each, shape = _sizes(q, k, v)
    o, last = fresh.empty(v, *q.shape[:3], v.shape[3]), fresh.empty(state, *state.shape)
    states, missed = (fresh.empty(state, *(size if keep else (0, *size[1:]))) for size in (shape, v.shape))
    given = q.new_empty(*q.shape[:2], 0) if g is None else g
    before, after = teams.arrays(q, k, v, beta, given, state), teams.arrays(o, last, states, missed)
    teams.run(_forward_work, v, 1, len(q) * q.shape[2], *before, tokens, each, *after)
    return o, last, states, missed


def _backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    reset: Tensor | None, state: Tensor, states: Tensor, missed: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens, each, _ = _sizes(q, k, v)
    given = q.new_empty(*q.shape[:2], 0) if g is None else g
    grads = [fresh.empty(t, *t.shape) for t in (q, k, v, beta, given, d_last)]
    before = teams.arrays(d_o, d_last, q, k, v, beta, given, states, missed)
    arrays = *before, tokens, each, *teams.arrays(*grads)
    teams.run(_backward_work, v, 1, len(q) * q.shape[2], *arrays)
    return tuple(grads if g is not None else [*grads[:4], grads[5]])


def _like(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor
) -> tuple[Tensor, ...]:
    return (
        v.new_empty(*q.shape[:3], v.shape[3]),
        state.new_empty(state.shape),
        v.new_empty(q.shape[:2], dtype=torch.bool),
        state.new_empty(_sizes(q, k, v)[2]),
        v.new_empty(v.shape),
    )


_contained = contained(ARGUMENTS, _forward, _backward, by_loop)
_run_delta = opaque(
    "delta_chunks_numba", "cpu", ARGUMENTS, *_contained[:2], _like, results=2, kept=3, alone=_contained[2]
)
# ---- a decay per key, or none, and a b^T in place of beta k k^T


LEAF = 16  # steps in a block whose pairs are walked


def _across(v: Lanes, row: Any, most: int, emit: Callable[[Any, int], None]) -> None:
    """Code by emit(offset, count) for all `row` bytes of rows: `most` vectors side by side, then one at a time."""
    word, builder = row.type, v.builder
    many = builder.udiv(row, word(vectors.BYTES))
    wide = builder.udiv(many, word(most))
    with cgutils.for_range(builder, wide, intp=word) as loop:
        emit(builder.mul(loop.index, word(most * vectors.BYTES)), most)
    done = builder.mul(wide, word(most))
    with cgutils.for_range(builder, builder.sub(many, done), intp=word) as loop:
        emit(builder.mul(builder.add(done, loop.index), word(vectors.BYTES)), 1)


class _Columns:
    """`count` vectors side by side, at `offset` of their rows."""

    def __init__(self, v: Lanes, row: Any, offset: Any, count: int):
        self.v, self.row = v, row
        self.offsets = [v.builder.add(offset, offset.type(i * vectors.BYTES)) for i in range(count)]

    def at(self, base: Any, i: Any) -> list[Any]:
        start = self.v.at(base, i, self.row)
        return [self.v.builder.add(start, offset) for offset in self.offsets]

    def load(self, base: Any, i: Any) -> list[Any]:
        return [self.v.load(at) for at in self.at(base, i)]

    def decays(self, power: Any, rest: Any, i: Any) -> list[tuple[Any, Any]]:
        return list(zip(self.load(power, i), self.load(rest, i)))

    def variables(self, value: float = 0.0) -> list[Any]:
        return [self.v.variable(self.v.full(value)) for _ in self.offsets]


@functools.partial(code, addresses=4)
def _factors(v: Lanes, steps: Any, row: Any, logs: Any, power: Any, rest: Any, total: Any) -> None:
    """e^logs in two parts, and the sums of the logs in powers of 2."""

    def emit(offset: Any, count: int) -> None:
        columns = _Columns(v, row, offset, count)
        sums = columns.variables()
        with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
            i = loop.index
            for log, sum_, p, r in zip(columns.load(logs, i), sums, columns.at(power, i), columns.at(rest, i)):
                log = v.builder.fmul(log, v.full(LOG2))
                v.builder.store(v.builder.fadd(v.builder.load(sum_), log), sum_)
                for at, part in zip((p, r), v.exp2(log)):
                    v.store(at, part)
        for at, sum_ in zip(columns.at(total, row.type(0)), sums):
            v.store(at, v.builder.load(sum_))

    _across(v, row, 2, emit)


def _running(
    v: Lanes, steps: Any, columns: _Columns, power: Any, rest: Any, back: bool, use: Callable[[Any, list[Any]], None]
) -> None:
    """use(i, the product of decays from the first step to i), or that of those behind i, from the last step back."""
    products = columns.variables(1.0)
    with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        i = v.builder.sub(v.builder.sub(steps, steps.type(1)), loop.index) if back else loop.index
        so_far = [v.builder.load(product) for product in products]
        new = [v.decayed(decay, value) for decay, value in zip(columns.decays(power, rest, i), so_far)]
        for product, value in zip(products, new):
            v.builder.store(value, product)
        use(i, so_far if back else new)


def _scaled_by(back: bool) -> Any:
    """Two tiles times the products of decays up to their rows, or of those behind them."""

    def body(
        v: Lanes, steps: Any, row: Any, x: Any, other: Any, power: Any, rest: Any, out: Any, other_out: Any
    ) -> None:
        def emit(offset: Any, count: int) -> None:
            columns = _Columns(v, row, offset, count)

            def use(i: Any, products: list[Any]) -> None:
                for source, target in ((x, out), (other, other_out)):
                    for value, product, at in zip(columns.load(source, i), products, columns.at(target, i)):
                        v.store(at, v.mul(value, product))

            _running(v, steps, columns, power, rest, back, use)

        _across(v, row, 4, emit)

    return code(body, 6)


def _through_by(back: bool, first: bool) -> Any:
    """Of two tiles: d_x += the product of decays times dx_; d_g += the sum of x_ dx_ over the steps whose x_ a step's
    decay is in, from what stands in `total` on. first: what stands in d_x, and forwards in d_g, does not count."""

    def body(
        v: Lanes, steps: Any, row: Any, x_: Any, dx_: Any, d_x: Any, other_: Any, d_other_: Any, d_other: Any,
        power: Any, rest: Any, d_g: Any, total: Any,
    ) -> None:  # fmt: skip
        def emit(offset: Any, count: int) -> None:
            columns = _Columns(v, row, offset, count)

            def use(i: Any, products: list[Any]) -> None:
                for given, out in ((dx_, d_x), (d_other_, d_other)):
                    for value, product, at in zip(columns.load(given, i), products, columns.at(out, i)):
                        v.store(at, v.mul(value, product) if first else v.mad(value, product, v.load(at)))

            _running(v, steps, columns, power, rest, back, use)
            sums = [v.variable(value) for value in columns.load(total, row.type(0))]
            with cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
                i = loop.index if back else v.builder.sub(v.builder.sub(steps, steps.type(1)), loop.index)
                four = zip(*(columns.load(base, i) for base in (x_, dx_, other_, d_other_)))
                for (p, dp, q, dq), sum_, at in zip(four, sums, columns.at(d_g, i)):
                    old = v.builder.load(sum_)
                    new = v.builder.fadd(v.mad(p, dp, v.mul(q, dq)), old)
                    v.builder.store(new, sum_)
                    now = old if back else new
                    v.store(at, now if first and not back else v.builder.fadd(v.load(at), now))

        _across(v, row, 4, emit)

    return code(body, 10)


_upto, _after = _scaled_by(False), _scaled_by(True)
_first_upto, _first_after = _through_by(False, True), _through_by(True, True)
_more_upto, _more_after = _through_by(False, False), _through_by(True, False)


def _sums(v: Lanes, values: list[Any]) -> list[Any]:
    """The sums over the lanes of each of some vectors, a power of 2 of them."""
    many, groups, width = len(values), 1, v.count
    while len(values) > 1:  # lanes of two become groups side by side of one
        width //= 2
        low = [half * v.count + 2 * g * width + l for half in range(2) for g in range(groups) for l in range(width)]
        high = [lane + width for lane in low]
        pairs = zip(values[::2], values[1::2])
        values = [v.builder.fadd(v.mix(p, q, low), v.mix(p, q, high)) for p, q in pairs]
        groups *= 2
    value, group = values[0], width
    while width > 1:
        width //= 2
        value = v.builder.fadd(value, v.mix(value, value, [lane ^ width for lane in range(v.count)]))
    return [v.builder.extract_element(value, ir.IntType(32)(g * group)) for g in range(many)]


@functools.partial(code, addresses=10)
def _walk(
    v: Lanes, steps: Any, row: Any, q: Any, a: Any, k: Any, b: Any, power: Any, rest: Any, seen: Any, out: Any,
    out_row: Any, apart: Any,
) -> None:  # fmt: skip
    """What q and a of `steps` steps read of k, then of b, of the first of these; seen: scratch, two rows.

    The four kinds of weights are `apart` bytes from each other.
    """
    word, builder = steps.type, v.builder
    many, other = builder.udiv(row, word(vectors.BYTES)), builder.add(seen, row)

    def step(i: Any, arrive: Callable[[Any], tuple[Any, Any]]) -> None:
        totals = [v.variable(v.full(0.0)) for _ in range(4)]
        q_i, a_i, out_i = v.at(q, i, row), v.at(a, i, row), v.at(out, i, out_row)
        with cgutils.for_range(builder, many, intp=word) as loop:
            at = builder.mul(loop.index, word(vectors.BYTES))
            from_k, from_b = arrive(at)
            v.store(builder.add(seen, at), from_k)
            v.store(builder.add(other, at), from_b)
            by_q, by_a = v.load(builder.add(q_i, at)), v.load(builder.add(a_i, at))
            pairs = ((by_q, from_k), (by_q, from_b), (by_a, from_k), (by_a, from_b))
            for total, (reads, writes) in zip(totals, pairs):
                builder.store(v.mad(reads, writes, builder.load(total)), total)
        for n, value in enumerate(_sums(v, [builder.load(total) for total in totals])):
            builder.store(value, builder.inttoptr(v.at(out_i, word(n), apart), v.scalar.as_pointer()))

    step(word(0), lambda at: (v.load(builder.add(k, at)), v.load(builder.add(b, at))))
    with cgutils.for_range(builder, builder.sub(steps, word(1)), intp=word) as loop:
        i = builder.add(loop.index, word(1))
        power_i, rest_i = v.at(power, i, row), v.at(rest, i, row)

        def arrive(at: Any) -> tuple[Any, Any]:
            decay = v.load(builder.add(power_i, at)), v.load(builder.add(rest_i, at))
            return v.decayed(decay, v.load(builder.add(seen, at))), v.decayed(decay, v.load(builder.add(other, at)))

        step(i, arrive)


@functools.partial(code, addresses=15)
def _walk_back(
    v: Lanes, steps: Any, row: Any, q: Any, a: Any, k: Any, b: Any, power: Any, rest: Any, seen: Any, given: Any,
    given_row: Any, apart: Any, d_q: Any, d_a: Any, d_k: Any, d_b: Any, d_g: Any,
) -> None:  # fmt: skip
    """Backward of _walk, to which the gradients and that of the logs grow; seen: scratch, 2 LEAF rows."""
    word, builder = steps.type, v.builder
    more, zero = builder.sub(steps, word(1)), word(0)
    seen_b = builder.add(seen, builder.mul(row, word(LEAF)))

    def emit(offset: Any, count: int) -> None:
        columns = _Columns(v, row, offset, count)
        both = ((k, seen), (b, seen_b))
        values = [[v.variable(x) for x in columns.load(base, zero)] for base, _ in both]

        def keep(i: Any) -> None:
            for now, (_, kept) in zip(values, both):
                for value, at in zip(now, columns.at(kept, i)):
                    v.store(at, builder.load(value))

        keep(zero)
        with cgutils.for_range(builder, more, intp=word) as loop:
            i = builder.add(loop.index, word(1))
            for n, decay in enumerate(columns.decays(power, rest, i)):
                for now in values:
                    builder.store(v.decayed(decay, builder.load(now[n])), now[n])
            keep(i)
        for now in values:
            for value in now:
                builder.store(v.full(0.0), value)

        def arrive(i: Any, n: int) -> tuple[Any, ...]:
            """mu of k and b, the gradients of what is seen of them at step i, and that."""
            place = v.at(given, i, given_row)
            qk, qb, ak, ab = (v.splat(v.at(place, word(m), apart)) for m in range(4))
            one = _Columns(v, row, columns.offsets[n], 1)
            of = lambda base: one.load(base, i)[0]
            from_k, from_b = of(seen), of(seen_b)
            for to_k, to_b, base in ((qk, qb, d_q), (ak, ab, d_a)):
                at = one.at(base, i)[0]
                v.store(at, v.mad(to_k, from_k, v.mad(to_b, from_b, v.load(at))))
            reads = of(q), of(a)
            mus = [
                builder.fadd(v.mad(by_q, reads[0], v.mul(by_a, reads[1])), builder.load(now[n]))
                for by_q, by_a, now in ((qk, ak, values[0]), (qb, ab, values[1]))
            ]
            return *mus, from_k, from_b, one.at(d_g, i)[0]

        with cgutils.for_range(builder, more, intp=word) as loop:
            i = builder.sub(more, loop.index)
            for n, decay in enumerate(columns.decays(power, rest, i)):
                mu_k, mu_b, from_k, from_b, at = arrive(i, n)
                v.store(at, v.mad(mu_k, from_k, v.mad(mu_b, from_b, v.load(at))))
                for mu, now in ((mu_k, values[0]), (mu_b, values[1])):
                    builder.store(v.decayed(decay, mu), now[n])
        for n in range(count):
            mu_k, mu_b, *_ = arrive(zero, n)
            for mu, base in ((mu_k, d_k), (mu_b, d_b)):
                at = columns.at(base, zero)[n]
                v.store(at, builder.fadd(mu, v.load(at)))

    _across(v, row, 2, emit)


@_compile
def _levels(size):
    """How many times a chunk is halved before leaves."""
    count = 0
    while LEAF << count < size:
        count += 1
    return count


@_compile
def _first(out, a, b, t, h, s):
    """out = a_t S."""
    out[:] = 0
    for d in range(a.shape[3]):
        weight = a[b, t, h, d]
        for x in range(out.shape[0]):
            out[x] += weight * s[d, x]


@_compile
def _first_back(d_a, end, a, b, t, h, s, given):
    """Backward of _first, to a_t, and to S in `end`."""
    for d in range(a.shape[3]):
        weight = a[b, t, h, d]
        for x in range(end.shape[1]):
            end[d, x] += weight * given[x]
        d_a[b, t, h, d] = tiles.dot(s[d], given)


@_compile
def _read(like, read, weights):
    """read_i += sum_{j < i} weights_{i - 1, j} read_j, from the first row on."""
    compiled.apart()
    size, item = weights.shape[0], read.itemsize
    row, block = read.shape[1] * item, size * item
    for i in range(0, size, tiles.ROWS):
        at, here = weights.ctypes.data + (i - 1) * block, read.ctypes.data + i * row
        if i:
            tiles.window(like, 1, tiles.ROWS, row, i, at, block, item, read.ctypes.data, row, here, row)
        _read_rows(like, row // vectors.BYTES, row, (at + i * item, block, here))


@_compile
def _read_back(like, given, weights):
    """The adjoint: given, the gradient of read, becomes all of it, that of what stood there before."""
    compiled.apart()
    size, item = weights.shape[0], given.itemsize
    row, block = given.shape[1] * item, size * item
    for last in range(size, 0, -tiles.ROWS):
        i = last - tiles.ROWS
        at, here = weights.ctypes.data + i * item, given.ctypes.data + i * row
        if last < size:
            tiles.window(
                like, 1, tiles.ROWS, row, size - last, at + (last - 1) * block, item, block,
                given.ctypes.data + last * row, row, here, row,
            )  # fmt: skip
        _read_rows_back(like, row // vectors.BYTES, row, (at + (i - 1) * block, block, here))


@_compile
def _prepare(like, t, levels, w, total, whole, turned, seen, q, k, a, b, g, n, start, steps, h, ahead):
    """A chunk's rows as they come and as they are scaled, in t, and those of k and b in levels (2, _, C, keys), the
    weights (4, C, C) of q and a against k and b, and the decays of all of it; turned, seen: scratch."""
    compiled.apart()
    size, wide, item = w.shape[1], turned.shape[1], w.itemsize
    qs, ks, as_, bs, logs = t[0, :size], t[1, :size], t[2, :size], t[3, :size], t[10, :size]
    row, block = wide * item, size * item
    at = t.ctypes.data + np.arange(10) * t.shape[1] * row
    _fetch(like, qs, q, n, start, steps, h, ahead)
    _fetch(like, ks, k, n, start, steps, h, ahead)
    _fetch(like, bs, b, n, start, steps, h, ahead)
    _fetch(like, as_, a, n, start + 1, steps - 1, h, ahead)  # a row of a is a query of the step before
    if g.shape[3]:
        _fetch(like, logs, g, n, start, steps, h, ahead)
    power, rest = at[8], at[9]
    _factors(like, size, row, (logs.ctypes.data, power, rest, total.ctypes.data))
    tiles.exp2(like, row // vectors.BYTES, row, (total.ctypes.data, whole.ctypes.data))
    _upto(like, size, row, (at[0], at[2], power, rest, at[4], at[6]))
    _after(like, size, row, (at[1], at[3], power, rest, at[5], at[7]))
    half = LEAF
    for level in range(levels.shape[1]):
        of_k, of_b = levels[0, level].ctypes.data, levels[1, level].ctypes.data
        for i in range(0, size, 2 * half):
            low, mid = i * row, (i + half) * row
            _after(like, half, row, (at[1] + low, at[3] + low, power + low, rest + low, of_k + low, of_b + low))
            _upto(like, half, row, (at[0] + mid, at[2] + mid, power + mid, rest + mid, of_k + mid, of_b + mid))
        for one in range(2):
            tiles.turn(like, turned[one], levels[one, level])
        for kind in range(4):
            reads, writes = levels[kind // 2, level].ctypes.data, turned[kind % 2].ctypes.data
            for i in range(0, size, 2 * half):
                tiles.window(
                    like, 0, half, half * item, wide, reads + (i + half) * row, row, item, writes + i * item, block,
                    w[kind].ctypes.data + (i + half) * block + i * item, block,
                )  # fmt: skip
        half *= 2
    for j in range(size):
        here = j * row
        _walk(
            like, LEAF - j % LEAF, row,
            (at[0] + here, at[2] + here, at[1] + here, at[3] + here, power + here, rest + here, seen.ctypes.data,
             w.ctypes.data + j * block + j * item, block, size * block),
        )  # fmt: skip


@_compile
def _prepare_back(like, t, levels, d_levels, w, total, zero, seen):
    """From the gradients of the scaled rows and of the weights, d_levels being scratch, those of the rows and of the
    logs of the decays."""
    compiled.apart()
    size, wide, item, half = w.shape[1], levels.shape[3], w.itemsize, LEAF
    row, block = wide * item, size * item
    at = t.ctypes.data + np.arange(20) * t.shape[1] * row
    power, rest, d_g, nothing = at[8], at[9], at[19], zero.ctypes.data
    _first_upto(
        like, size, row, (at[4], at[11], at[15], at[6], at[13], at[17], power, rest, d_g, total.ctypes.data)
    )  # fmt: skip
    _first_after(like, size, row, (at[5], at[12], at[16], at[7], at[14], at[18], power, rest, d_g, nothing))
    for level in range(levels.shape[1]):
        of_k, of_b = levels[0, level].ctypes.data, levels[1, level].ctypes.data
        d_of_k, d_of_b = d_levels[0, level].ctypes.data, d_levels[1, level].ctypes.data
        for i in range(0, size, 2 * half):
            low, mid = i * row, (i + half) * row
            for kind in range(4):
                reads, d_reads = (of_k, d_of_k) if kind < 2 else (of_b, d_of_b)
                writes, d_writes = (of_b, d_of_b) if kind % 2 else (of_k, d_of_k)
                given = w[kind].ctypes.data + (i + half) * block + i * item
                tiles.window(
                    like, kind % 2, half, row, half, given, block, item, writes + low, row, d_reads + mid, row
                )  # fmt: skip
                tiles.window(
                    like, kind // 2, half, row, half, given, item, block, reads + mid, row, d_writes + low, row
                )  # fmt: skip
            _more_upto(
                like, half, row,
                (of_k + mid, d_of_k + mid, at[15] + mid, of_b + mid, d_of_b + mid, at[17] + mid, power + mid,
                 rest + mid, d_g + mid, nothing),
            )  # fmt: skip
            _more_after(
                like, half, row,
                (of_k + low, d_of_k + low, at[16] + low, of_b + low, d_of_b + low, at[18] + low, power + low,
                 rest + low, d_g + low, nothing),
            )  # fmt: skip
        half *= 2
    for j in range(size):
        here = j * row
        _walk_back(
            like, LEAF - j % LEAF, row,
            (at[0] + here, at[2] + here, at[1] + here, at[3] + here, power + here, rest + here, seen.ctypes.data,
             w.ctypes.data + j * block + j * item, block, size * block, at[15] + here, at[17] + here, at[16] + here,
             at[18] + here, d_g + here),
        )  # fmt: skip


@_compile
def _dplr_forward_work(like, given, me):
    """Units are rows of the batch by heads; read: what a reads, (B, T, H, V), or nothing.

    A tile has a row to spare: at multiples of 4 KiB from each other they would push each other out of the cache.
    """
    compiled.apart()
    if teams.started(me):
        return
    q, k, v, a, b, g, state, size, o, last, states, read = given
    steps, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    wide, high, spare = tiles.up(keys), tiles.up(values), size + 1
    t, levels = np.zeros((11, spare, wide), v.dtype), np.zeros((2, _levels(size), size, wide), v.dtype)
    q_, k_, a_, b_ = t[4, :size], t[5, :size], t[6, :size], t[7, :size]
    turned, w = np.zeros((2, wide, size), v.dtype), np.zeros((4, size, size), v.dtype)
    rows = np.zeros((3, spare, high), v.dtype)
    vs, os, ps, base = rows[0, :size], rows[1, :size], rows[2, :size], rows[2, 1:]  # base: of the rows after
    seen, s = np.zeros((2, wide), v.dtype), np.zeros((wide, high), v.dtype)
    total, whole = np.zeros(wide, v.dtype), np.zeros((2, wide), v.dtype)
    units = q.shape[0] * heads
    for u in teams.share(units, me):
        n, h = u // heads, u % heads
        s[:] = 0
        tiles.copy(s[:keys, :values], state[n, h])
        for c in range(-(-steps // size)):
            start = c * size
            here = min(size, steps - start)
            _prepare(like, t, levels, w, total, whole, turned, seen, q, k, a, b, g, n, start, here, h, size)
            _fetch(like, vs, v, n, start, here, h, size)
            _first(ps[0], a, n, start, h, s)
            tiles.product(like, 0, base, a_, s)
            tiles.lower_product(like, 1, base, w[2], vs)
            _read(like, ps, w[3])
            tiles.lower_product(like, 0, os, w[0], vs)
            tiles.lower_product(like, 1, os, w[1], ps)
            tiles.product(like, 1, os, q_, s)
            tiles.save(o, os, n, start, here, h)
            if states.shape[0]:
                tiles.copy(states[n, h, c], s)
                tiles.save(read, ps, n, start, here, h)
            tiles.pass_on(s, whole[0], whole[1])
            tiles.turned_product(like, 1, s, k_, vs)
            tiles.turned_product(like, 1, s, b_, ps)
        tiles.copy(last[n, h], s[:keys, :values])


@_compile
def _dplr_backward_work(like, given, me):
    compiled.apart()
    if teams.started(me):
        return
    d_o, d_last, q, k, v, a, b, g, states, read, size, d_q, d_k, d_v, d_a, d_b, d_g, d_state = given
    steps, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    wide, high, spare = tiles.up(keys), tiles.up(values), size + 1
    t, levels = np.zeros((20, spare, wide), v.dtype), np.zeros((2, _levels(size), size, wide), v.dtype)
    q_, k_, a_, b_ = t[4, :size], t[5, :size], t[6, :size], t[7, :size]
    dq_, dk_, da_, db_ = t[11, :size], t[12, :size], t[13, :size], t[14, :size]
    dqs, dks, das, dbs, dgs = t[15, :size], t[16, :size], t[17, :size], t[18, :size], t[19, :size]
    d_levels = np.zeros(levels.shape, v.dtype)
    turned, w = np.zeros((2, wide, size), v.dtype), np.zeros((4, size, size), v.dtype)
    rows = np.zeros((5, spare, high), v.dtype)
    vs, do, ps, dv = rows[0, :size], rows[1, :size], rows[2, :size], rows[3, :size]
    dp, y = rows[4, :size], rows[4, 1:]  # a row of y is what reaches the row of read after it; after the last, nothing
    turned_v, st = np.zeros((high, size), v.dtype), np.zeros((high, wide), v.dtype)
    seen, end = np.zeros((2 * LEAF, wide), v.dtype), np.zeros((wide, high), v.dtype)
    total, whole, zero = np.zeros(wide, v.dtype), np.zeros((2, wide), v.dtype), np.zeros(wide, v.dtype)
    units = q.shape[0] * heads
    for u in teams.share(units, me):
        n, h = u // heads, u % heads
        end[:] = 0
        tiles.copy(end[:keys, :values], d_last[n, h])
        for c in range(-(-steps // size) - 1, -1, -1):
            start, s = c * size, states[n, h, c]
            here = min(size, steps - start)
            w[:] = 0
            _prepare(like, t, levels, w, total, whole, turned, seen, q, k, a, b, g, n, start, here, h, -size)
            _fetch(like, vs, v, n, start, here, h, -size)
            _fetch(like, do, d_o, n, start, here, h, -size)
            _fetch(like, ps, read, n, start, here, h, -size)
            tiles.turned_lower_product(like, 0, dp, w[1], do)
            tiles.product(like, 1, dp, b_, end)
            _read_back(like, dp, w[3])
            tiles.turned_lower_product(like, 0, dv, w[0], do)
            tiles.turned_lower_product(like, 1, dv, w[2], y)
            tiles.product(like, 1, dv, k_, end)
            tiles.save(d_v, dv, n, start, here, h)
            tiles.turn(like, turned_v, vs)  # from here on w are the gradients
            tiles.lower(like, w[0], do, turned_v)
            tiles.lower(like, w[2], y, turned_v)
            tiles.turn(like, turned_v, ps)
            tiles.lower(like, w[1], do, turned_v)
            tiles.lower(like, w[3], y, turned_v)
            tiles.turn(like, st, s)
            tiles.product(like, 0, dq_, do, st)
            tiles.product(like, 0, da_, y, st)
            tiles.turn(like, st, end)
            tiles.product(like, 0, dk_, vs, st)
            tiles.product(like, 0, db_, ps, st)
            _dots(total, s, end)
            for d in range(wide):
                total[d] *= whole[0, d] + whole[1, d]
            _prepare_back(like, t, levels, d_levels, w, total, zero, seen)
            tiles.save(d_q, dqs, n, start, here, h)
            tiles.save(d_k, dks, n, start, here, h)
            tiles.save(d_b, dbs, n, start, here, h)
            tiles.save(d_a, das, n, start + 1, here - 1, h)
            if d_g.shape[3]:
                tiles.save(d_g, dgs, n, start, here, h)
            tiles.pass_on(end, whole[0], whole[1])
            tiles.turned_product(like, 1, end, q_, do)
            tiles.turned_product(like, 1, end, a_, y)
            _first_back(d_a, end, a, n, start, h, s, dp[0])
        tiles.copy(d_state[n, h], end[:keys, :values])


def _dplr_forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor, *,
    keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, _, shape = _sizes(q, k, v)
    o, last = fresh.empty(v, *v.shape), fresh.empty(state, *state.shape)
    states, read = (fresh.empty(state, *(many if keep else (0, *many[1:]))) for many in (shape, v.shape))
    given = q.new_empty(*q.shape[:3], 0) if g is None else g
    before = teams.arrays(q, k, v, a, b, given, state)  # resets are in the decays
    arrays = *before, size, *teams.arrays(o, last, states, read)
    teams.run(_dplr_forward_work, v, 1, len(q) * q.shape[2], *arrays)
    return o, last, states, read


def _dplr_backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None,
    reset: Tensor | None, state: Tensor, states: Tensor, read: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, given = _sizes(q, k, v)[0], q.new_empty(*q.shape[:3], 0) if g is None else g
    grads = [fresh.empty(t, *t.shape) for t in (q, k, v, a, b, given, d_last)]
    before = teams.arrays(d_o, d_last, q, k, v, a, b, given, states, read)
    arrays = *before, size, *teams.arrays(*grads)
    teams.run(_dplr_backward_work, v, 1, len(q) * q.shape[2], *arrays)
    return tuple(grads if g is not None else [*grads[:5], grads[6]])


def _dplr_like(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor
) -> tuple[Tensor, ...]:
    return _like(q, k, v, q[..., 0], g, reset, state)


_dplr_contained = contained(dplr_in_torch.ARGUMENTS, _dplr_forward, _dplr_backward, dplr_in_torch.by_loop)
_run_dplr = opaque(
    "dplr_chunks_numba", "cpu", dplr_in_torch.ARGUMENTS, *_dplr_contained[:2], _dplr_like, results=2, kept=3,
    alone=_dplr_contained[2],
)  # fmt: skip


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = [t.to(state.dtype) for t in (q, k, v, beta)]
    out, last = in_torch.solve(_run_delta, _run_dplr, *wide, state, log_decay, reset, lengths)
    return out.to(v.dtype), last


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = [t.to(state.dtype) for t in (q, k, v, a, b)]
    out, last = dplr_in_torch.solve(_run_dplr, *wide, state, log_decay, reset, lengths)
    return out.to(v.dtype), last
