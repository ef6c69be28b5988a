"""DeltaProduct (Siems et al. 2025, arXiv:2502.10297)."""

from __future__ import annotations

from ..core import register_layer
from .delta_net import DeltaRule, sized


@register_layer(
    "delta_product",
    paper="arXiv:2502.10297",
    examples=[
        dict(width=3, heads=2, key=3, value=2, corrections=2, taps=None),
        dict(width=2, heads=1, key=2, value=2, corrections=3, forget=True, gate=True),
    ],
    sized=sized,
)
class DeltaProduct(DeltaRule):
    """S <- S + b_tj k_tj (v_tj - S^T k_tj)^T for j = 1 to n,  o_t = S_t^T q_t / sqrt(K),  y_t = W RMSNorm(o_t).

    DeltaNet with n = `corrections` keys, values and strengths a step: the step's matrix is a product of n generalised
    reflections prod_j (I - b_j k_j k_j^T). With b in (0, 2) (`negative`) it reaches any rotation in n / 2 planes and so
    any permutation of n + 1 things; with n = 1 this is DeltaNet.
    forget: the memory first decays as in GatedDeltaNet, once a step. gate: the output is multiplied by silu(G x), as
    there. taps: of the convolution in front, None for no convolution. The paper's group word problems are learned with
    none of the three.
    State: memory (B, heads, K, V) and the convolution's last inputs, float32 or wider.
    Linear maps have no bias and start Xavier uniform with gain 2^-2.5. Raises UsageError for sizes below 1.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key: int,
        value: int,
        corrections: int = 2,
        taps: int | None = 4,
        negative: bool = True,
        forget: bool = False,
        gate: bool = False,
    ):
        super().__init__(
            width, heads=heads, key=key, value=value, values_per_key=1, corrections=corrections, taps=taps,
            negative=negative, forget=forget, gate=gate,
        )  # fmt: skip
