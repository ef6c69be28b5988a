"""Rates of decay, learned as their logarithms."""

from __future__ import annotations

from torch import Tensor

MOST = 80.0  # e^(-dt e^80) is 0 for any dt; e^89 is infinite in float32, and 0 times that has no gradient


def rate(log: Tensor) -> Tensor:
    """e^log, at most e^80, with which everything is forgotten at once; beyond it the gradient to log is 0."""
    return log.clamp(max=MOST).exp()
