"""The delta rule by chunks of time, each from its inputs to its outputs in the nearest caches.

With the letters of in_torch.py and N = beta R, a thread goes from chunk to chunk with the states of its heads:
    R = V - exp(G) K S - tril(K K^T . D, -1) N   from the first row on, in blocks,
    O = exp(G) Q S + tril(Q K^T . D) N,   S' = exp(G_C) S + (exp(G_C - G) K)^T N.
No inverse is formed. Kept for the backward pass, which solves the transposed system, are R and the states between
chunks.

The form with a decay per key, and dplr_scan, are matrix products of torch with the inverses of a chunk compiled.
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
from ..selective_scan import in_numba as vectors
from ..tiles import in_numba as tiles
from ..tiles.in_numba import LOG2
from . import dplr_in_torch, in_torch
from .chunks import BLOCK, CUT, IN_TORCH
from .in_torch import ARGUMENTS, by_loop

_compile = threads._compile
ROWS = 64  # corrections in a chunk
_GROUP = 4  # rows that are subtracted at once


@functools.partial(_compile, fastmath={"contract", "nsz"})
def _inverse_work(a, z, worker, workers):
    many, size = a.shape[0], a.shape[1]
    for m in range(many * worker // workers, many * (worker + 1) // workers):
        rows, above = a[m], z[m]
        for i in range(size):
            row, j = above[i], 0
            row[:] = 0
            while j + _GROUP <= i:
                a0, a1, a2, a3 = rows[i, j], rows[i, j + 1], rows[i, j + 2], rows[i, j + 3]
                z0, z1, z2, z3 = above[j], above[j + 1], above[j + 2], above[j + 3]
                for c in range((j + _GROUP - 1) // BLOCK * BLOCK + BLOCK):
                    row[c] -= (a0 * z0[c] + a1 * z1[c]) + (a2 * z2[c] + a3 * z3[c])
                j += _GROUP
            while j < i:
                for c in range(j // BLOCK * BLOCK + BLOCK):
                    row[c] -= rows[i, j] * above[j, c]
                j += 1
            row[i] = 1


@functools.partial(_compile, parallel=True)
def _inverse_together(a, z, workers):
    for worker in numba.prange(workers):
        _inverse_work(a, z, np.int64(worker), workers)


def _inverse(a: Tensor, z: Tensor) -> None:
    workers = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    arrays = a.contiguous().numpy(), z.numpy()
    if workers == 1:
        _inverse_work(*arrays, 0, 1)
    else:
        _inverse_together(*arrays, workers)


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
def _forward_together(like, q, k, v, beta, g, state, tokens, each, o, last, states, missed, workers):
    for worker in numba.prange(workers):
        _forward_work(
            like, q, k, v, beta, g, state, tokens, each, o, last, states, missed, np.int64(worker), workers
        )  # fmt: skip


@functools.partial(_compile, parallel=True)
def _backward_together(
    like, d_o, d_last, q, k, v, beta, g, states, missed, tokens, each, d_q, d_k, d_v, d_beta, d_g, d_state, workers
):  # fmt: skip
    for worker in numba.prange(workers):
        _backward_work(
            like, d_o, d_last, q, k, v, beta, g, states, missed, tokens, each, d_q, d_k, d_v, d_beta, d_g, d_state,
            np.int64(worker), workers,
        )  # fmt: skip


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
_run_dplr = dplr_in_torch.chunked("dplr_chunks_numba", "cpu", IN_TORCH._replace(inverse=_inverse))


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
    return dplr_in_torch.solve(_run_dplr, q, k, v, a, b, state, log_decay, reset, lengths)
