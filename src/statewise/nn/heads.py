"""Channels in heads: norms of each head alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import check_sizes, wide


class HeadNorm(nn.Module):
    """y = w (x - mu) / sqrt(mean((x - mu)^2) + eps) over the channels of each head; mu = 0 unless centred.

    centred is a layer norm per head (GroupNorm), else a root-mean-square norm. x (..., H, V) -> (..., H V), computed in
    float32 or wider, in the dtype of w (H V,), which starts at one.
    """

    def __init__(self, heads: int, size: int, *, centred: bool = False, eps: float = 1e-6):
        super().__init__()
        check_sizes("HeadNorm", heads=heads, size=size)
        self.centred, self.eps = centred, eps
        self.weight = nn.Parameter(torch.ones(heads * size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(wide(x.dtype))
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (y.flatten(-2) * self.weight).to(self.weight.dtype)
