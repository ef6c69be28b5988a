"""Adaptive computation time (Graves 2016, arXiv:1603.08983): how deep to think, decided at each place."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core import wide

ENOUGH = 0.01  # what may be left of the weights when a place halts


class Pondered(NamedTuple):
    """What the depths gave so far."""

    answer: Tensor  # (..., D) sum_n w_n h_n
    left: Tensor  # (...) 1 - sum_n w_n; zero where the place has halted
    used: Tensor  # (...) N + w_N, as far as it is known


class Halting(nn.Module):
    """y = sum_n w_n h_n,  w_n = p_n = s(W norm(h_{n-1}) + b) while that leaves more than 0.01 of 1, else what is left.

    h_n is what depth n gives (..., D), h_0 what enters the first. The weights sum to one: a place that has not halted
    gives all that is left to the last depth. It costs `ponder` (N + w_N), where N is the depth at which it halts; only
    w_N has a gradient: it makes earlier depths weigh more.

    A place that has halted goes on to be transformed, so that others can attend to it at every depth (as in the
    Universal Transformer's code; its text copies the state instead). So to halt late by rounding moves an answer by 1 %
    of a step at most; and since a later place may look at any depth of this one, all depths are always computed.

    W starts at zero, and b so that half the depths are used, but p at most s(1), as in both papers' code.
    """

    def __init__(self, width: int, depth: int, norm: nn.Module, *, ponder: float):
        super().__init__()
        self.depth, self.ponder, self.norm, self.gate = depth, ponder, norm, nn.Linear(width, 1)
        half = 2 / depth
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 1.0 if half == 1 else min(1.0, math.log(half / (1 - half))))

    def begin(self, h: Tensor) -> Pondered:
        """Before the first depth. h (..., D)."""
        left = torch.ones(h.shape[:-1], dtype=wide(h.dtype), device=h.device)
        return Pondered(torch.zeros_like(h, dtype=left.dtype), left, torch.zeros_like(left))

    def weigh(self, depth: int, before: Tensor, after: Tensor, so_far: Pondered) -> Pondered:
        """With the depth that made h (..., D) `after` of `before`; depths count from 0."""
        answer, left, used = so_far
        running = (left > 0).to(left.dtype)
        if depth == self.depth - 1:
            return Pondered(answer + left[..., None] * after, torch.zeros_like(left), used + running + left)
        p = self.gate(self.norm(before))[..., 0].to(left.dtype).sigmoid()
        goes_on = left - p > ENOUGH
        weight = torch.where(goes_on, p, left)
        used = used + running + torch.where(goes_on, 0, left)
        return Pondered(answer + weight[..., None] * after, torch.where(goes_on, left - p, 0), used)
