"""The gated nonlinear cells over time: Elman, GRU and LSTM in torch.nn's layout.

They take x and its weight rather than the product: the fast kernels fuse the two, and the product over all of time is
then one large matrix multiplication, which is the kernel's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError, clear_past_end, tree_map, where, wide
from ..dispatch import Backend, op
from . import in_aten
from .cells import elman_step, gru_step, jordan_step, lstm_step

__all__ = ["elman_loop", "elman_step", "gru_loop", "gru_step", "jordan_loop", "jordan_step", "lstm_loop", "lstm_step"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _aten(target: Callable[..., Any], limits: Callable[..., str | None] | None = None) -> Backend:
    return Backend("aten", target, devices=("cpu", "cuda"), dtypes=_FLOATS, limits=limits)


def _unroll(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    x: Tensor,
    state: tuple[Tensor, ...],
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    zero, hs = tree_map(torch.zeros_like, state), []
    for t in range(x.shape[1]):
        before = state if reset is None else where(reset[:, t], zero, state)
        new = step(x[:, t], before)
        hs.append(new[0].to(x.dtype))
        state = new if lengths is None else where(t < lengths, new, state)
    h = torch.stack(hs, 1) if hs else x.new_zeros(*x.shape[:2], state[0].shape[-1])
    return (h if lengths is None else clear_past_end(h, lengths)), state


def _samples(gates: int, cell: bool = False) -> Callable[..., Iterator[dict[str, Any]]]:
    def samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        rng = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=rng, device=device, dtype=torch.float64) * scale).to(dtype)

        def call(b: int, t: int, d: int, n: int, p: int = 0, bias: bool = True, scale: float = 0.5, **more: Any) -> Any:
            state = {"h0": normal(b, p or n, dtype=wide(dtype))}
            if cell:
                state["c0"] = normal(b, n, dtype=wide(dtype))
            weights = {"w_ih": normal(gates * n, d, scale=scale), "w_hh": normal(gates * n, p or n, scale=scale)}
            if bias:
                weights |= {"b_ih": normal(gates * n), "b_hh": normal(gates * n)}
            if p:
                weights["w_hr"] = normal(p, n)
            return {"x": normal(b, t, d), **state, **weights, **more}

        def mask(b: int, t: int) -> Tensor:
            return torch.rand(b, t, generator=rng, device=device) < 0.3

        yield call(2, 5, 3, 4)
        yield call(1, 1, 1, 1, bias=False)
        yield call(2, 0, 3, 4)
        yield call(0, 3, 2, 4)
        yield call(2, 6, 3, 4, scale=20.0)  # gates at 0 and 1
        lengths = torch.tensor([4, 0, 6], device=device)
        yield call(3, 6, 2, 3, lengths=lengths)
        yield call(3, 6, 2, 3, reset=mask(3, 6))
        yield call(3, 6, 2, 3, reset=mask(3, 6), lengths=lengths, bias=False)
        yield call(2, 3, 2, 3, lengths=torch.tensor([0, 0], device=device))
        if cell:
            yield call(2, 5, 3, 4, p=2)
            yield call(3, 6, 3, 4, p=2, bias=False, reset=mask(3, 6), lengths=lengths)
        if gates == 1:
            yield call(2, 5, 3, 4, nonlinearity="relu")
            yield call(3, 6, 2, 3, nonlinearity="relu", reset=mask(3, 6), lengths=lengths)

    return samples


def _check(
    name: str,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor, Tensor],
    gates: int,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> None:
    h0, n = state[0], state[-1].shape[-1]
    if x.ndim != 3 or any(s.ndim != 2 or s.shape[0] != x.shape[0] for s in state):
        shapes = " and ".join(str(tuple(s.shape)) for s in state)
        raise UsageError(f"{name}: x is {tuple(x.shape)}, the first state {shapes}; expected (B, T, D) and (B, N)")
    if any(s.dtype != wide(s.dtype) or torch.promote_types(x.dtype, s.dtype) != s.dtype for s in state):
        raise UsageError(f"{name}: x is {x.dtype}, the first state {h0.dtype}; expected float32 or wider, as x is")
    want = (gates * n, x.shape[-1]), (gates * n, h0.shape[-1])
    for weight, shape, which in zip(weights, want, ("w_ih", "w_hh"), strict=True):
        if weight.shape != shape:
            raise UsageError(f"{name}: {which} is {tuple(weight.shape)}; expected {shape}")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        raise UsageError(f"{name}: reset is {reset.dtype} {tuple(reset.shape)}; expected bool {tuple(x.shape[:2])}")
    if lengths is not None and lengths.shape != x.shape[:1]:
        raise UsageError(f"{name}: lengths has shape {tuple(lengths.shape)}; expected ({len(x)},)")


def _check_elman(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *biases: Tensor | None,
    nonlinearity: str = "tanh",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    **named: Tensor | None,
) -> None:
    _check("elman_loop", x, (h0,), (w_ih, w_hh), 1, reset, lengths)
    if nonlinearity not in ("tanh", "relu"):
        raise UsageError(f"elman_loop: nonlinearity {nonlinearity!r}; expected 'tanh' or 'relu'")


def _check_jordan(
    x: Tensor,
    s0: Tensor,
    w_ih: Tensor,
    w_sh: Tensor,
    w_hy: Tensor,
    *biases: Tensor | None,
    decay: float = 0.0,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    **named: Tensor | None,
) -> None:
    hidden = s0.new_empty(x.shape[0], len(w_ih))
    _check("jordan_loop", x, (s0, hidden), (w_ih, w_sh), 1, reset, lengths)
    if w_hy.shape != w_sh.T.shape:
        raise UsageError(f"jordan_loop: w_hy is {tuple(w_hy.shape)}; expected {tuple(w_sh.T.shape)}")


def _jordan_samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng = torch.Generator(device).manual_seed(0)
    for call in _samples(1)(device, dtype):
        if call.pop("nonlinearity", "tanh") == "tanh":
            n, out, state = len(call.pop("w_hh")), 7, wide(dtype)

            def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(*shape, generator=rng, device=device, dtype=torch.float64).to(dtype)

            call |= {"s0": normal(len(call.pop("h0")), out, dtype=state), "w_sh": normal(n, out)}
            call |= {"w_hy": normal(out, n), "b_hy": None if call.pop("b_hh", None) is None else normal(out)}
            yield call
            yield call | {"decay": 0.5}


def _no_decay(*args: Any, decay: float = 0.0, **named: Any) -> str | None:
    return None if decay == 0 else f"decay {decay} (only 0)"


def _check_gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *biases: Tensor | None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    **named: Tensor | None,
) -> None:
    _check("gru_loop", x, (h0,), (w_ih, w_hh), 3, reset, lengths)


def _check_lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *rest: Tensor | None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    **named: Tensor | None,
) -> None:
    _check("lstm_loop", x, (h0, c0), (w_ih, w_hh), 4, reset, lengths)


@op(_aten(in_aten.elman), samples=_samples(1), check=_check_elman)
def elman_loop(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = tanh(W x_t + R h_{t-1} + b), or relu, over dim 1 of x.

    x (B, T, D); h0 (B, N) in float32 or wider, the dtype of the recurrence; w_ih (N, D), w_hh (N, N), biases (N,).
    reset (B, T) bool: where True, h_{t-1} counts as 0.
    lengths (B,): row b ends after lengths[b] steps; h is 0 from there on, the last state is the one at the end.

    Returns h (B, T, N) in the dtype of x and the last state (B, N) in the dtype of h0. T = 0 and B = 0 are legal.
    Differentiable in x, h0, weights and biases through both. Raises UsageError for shapes and dtypes that do not fit.

    >>> one = torch.ones(1, 1)
    >>> elman_loop(torch.ones(1, 3, 1), torch.zeros(1, 1), one, one, nonlinearity="relu")[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (elman_step(x_t, state[0], w_ih, w_hh, b_ih, b_hh, nonlinearity=nonlinearity),)

    h, (last,) = _unroll(step, x, (h0,), reset, lengths)
    return h, last


@op(_aten(in_aten.jordan, _no_decay), samples=_jordan_samples, check=_check_jordan)
def jordan_loop(
    x: Tensor,
    s0: Tensor,
    w_ih: Tensor,
    w_sh: Tensor,
    w_hy: Tensor,
    b_ih: Tensor | None = None,
    b_hy: Tensor | None = None,
    *,
    decay: float = 0.0,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = V tanh(W x_t + U s_{t-1} + a) + b,  s_t = decay s_{t-1} + y_t.

    x (B, T, D); s0 (B, E); w_ih (N, D), w_sh = U (N, E), w_hy = V (E, N), b_ih = a (N,), b_hy = b (E,).
    Returns y (B, T, E) in the dtype of x and the last s (B, E). The rest is as for `elman_loop`.

    >>> one = torch.ones(1, 1)
    >>> jordan_loop(torch.zeros(1, 3, 1), one, one, torch.zeros(1, 1), one, decay=0.5)[1].tolist()
    [[0.125]]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        s = state[1]
        y = jordan_step(x_t, s, w_ih, w_sh, w_hy, b_ih, b_hy)
        return y, decay * s + y

    y, (_, last) = _unroll(step, x, (torch.zeros_like(s0), s0), reset, lengths)
    return y, last


@op(_aten(in_aten.gru), samples=_samples(3), check=_check_gru)
def gru_loop(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """r, z = s(W x_t + R h_{t-1} + b);  n = tanh(W_n x_t + b_n + r (R_n h_{t-1} + c_n));  h_t = (1 - z) n + z h_{t-1}.

    x (B, T, D); h0 (B, N); w_ih (3N, D), w_hh (3N, N) and biases (3N,) with rows r, z, n.
    The rest is as for `elman_loop`.

    >>> zero = torch.zeros(3, 1)  # every gate half open, no input: h halves
    >>> gru_loop(torch.ones(1, 3, 1), torch.ones(1, 1), zero, zero)[0].flatten().tolist()
    [0.5, 0.25, 0.125]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (gru_step(x_t, state[0], w_ih, w_hh, b_ih, b_hh),)

    h, (last,) = _unroll(step, x, (h0,), reset, lengths)
    return h, last


@op(_aten(in_aten.lstm), samples=_samples(4, cell=True), check=_check_lstm)
def lstm_loop(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """i, f, g, o = W x_t + R h_{t-1} + b;  c_t = s(f) c_{t-1} + s(i) tanh(g);  h_t = W_hr s(o) tanh(c_t).

    x (B, T, D); c0 (B, N); h0 (B, P), with P = N where there is no projection; w_ih (4N, D), w_hh (4N, P) and biases
    (4N,) with rows i, f, g, o; w_hr (P, N) or None.
    Returns h (B, T, P) and the last h and c. The rest is as for `elman_loop`.

    >>> zero = torch.zeros(4, 1)  # every gate half open, no input: c halves
    >>> lstm_loop(torch.ones(1, 3, 1), torch.zeros(1, 1), torch.ones(1, 1), zero, zero)[2].tolist()
    [[0.125]]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return lstm_step(x_t, state[0], state[1], w_ih, w_hh, b_ih, b_hh, w_hr)

    h, (h_last, c_last) = _unroll(step, x, (h0, c0), reset, lengths)
    return h, h_last, c_last
