"""mLSTM, the matrix memory of xLSTM (Beck et al. 2024, arXiv:2405.04517).

Its form with dense maps and no convolution: Beck et al. 2025, arXiv:2503.13427.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, tree_map, wide
from ..nn import BlockLinear, HeadNorm, ShortConvolution, decayed_max
from ..ops import normalised_outer_scan
from .outer_cell import empty_memory, normalised_step, usual_heads

Forget = Literal["sigmoid", "exponential"]


class MatrixMemory(NamedTuple):
    """What an mLSTM remembers: the memory is e^m c, its normaliser e^m n, so states that differ by a shift of m and the
    scale that goes with it are the same state."""

    c: Tensor  # (B, H, K, V)
    n: Tensor  # (B, H, K)
    m: Tensor  # (B, H) log of the scale


class Gated(NamedTuple):
    """What enters the memory at one time."""

    q: Tensor  # (..., H, K)
    k: Tensor  # (..., H, K)
    v: Tensor  # (..., H, V)
    log_input: Tensor  # (..., H), float32 or wider
    log_forget: Tensor  # (..., H)


def memory_step(u: Gated, state: MatrixMemory, *, eps: float = 0.0) -> tuple[Tensor, MatrixMemory]:
    """One step: C_t = f C_{t-1} + i k v^T,  n_t = f n_{t-1} + i k,  h_t = C_t^T q / max(|n_t . q|, 1) per head.

    f = e^log_forget, i = e^log_input, q is divided by sqrt(K). Everything is kept divided by e^m with
    m_t = max(log_forget_t + m_{t-1}, log_input_t), so no gate overflows; m cancels, so it takes no gradient.
    eps is added to the denominator, after the division by e^m. Returns h (B, H, V) in the dtype of the state.
    """
    q, k, v, log_input, log_forget = tree_map(lambda leaf: leaf.to(state.m.dtype), u)
    m = torch.maximum(log_forget + state.m, log_input).detach()
    log_decay, k = _scaled(log_forget, log_input, k, state.m, m)
    num, z, c, n = normalised_step(q * q.shape[-1] ** -0.5, k, v, log_decay, state.c, state.n)
    return num / _denominator(z, m, eps), MatrixMemory(c, n, m)


def memory_scan(
    u: Gated, state: MatrixMemory, reset: Tensor | None, lengths: Tensor | None, *, eps: float = 0.0
) -> tuple[Tensor, MatrixMemory]:
    """memory_step over dim 1 of u. Returns h (B, T, H, V) in the dtype of the state, and the state at the end."""
    q, k, v, log_input, log_forget = tree_map(lambda leaf: leaf.to(state.m.dtype), u)
    m = decayed_max(log_forget, log_input, state.m, reset)
    before = torch.cat([state.m[:, None], m[:, :-1]], 1)
    if reset is not None:
        before = before.masked_fill(reset[..., None], 0)
    log_decay, k = _scaled(log_forget, log_input, k, before, m)
    num, z, c, n = normalised_outer_scan(
        q * q.shape[-1] ** -0.5, k, v, state.c, state.n, log_decay=log_decay, reset=reset, lengths=lengths
    )
    if lengths is None:
        last = m[:, -1].clone()  # a view would keep the whole sequence
    else:
        seen = torch.cat([state.m[:, None], m], 1)
        last = seen.gather(1, lengths[:, None, None].expand(-1, -1, m.shape[-1])).squeeze(1)
    return num / _denominator(z, m, eps), MatrixMemory(c, n, last)


def _scaled(log_forget: Tensor, log_input: Tensor, k: Tensor, before: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the decay, and k times the input gate, both at the scale m; neither factor is above 1.

    The difference of the scales is taken first: it is exact where they are close, and their own rounding cancels.
    """
    log_decay = log_forget + (before - m)
    return log_decay[..., None, None], (log_input - m).exp()[..., None] * k


def _denominator(z: Tensor, m: Tensor, eps: float) -> Tensor:
    tiny = torch.finfo(z.dtype).tiny  # where a huge m met a query of zero
    return (torch.maximum(z.abs(), (-m).exp()).clamp_min(tiny) + eps)[..., None]


def _nothing(layer: Any, batch: int) -> MatrixMemory:
    c = empty_memory(layer, batch)
    return MatrixMemory(c, torch.zeros_like(c[..., 0]), torch.zeros_like(c[..., 0, 0]))


def _check_forget(name: str, forget: str) -> None:
    if forget not in get_args(Forget):
        raise UsageError(f"{name}: forget {forget!r}; expected 'sigmoid' or 'exponential'")


def _log_forget(f: Tensor, kind: Forget) -> Tensor:
    return F.logsigmoid(f) if kind == "sigmoid" else f


def _start_gates(gates: nn.Linear, heads: int, forget: Forget) -> None:
    """Weights zero; input gates near one, forget gates from sigmoid(3) to sigmoid(6) over the heads, of either kind."""
    assert gates.bias is not None
    with torch.no_grad():
        gates.weight.zero_()
        gates.bias[:heads].normal_(std=0.1)
        f = torch.linspace(3, 6, heads)
        gates.bias[heads:].copy_(f if forget == "sigmoid" else F.logsigmoid(f))


class MLSTMState(NamedTuple):
    conv: Tensor  # (B, P-1, N) last inputs of the convolution
    memory: MatrixMemory


@register_layer(
    "mlstm",
    paper="arXiv:2405.04517",
    examples=[
        dict(width=4, heads=2, block=4, taps=3),
        dict(width=2, heads=1, block=2, expand=3, forget="exponential"),
    ],
    sized=lambda width: dict(
        width=width, heads=usual_heads(width), block=next(b for b in (4, 2) if 2 * width % b == 0)
    ),
)
class MLSTM(Cell[MLSTMState]):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  h_t = C_t^T q_t / max(|n_t . q_t|, 1).

    Per head; (u, z) = W x with N = expand D channels each, c = silu(conv(u)) causal over `taps` steps; q, k from c and
    v from u by block-diagonal maps, q divided by sqrt(N / H); i = exp(w_i . [q k v] + b_i),
    f = sigmoid(w_f . [q k v] + b_f), or exp of it where forget is "exponential";
    y = W_o ((norm(h) + s * c) * silu(z)) with a layer norm per head.
    The memory is kept divided by e^m, m_t = max(log f_t + m_{t-1}, log i_t), so that no gate overflows; gradients go
    through the denominator too.

    At birth w_i = w_f = 0, f from sigmoid(3) to sigmoid(6) over the heads, b_i normal with deviation 0.1, s = 1, linear
    maps without bias as in torch.nn.Linear. State (last inputs of conv, (C, n, m)), float32 or wider.

    Raises UsageError if heads or block do not divide N, or for an unknown forget.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        expand: int = 2,
        block: int = 4,
        taps: int = 4,
        forget: Forget = "sigmoid",
    ):
        super().__init__()
        check_sizes("MLSTM", width=width, heads=heads, expand=expand, block=block, taps=taps)
        _check_forget("MLSTM", forget)
        inner = expand * width
        if inner % heads:
            raise UsageError(f"MLSTM: {inner} inner channels (expand * width) are not a multiple of heads {heads}")
        self.width = self.out_width = width
        self.heads, self.forget = heads, forget
        self.key = self.value = inner // heads
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, taps=taps, bias=True)
        self.q, self.k, self.v = (BlockLinear(inner, size=block) for _ in range(3))
        self.gates = nn.Linear(3 * inner, 2 * heads)
        self.norm = HeadNorm(heads, self.value, centred=True, eps=1e-5)  # as in released code: h may be tiny
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)
        _start_gates(self.gates, heads, forget)

    def initial_state(self, batch: int) -> MLSTMState:
        return MLSTMState(self.conv.initial_state(batch), _nothing(self, batch))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, z = self.up(x).chunk(2, -1)
        return u, z

    def transition(self, u: tuple[Tensor, Tensor], state: MLSTMState) -> tuple[tuple[Tensor, ...], MLSTMState]:
        c, conv = self.conv.step(u[0], state.conv)
        gated, c = self._gated(u[0], c)
        h, memory = memory_step(gated, state.memory)
        return (h, c, u[1]), MLSTMState(conv, memory)

    def scan(
        self, u: tuple[Tensor, Tensor], state: MLSTMState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[tuple[Tensor, ...], MLSTMState]:
        c, conv = self.conv(u[0], state.conv, reset, lengths)
        gated, c = self._gated(u[0], c)
        h, memory = memory_scan(gated, state.memory, reset, lengths)
        return (h, c, u[1]), MLSTMState(conv, memory)

    def decode(self, o: tuple[Tensor, ...], x: Tensor) -> Tensor:
        h, c, z = o
        return self.out((self.norm(h) + self.skip * c) * F.silu(z)).to(x.dtype)

    def _gated(self, u: Tensor, c: Tensor) -> tuple[Gated, Tensor]:
        c = F.silu(c).to(self.out.weight.dtype)
        q, k, v = self.q(c), self.k(c), self.v(u)
        i, f = self.gates(torch.cat([q, k, v], -1)).to(wide(c.dtype)).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (q, k, v))
        return Gated(q, k, v, i, _log_forget(f, self.forget)), c


@register_layer(
    "mlstm_large",
    paper="arXiv:2503.13427",
    examples=[
        dict(width=3, heads=2, key=2, value=3),
        dict(width=2, heads=1, key=2, value=4, gate_cap=None, forget="exponential"),
    ],
    sized=lambda width: dict(
        width=width, heads=(h := usual_heads(width)), key=max(1, width // h // 2), value=max(2, width // h)
    ),
)
class MLSTMLarge(Cell[MatrixMemory]):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  h_t = C_t^T q_t / max(|n_t . q_t|, 1).

    The memory of MLSTM with plain linear maps, per head: q, k, v = W x, q divided by sqrt(K);
    i = exp(g(w_i . x + b_i)), f = sigmoid(g(w_f . x + b_f)), or exp where forget is "exponential", with
    g(a) = gate_cap tanh(a / gate_cap) or, for None, a; y = W_o (sigmoid(W_g x) * norm(h)) with a layer norm per head.
    eps is added to the denominator of the memory as it is kept, divided by e^m: released checkpoints have it.

    Gates start as in MLSTM; linear maps start as in torch.nn.Linear, with bias if `bias`. State (C, n, m), float32 or
    wider. Raises UsageError for an unknown forget or a gate_cap or eps that cannot be.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key: int,
        value: int,
        gate_cap: float | None = 15.0,
        forget: Forget = "sigmoid",
        bias: bool = False,
        eps: float = 0.0,
    ):
        super().__init__()
        check_sizes("MLSTMLarge", width=width, heads=heads, key=key, value=value)
        _check_forget("MLSTMLarge", forget)
        if gate_cap is not None and not 0 < gate_cap < math.inf:
            raise UsageError(f"MLSTMLarge: gate_cap {gate_cap}; expected more than 0, or None")
        if not 0 <= eps < math.inf:
            raise UsageError(f"MLSTMLarge: eps {eps}; expected at least 0")
        self.width = self.out_width = width
        self.heads, self.key, self.value = heads, key, value
        self.gate_cap, self.forget, self.eps = gate_cap, forget, eps
        self.q = nn.Linear(width, heads * key, bias=bias)
        self.k = nn.Linear(width, heads * key, bias=bias)
        self.v = nn.Linear(width, heads * value, bias=bias)
        self.gates = nn.Linear(width, 2 * heads)
        self.out_gate = nn.Linear(width, heads * value, bias=bias)
        self.norm = HeadNorm(heads, value, centred=True)
        self.out = nn.Linear(heads * value, width, bias=bias)
        _start_gates(self.gates, heads, forget)

    def initial_state(self, batch: int) -> MatrixMemory:
        return _nothing(self, batch)

    def encode(self, x: Tensor) -> Gated:
        gates = self.gates(x).to(wide(x.dtype))
        if self.gate_cap is not None:
            gates = self.gate_cap * torch.tanh(gates / self.gate_cap)
        i, f = gates.chunk(2, -1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (self.q(x), self.k(x), self.v(x)))
        return Gated(q, k, v, i, _log_forget(f, self.forget))

    def transition(self, u: Gated, state: MatrixMemory) -> tuple[Tensor, MatrixMemory]:
        return memory_step(u, state, eps=self.eps)

    def scan(
        self, u: Gated, state: MatrixMemory, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, MatrixMemory]:
        return memory_scan(u, state, reset, lengths, eps=self.eps)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.out_gate(x)) * self.norm(o)).to(x.dtype)
