"""Vectors of length one."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last axis: never longer than 1, with a gradient of at most 1 / sqrt(eps) at 0."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)
