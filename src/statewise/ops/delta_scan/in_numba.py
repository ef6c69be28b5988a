"""The delta rule by chunks of time, each from its inputs to its outputs in the nearest caches.

With the letters of in_torch.py and N = beta R, a thread goes from chunk to chunk with the states of its heads:
    R = V - exp(G) K S - tril(K K^T . D, -1) N   from the first row on, in blocks,
    O = exp(G) Q S + tril(Q K^T . D) N,   S' = exp(G_C) S + (exp(G_C - G) K)^T N.
No inverse is formed. Kept for the backward pass, which solves the transposed system, are R and the states between
chunks.

Decays per key, and a b^T in place of beta k k^T, are as in dplr_in_torch.py with the factors of outer_scan: a row of a
is a query of the step before, so that all four kinds of weights are of one form.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from torch import Tensor

from ..contain import contained
from ..linear_scan import in_numba as threads
from ..opaque import opaque
from ..outer_scan import in_numba as key
from ..selective_scan import in_numba as vectors
from ..tiles import in_numba as tiles
from ..tiles.in_numba import LOG2
from . import dplr_in_torch, in_torch
from .chunks import CUT
from .in_torch import ARGUMENTS, by_loop

_compile = threads._compile
ROWS = 64  # corrections in a chunk


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
def _scores(like, kk, qk, decay, qs, ks, kt, ones, logs, each):
    """What a correction sees of those before it (C, C), and a query of all up to it (C / each, C)."""
    threads._apart()
    size = ks.shape[0]
    tiles.weighed(like, decay, ones, logs)
    tiles.turn(like, kt, ks)
    tiles.lower(like, kk, ks, kt)
    tiles.lower(like, qk, qs, kt, each)
    for i in range(size):
        for j in range(size):
            kk[i, j] *= decay[i, j]
        kk[i, i] = 0
    for i in range(qs.shape[0]):
        end = (i + 1) * each - 1
        for j in range(size):
            qk[i, j] *= decay[end, j]


@_compile
def _solve(like, missing, new, kk, betas):
    """missing becomes the solution of missing = missing - kk new, new = beta missing, from the first row on."""
    threads._apart()
    size, width, item = missing.shape[0], missing.shape[1], missing.itemsize
    row = width * item
    for i in range(0, size, tiles.ROWS):
        tiles.window(
            like, -1, tiles.ROWS, row, i, kk.ctypes.data + i * size * item, size * item, item, new.ctypes.data, row,
            missing.ctypes.data + i * row, row,
        )  # fmt: skip
        for r in range(i, i + tiles.ROWS):
            for j in range(i, r):
                seen = kk[r, j]
                for x in range(width):
                    missing[r, x] -= seen * new[j, x]
            for x in range(width):
                new[r, x] = betas[r] * missing[r, x]


@_compile
def _solve_back(like, given, y, kk, betas):
    """The adjoint, from the last row on: given, the gradient of new, becomes all of it, and y that of missing."""
    threads._apart()
    size, width, item = given.shape[0], given.shape[1], given.itemsize
    row = width * item
    for last in range(size, 0, -tiles.ROWS):
        i = last - tiles.ROWS
        tiles.window(
            like, -1, tiles.ROWS, row, size - last, kk.ctypes.data + (last * size + i) * item, item, size * item,
            y.ctypes.data + last * row, row, given.ctypes.data + i * row, row,
        )  # fmt: skip
        for r in range(last - 1, i - 1, -1):
            for x in range(width):
                y[r, x] = betas[r] * given[r, x]
            for j in range(i, r):
                seen = kk[r, j]
                for x in range(width):
                    given[j, x] -= seen * y[r, x]


@_compile
def _forward_work(like, q, k, v, beta, g, state, tokens, each, o, last, states, missed, worker, workers):
    """Units are rows of the batch by heads; missed: what the corrections found missing, (B, n T, H, V), or nothing."""
    threads._apart()
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
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        b, h = u // heads, u % heads
        s[:] = 0  # what fills up the tile too: of the head before, it may not be finite
        s[:keys, :values] = state[b, h]
        for c in range(-(-steps // tokens)):
            start = c * tokens
            here = min(tokens, steps - start)
            tiles.load(qs, q, b, start, here, h)
            tiles.load(ks, k, b, start * each, here * each, h)
            tiles.load(rs, v, b, start * each, here * each, h)
            _betas(betas, beta, b, start * each, here * each, h)
            _logs(logs, g, each, b, start, here, h)
            tiles.factors(like, factors, whole, logs)
            _scores(like, kk, qk, decay, qs, ks, kt, ones, logs, each)
            tiles.scale(scaled, ks, factors[0])
            tiles.product(like, -1, rs, scaled, s)
            _solve(like, rs, new, kk, betas)
            if states.shape[0]:
                states[b, h, c] = s
                tiles.save(missed, rs, b, start * each, here * each, h)
            for i in range(tokens):
                for d in range(wide):
                    qs[i, d] *= factors[0, (i + 1) * each - 1]
            tiles.lower_product(like, 0, os, qk, new, each)
            tiles.product(like, 1, os, qs, s)
            tiles.save(o, os, b, start, here, h)
            tiles.pass_on(s, whole[0], whole[1])
            tiles.scale(scaled, ks, factors[1])
            tiles.turned_product(like, 1, s, scaled, new)
        last[b, h] = s[:keys, :values]


@_compile
def _backward_work(
    like, d_o, d_last, q, k, v, beta, g, states, missed, tokens, each, d_q, d_k, d_v, d_beta, d_g, d_state,
    worker, workers,
):  # fmt: skip
    threads._apart()
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
    factors, whole = np.zeros((2, size), v.dtype), np.zeros((2, 1), v.dtype)
    units = q.shape[0] * heads
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        b, h = u // heads, u % heads
        end[:] = 0
        end[:keys, :values] = d_last[b, h]
        for c in range(-(-steps // tokens) - 1, -1, -1):
            start, s = c * tokens, states[b, h, c]
            here = min(tokens, steps - start)
            tiles.load(qs, q, b, start, here, h)
            tiles.load(do, d_o, b, start, here, h)
            tiles.load(ks, k, b, start * each, here * each, h)
            tiles.load(rs, missed, b, start * each, here * each, h)
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
            for i in range(here * each):
                d_beta[b, start * each + i, h] = tiles.dot(d_new[i], rs[i])
            tiles.turn(like, turned, new)  # kk and qk become the gradients of k k^T and q k^T
            tiles.lower(like, kk, y, turned)
            tiles.lower(like, qk, do, turned, each)
            for i in range(size):
                for j in range(size):
                    kk[i, j] *= -decay[i, j]
                kk[i, i] = 0
            for i in range(tokens):
                for j in range(size):
                    qk[i, j] *= decay[(i + 1) * each - 1, j]
            tiles.turn(like, st, s)
            tiles.product(like, 0, dqs, do, st)
            tiles.product(like, 0, read, y, st)
            tiles.turn(like, st, end)
            tiles.product(like, 0, write, new, st)
            crossing = tiles.dot(s.reshape(s.size), end.reshape(end.size)) * (whole[0, 0] + whole[1, 0])
            for i in range(size):
                for d in range(wide):
                    read[i, d] *= -factors[0, i]
                for d in range(wide):
                    write[i, d] *= factors[1, i]
                crossing += tiles.dot(ks[i], write[i])
            for i in range(tokens):
                upto = factors[0, (i + 1) * each - 1]
                for d in range(wide):
                    dqs[i, d] *= upto
                for d in range(wide):
                    q_[i, d] = qs[i, d] * upto
            tiles.lower_product(like, 1, dqs, qk, ks, each)
            tiles.lower_product(like, 1, read, kk, ks)
            tiles.turned_lower_product(like, 1, write, kk, ks)
            tiles.turned_lower_product(like, 1, write, qk, qs, each)
            tiles.save(d_q, dqs, b, start, here, h)
            if d_g.shape[2]:
                for i in range(tokens):
                    later[i] = tiles.dot(qs[i], dqs[i])
                for i in range(size):
                    later[i // each] += tiles.dot(ks[i], read[i]) - tiles.dot(ks[i], write[i])
                beyond = 0.0 + crossing
                for step in range(here):
                    i = here - 1 - step
                    beyond += later[i]
                    d_g[b, start + i, h] = beyond
                    if logs[i * each] <= CUT * LOG2:  # nothing passes, not the rounding of sums that cancel
                        d_g[b, start + i, h] = 0
                        beyond = 0.0
            for i in range(size):
                for d in range(wide):
                    read[i, d] += write[i, d]
            tiles.save(d_k, read, b, start * each, here * each, h)
            tiles.scale(k_, ks, factors[0])
            tiles.pass_on(end, whole[0], whole[1])
            tiles.turned_product(like, 1, end, q_, do)
            tiles.turned_product(like, -1, end, k_, y)
        d_state[b, h] = end[:keys, :values]


@functools.partial(_compile, parallel=True)
def _forward_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _forward_work(like, *arrays, np.int64(worker), workers)


@functools.partial(_compile, parallel=True)
def _backward_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _backward_work(like, *arrays, np.int64(worker), workers)


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
    o, last = v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape)
    states, missed = (state.new_empty(size if keep else (0, *size[1:])) for size in (shape, v.shape))
    given = q.new_empty(*q.shape[:2], 0) if g is None else g
    before, after = vectors._arrays(q, k, v, beta, given, state), vectors._arrays(o, last, states, missed)
    vectors._run(_forward_work, _forward_together, v, 1, len(q) * q.shape[2], *before, tokens, each, *after)
    return o, last, states, missed


def _backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    reset: Tensor | None, state: Tensor, states: Tensor, missed: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens, each, _ = _sizes(q, k, v)
    given = q.new_empty(*q.shape[:2], 0) if g is None else g
    grads = [t.new_empty(t.shape) for t in (q, k, v, beta, given, d_last)]
    before = vectors._arrays(d_o, d_last, q, k, v, beta, given, states, missed)
    arrays = *before, tokens, each, *vectors._arrays(*grads)
    vectors._run(_backward_work, _backward_together, v, 1, len(q) * q.shape[2], *arrays)
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


@_compile
def _first(out, a, b, t, h, s):
    """out = a_t S."""
    out[:] = 0
    for d in range(a.shape[3]):
        for x in range(out.shape[0]):
            out[x] += a[b, t, h, d] * s[d, x]


@_compile
def _load_next(tile, a, b, start, steps, h):
    """Rows of the step after: what they read of the state before it is what a query of the step itself would."""
    tiles.load(tile, a, b, start + 1, steps - 1, h)


@_compile
def _read(like, read, base, weights):
    """read_{i+1} = base_i + sum_{j <= i} weights_ij read_j from read_0 on; base is written over."""
    threads._apart()
    size, width, item = read.shape[0], read.shape[1], read.itemsize
    row = width * item
    for i in range(0, size, tiles.ROWS):
        tiles.window(
            like, 1, tiles.ROWS, row, i, weights.ctypes.data + i * size * item, size * item, item, read.ctypes.data,
            row, base.ctypes.data + i * row, row,
        )  # fmt: skip
        for r in range(i, min(i + tiles.ROWS, size - 1)):
            for j in range(i, r + 1):
                weight = weights[r, j]
                for x in range(width):
                    base[r, x] += weight * read[j, x]
            read[r + 1] = base[r]


@_compile
def _read_back(like, given, y, weights):
    """The adjoint: given, the gradient of read, becomes all of it, and y that of base."""
    threads._apart()
    size, width, item = given.shape[0], given.shape[1], given.itemsize
    row = width * item
    y[size - 1] = 0
    for last in range(size, 0, -tiles.ROWS):
        i = last - tiles.ROWS
        tiles.window(
            like, 1, tiles.ROWS, row, size - last, weights.ctypes.data + (last * size + i) * item, item, size * item,
            y.ctypes.data + last * row, row, given.ctypes.data + i * row, row,
        )  # fmt: skip
        for r in range(last - 1, i - 1, -1):
            if r + 1 < size:
                y[r] = given[r + 1]
            for j in range(i, r + 1):
                weight = weights[r, j]
                for x in range(width):
                    given[j, x] += weight * y[r, x]


@_compile
def _prepare(like, t, of_k, of_b, w, total, whole, turned, q, k, a, b, g, reset, n, start, steps, h):
    """A chunk's rows as they come and as they are scaled, in t, the weights (4, C, C) of q and a against k and b, and
    the decays of all of it; turned: scratch."""
    threads._apart()
    qs, ks, as_, bs, q_, k_, a_, b_, power, rest, logs = (
        t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10]
    )  # fmt: skip
    row = turned.shape[0] * turned.itemsize
    tiles.load(qs, q, n, start, steps, h)
    tiles.load(ks, k, n, start, steps, h)
    tiles.load(bs, b, n, start, steps, h)
    _load_next(as_, a, n, start, steps, h)
    key.key_factors(like, power, rest, total, logs, g, reset, n, start, steps, h)
    key.key_scales(like, q_, k_, of_k, qs, ks, power, rest)
    key.key_scales(like, a_, b_, of_b, as_, bs, power, rest)
    key.key_weights(like, w[0], qs, ks, power, rest, of_k, of_k, turned)
    key.key_weights(like, w[1], qs, bs, power, rest, of_k, of_b, turned)
    key.key_weights(like, w[2], as_, ks, power, rest, of_b, of_k, turned)
    key.key_weights(like, w[3], as_, bs, power, rest, of_b, of_b, turned)
    tiles.exp2(like, row // vectors.BYTES, row, (total.ctypes.data, whole.ctypes.data))


@_compile
def _dplr_forward_work(like, q, k, v, a, b, g, reset, state, size, o, last, states, read, worker, workers):
    """Units are rows of the batch by heads; read: what a reads, (B, T, H, V), or nothing."""
    threads._apart()
    steps, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    wide, high, count = tiles.up(keys), tiles.up(values), key.key_levels(size)
    t = np.zeros((11, size, wide), v.dtype)
    q_, k_, a_, b_ = t[4], t[5], t[6], t[7]
    of_k, of_b = np.zeros((count, size, wide), v.dtype), np.zeros((count, size, wide), v.dtype)
    turned, w = np.zeros((wide, size), v.dtype), np.zeros((4, size, size), v.dtype)
    vs, os, ps = np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype)
    base, s = np.zeros((size, high), v.dtype), np.zeros((wide, high), v.dtype)
    total, whole = np.zeros(wide, v.dtype), np.zeros((2, wide), v.dtype)
    units = q.shape[0] * heads
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        n, h = u // heads, u % heads
        s[:] = 0
        s[:keys, :values] = state[n, h]
        for c in range(-(-steps // size)):
            start = c * size
            here = min(size, steps - start)
            _prepare(like, t, of_k, of_b, w, total, whole, turned, q, k, a, b, g, reset, n, start, here, h)
            tiles.load(vs, v, n, start, here, h)
            tiles.product(like, 0, base, a_, s)
            tiles.lower_product(like, 1, base, w[2], vs)
            _first(ps[0], a, n, start, h, s)
            _read(like, ps, base, w[3])
            tiles.lower_product(like, 0, os, w[0], vs)
            tiles.lower_product(like, 1, os, w[1], ps)
            tiles.product(like, 1, os, q_, s)
            tiles.save(o, os, n, start, here, h)
            if states.shape[0]:
                states[n, h, c] = s
                tiles.save(read, ps, n, start, here, h)
            tiles.pass_on(s, whole[0], whole[1])
            tiles.turned_product(like, 1, s, k_, vs)
            tiles.turned_product(like, 1, s, b_, ps)
        last[n, h] = s[:keys, :values]


@_compile
def _dplr_backward_work(
    like, d_o, d_last, q, k, v, a, b, g, reset, states, read, size, d_q, d_k, d_v, d_a, d_b, d_g, d_state,
    worker, workers,
):  # fmt: skip
    threads._apart()
    steps, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    wide, high, count = tiles.up(keys), tiles.up(values), key.key_levels(size)
    t = np.zeros((20, size, wide), v.dtype)
    qs, ks, as_, bs, q_, k_, a_, b_, power, rest = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]
    dq_, dk_, da_, db_, dqs, dks, das, dbs, dgs = (
        t[11], t[12], t[13], t[14], t[15], t[16], t[17], t[18], t[19]
    )  # fmt: skip
    of_k, of_b = np.zeros((count, size, wide), v.dtype), np.zeros((count, size, wide), v.dtype)
    d_of_k, d_of_b = np.zeros((count, size, wide), v.dtype), np.zeros((count, size, wide), v.dtype)
    turned, w = np.zeros((wide, size), v.dtype), np.zeros((4, size, size), v.dtype)
    vs, do, ps = np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype)
    dv, dp, y = np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype), np.zeros((size, high), v.dtype)
    turned_v, st, end = (
        np.zeros((high, size), v.dtype),
        np.zeros((high, wide), v.dtype),
        np.zeros((wide, high), v.dtype),
    )
    total, whole = np.zeros(wide, v.dtype), np.zeros((2, wide), v.dtype)
    zero = np.zeros(wide, v.dtype)
    units = q.shape[0] * heads
    for u in range(units * worker // workers, units * (worker + 1) // workers):
        n, h = u // heads, u % heads
        end[:] = 0
        end[:keys, :values] = d_last[n, h]
        for c in range(-(-steps // size) - 1, -1, -1):
            start, s = c * size, states[n, h, c]
            here = min(size, steps - start)
            _prepare(like, t, of_k, of_b, w, total, whole, turned, q, k, a, b, g, reset, n, start, here, h)
            tiles.load(vs, v, n, start, here, h)
            tiles.load(do, d_o, n, start, here, h)
            tiles.load(ps, read, n, start, here, h)
            tiles.turned_lower_product(like, 0, dp, w[1], do)
            tiles.product(like, 1, dp, b_, end)
            _read_back(like, dp, y, w[3])
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
            for i in range(keys):
                total[i] = tiles.dot(s[i], end[i]) * (whole[0, i] + whole[1, i])
            t[15:20] = 0
            key.key_between(like, 0, d_of_k, d_of_k, w[0], of_k, of_k)
            key.key_between(like, 0, d_of_b, d_of_b, w[3], of_b, of_b)
            key.key_between(like, 1, d_of_k, d_of_b, w[1], of_k, of_b)
            key.key_between(like, 1, d_of_b, d_of_k, w[2], of_b, of_k)
            key.key_through(like, dqs, dks, dgs, q_, k_, dq_, dk_, of_k, d_of_k, power, rest, total)
            key.key_through(like, das, dbs, dgs, a_, b_, da_, db_, of_b, d_of_b, power, rest, zero)
            key.key_leaves(like, dqs, dks, dgs, qs, ks, power, rest, w[0])
            key.key_leaves(like, dqs, dbs, dgs, qs, bs, power, rest, w[1])
            key.key_leaves(like, das, dks, dgs, as_, ks, power, rest, w[2])
            key.key_leaves(like, das, dbs, dgs, as_, bs, power, rest, w[3])
            tiles.save(d_q, dqs, n, start, here, h)
            tiles.save(d_k, dks, n, start, here, h)
            tiles.save(d_b, dbs, n, start, here, h)
            tiles.save(d_a, das, n, start + 1, here - 1, h)
            for d in range(keys):
                d_a[n, start, h, d] = tiles.dot(s[d], dp[0])
            tiles.save(d_g, dgs, n, start, here, h)
            tiles.pass_on(end, whole[0], whole[1])
            tiles.turned_product(like, 1, end, q_, do)
            tiles.turned_product(like, 1, end, a_, y)
            for d in range(keys):
                for x in range(high):
                    end[d, x] += a[n, start, h, d] * dp[0, x]
        d_state[n, h] = end[:keys, :values]


@functools.partial(_compile, parallel=True)
def _dplr_forward_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _dplr_forward_work(like, *arrays, np.int64(worker), workers)


@functools.partial(_compile, parallel=True)
def _dplr_backward_together(like, arrays, workers):
    for worker in numba.prange(workers):
        _dplr_backward_work(like, *arrays, np.int64(worker), workers)


def _dplr_forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor, *,
    keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, _, shape = _sizes(q, k, v)
    o, last = v.new_empty(v.shape), state.new_empty(state.shape)
    states, read = (state.new_empty(many if keep else (0, *many[1:])) for many in (shape, v.shape))
    given = q.new_empty(*q.shape[:3], 0) if g is None else g
    before = vectors._arrays(q, k, v, a, b, given, None, state)  # resets are in the decays
    arrays = *before, size, *vectors._arrays(o, last, states, read)
    vectors._run(_dplr_forward_work, _dplr_forward_together, v, 1, len(q) * q.shape[2], *arrays)
    return o, last, states, read


def _dplr_backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None,
    reset: Tensor | None, state: Tensor, states: Tensor, read: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, given = _sizes(q, k, v)[0], q.new_empty(*q.shape[:3], 0) if g is None else g
    grads = [t.new_empty(t.shape) for t in (q, k, v, a, b, given, d_last)]
    before = vectors._arrays(d_o, d_last, q, k, v, a, b, given, None, states, read)
    arrays = *before, size, *vectors._arrays(*grads)
    vectors._run(_dplr_backward_work, _dplr_backward_together, v, 1, len(q) * q.shape[2], *arrays)
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
