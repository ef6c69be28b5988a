"""S_t = a_t S_{t-1} + k_t v_t^T: the matrix memory under linear attention, RetNet, GLA, Mamba-2 and mLSTM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError, wide
from ..dispatch import Backend, op
from ..given import check_time, needs_a_gpu
from ..looping import loop
from .edges import kind_of

_WIDE = (torch.float32, torch.float64)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    if (
        q.ndim != 4
        or q.shape != k.shape
        or v.ndim != 4
        or v.shape[:2] != q.shape[:2]
        or v.shape[2] % max(q.shape[2], 1)
    ):
        raise UsageError(
            f"outer_scan: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected q and k (B, T, G, K) "
            f"and v (B, T, H, V) with H a multiple of G"
        )
    batch, steps, heads, values = v.shape
    if state.shape != (batch, heads, q.shape[3], values):
        raise UsageError(
            f"outer_scan: state is {tuple(state.shape)}; expected (B, H, K, V) {(batch, heads, q.shape[3], values)}"
        )
    if state.dtype not in _WIDE or any(torch.promote_types(t.dtype, state.dtype) != state.dtype for t in (q, k, v)):
        raise UsageError(
            f"outer_scan: q is {q.dtype}, k {k.dtype}, v {v.dtype}, state {state.dtype}; expected state in float32 or "
            f"float64, no narrower than the others"
        )
    if log_decay is not None:
        whole = (batch, steps, heads, *state.shape[2:])
        shape = (*[1] * (5 - log_decay.ndim), *log_decay.shape)
        if log_decay.ndim > 5 or any(m not in (n, 1) for m, n in zip(shape, whole)):
            raise UsageError(
                f"outer_scan: log_decay is {tuple(log_decay.shape)}; expected a shape that broadcasts to "
                f"(B, T, H, K, V) {whole}"
            )
        if torch.promote_types(log_decay.dtype, state.dtype) != state.dtype:
            raise UsageError(f"outer_scan: log_decay is {log_decay.dtype}; expected no wider than state, {state.dtype}")
    if any(t is not None and t.device != v.device for t in (q, k, state, log_decay, reset)):
        raise UsageError(
            f"outer_scan: q is on {q.device}, k on {k.device}, v on {v.device}, state on {state.device}; "
            f"move them, log_decay and reset together"
        )
    check_time("outer_scan", q, reset, lengths)


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng, wider = torch.Generator(device).manual_seed(0), wide(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=torch.float64).to(dtype)

    def decay(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=device, dtype=torch.float64).log().to(wider)

    def coin(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device) < 0.3

    def inputs(
        batch: int, steps: int, groups: int, heads: int, keys: int, values: int, g: Tensor | None = None, **more: Tensor
    ) -> dict[str, Any]:
        return {
            "q": normal(batch, steps, groups, keys),
            "k": normal(batch, steps, groups, keys),
            "v": normal(batch, steps, heads, values),
            "state": normal(batch, heads, keys, values, dtype=wider),
            "log_decay": g,
            **more,
        }

    def constant(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=device, dtype=wider)

    ends, lowest = torch.tensor([0, 7, 3], device=device), torch.finfo(wider).min
    yield inputs(2, 5, 7, 7, 3, 4)  # no two sizes alike but the heads'
    for kind in ((1, 1), (3, 1), (1, 4), (3, 4)):
        yield inputs(2, 6, 2, 2, 3, 4, decay(2, 6, 2, *kind))
        yield inputs(1, 1, 1, 1, 3, 4, decay(1, 1, 1, *kind))
        yield inputs(2, 0, 1, 2, 3, 4, decay(2, 0, 2, *kind))
        yield inputs(0, 3, 1, 2, 3, 4, decay(0, 3, 2, *kind))
        yield inputs(1, 37, 1, 1, 3, 4, decay(1, 37, 1, *kind) / 8)
        yield inputs(3, 7, 1, 2, 3, 4, decay(3, 7, 2, *kind), reset=coin(3, 7), lengths=ends)
        yield inputs(2, 5, 1, 4, 3, 4, decay(4, *kind))  # constant in time, two heads to a group
        yield inputs(1, 6, 1, 1, 3, 4, decay(1, 6, 1, *kind).masked_fill(coin(1, 6, 1, *kind), -torch.inf))
        for value in (-torch.inf, lowest, -1e4, -20.0, -1e-7, 0.0):
            yield inputs(1, 4, 1, 1, 3, 4, constant(value, *kind))
        yield inputs(1, 9, 1, 1, 3, 4, constant(-1e4, 1, 9, 1, *kind).where(coin(1, 9, 1, 1, 1), decay(1, 9, 1, *kind)))
    for kind in ((1, 1), (3, 1), (1, 4)):
        yield inputs(2, 133, 1, 2, 3, 4, decay(2, 133, 2, *kind) / 30, reset=coin(2, 133) & coin(2, 133))
    yield inputs(1, 300, 1, 1, 2, 2, decay(1, 300, 1, 1, 1) / 100)  # some whole chunks and a part
    yield inputs(1, 300, 1, 1, 2, 2, decay(1, 300, 1, 2, 1) / 100)
    yield inputs(2, 4, 3, 3, 3, 4, reset=coin(2, 4))
    yield inputs(3, 7, 1, 2, 3, 4, lengths=ends)
    for shape in ((), (4,), (3, 1), (3, 4), (1, 1, 1), (6, 1, 1, 1), (2, 1, 2, 1, 1)):
        yield inputs(2, 6, 1, 2, 3, 4, decay(*shape))
    yield inputs(2, 6, 1, 2, 3, 4, decay(2, 1, 2, 1, 1).expand(2, 6, 2, 3, 1))
    yield inputs(2, 6, 1, 2, 3, 4, decay(2, 6, 2, 1, 1).expand(2, 6, 2, 3, 4))
    yield inputs(2, 6, 1, 1, 1, 1, decay(2, 6, 1, 1, 1))
    yield inputs(2, 6, 1, 1, 1, 4, decay(2, 6, 1, 1, 4))
    yield inputs(2, 6, 2, 2, 5, 1, decay(2, 6, 2, 5, 1))
    odd = inputs(2, 6, 2, 4, 3, 4, decay(2, 4, 6, 3, 1).transpose(1, 2))
    yield odd | {"q": normal(1, 1, 2, 3).expand(2, 6, 2, 3), "v": normal(2, 4, 6, 4).transpose(1, 2)}
    yield odd | {"k": normal(2, 6, 2, 6)[..., ::2], "state": normal(1, 1, 4, 3, dtype=wider).mT.expand(2, 4, 3, 4)}


def outer_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step in plain arithmetic: q, k (B, G, K), v (B, H, V), log_decay (B, H, K, V) -> o, state."""
    q, k = (t.repeat_interleave(v.shape[1] // t.shape[1], 1) for t in (q, k))
    if log_decay is not None:
        state = log_decay.exp() * state
    state = state + k[..., None] * v[..., None, :]
    return (q[..., None] * state).sum(-2), state


def _not_in_triton(q: Tensor, k: Tensor, v: Tensor, state: Tensor, **more: Any) -> str | None:
    missing = needs_a_gpu(v)
    if missing is not None:
        return missing
    kind = kind_of(more.get("log_decay"))
    if kind in ("value", "full"):
        return f"a decay per {'value' if kind == 'value' else 'key and value'} (takes one per head or per key)"
    return f"{q.shape[3]} keys (takes up to 256)" if q.shape[3] > 256 else None


def _not_in_numba(q: Tensor, k: Tensor, v: Tensor, state: Tensor, **more: Any) -> str | None:
    kind = kind_of(more.get("log_decay"))
    if kind in ("value", "full"):
        return f"a decay per {'value' if kind == 'value' else 'key and value'} (takes one per head or per key)"
    return None


@op(
    Backend(
        "triton",
        "statewise.ops.outer_scan.in_triton:scan",
        devices=("cuda", "xpu", "cpu"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        requires=("triton",),
        limits=_not_in_triton,
    ),
    Backend(
        "numba",
        "statewise.ops.outer_scan.in_numba:scan",
        devices=("cpu",),
        dtypes=(*_WIDE, torch.bfloat16, torch.float16),
        requires=("numba",),
        limits=_not_in_numba,
    ),
    Backend(
        "torch",
        "statewise.ops.outer_scan.in_torch:scan",
        devices=("cpu", "cuda", "mps", "xpu", "meta"),
        dtypes=(*_WIDE, torch.bfloat16, torch.float16),
    ),
    samples=_samples,
    check=_check,
)
def outer_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T and read o_t = S_t^T q_t, head by head.

    q, k: (B, T, G, K), v: (B, T, H, V); H a multiple of G: query and key head g serves H / G value heads in a row.
    log_decay: None for no decay, or any shape that broadcasts to (B, T, H, K, V); at most 0, -inf forgets. Its last two
        sizes say the kind: (1, 1) a scalar per head, (K, 1) per key channel, (1, V) per value channel, (K, V) full.
    state: (B, H, K, V), S before the first step, float32 or wider; everything is computed in its dtype.
    reset: (B, T) bool; where True, S_{t-1} counts as zero at t, infinities included.
    lengths: (B,) integers; row b ends after lengths[b] steps, o is 0 from there on.

    Returns o (B, T, H, V) in the dtype of v, and S at the end (B, H, K, V) in the dtype of state.
    Differentiable once in q, k, v, state and log_decay, through both results. A NaN or infinity stays in its row, head
    and future. Memory beyond inputs and outputs is a state for each chunk of time. Raises UsageError for shapes and
    dtypes that do not fit.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> outer_scan(one, one, one, torch.zeros(1, 1, 1, 1))[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    if log_decay is not None:
        log_decay = log_decay.expand(torch.broadcast_shapes(log_decay.shape, (*v.shape[:3], 1, 1)))
    fresh = torch.zeros_like(state)
    return loop(outer_step, (q, k, v, log_decay), state, fresh=fresh, like=v, reset=reset, lengths=lengths)


def normalised_outer_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    norm: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """outer_scan and z_t = n_t . q_t of the normaliser n_t = exp(log_decay_t) n_{t-1} + k_t, in one pass.

    norm: (B, H, K), n before the first step, in the dtype of state. log_decay: as in outer_scan, with a last size of 1.

    Returns o (B, T, H, V) in the dtype of v, z (B, T, H) in the dtype of state, and S and n at the end.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> normalised_outer_scan(one, one, 2 * one, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))[1].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    if log_decay is not None and log_decay.ndim and log_decay.shape[-1] != 1:
        raise UsageError(f"normalised_outer_scan: log_decay is {tuple(log_decay.shape)}; expected a last size of 1")
    if norm.shape != state.shape[:-1] or norm.dtype != state.dtype:
        raise UsageError(
            f"normalised_outer_scan: norm is {norm.dtype} {tuple(norm.shape)}; expected {state.dtype} "
            f"{tuple(state.shape[:-1])}, as state without its last size"
        )
    # n is one more column of S, whose value is always 1
    wider = torch.cat([v.to(state.dtype), torch.ones_like(v[..., :1], dtype=state.dtype)], -1)
    start = torch.cat([state, norm[..., None]], -1)
    o, last = outer_scan(q, k, wider, start, log_decay=log_decay, reset=reset, lengths=lengths)
    return o[..., :-1].to(v.dtype), o[..., -1], last[..., :-1].clone(), last[..., -1].clone()  # no shared memory
