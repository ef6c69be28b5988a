"""DeltaNet (Schlag et al. 2021, arXiv:2102.11174; in parallel over time: Yang et al. 2024, arXiv:2406.06484)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, check_sizes, register_layer, wide
from ..nn import RMSNorm, ShortConvolution, inverse_softplus, log_uniform, rate, unit
from ..ops import delta_scan, delta_step
from .outer_cell import usual_heads


class DeltaState(NamedTuple):
    taps: Tensor | None  # (B, P-1, C) the last inputs of the convolution, if there is one
    memory: Tensor  # (B, H, K, V)


class Projected(NamedTuple):
    qkv: Tensor  # (..., C) queries, keys and values, before the convolution
    beta: Tensor  # (..., n H) in (0, 1) or (0, 2)
    log_decay: Tensor | None  # (..., H)


class DeltaRule(Cell[DeltaState]):
    """S_t = A_t S_{t-1} + (what is written),  A_t = e^{g_t} prod_j (I - b_tj k_tj k_tj^T),  o_t = S_t^T q_t / sqrt(K).

    Head by head, each of the n corrections reads what the memory says of k_j and writes the missing part b_j of v_j:
    S <- S + b_j k_j (v_j - S^T k_j)^T; the decay comes first, once a step. What DeltaNet, GatedDeltaNet and
    DeltaProduct share; each shows the options that its paper has.

    q, k, v = silu(conv(W x)), q and k divided by their length, head by head; b = sigmoid(W_b x), twice that if
    `negative`; g = -exp(a_log) softplus(W_a x + dt_bias); y = W_o RMSNorm(o), times silu(W_g x) if there is a gate.
    Linear maps have no bias and start Xavier uniform with gain 2^-2.5.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key: int,
        value: int,
        values_per_key: int,
        corrections: int,
        taps: int | None,
        negative: bool,
        forget: bool,
        gate: bool,
    ):
        super().__init__()
        check_sizes(
            type(self).__name__, width=width, heads=heads, key=key, value=value, values_per_key=values_per_key,
            corrections=corrections,
        )  # fmt: skip
        self.width = self.out_width = width
        self.heads, self.key, self.value, self.values_per_key = heads, key, value, values_per_key
        self.corrections, self.negative = corrections, negative
        self.value_heads = heads * values_per_key
        self.sizes = [heads * key, corrections * heads * key, corrections * self.value_heads * value]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = None if taps is None else ShortConvolution(sum(self.sizes), taps=taps)
        self.beta = nn.Linear(width, corrections * self.value_heads, bias=False)
        self.decay = nn.Linear(width, self.value_heads, bias=False) if forget else None
        if forget:
            a = torch.rand(self.value_heads, dtype=torch.float64).clamp_min(1e-6) * 16
            dt = log_uniform(self.value_heads, 1e-3, 0.1).exp()
            self.a_log = nn.Parameter(a.log().to(torch.get_default_dtype()))
            self.dt_bias = nn.Parameter(inverse_softplus(dt).to(torch.get_default_dtype()))
        self.norm = RMSNorm(value, eps=1e-5)
        self.gate = nn.Linear(width, self.value_heads * value, bias=False) if gate else None
        self.out = nn.Linear(self.value_heads * value, width, bias=False)
        with torch.no_grad():
            for linear in (self.qkv, self.beta, self.decay, self.gate, self.out):
                if linear is not None:
                    for map in linear.weight.split(self.sizes) if linear is self.qkv else [linear.weight]:
                        nn.init.xavier_uniform_(map, gain=2**-2.5)

    def initial_state(self, batch: int) -> DeltaState:
        weight = self.qkv.weight
        memory = weight.new_zeros(batch, self.value_heads, self.key, self.value, dtype=wide(weight.dtype))
        return DeltaState(None if self.conv is None else self.conv.initial_state(batch), memory)

    def encode(self, x: Tensor) -> Projected:
        high = wide(self.qkv.weight.dtype)
        beta = self.beta(x).to(high).sigmoid()
        log_decay = None
        if self.decay is not None:
            log_decay = -rate(self.a_log.to(high)) * F.softplus(self.decay(x).to(high) + self.dt_bias)
        return Projected(self.qkv(x), 2 * beta if self.negative else beta, log_decay)

    def transition(self, u: Projected, state: DeltaState) -> tuple[Tensor, DeltaState]:
        qkv, taps = u.qkv, state.taps
        if self.conv is not None and taps is not None:
            qkv, taps = self.conv.step(qkv, taps)
        o, memory = delta_step(*self._operands(qkv, u), state.memory)
        return o, DeltaState(taps, memory)

    def scan(
        self, u: Projected, state: DeltaState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, DeltaState]:
        qkv, taps = u.qkv, state.taps
        if self.conv is not None and taps is not None:
            qkv, taps = self.conv(qkv, taps, reset, lengths)
        *operands, log_decay = self._operands(qkv, u)
        o, memory = delta_scan(*operands, state.memory, log_decay=log_decay, reset=reset, lengths=lengths)
        return o, DeltaState(taps, memory)

    def _operands(self, qkv: Tensor, u: Projected) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q (..., H, K), k (..., [n,] H, K), v (..., [n,] H, V), beta (..., [n,] H), log_decay (..., H, 1, 1)."""
        q, k, v = F.silu(qkv.to(u.beta.dtype)).split(self.sizes, -1)
        # a key rounded to half precision is longer than 1, and b = 2 would then let the memory grow: keys stay wide
        q = unit(q.unflatten(-1, (self.heads, self.key))) / self.key**0.5
        k = unit(k.unflatten(-1, (self.corrections, self.heads, self.key)))
        v = v.unflatten(-1, (self.corrections, self.value_heads, self.value))
        beta = u.beta.unflatten(-1, (self.corrections, self.value_heads))
        if self.values_per_key > 1:
            q, k = q.repeat_interleave(self.values_per_key, -2), k.repeat_interleave(self.values_per_key, -2)
        if self.corrections == 1:
            k, v, beta = k.squeeze(-3), v.squeeze(-3), beta.squeeze(-2)
        return q, k, v, beta, None if u.log_decay is None else u.log_decay[..., None, None]

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        o = self.norm(o).flatten(-2)
        if self.gate is not None:
            o = o * F.silu(self.gate(x).to(o.dtype))
        return self.out(o.to(x.dtype)).to(x.dtype)


def sized(width: int) -> dict[str, int]:
    """Heads as wide as they are long, that share the width."""
    heads = usual_heads(width)
    return dict(width=width, heads=heads, key=max(1, width // heads), value=max(1, width // heads))


@register_layer(
    "delta_net",
    paper="arXiv:2406.06484",
    examples=[
        dict(width=3, heads=2, key=3, value=2),
        dict(width=2, heads=1, key=2, value=3, taps=None, negative=True),
    ],
    sized=sized,
)
class DeltaNet(DeltaRule):
    """S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K),  y_t = W RMSNorm(o_t), by heads.

    A memory that corrects itself: what it said of the key k_t moves towards v_t by the part b_t; with b = 1 the pair is
    stored exactly and what stands under orthogonal keys is untouched.
    q, k, v = silu(conv(W x)) with `taps` taps (None: no convolution); q and k have length 1; b = sigmoid(W_b x), twice
    that if `negative`, so that the eigenvalue 1 - b of a step along k may be negative (Grazzi et al. 2025,
    arXiv:2411.12537): one layer then counts modulo 2.
    heads H of `key` K and `value` V. State: memory (B, H, K, V) and the convolution's last inputs, float32 or wider.
    Linear maps have no bias and start Xavier uniform with gain 2^-2.5. Raises UsageError for sizes below 1.
    """

    def __init__(self, width: int, *, heads: int, key: int, value: int, taps: int | None = 4, negative: bool = False):
        super().__init__(
            width, heads=heads, key=key, value=value, values_per_key=1, corrections=1, taps=taps, negative=negative,
            forget=False, gate=False,
        )  # fmt: skip
