"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) and other ways to normalise it.

Learnt normaliser: Sieber et al. 2024, arXiv:2405.15731. A norm in its place: Qin et al. 2022, arXiv:2210.10340.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..core import UsageError, register_layer, tree_map, wide
from ..nn import POSITIVE, Feature, HeadNorm, check_feature, features
from ..ops import normalised_outer_scan, outer_scan, outer_step
from .outer_cell import MemoryCell, Outer, empty_memory, normalised_step, usual_heads

Normaliser = Literal["sum", "learnt", "rms", "none"]
EPS = 1e-6  # keeps 0 / 0 out where no key answers the query


class LinearAttentionState(NamedTuple):
    s: Tensor  # (B, H, K, V) sum of phi(k) v^T
    n: Tensor | None  # (B, H, K) sum of phi(k), where the normaliser is "sum"


@register_layer(
    "linear_attention",
    paper="arXiv:2006.16236",
    examples=[
        dict(width=3, heads=2, key=2, value=3),
        dict(width=3, heads=1, key=3, value=2, feature="identity", normaliser="learnt"),
        dict(width=2, heads=2, key=2, value=2, feature="relu", normaliser="rms"),
    ],
    sized=lambda width: dict(
        width=width, heads=(h := usual_heads(width)), key=max(1, width // h), value=max(1, width // h)
    ),
)
class LinearAttention(MemoryCell[LinearAttentionState]):
    """S_t = S_{t-1} + phi(k_t) v_t^T,  y_t = W_o (S_t^T phi(q_t) / z_t),  per head.

    q, k, v = W x without bias. feature, phi: "elu" for elu + 1, "relu", "softmax" over channels, "silu", "identity".
    normaliser, z: "sum" for n_t . phi(q_t) + 1e-6 with n_t = n_{t-1} + phi(k_t); "learnt" for sqrt(K) exp(w_n . x_t),
    its exponent kept within 20 and w_n zero at birth; "none" for sqrt(K); "rms" for the same and a norm of each head.
    State (S, n), float32 or wider. Linear maps start as in torch.nn.Linear.

    Raises UsageError for an unknown feature or normaliser, and for "sum" with a feature that may be negative.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key: int,
        value: int,
        feature: Feature = "elu",
        normaliser: Normaliser = "sum",
    ):
        super().__init__(width, heads=heads, key=key, value=value)
        check_feature("LinearAttention", feature)
        if normaliser not in get_args(Normaliser):
            known = ", ".join(get_args(Normaliser))
            raise UsageError(f"LinearAttention: normaliser {normaliser!r}; expected one of {known}")
        if normaliser == "sum" and feature not in POSITIVE:
            raise UsageError(
                f"LinearAttention: feature {feature!r} may be negative and its sum zero; take one of "
                f"{', '.join(POSITIVE)}, or another normaliser"
            )
        self.width = self.out_width = width
        self.heads, self.key, self.value = heads, key, value
        self.feature, self.normaliser = feature, normaliser
        self.norm = HeadNorm(heads, value) if normaliser == "rms" else None
        self.log_z = nn.Linear(width, heads, bias=False) if normaliser == "learnt" else None
        if self.log_z is not None:
            nn.init.zeros_(self.log_z.weight)

    def initial_state(self, batch: int) -> LinearAttentionState:
        s = empty_memory(self, batch)
        return LinearAttentionState(s, torch.zeros_like(s[..., 0]) if self.normaliser == "sum" else None)

    def encode(self, x: Tensor) -> Outer:
        q, k, v = self.project(x)
        q, k = features(q, self.feature), features(k, self.feature)
        if self.normaliser == "sum":  # before the division o is a sum over all time, too large for half precision
            return Outer(q, k, v.to(wide(v.dtype)))
        return Outer(q * self.key**-0.5, k, v)

    def transition(self, u: Outer, state: LinearAttentionState) -> tuple[Tensor, LinearAttentionState]:
        q, k, v, _ = tree_map(lambda leaf: leaf.to(state.s.dtype), u)
        if state.n is None:
            o, s = outer_step(q, k, v, None, state.s)
            return o.to(u.v.dtype), LinearAttentionState(s, None)
        o, z, s, n = normalised_step(q, k, v, None, state.s, state.n)
        return o / (z[..., None] + EPS), LinearAttentionState(s, n)

    def scan(
        self, u: Outer, state: LinearAttentionState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, LinearAttentionState]:
        if state.n is None:
            o, s = outer_scan(u.q, u.k, u.v, state.s, reset=reset, lengths=lengths)
            return o, LinearAttentionState(s, None)
        o, z, s, n = normalised_outer_scan(u.q, u.k, u.v, state.s, state.n, reset=reset, lengths=lengths)
        return o / (z[..., None] + EPS), LinearAttentionState(s, n)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        if self.norm is not None:
            return self.out(self.norm(o)).to(x.dtype)
        if self.log_z is not None:
            log_z = self.log_z(x).to(wide(x.dtype)).clamp(-20, 20)  # an exponential of x would overflow
            o = o * (-log_z).exp()[..., None]
        return self.out(o.flatten(-2).to(self.out.weight.dtype)).to(x.dtype)
