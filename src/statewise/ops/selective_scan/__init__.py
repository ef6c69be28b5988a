"""h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, y_t = c_t . h_t: Mamba's scan, whose states are never all in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError, wide
from ..dispatch import Backend, op
from ..given import check_time, needs_a_gpu
from ..looping import loop

_WIDE = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


def _check(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    name = "selective_scan"
    if x.ndim != 3 or a.ndim != 2:
        raise UsageError(f"{name}: x is {tuple(x.shape)}, a {tuple(a.shape)}; expected (B, T, D) and (D, N)")
    batch, steps, width = x.shape
    shapes = dict(dt=x.shape, a=(width, a.shape[1]), b=(batch, steps, a.shape[1]), c=(batch, steps, a.shape[1]))
    given = dict(x=x, dt=dt, a=a, b=b, c=c, state=state)
    for what, shape in (shapes | dict(state=(batch, width, a.shape[1]))).items():
        if given[what].shape != shape:
            raise UsageError(
                f"{name}: {what} is {tuple(given[what].shape)}; expected {tuple(shape)}, as x is {tuple(x.shape)} and "
                f"a {tuple(a.shape)}"
            )
    if state.dtype not in _WIDE:
        raise UsageError(f"{name}: state is {state.dtype}; expected float32 or float64")
    for what, t in given.items():
        if not t.is_floating_point() or torch.promote_types(t.dtype, state.dtype) != state.dtype:
            raise UsageError(f"{name}: {what} is {t.dtype}, state {state.dtype}; expected none wider than the state")
        if t.device != x.device:
            raise UsageError(f"{name}: {what} is on {t.device}, x on {x.device}; move them together")
    check_time(name, x, reset, lengths)


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng, high = torch.Generator(device).manual_seed(0), wide(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=torch.float64).to(dtype)

    def inputs(batch: int, steps: int, width: int, states: int, **more: Any) -> dict[str, Any]:
        x, dt, b, c = (normal(batch, steps, n) for n in (width, width, states, states))
        a, state = -normal(width, states, dtype=high).exp(), normal(batch, width, states, dtype=high)
        return dict(x=x, dt=dt.abs(), a=a, b=b, c=c, state=state) | more

    def coin(*shape: int, chance: float = 0.3) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device) < chance

    def ends(*lengths: int) -> Tensor:
        return torch.tensor(lengths, device=device)

    yield inputs(2, 5, 3, 4)  # no two sizes alike
    yield inputs(1, 1, 1, 1)
    yield inputs(2, 0, 3, 2)
    yield inputs(0, 4, 3, 2)
    yield inputs(2, 4, 0, 2)
    yield inputs(2, 4, 3, 0)
    yield inputs(2, 37, 21, 7)  # no power of two, no whole vectors
    yield inputs(1, 70, 5, 16)  # several tiles of time
    yield inputs(1, 9, 67, 3)  # several blocks of channels
    for rate in (0.0, -1e-6, -1e4, torch.finfo(torch.float32).min, 0.25):  # decay 1, nearly 1, 0, 0 and above 1
        yield inputs(2, 9, 3, 2, a=torch.full((3, 2), rate, device=device, dtype=high))
    yield inputs(2, 9, 3, 2, dt=torch.zeros(2, 9, 3, dtype=dtype, device=device))
    yield inputs(2, 7, 3, 2, dt=normal(2, 7, 1).abs().expand(2, 7, 3))  # one step size for all channels
    yield inputs(2, 7, 3, 2, a=-normal(3, 1, dtype=high).exp().expand(3, 2), x=normal(7, 2, 3).transpose(0, 1))
    yield inputs(2, 7, 3, 4, b=normal(2, 4, 7).mT, c=normal(1, 7, 4).expand(2, 7, 4))
    yield inputs(3, 11, 18, 5, reset=coin(3, 11))
    yield inputs(2, 75, 3, 2, reset=coin(2, 75, chance=0.05))
    yield inputs(2, 5, 3, 2, reset=torch.ones(2, 5, dtype=torch.bool, device=device))
    yield inputs(4, 6, 3, 2, lengths=ends(0, 1, 5, 6))
    yield inputs(4, 6, 3, 2, lengths=ends(6, 0, 3, 0), reset=coin(4, 6))


def selective_step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: x, dt (B, D), b, c (B, N), state (B, D, N), a (D, N) -> y (B, D), state."""
    # h + (decay - 1) h: float32 has few numbers near 1, and what they miss would be missed at every step
    state = torch.addcmul(state, torch.expm1(dt[..., None] * a), state)
    state = torch.addcmul(state, (dt * x)[..., None], b[:, None])
    return (state * c[:, None]).sum(-1), state


@op(
    Backend(
        "triton",
        "statewise.ops.selective_scan.in_triton:scan",
        devices=("cuda", "xpu", "cpu"),
        dtypes=(*_WIDE, *_HALF),
        requires=("triton",),
        limits=needs_a_gpu,
    ),
    Backend(
        "numba",
        "statewise.ops.selective_scan.in_numba:scan",
        devices=("cpu",),
        dtypes=(*_WIDE, *_HALF),
        requires=("numba",),
    ),
    Backend(
        "torch",
        "statewise.ops.selective_scan.in_torch:scan",
        devices=("cpu", "cuda", "mps", "xpu", "meta"),
        dtypes=(*_WIDE, *_HALF),
    ),
    samples=_samples,
    check=_check,
)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t and read y_t = c_t . h_t, channel by channel.

    x, dt: (B, T, D), dt >= 0; a: (D, N), negative for a stable system; b, c: (B, T, N), shared by the channels.
    state: (B, D, N), h before the first step, float32 or wider; everything is computed in its dtype.
    reset: (B, T) bool; where True, h_{t-1} counts as zero at t. lengths: (B,) integers; y is 0 past a row's end.

    Returns y (B, T, D) in the dtype of x, and h at the end (B, D, N) in the dtype of state. No (B, T, D, N) is formed
    by the fast backends: the backward pass computes the states anew.
    Differentiable in x, dt, a, b, c and state, through both results.

    >>> one = torch.ones(1, 3, 1)
    >>> selective_scan(one, one, torch.zeros(1, 1), one, one, torch.zeros(1, 1, 1))[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    a = a.to(state.dtype)
    fresh = torch.zeros_like(state)
    return loop(
        lambda x, dt, b, c, h: selective_step(x, dt, b, c, h, a),
        (x, dt, b, c), state, fresh=fresh, like=x, reset=reset, lengths=lengths,
    )  # fmt: skip
