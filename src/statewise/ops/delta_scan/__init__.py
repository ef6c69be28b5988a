"""S_t = a_t (I - b k k^T) S_{t-1} + b k v^T: the error-correcting memory under DeltaNet, its products and RWKV-7."""

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
_ANYWHERE = ("cpu", "cuda", "xpu", "meta")


def _check_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    if q.ndim != 4:
        raise UsageError(f"delta_scan: q is {tuple(q.shape)}; expected (B, T, H, K)")
    (batch, steps, heads, keys), values = q.shape, v.shape[-1]
    several = [*k.shape[2:3]] if k.ndim == 5 else []
    if several == [0]:
        raise UsageError(f"delta_scan: k is {tuple(k.shape)}, no correction a step; expected n >= 1 in (B, T, n, H, K)")
    rows = (batch, steps, *several, heads)
    for name, t, shape in (("k", k, (*rows, keys)), ("v", v, (*rows, values)), ("beta", beta, rows)):
        if t.shape != shape:
            raise UsageError(
                f"delta_scan: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and beta "
                f"{tuple(beta.shape)}; expected {name} to be {shape}: (B, T, H, K), (B, T, H, V) and (B, T, H), or "
                f"with n corrections a step k (B, T, n, H, K), v (B, T, n, H, V) and beta (B, T, n, H)"
            )
    _check_rest("delta_scan", q, v, state, log_decay, reset, lengths, {"q": q, "k": k, "v": v, "beta": beta})


def _check_dplr(
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
) -> None:
    if q.ndim != 4 or any(t.shape != q.shape for t in (k, a, b)) or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise UsageError(
            f"dplr_scan: q is {tuple(q.shape)}, k {tuple(k.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)} and v "
            f"{tuple(v.shape)}; expected (B, T, H, K) four times and (B, T, H, V)"
        )
    _check_rest("dplr_scan", q, v, state, log_decay, reset, lengths, {"q": q, "k": k, "v": v, "a": a, "b": b})


def _check_rest(
    name: str,
    q: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    inputs: dict[str, Tensor],
) -> None:
    (batch, steps, heads, keys), values = q.shape, v.shape[-1]
    if state.shape != (batch, heads, keys, values):
        raise UsageError(
            f"{name}: state is {tuple(state.shape)}; expected (B, H, K, V) = {(batch, heads, keys, values)}"
        )
    every = {**inputs, "state": state} | ({} if log_decay is None else {"log_decay": log_decay})
    if state.dtype not in _WIDE or any(
        torch.promote_types(t.dtype, state.dtype) != state.dtype for t in every.values()
    ):
        raise UsageError(
            f"{name}: {', '.join(f'{n} is {t.dtype}' for n, t in every.items())}; expected state in float32 or wider, "
            f"and nothing wider than it"
        )
    if any(t.device != state.device for t in every.values()):
        raise UsageError(
            f"{name}: {', '.join(f'{n} is on {t.device}' for n, t in every.items())}; move them to one device"
        )
    if log_decay is not None:
        shape, full = (*[1] * (5 - log_decay.ndim), *log_decay.shape), (batch, steps, heads, keys, 1)
        if log_decay.ndim > 5 or any(m not in (1, n) for m, n in zip(shape, full)):
            raise UsageError(
                f"{name}: log_decay is {tuple(log_decay.shape)}; expected a shape that broadcasts to (B, T, H, K, 1) = "
                f"{full}, such as (H, 1, 1) or (B, T, H, 1, 1)"
            )
    check_time(name, q, reset, lengths)


class _Draw:
    """Random inputs of both ops, keys of length one, and the calls that try what has broken such kernels before."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.rng, self.device, self.dtype = torch.Generator(device).manual_seed(0), device, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self.rng, device=self.device, dtype=torch.float64)
        return drawn.to(self.dtype if dtype is None else dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.rng, device=self.device, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        return torch.nn.functional.normalize(self.normal(*shape, dtype=torch.float64), dim=-1).to(self.dtype)

    def decay(self, *shape: int) -> Tensor:
        """Logs of decays, some exactly 0 or 1 and some far below what exp can hold."""
        drawn = self.uniform(*shape).log()
        kind, lowest = self.uniform(*shape), torch.finfo(wide(self.dtype)).min
        for below, value in ((0.3, 0.0), (0.2, -1e4), (0.15, -torch.inf), (0.1, -40.0), (0.05, lowest)):
            drawn = drawn.masked_fill(kind < below, value)
        return drawn.to(wide(self.dtype))

    def coin(self, *shape: int) -> Tensor:
        return self.uniform(*shape) < 0.2

    def ends(self, *lengths: int) -> Tensor:
        return torch.tensor(lengths, device=self.device)

    def state(self, batch: int, heads: int, keys: int, values: int) -> Tensor:
        return self.normal(batch, heads, keys, values, dtype=wide(self.dtype))

    def delta(
        self, batch: int, steps: int, heads: int, keys: int, values: int, *several: int, **more: Any
    ) -> dict[str, Any]:
        rows = (batch, steps, *several, heads)
        beta = (2 * self.uniform(*rows)).to(self.dtype)
        return {
            "q": self.normal(batch, steps, heads, keys),
            "k": self.unit(*rows, keys),
            "v": self.normal(*rows, values),
            "beta": more.pop("beta", beta),
            "state": self.state(batch, heads, keys, values),
            **more,
        }

    def dplr(self, batch: int, steps: int, heads: int, keys: int, values: int, **more: Any) -> dict[str, Any]:
        shape = (batch, steps, heads, keys)
        a = self.unit(*shape)
        return {
            "q": self.normal(*shape),
            "k": self.normal(*shape),
            "v": self.normal(batch, steps, heads, values),
            "a": -a,
            "b": (a * self.uniform(*shape)).to(self.dtype),
            "state": self.state(batch, heads, keys, values),
            **more,
        }

    def hard(self, make: Any) -> Iterator[dict[str, Any]]:
        """Shapes and decays that either op is called with. make: self.delta or self.dplr."""
        yield make(2, 5, 7, 3, 4)  # no two sizes alike
        yield make(1, 1, 1, 1, 1)
        yield make(2, 0, 2, 3, 4)
        yield make(0, 4, 2, 3, 4)
        yield make(2, 7, 2, 1, 3)
        yield make(1, 66, 2, 3, 2, log_decay=-self.uniform(1, 66, 2, 1, 1).to(wide(self.dtype)))
        yield make(1, 150, 1, 4, 3, log_decay=self.decay(1, 150, 1, 1, 1), reset=self.coin(1, 150))
        yield make(2, 40, 2, 3, 2, log_decay=self.decay(2, 40, 2, 1, 1))
        yield make(2, 9, 2, 3, 2, log_decay=self.decay(2, 1, 1))
        yield make(2, 9, 2, 3, 2, log_decay=-self.uniform(2, 1, 1).to(wide(self.dtype)).expand(2, 9, 2, 1, 1))
        for constant in (0.0, -1e-6, -1e4, -torch.inf, torch.finfo(wide(self.dtype)).min):
            log_decay = torch.full((1, 1), constant, device=self.device, dtype=wide(self.dtype))
            yield make(1, 19, 1, 3, 2, log_decay=log_decay)
        yield make(3, 20, 2, 3, 2, reset=self.coin(3, 20))
        yield make(3, 20, 2, 3, 2, lengths=self.ends(0, 7, 20), log_decay=self.decay(3, 20, 2, 1, 1))
        yield make(3, 20, 2, 3, 2, lengths=self.ends(20, 1, 17), reset=self.coin(3, 20))
        yield make(2, 21, 2, 3, 4, log_decay=self.decay(2, 21, 2, 3, 1))  # per key
        yield make(2, 70, 1, 4, 2, log_decay=self.decay(70, 1, 4, 1), reset=self.coin(2, 70), lengths=self.ends(70, 67))
        yield make(1, 17, 1, 3, 2, log_decay=-60 * self.uniform(1, 17, 1, 3, 1).to(wide(self.dtype)))
        slow = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in make(2, 18, 2, 3, 4).items()}
        yield slow | {"v": slow["v"][:, :1].expand(slow["v"].shape)}


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    draw = _Draw(device, dtype)
    yield from draw.hard(draw.delta)
    for beta in (0, 1, 2):
        fixed = torch.full((1, 33, 2), beta, device=device, dtype=dtype)
        yield draw.delta(1, 33, 2, 3, 2, beta=fixed, log_decay=draw.decay(1, 33, 2, 1, 1))
    same = draw.unit(1, 1, 1, 4).expand(1, 40, 1, 4)
    yield draw.delta(1, 40, 1, 4, 2) | {"k": same}  # one key over and over
    yield draw.delta(2, 9, 2, 3, 4, 1)
    yield draw.delta(2, 40, 2, 3, 4, 2, log_decay=draw.decay(2, 40, 2, 1, 1), reset=draw.coin(2, 40))
    yield draw.delta(2, 35, 1, 4, 3, 3, log_decay=draw.decay(1, 1, 1), lengths=draw.ends(35, 12))
    yield draw.delta(1, 7, 1, 4, 3, 5)
    yield draw.delta(2, 23, 1, 3, 2, 3, log_decay=draw.decay(2, 23, 1, 3, 1), reset=draw.coin(2, 23))


def _dplr_samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    draw = _Draw(device, dtype)
    yield from draw.hard(draw.dplr)


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: q (B, H, K), k (B, [n,] H, K), v (B, [n,] H, V), beta (B, [n,] H),
    log_decay (B, H, K | 1, 1) -> o (B, H, V), state."""
    if k.ndim == 3:
        k, v, beta = k[:, None], v[:, None], beta[:, None]
    if log_decay is not None:
        state = log_decay.exp() * state
    for k_j, v_j, beta_j in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        error = v_j - (k_j[..., None] * state).sum(-2)
        state = state + (beta_j[..., None] * k_j)[..., None] * error[..., None, :]
    return (q[..., None] * state).sum(-2), state


@op(
    Backend(
        "triton",
        "statewise.ops.delta_scan.in_triton:delta",
        devices=("cuda", "xpu", "cpu"),
        dtypes=(torch.float32, *_HALF),
        requires=("triton",),
        limits=needs_a_gpu,
    ),
    Backend(
        "numba",
        "statewise.ops.delta_scan.in_numba:delta",
        devices=("cpu",),
        dtypes=(*_WIDE, *_HALF),
        requires=("numba",),
    ),
    Backend("torch", "statewise.ops.delta_scan.in_torch:delta", devices=_ANYWHERE, dtypes=(*_WIDE, *_HALF)),
    samples=_samples,
    check=_check_delta,
)
def delta_scan(
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
    """Solve S_t = (I - beta_t k_t k_t^T) exp(log_decay_t) S_{t-1} + beta_t k_t v_t^T and read o_t = S_t^T q_t.

    q: (B, T, H, K), k: (B, T, H, K), v: (B, T, H, V), beta: (B, T, H).
    Several corrections a step (DeltaProduct): k (B, T, n, H, K), v (B, T, n, H, V), beta (B, T, n, H); the decay comes
        first, once, then correction 1 to n, then the reading.
    log_decay: None, or any shape that broadcasts to (B, T, H, K, 1); at most 0, -inf forgets.
    state: (B, H, K, V), S before the first step, float32 or wider; everything is computed in its dtype.
    reset: (B, T) bool; where True, S_{t-1} counts as zero at t. lengths: (B,) integers; o is 0 past a row's end.
    A step stays bounded if |k| = 1 and 0 <= beta <= 2: I - beta k k^T then has the eigenvalue 1 - beta in [-1, 1].

    Returns o (B, T, H, V) in the dtype of v, and S at the end (B, H, K, V) in the dtype of state.
    Differentiable in q, k, v, beta, state and log_decay, through both results.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> delta_scan(one, one, one, one[..., 0] / 2, torch.zeros(1, 1, 1, 1))[0].flatten().tolist()
    [0.5, 0.75, 0.875]
    """
    if log_decay is not None:
        log_decay = log_decay.expand(torch.broadcast_shapes(log_decay.shape, (*q.shape[:3], 1, 1)))
    like = v if v.ndim == 4 else v[:, :, 0]
    fresh = torch.zeros_like(state)
    return loop(delta_step, (q, k, v, beta, log_decay), state, fresh=fresh, like=like, reset=reset, lengths=lengths)


def dplr_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: q, k, a, b (B, H, K), v (B, H, V), log_decay (B, H, K | 1, 1) -> o, state."""
    read = (a[..., None] * state).sum(-2)
    decayed = state if log_decay is None else log_decay.exp() * state
    state = decayed + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
    return (q[..., None] * state).sum(-2), state


@op(
    Backend(
        "triton",
        "statewise.ops.delta_scan.in_triton:dplr",
        devices=("cuda", "xpu", "cpu"),
        dtypes=(torch.float32, *_HALF),
        requires=("triton",),
        limits=needs_a_gpu,
    ),
    Backend(
        "numba",
        "statewise.ops.delta_scan.in_numba:dplr",
        devices=("cpu",),
        dtypes=(*_WIDE, *_HALF),
        requires=("numba",),
    ),
    Backend("torch", "statewise.ops.delta_scan.dplr_in_torch:scan", devices=_ANYWHERE, dtypes=(*_WIDE, *_HALF)),
    samples=_dplr_samples,
    check=_check_dplr,
)
def dplr_scan(
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
    """Solve S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T and read o_t = S_t^T q_t.

    The diagonal plus low rank form that RWKV-7 needs; with a = k, b = -beta exp(log_decay) k and keys beta k it is
    `delta_scan`.
    q, k, a, b: (B, T, H, K), v: (B, T, H, V). The rest as in `delta_scan`.

    Returns o (B, T, H, V) in the dtype of v, and S at the end (B, H, K, V) in the dtype of state.
    Differentiable in q, k, v, a, b, state and log_decay, through both results.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> dplr_scan(one, one, one, one, -one / 2, torch.zeros(1, 1, 1, 1))[0].flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    if log_decay is not None:
        log_decay = log_decay.expand(torch.broadcast_shapes(log_decay.shape, (*v.shape[:3], 1, 1)))
    fresh = torch.zeros_like(state)
    return loop(dplr_step, (q, k, v, a, b, log_decay), state, fresh=fresh, like=v, reset=reset, lengths=lengths)
