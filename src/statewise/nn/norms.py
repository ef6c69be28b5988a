"""Normalisation of one time step's channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import wide


class RMSNorm(nn.Module):
    """y = w x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32 or wider.

    x (..., D) -> y (..., D) in the dtype of x. w starts at one.
    """

    def __init__(self, width: int, *, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(wide(x.dtype))
        return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)
