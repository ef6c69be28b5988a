"""Feature maps of linear attention: what stands where softmax attention has exp(q . k)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import UsageError

Feature = Literal["elu", "relu", "softmax", "silu", "identity"]
POSITIVE: tuple[Feature, ...] = ("elu", "relu", "softmax")  # whose sums can be divided by


def features(x: Tensor, kind: Feature) -> Tensor:
    """x (..., K) -> phi(x) (..., K): for "elu" elu(x) + 1, for "softmax" over K, else what the name says."""
    if kind == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # elu(x) + 1 as written is 0 from x = -17 on
    if kind == "softmax":
        return x.softmax(-1)
    if kind == "identity":
        return x
    return F.relu(x) if kind == "relu" else F.silu(x)


def check_feature(name: str, kind: str) -> None:
    """Raises UsageError in the name of a layer for a feature map that is not there."""
    if kind not in get_args(Feature):
        raise UsageError(f"{name}: feature {kind!r}; expected one of {', '.join(get_args(Feature))}")
