"""A linear map by blocks along the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import UsageError, check_sizes


class BlockLinear(nn.Module):
    """y = diag(W_1, W_2, ...) x: channels in groups of `size`, each with a square matrix of its own, no bias.

    x (..., D) -> y (..., D). weight (D / size, size, size) starts uniform within 1 / sqrt(size), as in torch.nn.Linear.
    Raises UsageError unless size divides width.
    """

    def __init__(self, width: int, *, size: int):
        super().__init__()
        check_sizes("BlockLinear", width=width, size=size)
        if width % size:
            raise UsageError(f"BlockLinear: width {width} is not a multiple of the block size {size}")
        self.size = size
        self.weight = nn.Parameter(torch.empty(width // size, size, size).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,goi->...go", x.unflatten(-1, (-1, self.size)), self.weight).flatten(-2)
