"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Turn channel pair i of x by position * base^(-i / pairs), so that products see differences of positions only.

    x (..., H, K), position (...) int64 -> (..., H, K). Angles are computed in float64: in float32 they are off by 0.06
    after a million steps. An odd last channel stays as it is.
    """
    pairs = x.shape[-1] // 2
    speed = base ** -(torch.arange(pairs, device=x.device, dtype=torch.float64) / max(pairs, 1))
    angle = position[..., None, None] * speed  # (..., 1, K/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
