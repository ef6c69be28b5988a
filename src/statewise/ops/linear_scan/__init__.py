"""h_t = a_t h_{t-1} + x_t, elementwise: the recurrence under every diagonal linear RNN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError, clear_past_end, wide
from ..dispatch import Backend, op

_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_HALF = (torch.bfloat16, torch.float16)


def _check(a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> None:
    if x.ndim < 2 or h0.shape != (*x.shape[:1], *x.shape[2:]):
        raise UsageError(
            f"linear_scan: x is {tuple(x.shape)} and h0 {tuple(h0.shape)}; expected (B, T, N...) and (B, N...)"
        )
    shape = (*[1] * (x.ndim - a.ndim), *a.shape)
    if a.ndim > x.ndim or any(m != n and m != 1 for m, n in zip(shape, x.shape)):
        raise UsageError(f"linear_scan: a is {tuple(a.shape)}; expected a shape that broadcasts to x {tuple(x.shape)}")
    if h0.dtype not in _WIDE or h0.dtype != wide(x.dtype) or torch.promote_types(a.dtype, h0.dtype) != h0.dtype:
        raise UsageError(
            f"linear_scan: a is {a.dtype}, x {x.dtype}, h0 {h0.dtype}; expected h0 in {wide(x.dtype)} (float32 or "
            f"wider, as x is) and a no wider than h0"
        )
    if not a.device == x.device == h0.device:
        raise UsageError(f"linear_scan: a is on {a.device}, x on {x.device}, h0 on {h0.device}; move them together")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        raise UsageError(
            f"linear_scan: reset is {reset.dtype} {tuple(reset.shape)}; expected bool {tuple(x.shape[:2])}"
        )
    if lengths is not None and lengths.shape != x.shape[:1]:
        raise UsageError(f"linear_scan: lengths has shape {tuple(lengths.shape)}; expected ({len(x)},)")


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng, state = torch.Generator(device).manual_seed(0), wide(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=torch.float64).to(dtype)

    def gate(*shape: int) -> Tensor:
        size = torch.rand(*shape, generator=rng, device=device, dtype=torch.float64)
        return (torch.polar(size, 6 * size) if state.is_complex else size).to(state)

    def inputs(batch: int, steps: int, *n: int, a: Tensor | None = None, **more: Any) -> dict[str, Any]:
        a = gate(batch, steps, *n) if a is None else a
        return {"a": a, "x": normal(batch, steps, *n), "h0": normal(batch, *n, dtype=state), **more}

    yield inputs(2, 5, 3)
    yield inputs(1, 1, 1)
    yield inputs(2, 0, 3)


@op(
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
    h, hs = h0, []
    a, one = a.expand(x.shape), [1] * (h0.ndim - 1)
    for t in range(x.shape[1]):
        a_t, before = a[:, t], h
        if reset is not None:
            cut = reset[:, t].view(-1, *one)
            a_t, before = a_t.masked_fill(cut, 0), h.masked_fill(cut, 0)
        new = a_t * before + x[:, t]
        hs.append(new.to(x.dtype))
        h = new if lengths is None else torch.where((t < lengths).view(-1, *one), new, h)
    out = torch.stack(hs, 1) if hs else x
    return (out if lengths is None else clear_past_end(out, lengths)), h
