"""The delta rule on a GPU: one program per head and block of values walks through the chunks, its state in registers.

All that chunks can do without each other, scores, inverses, outputs and most gradients, are batched products of
matrices that torch has the best kernels for. Left are the two loops over chunks (`chunks.Passes`), which here are one
kernel each, forward and backward, with float32 accumulation and 64-bit offsets.

Tested in interpreter mode only: not yet run on a GPU, so block sizes are a guess. State in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import dplr_in_torch, in_torch
from .chunks import Passes

BLOCK_V = 32  # value channels of a program


@triton.jit
def _load(x, row, column, rows, columns, ROW: tl.constexpr):
    """A tile of a matrix with rows of ROW numbers, zero outside of (rows, columns)."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(x + row[:, None] * ROW + column[None, :], mask=inside, other=0.0)


@triton.jit
def _load_turned(x, row, column, rows, columns, ROW: tl.constexpr):
    """The same tile, transposed: (column, row)."""
    inside = (row[None, :] < rows) & (column[:, None] < columns)
    return tl.load(x + row[None, :] * ROW + column[:, None], mask=inside, other=0.0)


@triton.jit
def _store(x, value, row, column, rows, columns, ROW: tl.constexpr):
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(x + row[:, None] * ROW + column[None, :], value, mask=inside)


@triton.jit
def _ahead_kernel(
    states, r, base, read, z, write, whole, extra, chunks, heads,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WHOLE: tl.constexpr, HAS_EXTRA: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    row, key = tl.arange(0, BC).to(tl.int64), tl.arange(0, BK).to(tl.int64)
    state = _load(states + head * K * V, key, value, K, V, V)
    n = head * 0
    while n < chunks:
        at = n * heads + head
        missing = _load(base + at * C * V, row, value, C, V, V)
        missing += tl.dot(_load(read + at * C * K, row, key, C, K, K), state, input_precision="ieee")
        found = tl.dot(_load(z + at * C * C, row, row, C, C, C), missing, input_precision="ieee")
        _store(r + at * C * V, found, row, value, C, V, V)
        if WHOLE == 1:
            state *= tl.load(whole + at)
        elif WHOLE > 1:
            state *= tl.load(whole + at * K + key, mask=key < K, other=0.0)[:, None]
        if HAS_EXTRA:
            state += _load(extra + at * K * V, key, value, K, V, V)
        state += tl.dot(_load_turned(write + at * C * K, row, key, C, K, K), found, input_precision="ieee")
        _store(states + (at + heads) * K * V, state, key, value, K, V, V)
        n += 1


@triton.jit
def _back_kernel(
    d_states, d_r, y, scale, z, read, write, whole, extra, chunks, heads,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WHOLE: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    row, key = tl.arange(0, BC).to(tl.int64), tl.arange(0, BK).to(tl.int64)
    n = head * 0 + chunks - 1
    state = _load(d_states + (chunks * heads + head) * K * V, key, value, K, V, V)
    while n >= 0:
        at = n * heads + head
        found = _load(d_r + at * C * V, row, value, C, V, V)
        found += tl.dot(_load(write + at * C * K, row, key, C, K, K), state, input_precision="ieee")
        _store(d_r + at * C * V, found, row, value, C, V, V)
        if HAS_SCALE:
            found *= tl.load(scale + at * C + row, mask=row < C, other=0.0)[:, None]
        missing = tl.dot(_load_turned(z + at * C * C, row, row, C, C, C), found, input_precision="ieee")
        _store(y + at * C * V, missing, row, value, C, V, V)
        if WHOLE == 1:
            state *= tl.load(whole + at)
        elif WHOLE > 1:
            state *= tl.load(whole + at * K + key, mask=key < K, other=0.0)[:, None]
        state += _load(extra + at * K * V, key, value, K, V, V)
        state += tl.dot(_load_turned(read + at * C * K, row, key, C, K, K), missing, input_precision="ieee")
        _store(d_states + at * K * V, state, key, value, K, V, V)
        n -= 1


def _sizes(r: Tensor, read: Tensor, whole: Tensor | None) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the sizes that kernels are compiled for: tiles of at least 16, which a dot product needs."""
    (_, heads, rows, values), keys = r.shape, read.shape[-1]
    block = min(BLOCK_V, max(16, triton.next_power_of_2(values)))
    sizes = {
        "C": rows,
        "K": keys,
        "V": values,
        "BC": max(16, triton.next_power_of_2(rows)),
        "BK": max(16, triton.next_power_of_2(keys)),
        "BV": block,
        "WHOLE": 0 if whole is None else 1 if whole[0, 0].numel() == 1 else 2,
    }
    return (heads, triton.cdiv(values, block)), sizes


def _ahead(
    states: Tensor, r: Tensor, base: Tensor, read: Tensor, z: Tensor, write: Tensor, whole: Tensor | None,
    extra: Tensor | None,
) -> None:  # fmt: skip
    if not states.numel() or not r.numel():
        return
    grid, sizes = _sizes(r, read, whole)
    base, read, z, write = (t.contiguous() for t in (base, read, z, write))
    whole_, extra_ = (z if t is None else t.contiguous() for t in (whole, extra))  # if None, any address will do
    _ahead_kernel[grid](
        states, r, base, read, z, write, whole_, extra_, *r.shape[:2], **sizes, HAS_EXTRA=extra is not None
    )


def _back(
    d_states: Tensor, d_r: Tensor, y: Tensor, scale: Tensor | None, z: Tensor, read: Tensor, write: Tensor,
    whole: Tensor | None, extra: Tensor,
) -> None:  # fmt: skip
    if not d_states.numel() or not y.numel():
        return
    grid, sizes = _sizes(y, read, whole)
    z, read, write, extra = (t.contiguous() for t in (z, read, write, extra))
    scale_, whole_ = (z if t is None else t.contiguous() for t in (scale, whole))
    _back_kernel[grid](
        d_states, d_r, y, scale_, z, read, write, whole_, extra, *y.shape[:2], **sizes, HAS_SCALE=scale is not None
    )


_PASSES = Passes(_ahead, _back, 4096)
_run = in_torch.chunked("delta_chunks_triton", None, _PASSES)
_run_dplr = dplr_in_torch.chunked("dplr_chunks_triton", None, _PASSES)


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
    return in_torch.solve(_run, _run_dplr, q, k, v, beta, state, log_decay, reset, lengths)


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
