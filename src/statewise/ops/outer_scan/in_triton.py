"""The chunked scan on a GPU: one decay per head, or one per key.

Forward: a program per (row and head, block of values) walks over the chunks and writes the state before each; then a
program per (chunk, row and head, block of values) makes its outputs. Backward: the first kernel run the other way
writes the gradient of the state after each chunk; then a program per (chunk, row and head) makes all gradients there.

Every exponent is a sum of the log decays between two steps, added up and never subtracted: no factor exceeds 1 and a
decay of 0 is a factor of 0. For one decay per key the weights of a chunk are made column by column, so its chunks are
short. Offsets are 64-bit, sums are in float32. Where a decay or a reset is 0, an infinite state between chunks is
cleared; within its chunk and head a number that is not finite may reach steps that it should not.

Tested in interpreter mode only: not yet run on a GPU, so sizes of chunks and blocks are guesses.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..opaque import opaque
from .edges import normal

CHUNK = {"scalar": 64, "key": 16}
VALUES = 64  # values of a program
SMALLEST = 16  # of a side of a matrix product


@triton.jit
def _gates(g, base, stride, c, n, steps_left, keys, C: tl.constexpr, KEY: tl.constexpr):
    """Log decays of a chunk, and the same one step earlier in time: (C, K), or (C, 1) for one per head."""
    if KEY:
        here = (c[:, None] < steps_left) & (n[None, :] < keys)
        after = (c[:, None] + 1 < C) & (c[:, None] + 1 < steps_left) & (n[None, :] < keys)
        at = base + c[:, None] * stride + n[None, :]
    else:
        here, after = c[:, None] < steps_left, (c[:, None] + 1 < C) & (c[:, None] + 1 < steps_left)
        at = base + c[:, None] * stride
    return tl.load(g + at, mask=here, other=0.0), tl.load(g + at + stride, mask=after, other=0.0)


@triton.jit
def _rows(t, base, stride, c, n, steps_left, width):
    mask = (c[:, None] < steps_left) & (n[None, :] < width)
    return tl.load(t + base + c[:, None] * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _between(gate, c, C: tl.constexpr):
    """exp of the sums in (j, i], 0 above the diagonal: (C, C) from (C, 1)."""
    i, j = c[:, None], c[None, :]
    return tl.where(i >= j, tl.exp(tl.cumsum(tl.where(i > j, gate, 0.0), 0)), 0.0)


@triton.jit
def _weights(q, k_base, gate, k, c, n, k_stride, steps_left, keys, C: tl.constexpr, KEY: tl.constexpr, P: tl.constexpr):
    """sum_d q_id k_jd e^{D_ijd} for j <= i."""
    if KEY:
        weights = tl.zeros((C, C), dtype=tl.float32)
        for j in range(C):
            row = tl.load(k + k_base + j * k_stride + n, mask=(n * 0 + j < steps_left) & (n < keys), other=0.0).to(
                tl.float32
            )
            decay = tl.exp(tl.cumsum(tl.where(c[:, None] > j, gate, 0.0), 0))
            column = tl.sum(q * decay * row[None, :], 1)
            weights = tl.where((c[None, :] == j) & (c[:, None] >= j), column[:, None], weights)
        return weights
    else:  # noqa: RET505 - known when it is compiled: one branch is all there is
        other = _rows(k, k_base, k_stride, c, n, steps_left, keys)
        return tl.dot(q, tl.trans(other), input_precision=P) * _between(gate, c, C)


@triton.jit
def _states_kernel(
    x, y, g, first, states, last, steps, heads, x_heads, keys, values,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, BACK: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """S' = e^{p_C} S + sum_j e^{s_j} x_j y_j^T, forwards; backwards the same with p_j in place of s_j."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    c, n, m = tl.arange(0, C), tl.arange(0, K), tl.program_id(1) * V + tl.arange(0, V)
    chunks, G = (steps + C - 1) // C, keys if KEY else 1
    x_stride, y_stride, g_stride = x_heads * keys, heads * values, heads * G
    inside = (n[:, None] < keys) & (m[None, :] < values)
    at = row * keys * values + n[:, None] * values + m[None, :]
    state = tl.load(first + at, mask=inside, other=0.0)
    for step in range(chunks):
        i = b * 0 + ((chunks - 1 - step) if BACK else step)  # in 64 bits
        start = b * steps + i * C
        steps_left = steps - i * C
        place = (i * tl.num_programs(0) + row) * keys * values
        tl.store(states + place + n[:, None] * values + m[None, :], state, mask=inside)
        p = _rows(x, start * x_stride + h // (heads // x_heads) * keys, x_stride, c, n, steps_left, keys)
        u = _rows(y, start * y_stride + h * values, y_stride, c, m, steps_left, values)
        gate, after = _gates(g, start * g_stride + h * G, g_stride, c, n, steps_left, keys, C, KEY)
        p *= tl.exp(tl.cumsum(gate, 0)) if BACK else tl.exp(tl.cumsum(after, 0, reverse=True))
        decay = tl.exp(tl.sum(gate, 0))[:, None]
        state = tl.where(decay == 0, 0.0, decay * state)
        state += tl.dot(tl.trans(p), u, input_precision=P)
    tl.store(last + at, state, mask=inside)


@triton.jit
def _outputs_kernel(
    q, k, v, g, states, o, steps, heads, groups, keys, values,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    i, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    c, n, m = tl.arange(0, C), tl.arange(0, K), tl.program_id(2) * V + tl.arange(0, V)
    G, steps_left, start = keys if KEY else 1, steps - i * C, b * steps + i * C
    q_stride, v_stride, g_stride = groups * keys, heads * values, heads * G
    q_base = start * q_stride + h // (heads // groups) * keys
    x = _rows(q, q_base, q_stride, c, n, steps_left, keys)
    y = _rows(v, start * v_stride + h * values, v_stride, c, m, steps_left, values)
    gate, _ = _gates(g, start * g_stride + h * G, g_stride, c, n, steps_left, keys, C, KEY)
    weights = _weights(x, q_base, gate, k, c, n, q_stride, steps_left, keys, C, KEY, P)
    place = (i * tl.num_programs(1) + row) * keys * values + n[:, None] * values + m[None, :]
    state = tl.load(states + place, mask=(n[:, None] < keys) & (m[None, :] < values), other=0.0)
    out = tl.dot(weights, y, input_precision=P) + tl.dot(x * tl.exp(tl.cumsum(gate, 0)), state, input_precision=P)
    mask = (c[:, None] < steps_left) & (m[None, :] < values)
    at = start * v_stride + h * values + c[:, None] * v_stride + m[None, :]
    tl.store(o + at, out.to(o.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_kernel(
    d_o, q, k, v, g, states, ends, d_q, d_k, d_v, d_g, steps, heads, groups, keys, values,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    i, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    c, n = tl.arange(0, C), tl.arange(0, K)
    G, steps_left, start = keys if KEY else 1, steps - i * C, b * steps + i * C
    q_stride, v_stride, g_stride = groups * keys, heads * values, heads * G
    q_base, v_base = start * q_stride + h // (heads // groups) * keys, start * v_stride + h * values
    x = _rows(q, q_base, q_stride, c, n, steps_left, keys)
    z = _rows(k, q_base, q_stride, c, n, steps_left, keys)
    gate, after = _gates(g, start * g_stride + h * G, g_stride, c, n, steps_left, keys, C, KEY)
    of_start, to_end = tl.exp(tl.cumsum(gate, 0)), tl.exp(tl.cumsum(after, 0, reverse=True))
    weights = _weights(x, q_base, gate, k, c, n, q_stride, steps_left, keys, C, KEY, P)
    d_weights = tl.zeros((C, C), dtype=tl.float32)
    dx, dz = tl.zeros((C, K), dtype=tl.float32), tl.zeros((C, K), dtype=tl.float32)
    whole = tl.zeros((K,), dtype=tl.float32)  # of the decay of the state over the chunk
    for block in range((values + V - 1) // V):
        m = block * V + tl.arange(0, V)
        place = (i * tl.num_programs(1) + row) * keys * values + n[:, None] * values + m[None, :]
        inside = (n[:, None] < keys) & (m[None, :] < values)
        state = tl.load(states + place, mask=inside, other=0.0)
        end = tl.load(ends + place, mask=inside, other=0.0)
        y = _rows(v, v_base, v_stride, c, m, steps_left, values)
        dy = _rows(d_o, v_base, v_stride, c, m, steps_left, values)
        d_weights += tl.dot(dy, tl.trans(y), input_precision=P)
        dx += tl.dot(dy, tl.trans(state), input_precision=P)
        dz += tl.dot(y, tl.trans(end), input_precision=P)
        whole += tl.sum(state * end, 1)
        dv = tl.dot(tl.trans(weights), dy, input_precision=P) + tl.dot(z * to_end, end, input_precision=P)
        mask = (c[:, None] < steps_left) & (m[None, :] < values)
        tl.store(d_v + v_base + c[:, None] * v_stride + m[None, :], dv.to(d_v.dtype.element_ty), mask=mask)
    dx, dz = dx * of_start, dz * to_end
    later, earlier = tl.cumsum(dx * x, 0, reverse=True), dz * z
    rows, columns = c[:, None], c[None, :]
    before = tl.dot(tl.where(columns < rows, 1.0, 0.0), earlier, input_precision="ieee")
    if KEY:
        gates = later + before + (tl.exp(tl.sum(gate, 0)) * whole)[None, :]
        for j in range(C):
            mask = (n * 0 + j < steps_left) & (n < keys)
            row_k = tl.load(k + q_base + j * q_stride + n, mask=mask, other=0.0).to(tl.float32)
            decay = tl.where(rows >= j, tl.exp(tl.cumsum(tl.where(rows > j, gate, 0.0), 0)), 0.0)
            weight = tl.sum(tl.where(columns == j, d_weights, 0.0), 1)[:, None] * decay
            dx += weight * row_k[None, :]
            dz += tl.where(rows == j, tl.sum(weight * x, 0)[None, :], 0.0)
            crossing = tl.where(rows > j, weight * x * row_k[None, :], 0.0)
            gates += tl.where(rows > j, tl.cumsum(crossing, 0, reverse=True), 0.0)
        here = (c[:, None] < steps_left) & (n[None, :] < keys)
        tl.store(d_g + start * g_stride + h * G + c[:, None] * g_stride + n[None, :], gates, mask=here)
    else:
        crossing = tl.where(columns < rows, d_weights * weights, 0.0)
        gates = tl.sum(tl.where(columns < rows, tl.cumsum(crossing, 0, reverse=True), 0.0), 1)
        gates += tl.sum(later + before, 1) + tl.exp(tl.sum(gate)) * tl.sum(whole)
        tl.store(d_g + start * g_stride + h * G + c * g_stride, gates, mask=c < steps_left)
        d_weights *= _between(gate, c, C)
        dx += tl.dot(d_weights, z, input_precision=P)
        dz += tl.dot(tl.trans(d_weights), x, input_precision=P)
    mask = (c[:, None] < steps_left) & (n[None, :] < keys)
    at = start * heads * keys + h * keys + c[:, None] * (heads * keys) + n[None, :]
    tl.store(d_q + at, dx, mask=mask)
    tl.store(d_k + at, dz, mask=mask)


def _sizes(q: Tensor, v: Tensor, kind: str) -> dict[str, int | bool | str]:
    exact = q.dtype == v.dtype == torch.float32
    return {
        "C": CHUNK[kind],
        "K": max(SMALLEST, triton.next_power_of_2(q.shape[3])),
        "V": min(VALUES, max(SMALLEST, triton.next_power_of_2(v.shape[3]))),
        "KEY": kind == "key",
        "P": "ieee" if exact or os.environ.get("TRITON_INTERPRET") == "1" else "tf32",
    }


def _decays(g: Tensor | None, v: Tensor, reset: Tensor | None) -> Tensor:
    """A reset is a decay of 0."""
    if g is None:
        g = torch.zeros(1, dtype=torch.float32, device=v.device).expand(*v.shape[:3], 1)
    return (g if reset is None else g.masked_fill(reset[..., None, None], -math.inf)).contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, steps, heads, values), (groups, keys), sizes = v.shape, q.shape[2:], _sizes(q, v, kind)
    count = triton.cdiv(steps, CHUNK[kind])
    o, last, states = (
        v.new_empty(v.shape),
        state.clone(memory_format=torch.contiguous_format),
        state.new_empty(count, *state.shape),
    )
    if not v.numel() or not q.numel():
        return o.zero_(), last, states
    q, k, v, state, g = *(t.contiguous() for t in (q, k, v, state)), _decays(g, v, reset)
    blocks = triton.cdiv(values, sizes["V"])
    _states_kernel[batch * heads, blocks](
        k, v, g, state, states, last, steps, heads, groups, keys, values, BACK=False, **sizes
    )
    _outputs_kernel[count, batch * heads, blocks](q, k, v, g, states, o, steps, heads, groups, keys, values, **sizes)
    return o, last, states


def _backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
    reset: Tensor | None, kind: str, states: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    (batch, steps, heads, values), (groups, keys), sizes = v.shape, q.shape[2:], _sizes(q, v, kind)
    d_state = d_last.clone(memory_format=torch.contiguous_format)
    if not v.numel() or not q.numel():
        return *(torch.zeros_like(t) for t in (q, k, v, g) if t is not None), d_state
    decays, ends, d_v = _decays(g, v, reset), torch.empty_like(states), v.new_empty(v.shape)
    d_q, d_k = (torch.empty(batch, steps, heads, keys, dtype=torch.float32, device=v.device) for _ in range(2))
    d_g = torch.empty_like(decays)
    d_o, d_last, q_, k_, v = (t.contiguous() for t in (d_o, d_last, q, k, v))
    _states_kernel[batch * heads, triton.cdiv(values, sizes["V"])](
        q_, d_o, decays, d_last, ends, d_state, steps, heads, groups, keys, values, BACK=True, **sizes
    )
    _gradients_kernel[triton.cdiv(steps, CHUNK[kind]), batch * heads](
        d_o, q_, k_, v, decays, states, ends, d_q, d_k, d_v, d_g, steps, heads, groups, keys, values, **sizes
    )
    d_q, d_k = (t.unflatten(2, (groups, -1)).sum(3).to(o.dtype) for t, o in ((d_q, q), (d_k, k)))
    if g is None:
        return d_q, d_k, d_v, d_state
    return d_q, d_k, d_v, d_g.masked_fill_(decays.exp() == 0, 0), d_state


def _like(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    count = triton.cdiv(v.shape[1], CHUNK[kind])
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(count, *state.shape)


_run = opaque(
    "outer_scan_triton", ("cuda", "xpu", "cpu"), "q k v g? state reset? kind:str", _forward, _backward, _like,
    results=2, kept=1,
)  # fmt: skip  # cpu: interpreter mode


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    o, last = _run(*normal(q, k, v, log_decay, state, reset, lengths))
    return o, last
