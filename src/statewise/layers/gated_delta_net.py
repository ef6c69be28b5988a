"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2025, arXiv:2412.06464)."""

from __future__ import annotations

from ..core import register_layer
from .delta_net import DeltaRule
from .outer_cell import usual_heads


def _sized(width: int) -> dict[str, int]:
    heads = usual_heads(width)
    key = max(1, 3 * width // (4 * heads))
    return dict(width=width, heads=heads, key=key, value=2 * key)


@register_layer(
    "gated_delta_net",
    paper="arXiv:2412.06464",
    examples=[
        dict(width=3, heads=2, key=2, value=3),
        dict(width=2, heads=1, key=2, value=1, values_per_key=2, negative=True),
    ],
    sized=_sized,
)
class GatedDeltaNet(DeltaRule):
    """S_t = e^{g_t} (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  y_t = W (RMSNorm(S_t^T q_t / sqrt(K)) * silu(G x_t)).

    DeltaNet that also forgets: g_t = -exp(a_log) softplus(W_a x_t + dt_bias), one number per head, and what the key's
    correction reads is the decayed memory. At birth exp(a_log) is uniform in (0, 16) and softplus(dt_bias)
    log-uniform in [0.001, 0.1].
    q, k, v = silu(conv(W x)) with `taps` taps (None: no convolution); q and k have length 1; b = sigmoid(W_b x), twice
    that if `negative`: eigenvalues of a step in (-1, 1) and not only (0, 1).
    heads of `key` K and `value` V; `values_per_key` value heads share a query and a key, each with its own b and g. The
    paper has heads K = 3/4 width, V = 2 K.
    State: memory (B, heads values_per_key, K, V) and the convolution's last inputs, float32 or wider.
    Linear maps have no bias and start Xavier uniform with gain 2^-2.5. Raises UsageError for sizes below 1.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key: int,
        value: int,
        values_per_key: int = 1,
        taps: int | None = 4,
        negative: bool = False,
    ):
        super().__init__(
            width, heads=heads, key=key, value=value, values_per_key=values_per_key, corrections=1, taps=taps,
            negative=negative, forget=True, gate=True,
        )  # fmt: skip
