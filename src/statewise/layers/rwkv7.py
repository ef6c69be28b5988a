"""RWKV-7 "Goose", its time mixing (Peng et al. 2025, arXiv:2503.14456)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..nn import tail, unit
from ..ops import dplr_scan, dplr_step


class RWKV7State(NamedTuple):
    last: Tensor  # (B, D) the last input
    memory: Tensor  # (B, H, K, K)


class Mixed(NamedTuple):
    r: Tensor  # (..., H, K) what is asked
    k: Tensor  # (..., H, K) key to write
    v: Tensor  # (..., H, K)
    kappa: Tensor  # (..., H, K) key to remove, of length 1
    a: Tensor  # (..., H, K) how much of it to remove, in (0, 1)
    log_w: Tensor  # (..., H, K) log decay
    g: Tensor  # (..., D) gate


class Read(NamedTuple):
    y: Tensor  # (..., D)
    v: Tensor  # (..., D)


class LowRank(nn.Module):
    """y = f(x A) C + bias through a few channels. A and C start orthogonal, with gains 0.1."""

    def __init__(self, width: int, rank: int, bias: Tensor | None, f: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=bias is not None)
        self.f = f
        for linear in (self.down, self.up):
            nn.init.orthogonal_(linear.weight, gain=0.1)
        if bias is not None:
            with torch.no_grad():
                self.up.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        return self.up(low if self.f is None else self.f(low))


def _rank(factor: float, width: int) -> int:
    """factor sqrt(width), rounded to a multiple of 32, but never more than the width can use."""
    return min(width, max(32, 32 * round(factor * width**0.5 / 32)))


def _sized(width: int) -> dict[str, int]:
    heads = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
    return dict(width=width, heads=heads)


@register_layer(
    "rwkv7",
    paper="arXiv:2503.14456",
    examples=[
        dict(width=6, heads=2),
        dict(width=3, heads=1, v_first="in", depth=0.5),
        dict(width=4, heads=1, v_first="out"),
    ],
    sized=_sized,
)
class RWKV7(Cell[RWKV7State]):
    """S_t = (diag(w_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T,  y_t = W_o (g_t * (norm(S_t^T r_t) + bonus_t)).

    Each of the six streams i sees x_i = x_t + mu_i * (x_{t-1} - x_t), zero before the start. r = W_r x_r, v = W_v x_v;
    from k' = W_k x_k: the key to remove c = k' * k_k, divided by its length, and the key to write
    k = k' * (1 + (a - 1) * k_a), where a = sigmoid(L_a(x_a)); the decay w = exp(-e^(-1/2) sigmoid(L_w(x_w))), in
    (0.545, 1); the gate g = L_g(x_g); norm a GroupNorm, one group per head; bonus = sum(r * k * r_k) v. The L are maps
    of low rank. The eigenvalues of a step are real and lie in (-0.455, 1).

    The paper's layers after the first mix the first layer's value in, v <- v + (v_first - v) * sigmoid(L_v(x_v)). What
    passes between layers does so as input and output, since a layer remembers nothing: with v_first="out" (the first
    layer) the output is (y_t, v_t), 2 D wide; with "in" (all others) the input is (x_t, v_first_t), 2 D wide; with
    "unused" the layer stands alone.

    heads H of size K divide width D. depth: where in its model the layer stands, from 0 (first) to 1 (last); the
    decays and mu start accordingly. So that every parameter learns from the first step, maps that the authors start at
    zero start small: A of the low-rank maps orthogonal with gain 0.1, W_o as in torch.nn.Linear.
    State: last input (B, D) and memory (B, H, K, K), float32 or wider. Raises UsageError if heads do not divide width.
    """

    def __init__(
        self, width: int, *, heads: int, v_first: Literal["unused", "out", "in"] = "unused", depth: float = 0.0
    ):
        super().__init__()
        check_sizes("RWKV7", width=width, heads=heads)
        if width % heads:
            raise UsageError(f"RWKV7: width {width} is not a multiple of heads {heads}")
        if v_first not in ("unused", "out", "in"):
            raise UsageError(f"RWKV7: v_first {v_first!r}; expected 'unused', 'out' or 'in'")
        if not 0 <= depth <= 1:
            raise UsageError(f"RWKV7: depth {depth}; expected 0 (first layer) to 1 (last)")
        self.inner, self.heads, self.v_first = width, heads, v_first
        self.width = 2 * width if v_first == "in" else width
        self.out_width = 2 * width if v_first == "out" else width
        size = width // heads

        channel = torch.arange(width, dtype=torch.float64)
        part = channel / max(width - 1, 1)  # 0 .. 1 over the channels
        within = (channel % size) / max(size - 1, 1) * 2 - 1  # -1 .. 1 over a head's
        zigzag = within * within.abs()
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], dtype=torch.float64)  # r, w, k, v, a, g
        dtype = torch.get_default_dtype()
        self.mu = nn.Parameter((1 - (channel / width) ** (powers[:, None] * (1 - depth))).to(dtype))
        self.k_k = nn.Parameter((0.71 - 0.1 * (part - 0.5)).to(dtype))
        self.k_a = nn.Parameter(torch.full((width,), 1.02))
        self.r_k = nn.Parameter(torch.full((heads, size), -0.04))

        self.r, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        for linear, gain in ((self.r, 1.0), (self.k, 0.1), (self.v, 1.0)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        slowest_last = -5.5 + 6 * part ** (1 + depth**0.3) + 2.5 * zigzag
        self.decay = LowRank(width, _rank(2.5, width), slowest_last, torch.tanh)
        self.rate = LowRank(width, _rank(2.5, width), -0.19 + 0.3 * zigzag + 0.4 * (part - 0.5))
        self.gate = LowRank(width, _rank(5, width), None, torch.sigmoid)
        self.mix = LowRank(width, _rank(1.7, width), 0.73 - 0.4 * (part - 0.5)) if v_first == "in" else None
        self.norm = nn.GroupNorm(heads, width, eps=1e-5 * size)

    def initial_state(self, batch: int) -> RWKV7State:
        weight = self.mu
        size, dtype = self.inner // self.heads, wide(weight.dtype)
        memory = weight.new_zeros(batch, self.heads, size, size, dtype=dtype)
        return RWKV7State(weight.new_zeros(batch, self.inner, dtype=dtype), memory)

    def transition(self, u: Tensor, state: RWKV7State) -> tuple[Read, RWKV7State]:
        m = self._mixed(u, state.last)
        o, memory = dplr_step(m.r, m.k, m.v, -m.kappa, m.a * m.kappa, m.log_w[..., None], state.memory)
        return self._read(o, m), RWKV7State(u[..., : self.inner].to(state.last.dtype), memory)

    def scan(
        self, u: Tensor, state: RWKV7State, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Read, RWKV7State]:
        seen = torch.cat([state.last[:, None], u[..., : self.inner].to(state.last.dtype)], 1)  # time t stands at t + 1
        before = seen[:, :-1] if reset is None else seen[:, :-1].masked_fill(reset[..., None], 0)
        m = self._mixed(u, before)
        o, memory = dplr_scan(
            m.r, m.k, m.v, -m.kappa, m.a * m.kappa, state.memory, log_decay=m.log_w[..., None], reset=reset,
            lengths=lengths,
        )  # fmt: skip
        return self._read(o, m), RWKV7State(tail(seen, 1, lengths)[:, 0], memory)

    def _mixed(self, u: Tensor, before: Tensor) -> Mixed:
        """u (..., D) or (..., 2 D) and the x before it (..., D): what enters the recurrence."""
        x, high = u[..., : self.inner], before.dtype
        shift = before - x
        x_r, x_w, x_k, x_v, x_a, x_g = ((x + mu * shift).to(u.dtype) for mu in self.mu.unbind())
        v = self.v(x_v)
        if self.mix is not None:
            v = v + (u[..., self.inner :] - v) * self.mix(x_v).sigmoid()
        k, a = self.k(x_k).to(high), self.rate(x_a).to(high).sigmoid()
        log_w = -math.exp(-0.5) * self.decay(x_w).to(high).sigmoid()
        write = k * (1 + (a - 1) * self.k_a)
        r, write, v, remove, a, log_w = (
            t.to(high).unflatten(-1, (self.heads, -1)) for t in (self.r(x_r), write, v, k * self.k_k, a, log_w)
        )
        return Mixed(r, write, v, unit(remove, eps=1e-12), a, log_w, self.gate(x_g))

    def _read(self, o: Tensor, m: Mixed) -> Read:
        weight, bias = self.norm.weight.to(o.dtype), self.norm.bias.to(o.dtype)
        y = F.group_norm(o.reshape(-1, self.inner), self.heads, weight, bias, self.norm.eps)
        bonus = (m.r * m.k * self.r_k).sum(-1, keepdim=True) * m.v
        return Read((y.view_as(m.g) + bonus.flatten(-2)) * m.g, m.v.flatten(-2))

    def decode(self, o: Read, x: Tensor) -> Tensor:
        y = self.out(o.y.to(x.dtype)).to(x.dtype)
        return torch.cat([y, o.v.to(x.dtype)], -1) if self.v_first == "out" else y
