"""h_t = a_t h_{t-1} + x_t, elementwise: the recurrence under every diagonal linear RNN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError, clear_past_end, past_end, wide
from ..dispatch import Backend, op
from ..given import check_time, needs_a_gpu

_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_HALF = (torch.bfloat16, torch.float16)


def _check(a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> None:
    if x.ndim < 2 or h0.shape != (*x.shape[:1], *x.shape[2:]):
        raise UsageError(
            f"linear_scan: x is {tuple(x.shape)} and h0 {tuple(h0.shape)}; expected (B, T, N...) and (B, N...)"
        )
    if a.shape != x.shape and not _broadcasts(a, x):
        raise UsageError(f"linear_scan: a is {tuple(a.shape)}; expected a shape that broadcasts to x {tuple(x.shape)}")
    state, decay = h0.dtype, a.dtype
    wider = decay != state and torch.promote_types(decay, state) != state
    if wider or state not in _WIDE or state != wide(x.dtype):
        raise UsageError(
            f"linear_scan: a is {a.dtype}, x {x.dtype}, h0 {h0.dtype}; expected h0 in {wide(x.dtype)} (float32 or "
            f"wider, as x is) and a no wider than h0"
        )
    if not a.device == x.device == h0.device:
        raise UsageError(f"linear_scan: a is on {a.device}, x on {x.device}, h0 on {h0.device}; move them together")
    check_time("linear_scan", x, reset, lengths)


def _broadcasts(a: Tensor, x: Tensor) -> bool:
    shape = (*[1] * (x.ndim - a.ndim), *a.shape)
    return a.ndim <= x.ndim and all(m in (1, n) for m, n in zip(shape, x.shape))


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng, state = torch.Generator(device).manual_seed(0), wide(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        kind = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(*shape, generator=rng, device=device, dtype=kind).to(dtype)

    def decay(*shape: int) -> Tensor:
        size = torch.rand(shape, generator=rng, device=device, dtype=torch.float64)
        return (torch.polar(size, 6 * size) if state.is_complex else size).to(state)

    def inputs(batch: int, steps: int, *n: int, a: Tensor | None = None, **more: Tensor) -> dict[str, Any]:
        a = decay(batch, steps, *n) if a is None else a
        return {"a": a, "x": normal(batch, steps, *n), "h0": normal(batch, *n, dtype=state), **more}

    def coin(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device) < 0.3

    def ends(*lengths: int) -> Tensor:
        return torch.tensor(lengths, device=device)

    yield inputs(2, 5, 3)
    yield inputs(1, 1, 1)
    yield inputs(2, 0, 3)
    yield inputs(0, 4, 3)
    yield inputs(2, 4, 0)
    yield inputs(2, 6)  # no channel axis
    yield inputs(3, 37, 21)  # no power of two, no whole vectors
    yield inputs(2, 130, 2, 9)  # two channel axes
    for constant in (0.0, 1.0, -1.0, 1e-30, 1e-42, 1.5):
        yield inputs(2, 9, 17, a=torch.full((2, 9, 17), constant, device=device, dtype=state))
    for shape in ((3,), (1,), (), (7, 1), (7, 3), (2, 1, 3), (1, 7, 3), (2, 7, 1), (2, 1, 1)):
        yield inputs(2, 7, 3, a=decay(*shape))
    yield inputs(2, 7, 3, 4, a=decay(3, 1))  # one decay per head
    yield inputs(2, 7, 3, a=decay(3).expand(2, 7, 3))
    yield inputs(2, 7, 3, a=decay(7, 2, 3).transpose(0, 1))
    yield inputs(4, 11, 18, reset=coin(4, 11))
    yield inputs(4, 11, 3, a=decay(3), reset=coin(4, 11))
    yield inputs(2, 5, 3, reset=torch.ones(2, 5, dtype=torch.bool, device=device))
    yield inputs(4, 6, 3, lengths=ends(0, 1, 5, 6))
    yield inputs(4, 6, 3, a=decay(3), lengths=ends(6, 0, 3, 0), reset=coin(4, 6))


@op(
    Backend(
        "triton",
        "statewise.ops.linear_scan.in_triton:scan",
        devices=("cuda", "xpu", "cpu"),
        dtypes=(*_WIDE, *_HALF),
        requires=("triton",),
        limits=needs_a_gpu,
    ),
    Backend(
        "numba",
        "statewise.ops.linear_scan.in_numba:scan",
        devices=("cpu",),
        dtypes=(*_WIDE, *_HALF),
        requires=("numba",),
    ),
    Backend(
        "torch",
        "statewise.ops.linear_scan.in_torch:scan",
        devices=("cpu", "cuda", "mps", "xpu", "meta"),
        dtypes=(*_WIDE, *_HALF),
    ),
    samples=_samples,
    check=_check,
)
def linear_scan(
    a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Solve h_t = a_t h_{t-1} + x_t along dim 1, elementwise.

    x: (B, T, N...), real or complex; float16 and bfloat16 are computed in float32. T = 0 and B = 0 are legal.
    a: any shape that broadcasts to x's. A decay shared over batch, time or channels costs least, in its gradient too,
        when it is given in its own small shape, such as (N,).
    h0: (B, N...), the state before the first step, in float32 or wider.
    reset: (B, T) bool; where True, h_t = x_t, whatever h_{t-1} and a_t are, infinities included.
    lengths: (B,) integers; row b ends after lengths[b] steps, h is 0 from there on.

    Returns h (B, T, N...) in the dtype of x, and the state at the end (B, N...) in the dtype of h0.
    Differentiable any number of times in a, x and h0, through both results. A NaN or infinity stays in its row, channel
    and future. Raises UsageError for shapes and dtypes that do not fit.

    >>> one = torch.ones(1, 3, 1)
    >>> linear_scan(one, one, torch.zeros(1, 1))[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    h, hs, one = h0, [], [1] * (h0.ndim - 1)
    a = a.expand(x.shape)
    if lengths is not None:  # from its end on a row rests
        ended = past_end(lengths, x.shape[1])
        a, x = a.masked_fill(ended.view(*ended.shape, *one), 1), clear_past_end(x, lengths)
        reset = None if reset is None else reset & ~ended
    for t in range(x.shape[1]):
        a_t = a[:, t]
        if reset is not None:
            cut = reset[:, t].view(-1, *one)
            a_t, h = a_t.masked_fill(cut, 0), h.masked_fill(cut, 0)
        h = a_t * h + x[:, t]
        hs.append(h.to(x.dtype))
    if not hs:
        return x, h0.clone()
    out = torch.stack(hs, 1)
    return (out if lengths is None else clear_past_end(out, lengths)), h
