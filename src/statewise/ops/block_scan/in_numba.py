"""The scan on a CPU: one walk through time.

Backward is one pass the other way: lam_t = g_t + mu_{t+1}, dx_t = lam_t, dA_t = lam_t h_{t-1}^T, mu_t = A_t^T lam_t,
dh_0 = mu_1. A step reads N^2 numbers to make N, so the memory that holds A sets the speed.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ..compiled import in_numba as compiled
from ..opaque import opaque

_SUMS = {"reassoc", "contract", "nsz"}  # sums may be taken in any order; infinities and NaN keep their meaning


@functools.partial(compiled.function, fastmath=_SUMS)
def _forward_kernel(a, x, reset, h0, h):
    rows, steps, groups, size = x.shape
    for b in range(rows):
        for t in range(steps):
            cut = reset.shape[1] > 0 and reset[b, t]
            for g in range(groups):
                for i in range(size):
                    total = x[b, t, g, i]
                    if not cut and t > 0:
                        for j in range(size):
                            total += a[b, t, g, i, j] * h[b, t - 1, g, j]
                    elif not cut:
                        for j in range(size):
                            total += a[b, t, g, i, j] * h0[b, g, j]
                    h[b, t, g, i] = total


@functools.partial(compiled.function, fastmath=_SUMS)
def _backward_kernel(d_out, a, reset, h0, h, da, dx, mu):
    """mu comes as the gradient of the last state and leaves as the gradient of h0."""
    rows, steps, groups, size = dx.shape
    for b in range(rows):
        for t in range(steps - 1, -1, -1):
            cut = reset.shape[1] > 0 and reset[b, t]
            for g in range(groups):
                for i in range(size):
                    dx[b, t, g, i] = d_out[b, t, g, i] + mu[b, g, i]
                    mu[b, g, i] = 0
                for i in range(size):
                    lam = dx[b, t, g, i]
                    for j in range(size):
                        if cut:
                            da[b, t, g, i, j] = 0
                        else:
                            da[b, t, g, i, j] = lam * (h[b, t - 1, g, j] if t > 0 else h0[b, g, j])
                            mu[b, g, j] += a[b, t, g, i, j] * lam


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _flags(x: Tensor, reset: Tensor | None) -> Tensor:
    return torch.zeros(len(x), 0, dtype=torch.bool) if reset is None else reset


def _forward(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape)
    if not x.numel():
        return h, h0.clone()
    arrays = (*_arrays(a, x, _flags(x, reset), h0), h.numpy())
    _forward_kernel(*arrays)
    return h, h[:, -1].clone()


def _backward(
    g: Tensor, g_last: Tensor, a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    h, _ = _forward(a, x, h0, reset)
    da, dx, dh0 = a.new_empty(a.shape), x.new_empty(x.shape), g_last.clone(memory_format=torch.contiguous_format)
    if not x.numel():
        return torch.zeros_like(a), dx, dh0
    arrays = (*_arrays(g, a, _flags(x, reset), h0, h), da.numpy(), dx.numpy(), dh0.numpy())
    _backward_kernel(*arrays)
    return da, dx, dh0


def _like(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), h0.new_empty(h0.shape)


_scan = opaque("block_scan_numba", "cpu", "a x h0 reset?", _forward, _backward, _like, results=2, kept=0)


def scan(a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    h, last = _scan(a, x, h0, reset)
    return h, last
