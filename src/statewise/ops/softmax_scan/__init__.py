"""Running softmax averages and running log-sum-exps: attention with a fixed query as a recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import UsageError, wide
from ..dispatch import Backend, op
from ..given import check_time, needs_a_gpu
from ..looping import loop


class SoftmaxState(NamedTuple):
    """What a softmax average of the past needs: the average is w / u. Nothing seen: m lowest, u and w zero."""

    m: Tensor  # (B, H) largest score so far
    u: Tensor  # (B, H) sum of exp(score - m)
    w: Tensor  # (B, H, V) sum of exp(score - m) v


def nothing_seen(batch: int, heads: int, value: int, *, like: Tensor) -> SoftmaxState:
    """The state before the first step, in the dtype and on the device of `like`."""
    lowest = like.new_full((batch, heads), torch.finfo(like.dtype).min)  # finite: -inf minus -inf is no number
    return SoftmaxState(lowest, torch.zeros_like(lowest), like.new_zeros(batch, heads, value))


_WIDE = (torch.float32, torch.float64)
_DTYPES = (*_WIDE, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")


def _check(
    score: Tensor, v: Tensor, state: SoftmaxState, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> None:
    if score.ndim != 3 or v.ndim != 4 or v.shape[:3] != score.shape:
        raise UsageError(
            f"softmax_scan: score is {tuple(score.shape)}, v {tuple(v.shape)}; expected (B, T, H) and (B, T, H, V)"
        )
    batch, _, heads, value = v.shape
    for name, leaf, shape in zip("muw", state, ((batch, heads), (batch, heads), (batch, heads, value)), strict=True):
        if leaf.shape != shape or leaf.dtype != state.u.dtype or leaf.device != v.device:
            raise UsageError(
                f"softmax_scan: state.{name} is {leaf.dtype} {tuple(leaf.shape)} on {leaf.device}; expected "
                f"{state.u.dtype} {shape} on {v.device}"
            )
    _check_dtypes("softmax_scan", dict(score=score, v=v), state.u)
    check_time("softmax_scan", score, reset, lengths)


def _log_check(x: Tensor, z0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> None:
    if x.ndim < 2 or z0.shape != (*x.shape[:1], *x.shape[2:]):
        raise UsageError(
            f"log_sum_exp_scan: x is {tuple(x.shape)}, z0 {tuple(z0.shape)}; expected (B, T, N...) and (B, N...)"
        )
    _check_dtypes("log_sum_exp_scan", dict(x=x), z0)
    check_time("log_sum_exp_scan", x, reset, lengths)


def _check_dtypes(op: str, given: dict[str, Tensor], state: Tensor) -> None:
    if state.dtype not in _WIDE:
        raise UsageError(f"{op}: the state is {state.dtype}; expected float32 or float64")
    for name, t in given.items():
        if not t.is_floating_point() or torch.promote_types(t.dtype, state.dtype) != state.dtype:
            raise UsageError(f"{op}: {name} is {t.dtype}, the state {state.dtype}; expected none wider than the state")
        if t.device != state.device:
            raise UsageError(f"{op}: {name} is on {t.device}, the state on {state.device}; move them together")


def _triton(name: str) -> Backend:
    target = f"statewise.ops.softmax_scan.in_triton:{name}"
    return Backend("triton", target, devices=("cuda", "cpu"), dtypes=_DTYPES, requires=("triton",), limits=needs_a_gpu)


class _Draw:
    """Random inputs for samples."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.rng = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, high: bool = False) -> Tensor:
        t = torch.randn(*shape, generator=self.rng, device=self.device, dtype=torch.float64)
        return t.to(wide(self.dtype) if high else self.dtype)

    def coin(self, *shape: int, chance: float = 0.3) -> Tensor:
        return torch.rand(*shape, generator=self.rng, device=self.device) < chance

    def ends(self, *lengths: int) -> Tensor:
        return torch.tensor(lengths, device=self.device)


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    draw = _Draw(device, dtype)

    def inputs(batch: int, steps: int, heads: int, value: int, scale: float = 1.0, **more: Any) -> dict[str, Any]:
        state = SoftmaxState(
            draw.normal(batch, heads, high=True),
            draw.normal(batch, heads, high=True).abs() + 1,
            draw.normal(batch, heads, value, high=True),
        )
        score, v = scale * draw.normal(batch, steps, heads), draw.normal(batch, steps, heads, value)
        return dict(score=score, v=v, state=state) | more

    def fresh(batch: int, heads: int, value: int) -> SoftmaxState:
        return nothing_seen(batch, heads, value, like=torch.zeros(1, device=device, dtype=wide(dtype)))

    yield inputs(2, 5, 3, 4)
    yield inputs(2, 5, 3, 2, state=fresh(2, 3, 2))
    yield inputs(1, 1, 1, 1)
    yield inputs(2, 0, 3, 2)
    yield inputs(0, 4, 3, 2)
    yield inputs(2, 4, 3, 0)
    yield inputs(2, 37, 2, 21)  # no power of two, no whole vectors
    yield inputs(1, 130, 1, 3)
    for scale in (0.0, 1e-3, 100.0, 1e4):
        yield inputs(2, 9, 2, 3, scale=scale)
    for step in (30.0, -30.0):  # each score hides those before it; or hides itself
        yield inputs(1, 9, 1, 2, score=(step * torch.arange(9, device=device)).to(dtype).view(1, 9, 1))
    masked = draw.normal(2, 9, 2).masked_fill(draw.coin(2, 9, 2), -torch.inf)
    masked[0, :4] = -torch.inf
    yield inputs(2, 9, 2, 3, score=masked)
    yield inputs(2, 9, 2, 3, score=masked, state=fresh(2, 2, 3))  # nothing seen for four steps
    yield inputs(2, 7, 2, 3, score=draw.normal(2, 7, 1).expand(2, 7, 2), v=draw.normal(7, 2, 2, 3).transpose(0, 1))
    yield inputs(4, 11, 2, 3, reset=draw.coin(4, 11))
    yield inputs(2, 9, 2, 3, scale=100.0, reset=draw.coin(2, 9))
    yield inputs(2, 5, 2, 3, reset=torch.ones(2, 5, dtype=torch.bool, device=device))
    yield inputs(4, 6, 2, 3, lengths=draw.ends(0, 1, 5, 6))
    yield inputs(4, 6, 2, 3, lengths=draw.ends(6, 0, 3, 0), reset=draw.coin(4, 6))


def _log_samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    draw = _Draw(device, dtype)

    def inputs(batch: int, steps: int, *n: int, scale: float = 1.0, **more: Any) -> dict[str, Any]:
        return dict(x=scale * draw.normal(batch, steps, *n), z0=draw.normal(batch, *n, high=True)) | more

    def lowest(*shape: int) -> Tensor:
        return torch.full(shape, torch.finfo(wide(dtype)).min, device=device, dtype=wide(dtype))

    yield inputs(2, 5, 3)
    yield inputs(2, 5, 3, z0=lowest(2, 3))
    yield inputs(1, 1, 1)
    yield inputs(2, 0, 3)
    yield inputs(0, 4, 3)
    yield inputs(2, 4, 0)
    yield inputs(2, 6)  # no channel axis
    yield inputs(2, 37, 2, 11)
    for scale in (0.0, 100.0, 1e4):
        yield inputs(2, 9, 3, scale=scale)
    yield inputs(2, 9, 3, x=draw.normal(2, 9, 3).masked_fill(draw.coin(2, 9, 3), -torch.inf))
    yield inputs(2, 7, 3, x=draw.normal(7, 2, 3).transpose(0, 1))
    yield inputs(2, 7, 3, x=draw.normal(2, 7, 1).expand(2, 7, 3))
    yield inputs(4, 11, 3, reset=draw.coin(4, 11))
    yield inputs(2, 9, 3, scale=100.0, reset=draw.coin(2, 9))
    yield inputs(2, 5, 3, reset=torch.ones(2, 5, dtype=torch.bool, device=device))
    yield inputs(4, 6, 3, lengths=draw.ends(0, 1, 5, 6))
    yield inputs(4, 6, 3, lengths=draw.ends(6, 0, 3, 0), reset=draw.coin(4, 6))


def softmax_step(score: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """One step in plain arithmetic: score (B, H), v (B, H, V) -> o (B, H, V), state."""
    m = torch.maximum(state.m, score).detach()  # o does not depend on it
    old, new = (state.m - m).exp(), (score - m).exp()
    u = old * state.u + new
    w = old[..., None] * state.w + new[..., None] * v
    # all scores -inf so far: nothing has weight, and the average is 0
    return w / torch.where(u == 0, 1, u)[..., None], SoftmaxState(m, u, w)


@op(
    _triton("softmax_scan"),
    Backend(
        "numba",
        "statewise.ops.softmax_scan.in_numba:softmax_scan",
        devices=("cpu",),
        dtypes=_DTYPES,
        requires=("numba",),
    ),
    Backend("torch", "statewise.ops.softmax_scan.in_torch:softmax_scan", devices=_DEVICES, dtypes=_DTYPES),
    samples=_samples,
    check=_check,
)
def softmax_scan(
    score: Tensor,
    v: Tensor,
    state: SoftmaxState,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """o_t = sum_{s <= t} exp(score_s) v_s / sum_{s <= t} exp(score_s), from a running maximum.

    score: (B, T, H), v: (B, T, H, V). state: what was seen before (`nothing_seen` at the start), float32 or wider.
    A score of -inf gives no weight; as long as nothing has weight, o is 0.
    reset: (B, T) bool; where True, the average begins anew at t. lengths: (B,) integers; o is 0 past a row's end.

    Returns o (B, T, H, V) in the dtype of v, and the state at the end.
    Differentiable in score, v and the given state, through o and the last u and w. The last m is a constant: what comes
    after does not depend on it, if u and w are meant to be in its measure.

    >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    >>> softmax_scan(torch.zeros(1, 3, 1), v, nothing_seen(1, 1, 1, like=v))[0].flatten().tolist()
    [1.0, 1.5, 3.0]
    """
    fresh = nothing_seen(*state.w.shape, like=state.w)
    return loop(softmax_step, (score, v), state, fresh=fresh, like=v, reset=reset, lengths=lengths)


@op(
    _triton("log_sum_exp_scan"),
    Backend("torch", "statewise.ops.softmax_scan.in_torch:log_sum_exp_scan", devices=_DEVICES, dtypes=_DTYPES),
    samples=_log_samples,
    check=_log_check,
)
def log_sum_exp_scan(
    x: Tensor, z0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z_t = log(exp(z_{t-1}) + exp(x_t)), elementwise.

    x: (B, T, N...), z0: (B, N...), float32 or wider; torch.finfo(dtype).min for nothing before.
    reset: (B, T) bool; where True, z_t = x_t. lengths: (B,) integers; z is 0 past a row's end.

    Returns z (B, T, N...) in the dtype of z0, whatever x's is, and z at the end (B, N...).
    Differentiable in x and z0, through both results. Whatever is -inf adds nothing.

    >>> z, _ = log_sum_exp_scan(torch.zeros(1, 3), torch.full((1,), torch.finfo(torch.float32).min))
    >>> z.exp().round(decimals=4).tolist()
    [[1.0, 2.0, 3.0]]
    """

    def step(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.logaddexp(z, x)
        return z, z

    fresh = torch.full_like(z0, torch.finfo(z0.dtype).min)
    return loop(step, (x,), z0, fresh=fresh, like=x.to(z0.dtype), reset=reset, lengths=lengths)
