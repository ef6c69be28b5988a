"""y = x W^T for a few rows of x: every weight is read once, as fast as memory gives it."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

ALONE = 1 << 15  # weights that one thread multiplies in less time than it takes to wake another
REORDER = {"reassoc", "contract", "nsz"}  # sums in any order; NaN and infinity stay what they are


def _compile(function: Callable[..., Any], **options: Any) -> Any:
    """numba.njit, cached beside this file, else in the user's cache directory, else not at all."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # no directory can be written
        return numba.njit(nogil=True, error_model="numpy", **options)(function)


@functools.partial(_compile, fastmath=REORDER)
def _rows(w, scale, x, y, start, stop):
    """Columns start to stop of y: row n of w, while it is at hand, with every row of x."""
    for n in range(start, stop):
        for b in range(x.shape[0]):
            total = np.float32(0)
            for k in range(w.shape[1]):
                total += np.float32(w[n, k]) * x[b, k]
            y[b, n] = total * scale[n] if scale.size else total


@functools.partial(_compile, parallel=True)
def _shared(w, scale, x, y, workers):
    for i in numba.prange(workers):
        _rows(w, scale, x, y, w.shape[0] * i // workers, w.shape[0] * (i + 1) // workers)


_one_at_a_time = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked, _one_at_a_time
    _forked, _one_at_a_time = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def product(w: np.ndarray, scale: np.ndarray, x: Tensor) -> Tensor:
    """x (B, K) float32, contiguous; w (N, K) float32 or int8; scale (N,) float32, or (0,) for none -> y (B, N)."""
    y = torch.empty(len(x), len(w))
    most = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    workers = 1 if w.size < ALONE or _forked else min(torch.get_num_threads(), most)
    if workers == 1:
        _rows(w, scale, x.numpy(), y.numpy(), 0, len(w))
    else:
        with _one_at_a_time:  # numba's pool may not take several callers
            numba.set_num_threads(workers)
            _shared(w, scale, x.numpy(), y.numpy(), workers)
    return y
