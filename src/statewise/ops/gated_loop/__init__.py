"""The gated nonlinear cells over time: Elman, GRU and LSTM in torch.nn's layout, and sLSTM.

They take x and its weight rather than the product: the fast kernels fuse the two, and the product over all of time is
then one large matrix multiplication, which is the kernel's business. Where the gates' inputs come from more than one
product, w_ih is None and x holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError, wide
from ..dispatch import Backend, op
from ..given import check_time, needs_a_gpu
from ..looping import loop
from . import cells, in_aten
from .cells import SLSTMState, fresh_slstm, jordan_step, slstm_step
from .in_aten import elman_step, gru_step, lstm_step

__all__ = [
    "SLSTMState", "elman_loop", "elman_step", "fresh_slstm", "gru_loop", "gru_step", "jordan_loop", "jordan_step",
    "lstm_loop", "lstm_step", "slstm_loop", "slstm_step",
]  # fmt: skip

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _aten(target: Callable[..., Any], limits: Callable[..., str | None] | None = None) -> Backend:
    return Backend("aten", target, devices=("cpu", "cuda"), dtypes=_FLOATS, limits=limits)


def _numba(name: str, limits: Callable[..., str | None] | None = None) -> Backend:
    target = f"statewise.ops.gated_loop.in_numba:{name}"
    return Backend("numba", target, devices=("cpu",), dtypes=_FLOATS, requires=("numba",), limits=limits)


def _triton(name: str, gates: int, states: int = 1) -> Backend:
    def limits(*args: Any, **named: Any) -> str | None:
        """Beside a GPU it needs a head whose matrix, with sides padded to powers of 2, stays within 64 KiB."""
        reason = needs_a_gpu(*args, **named)
        if reason is not None:
            return reason
        h0, w_hh = (named[n] if n in named else args[i] for n, i in (("h0", 1), ("w_hh", states + 2)))
        if states == 2 and (named.get("w_hr") is not None or any(a is not None for a in args[states + 5 :])):
            return "w_hr (takes no projection)"
        most = (128 if gates == 1 else 64) // (2 if h0.dtype == torch.float64 else 1)
        size = w_hh.shape[-1]
        return None if size <= most else f"a head of {size} units (takes {most} at most in {h0.dtype})"

    target = f"statewise.ops.gated_loop.in_triton:{name}"
    return Backend("triton", target, devices=("cuda", "cpu"), dtypes=_FLOATS, requires=("triton",), limits=limits)


def _unroll(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    x: Tensor,
    state: tuple[Tensor, ...],
    reset: Tensor | None,
    lengths: Tensor | None,
    fresh: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """step gives the new state, whose first leaf is the output. A reset leaves `fresh`, zeros unless it is given."""

    def outward(x_t: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        new = step(x_t, before)
        return new[0], new

    fresh = tuple(map(torch.zeros_like, state)) if fresh is None else fresh
    like = x.new_zeros(*x.shape[:2], state[0].shape[-1])
    return loop(outward, (x,), state, fresh=fresh, like=like, reset=reset, lengths=lengths)


def _samples(gates: int, states: int = 1) -> Callable[..., Iterator[dict[str, Any]]]:
    """states: how many tensors the cell carries."""

    def samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        rng = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=rng, device=device, dtype=torch.float64) * scale).to(dtype)

        def call(
            b: int, t: int, d: int, n: int, p: int = 0, bias: bool = True, scale: float = 0.5, heads: int = 0,
            **more: Any,
        ) -> Any:  # fmt: skip
            state = {"h0": normal(b, p or n, dtype=wide(dtype))}
            if states > 1:
                state["c0"] = normal(b, n, dtype=wide(dtype))
            if states > 2:
                state["n0"], state["m0"] = (normal(b, n, dtype=wide(dtype)) for _ in range(2))
                state["n0"] = state["n0"].abs() + 0.5
            block = (heads, gates * n // heads, n // heads) if heads else (gates * n, p or n)
            weights: dict[str, Any] = {"w_ih": normal(gates * n, d, scale=scale), "w_hh": normal(*block, scale=scale)}
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
        closed = call(2, 6, 3, 4)  # gates at 0 and 1, but not of every unit: where all are, gradients are rounding
        yield closed | {"w_ih": closed["w_ih"] * closed["w_ih"].new_tensor([[40.0], [1.0]] * (2 * gates))}
        lengths = torch.tensor([4, 0, 6], device=device)
        yield call(3, 6, 2, 3, lengths=lengths)
        yield call(3, 6, 2, 3, reset=mask(3, 6))
        yield call(3, 6, 2, 3, reset=mask(3, 6), lengths=lengths, bias=False)
        yield call(2, 3, 2, 3, lengths=torch.tensor([0, 0], device=device))
        for heads in (1, 2, 3):
            yield call(3, 6, 2, 6, heads=heads, reset=mask(3, 6), lengths=lengths)
        yield call(5, 7, 3, 18, heads=1) | {"w_ih": None, "b_ih": None, "x": normal(5, 7, gates * 18)}
        yield call(17, 3, 2, 70, scale=0.1)  # more than a vector and a block of rows
        yield call(2, 4, 3, 40, heads=2, scale=0.2, lengths=torch.tensor([4, 2], device=device))
        spread = call(2, 5, 3, 4)
        yield spread | {name: spread[name].mT.contiguous().mT for name in ("x", "w_ih", "w_hh")}
        yield spread | {"x": spread["x"][:1].expand(2, 5, 3)}
        if states == 2:
            yield call(2, 5, 3, 4, p=2)
            yield call(3, 6, 3, 4, p=2, bias=False, reset=mask(3, 6), lengths=lengths)
        if gates == 1:
            yield call(2, 5, 3, 4, nonlinearity="relu")
            yield call(3, 6, 2, 3, nonlinearity="relu", reset=mask(3, 6), lengths=lengths)
            yield call(3, 6, 2, 4, heads=2, leak=0.3, reset=mask(3, 6), lengths=lengths)
            yield call(2, 5, 3, 4, nonlinearity="relu", leak=0.7)
        if states == 4:
            yield call(2, 5, 3, 4, forget="exp")
            zero = torch.zeros(2, 4, device=device, dtype=wide(dtype))
            fresh = dict(zip(("h0", "c0", "n0", "m0"), fresh_slstm(2, 4, like=zero), strict=True))
            for scale in (1.0, 300.0):  # gates far beyond what exp can take
                for forget in ("sigmoid", "exp"):
                    yield call(2, 6, 3, 4, scale=scale, forget=forget) | fresh

    return samples


def _check(
    name: str,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor | None, Tensor],
    gates: int,
    reset: Tensor | None,
    lengths: Tensor | None,
    w_hr: Tensor | None = None,
) -> None:
    h0, n = state[0], state[-1].shape[-1]
    if x.ndim != 3 or any(s.ndim != 2 or s.shape[0] != x.shape[0] for s in state):
        shapes = " and ".join(str(tuple(s.shape)) for s in state)
        raise UsageError(f"{name}: x is {tuple(x.shape)}, the first state {shapes}; expected (B, T, D) and (B, N)")
    sizes = {n} if w_hr is None else {n, len(w_hr)}
    if {s.shape[1] for s in state} != sizes or len({s.dtype for s in state}) != 1:
        shapes = " and ".join(f"{s.dtype} {tuple(s.shape)}" for s in state)
        raise UsageError(f"{name}: the first state is {shapes}; expected one dtype and sizes {sorted(sizes)}")
    if any(s.dtype != wide(s.dtype) or torch.promote_types(x.dtype, s.dtype) != s.dtype for s in state):
        raise UsageError(f"{name}: x is {x.dtype}, the first state {h0.dtype}; expected float32 or wider, as x is")
    w_ih, w_hh = weights
    if w_ih is None and x.shape[-1] != gates * n:
        raise UsageError(f"{name}: x is {tuple(x.shape)} without w_ih; expected {gates * n} inputs of gates")
    if w_ih is not None and w_ih.shape != (gates * n, x.shape[-1]):
        raise UsageError(f"{name}: w_ih is {tuple(w_ih.shape)}; expected {(gates * n, x.shape[-1])}")
    heads = w_hh.shape[0] if w_hh.ndim == 3 and w_hh.shape[0] and w_hr is None else 0
    if w_hh.shape != ((heads, gates * n // heads, n // heads) if heads else (gates * n, h0.shape[-1])):
        blocks = "" if w_hr is not None else f" or (H, {gates * n}/H, {n}/H)"
        raise UsageError(f"{name}: w_hh is {tuple(w_hh.shape)}; expected {(gates * n, h0.shape[-1])}{blocks}")
    if heads and n % heads:
        raise UsageError(f"{name}: w_hh has {heads} heads; expected a divisor of N = {n}")
    check_time(name, x, reset, lengths)


def _check_elman(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    *biases: Tensor | None,
    nonlinearity: str = "tanh",
    leak: float = 1.0,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    **named: Tensor | None,
) -> None:
    _check("elman_loop", x, (h0,), (w_ih, w_hh), 1, reset, lengths)
    if nonlinearity not in ("tanh", "relu"):
        raise UsageError(f"elman_loop: nonlinearity {nonlinearity!r}; expected 'tanh' or 'relu'")
    if not 0 < leak <= 1:
        raise UsageError(f"elman_loop: leak {leak}; expected more than 0 and at most 1")


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
    _check("jordan_loop", x, (s0, hidden), (w_ih, w_sh), 1, reset, lengths, w_hr=w_hy)
    if w_hy.shape != w_sh.T.shape:
        raise UsageError(f"jordan_loop: w_hy is {tuple(w_hy.shape)}; expected {tuple(w_sh.T.shape)}")


def _jordan_samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng = torch.Generator(device).manual_seed(0)
    dense = (call for call in _samples(1)(device, dtype) if call["w_ih"] is not None and call["w_hh"].ndim == 2)
    for call in dense:
        if call.pop("nonlinearity", "tanh") == "tanh" and len(call["w_hh"]) < 50:  # beyond, it multiplies errors
            n, out, state = len(call.pop("w_hh")), 7, wide(dtype)

            def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(*shape, generator=rng, device=device, dtype=torch.float64).to(dtype)

            call |= {"s0": normal(len(call.pop("h0")), out, dtype=state), "w_sh": normal(n, out)}
            call |= {"w_hy": normal(out, n), "b_hy": None if call.pop("b_hh", None) is None else normal(out)}
            yield call
            yield call | {"decay": 0.5}


def _no_decay(*args: Any, decay: float = 0.0, **named: Any) -> str | None:
    return None if decay == 0 else f"decay {decay} (only 0)"


def _dense(w_ih: Tensor | None, w_hh: Tensor) -> str | None:
    """What torch.nn's kernels do not know."""
    if w_ih is None:
        return "no w_ih (takes x and its weight)"
    return None if w_hh.ndim == 2 else "w_hh has heads (takes a dense one)"


def _native_elman(
    x: Tensor, h0: Tensor, w_ih: Tensor | None, w_hh: Tensor, *biases: Any, leak: float = 1.0, **named: Any
) -> str | None:
    return f"leak {leak} (only 1)" if leak != 1 else _dense(w_ih, w_hh)


def _native_gru(x: Tensor, h0: Tensor, w_ih: Tensor | None, w_hh: Tensor, *biases: Any, **named: Any) -> str | None:
    return _dense(w_ih, w_hh)


def _native_lstm(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor | None, w_hh: Tensor, *biases: Any, **named: Any
) -> str | None:
    return _dense(w_ih, w_hh)


def _not_compiled(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> str | None:
    """What the compiled LSTM does not know, and plain calls for which torch.nn's kernels were measured to be faster."""
    if w_hr is not None:
        return "w_hr (takes no projection)"
    plain = reset is None and lengths is None and c0.dtype == torch.float32 and _dense(w_ih, w_hh) is None
    if not plain or torch.compiler.is_compiling():  # a trace is to hold for any batch
        return None
    (batch, steps), n = x.shape[:2], c0.shape[1]
    little = batch >= 16 and steps <= 128 and 4 * batch * steps * n * n < 1 << 27
    return f"{steps} steps of {batch} rows of {n} units: aten is as fast or faster" if little else None


def _check_gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
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
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    _check("lstm_loop", x, (h0, c0), (w_ih, w_hh), 4, reset, lengths, w_hr)


def _check_slstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    *biases: Tensor | None,
    forget: str = "sigmoid",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    **named: Tensor | None,
) -> None:
    _check("slstm_loop", x, (h0, c0, n0, m0), (w_ih, w_hh), 4, reset, lengths)
    if forget not in ("sigmoid", "exp"):
        raise UsageError(f"slstm_loop: forget {forget!r}; expected 'sigmoid' or 'exp'")


@op(
    _triton("elman", 1),
    _numba("elman"),
    _aten(in_aten.elman, _native_elman),
    samples=_samples(1),
    check=_check_elman,
)
def elman_loop(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    leak: float = 1.0,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - leak) h_{t-1} + leak tanh(W x_t + R h_{t-1} + b), or relu, over dim 1 of x.

    x (B, T, D); h0 (B, N) in float32 or wider, the dtype of the recurrence; w_ih (N, D), biases (N,).
    w_hh (N, N), or (H, N/H, N/H): R with a block for each head, whose units lie next to each other.
    w_ih None: x (B, T, N) is W x already.
    reset (B, T) bool: where True, h_{t-1} counts as 0.
    lengths (B,): row b ends after lengths[b] steps; h is 0 from there on, the last state is the one at the end.

    Returns h (B, T, N) in the dtype of x and the last state (B, N) in the dtype of h0. T = 0 and B = 0 are legal.
    Differentiable in x, h0, weights and biases through both. Raises UsageError for shapes and dtypes that do not fit.

    >>> one = torch.ones(1, 1)
    >>> elman_loop(torch.ones(1, 3, 1), torch.zeros(1, 1), one, one, nonlinearity="relu")[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (cells.elman_step(x_t, state[0], w_ih, w_hh, b_ih, b_hh, nonlinearity=nonlinearity, leak=leak),)

    h, (last,) = _unroll(step, x, (h0,), reset, lengths)
    return h, last


@op(_numba("jordan", _no_decay), _aten(in_aten.jordan, _no_decay), samples=_jordan_samples, check=_check_jordan)
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


@op(
    _triton("gru", 3),
    _numba("gru"),
    _aten(in_aten.gru, _native_gru),
    samples=_samples(3),
    check=_check_gru,
)
def gru_loop(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """r, z = s(W x_t + R h_{t-1} + b);  n = tanh(W_n x_t + b_n + r (R_n h_{t-1} + c_n));  h_t = (1 - z) n + z h_{t-1}.

    x (B, T, D); h0 (B, N); w_ih (3N, D), w_hh (3N, N) and biases (3N,) with rows r, z, n.
    w_hh (H, 3N/H, N/H), a block for each head, has the rows r, z, n of the head. The rest is as for `elman_loop`.

    >>> zero = torch.zeros(3, 1)  # every gate half open, no input: h halves
    >>> gru_loop(torch.ones(1, 3, 1), torch.ones(1, 1), zero, zero)[0].flatten().tolist()
    [0.5, 0.25, 0.125]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (cells.gru_step(x_t, state[0], w_ih, w_hh, b_ih, b_hh),)

    h, (last,) = _unroll(step, x, (h0,), reset, lengths)
    return h, last


@op(
    _triton("lstm", 4, states=2),
    _numba("lstm", _not_compiled),
    _aten(in_aten.lstm, _native_lstm),
    samples=_samples(4, states=2),
    check=_check_lstm,
)
def lstm_loop(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
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
    (4N,) with rows i, f, g, o; w_hr (P, N) or None. w_hh (H, 4N/H, N/H), a block for each head, has the rows i, f, g,
    o of the head, and no w_hr beside it.
    Returns h (B, T, P) and the last h and c. The rest is as for `elman_loop`.

    >>> zero = torch.zeros(4, 1)  # every gate half open, no input: c halves
    >>> lstm_loop(torch.ones(1, 3, 1), torch.zeros(1, 1), torch.ones(1, 1), zero, zero)[2].tolist()
    [[0.125]]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return cells.lstm_step(x_t, state[0], state[1], w_ih, w_hh, b_ih, b_hh, w_hr)

    h, (h_last, c_last) = _unroll(step, x, (h0, c0), reset, lengths)
    return h, h_last, c_last


@op(_triton("slstm", 4, states=4), _numba("slstm"), samples=_samples(4, states=4), check=_check_slstm)
def slstm_loop(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    forget: str = "sigmoid",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """i, f, z, o = W x_t + R h_{t-1} + b;  l = log s(f), or f;  m_t = max(l + m_{t-1}, i);
    c_t = e^(l + m_{t-1} - m_t) c_{t-1} + e^(i - m_t) tanh(z);  n_t likewise with 1 for tanh(z);  h_t = s(o) c_t / n_t.

    x (B, T, D); h0, c0, n0, m0 (B, N): see SLSTMState and `fresh_slstm`, the state that a reset leaves. w_ih (4N, D),
    w_hh (4N, N) or (H, 4N/H, N/H) and biases (4N,) with rows i, f, z, o. forget: "sigmoid" or "exp", the forget gate.
    Returns h (B, T, N) and the last h, c, n and m. The rest is as for `elman_loop`.

    >>> fresh = fresh_slstm(1, 1, like=torch.zeros(1))  # open gates: the average of what was written
    >>> x = torch.tensor([[[0.0, 0, 9, 99], [0, 0, -9, 99]]])
    >>> slstm_loop(x, *fresh, None, torch.zeros(4, 1), forget="exp")[0].round(decimals=3).abs().flatten().tolist()
    [1.0, 0.0]
    """

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c, n, m = state
        return tuple(slstm_step(x_t, h, c, n, m, w_ih, w_hh, b_ih, b_hh, forget=forget))

    fresh = tuple(fresh_slstm(*h0.shape, like=h0))
    h, (h_last, c_last, n_last, m_last) = _unroll(step, x, (h0, c0, n0, m0), reset, lengths, fresh)
    return h, h_last, c_last, n_last, m_last
