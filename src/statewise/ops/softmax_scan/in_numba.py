"""Compiled softmax scan: one pass over time for each row and head, one exp a step unless the maximum rises.

Backward, from the end, with W and U the gradients that reach w_t and u_t in the measure of m_t:
    W_t = do_t / u_t + e_{t+1} W_{t+1},   U_t = -do_t . o_t / u_t + e_{t+1} U_{t+1},   e_t = exp(m_{t-1} - m_t),
    p_t = exp(score_t - m_t),   dv_t = p_t W_t,   dscore_t = p_t (W_t . v_t + U_t),
    dw_0 = e_1 W_1,   du_0 = e_1 U_1,   dm_0 = w_0 . dw_0 + u_0 du_0.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core import clear_past_end, tree_map
from .. import fresh
from ..compiled import in_numba as compiled
from ..opaque import opaque
from ..teams import in_numba as teams
from . import SoftmaxState

_compile = compiled.function


@functools.partial(_compile, fastmath={"reassoc", "contract"})
def _dot(p, q):
    compiled.apart()
    total = p[0] * 0 if len(p) else p.dtype.type(0)
    for i in range(len(p)):
        total += p[i] * q[i]
    return total


@_compile
def _forward_work(lowest, given, me):
    if teams.started(me):
        return
    score, v, m0, u0, w0, reset, ends, o, m1, u1, w1, ms, us = given
    batch, _, heads = score.shape
    value = v.shape[3]
    for unit in teams.share(batch * heads, me):
        i, h = unit // heads, unit % heads
        m, u, w = m0[i, h], u0[i, h], w1[i, h]
        for j in range(value):
            w[j] = w0[i, h, j]
        for t in range(ends[i]):
            s, now, out, old = score[i, t, h], v[i, t, h], o[i, t, h], score.dtype.type(1)
            if reset.shape[0] and reset[i, t]:
                m, u = lowest, u * 0 if u - u == 0 else lowest * 0
                for j in range(value):
                    w[j] = 0
            if not s <= m:  # a NaN goes here too, and stays
                old, m = math.exp(m - s), s
            new = math.exp(s - m)
            u = old * u + new
            share = 1 / u if u != 0 else u + 1
            for j in range(value):
                w[j] = old * w[j] + new * now[j]
                out[j] = w[j] * share
            ms[i, t, h], us[i, t, h] = m, u
        m1[i, h], u1[i, h] = m, u


@_compile
def _backward_work(lowest, given, me):
    if teams.started(me):
        return
    do, dm1, du1, dw1, score, v, m0, u0, w0, reset, ends, o, ms, us, dscore, dv, dm0, du0, dw0 = given
    batch, _, heads = score.shape
    value = v.shape[3]
    for unit in teams.share(batch * heads, me):
        i, h = unit // heads, unit % heads
        to_u, to_w = du1[i, h], dw0[i, h]
        for j in range(value):
            to_w[j] = dw1[i, h, j]
        for t in range(ends[i] - 1, -1, -1):
            m, u, now, g, to_v = ms[i, t, h], us[i, t, h], v[i, t, h], do[i, t, h], dv[i, t, h]
            share = 1 / u if u != 0 else u + 1
            if u != 0:
                to_u -= _dot(g, o[i, t, h]) * share
            new = math.exp(score[i, t, h] - m)
            cut = reset.shape[0] and reset[i, t]
            before = ms[i, t - 1, h] if t else m0[i, h]
            old = math.exp(before - m) if not cut else m * 0
            for j in range(value):
                to_w[j] += g[j] * share
            dscore[i, t, h] = new * (_dot(to_w, now) + to_u)
            for j in range(value):
                to_v[j] = new * to_w[j]
            if cut:
                to_u = score.dtype.type(0)
                for j in range(value):
                    to_w[j] = 0
            else:
                to_u *= old
                for j in range(value):
                    to_w[j] *= old
        du0[i, h] = to_u
        dm0[i, h] = dm1[i, h] if ends[i] == 0 else u0[i, h] * to_u + _dot(w0[i, h], to_w)
        if ends[i] and reset.shape[0] and reset[i, 0]:
            dm0[i, h] = 0


def _run(work: Any, v: Tensor, *tensors: Tensor | None) -> None:
    lowest = np.finfo(np.float64 if v.dtype == torch.float64 else np.float32).min
    teams.run(work, v, 1, len(v) * v.shape[2], *teams.arrays(*tensors), like=lowest)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]


def _forward(
    score: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, ...]:
    o, ms, us = fresh.empty(v, *v.shape).zero_(), fresh.empty(score, *score.shape), fresh.empty(score, *score.shape)
    last = m.new_empty(m.shape), u.new_empty(u.shape), w.new_empty(w.shape)
    _run(_forward_work, v, score, v, m, u, w, reset, ends, o, *last, ms, us)
    return o, *last, ms, us


def _backward(
    do: Tensor, dm1: Tensor, du1: Tensor, dw1: Tensor,
    score: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor, reset: Tensor | None, ends: Tensor,
    o: Tensor, m1: Tensor, u1: Tensor, w1: Tensor, ms: Tensor, us: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = *(fresh.empty(t, *t.shape).zero_() for t in (score, v)), *(t.new_empty(t.shape) for t in (m, u, w))
    _run(_backward_work, v, do, dm1, du1, dw1, score, v, m, u, w, reset, ends, o, ms, us, *grads)
    return grads


def _like(
    score: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor, reset: Tensor | None, ends: Tensor
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (v, m, u, w, score, score))


_scan = opaque(
    "softmax_scan_numba", "cpu", "score v m u w reset? ends?", _forward, _backward, _like, results=4, kept=2,
    keep_results=True,
)  # fmt: skip


def softmax_scan(
    score: Tensor, v: Tensor, state: SoftmaxState, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, SoftmaxState]:
    dtype = state.u.dtype
    if v.shape[1] == 0:
        return v, tree_map(Tensor.clone, state)
    ends = torch.full((len(v),), v.shape[1]) if lengths is None else lengths.to(v.device, torch.int64)
    wide = v.to(dtype) if lengths is None else clear_past_end(v.to(dtype), ends)
    o, m, u, w = _scan(score.to(dtype), wide, *state, reset, ends)
    if lengths is None:
        m = m.detach()
    return o.to(v.dtype), SoftmaxState(m, u, w)
