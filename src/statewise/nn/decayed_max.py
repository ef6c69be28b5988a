"""The largest of the past, losing weight as it ages: what keeps exponential gates within the range of numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def decayed_max(decay: Tensor, x: Tensor, m0: Tensor, reset: Tensor | None) -> Tensor:
    """m_t = max(m_{t-1} + decay_t, x_t), in log2 T rounds. No gradient: it serves as a scale that cancels.

    decay, x: (B, T, H), m0: (B, H). reset: (B, T) bool; where True, m_{t-1} counts as zero, NaN included.

    >>> x = torch.tensor([3.0, 0, 0, 5]).view(1, 4, 1)
    >>> decayed_max(-torch.ones_like(x), x, torch.zeros(1, 1), None).flatten()
    tensor([3., 2., 1., 5.])
    """
    decay, m = decay.detach(), x.detach()
    # cut: the span that ends at t holds a reset, so nothing from before the span is seen
    cut = torch.zeros_like(m, dtype=torch.bool) if reset is None else reset[..., None].expand_as(m)
    before = torch.cat([m0.detach()[:, None], torch.zeros_like(m[:, 1:])], 1)
    begins = torch.cat([torch.ones_like(cut[:, :1]), cut[:, 1:]], 1)
    m = torch.where(begins, torch.maximum(m, decay + before.masked_fill(cut, 0)), m)
    span = 1
    while span < m.shape[1]:
        older = (decay[:, span:] + m[:, :-span]).masked_fill(cut[:, span:], -torch.inf)
        m = torch.cat([m[:, :span], torch.maximum(m[:, span:], older)], 1)
        decay = torch.cat([decay[:, :span], decay[:, span:] + decay[:, :-span]], 1)
        cut = torch.cat([cut[:, :span], cut[:, span:] | cut[:, :-span]], 1)
        span *= 2
    return m
