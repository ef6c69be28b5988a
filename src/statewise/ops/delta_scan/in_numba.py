"""The delta rule by matrix products of torch, with the decays and the inverses of a chunk compiled.

A row of decays is the row above times one factor: a product taken along, in float64, needs no exponential and no mask.
Numbers too small to be normal are 0: they are slow to work with, and what they would weigh is lost in rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..linear_scan import in_numba as threads
from . import dplr_in_torch, in_torch
from .chunks import BLOCK, CUT, IN_TORCH, Decays, Plan

_compile = threads._compile
_GROUP = 4  # rows that are subtracted at once


@_compile
def _decays_work(lowest, factors, per_step, d, from_start, to_end, worker, workers):
    many, rows = from_start.shape
    along = np.empty(rows)
    for m in range(many * worker // workers, many * (worker + 1) // workers):
        along[:] = 0
        whole = 1.0
        for i in range(rows):
            factor, out = factors[m, i // per_step] if i % per_step == 0 else 1.0, d[m, i]
            for j in range(rows):
                x = along[j] * factor
                along[j] = out[j] = x if x >= lowest else 0.0
            along[i] = out[i] = 1
            whole *= factor
            from_start[m, i] = whole if whole >= lowest else 0.0
        to_end[m] = along


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
def _decays_together(lowest, factors, per_step, d, from_start, to_end, workers):
    for worker in numba.prange(workers):
        _decays_work(lowest, factors, per_step, d, from_start, to_end, np.int64(worker), workers)


@functools.partial(_compile, parallel=True)
def _inverse_together(a, z, workers):
    for worker in numba.prange(workers):
        _inverse_work(a, z, np.int64(worker), workers)


def _run(work: Callable[..., None], together: Callable[..., None], *arguments: Any) -> None:
    workers = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    arrays = [t.numpy() if isinstance(t, Tensor) else t for t in arguments]
    if workers == 1:
        work(*arrays, 0, 1)
    else:
        together(*arrays, workers)


def _decays(g: Tensor, p: Plan, dtype: torch.dtype) -> Decays:
    cut, lead = g <= CUT, g.shape[:2]
    factors = g.exp().masked_fill_(cut, 0).flatten(0, 1)
    d = torch.empty(*lead, p.rows, p.rows, dtype=dtype)
    from_start, to_end = (torch.empty(*lead, p.rows, 1, dtype=dtype) for _ in range(2))
    flat = d.flatten(0, 1), from_start.view(-1, p.rows), to_end.view(-1, p.rows)
    _run(_decays_work, _decays_together, torch.finfo(dtype).tiny, factors, p.per_step, *flat)
    return Decays(d, from_start, to_end, from_start[..., -1:, :], cut)


def _inverse(a: Tensor, z: Tensor) -> None:
    _run(_inverse_work, _inverse_together, a.contiguous(), z)


_PASSES = IN_TORCH._replace(decays=_decays, inverse=_inverse)
_run_delta = in_torch.chunked("delta_chunks_numba", "cpu", _PASSES)
_run_dplr = dplr_in_torch.chunked("dplr_chunks_numba", "cpu", _PASSES)


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
    return in_torch.solve(_run_delta, _run_dplr, q, k, v, beta, state, log_decay, reset, lengths)


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
