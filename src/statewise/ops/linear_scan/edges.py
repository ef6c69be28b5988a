"""What every backend does before and after its kernel, so that kernels see one shape of problem."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import clear_past_end, past_end


def normal(
    a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """a with the dims of x and the dtype of the state, and a reset that also cuts off what lies past the end.

    Past the end the input is zero and every step is a reset: h is exactly zero there, and so is every gradient,
    whatever the padding holds.
    """
    a = a if a.dtype == h0.dtype else a.to(h0.dtype)
    a = a if a.ndim == x.ndim else a.view(*[1] * (x.ndim - a.ndim), *a.shape)
    if lengths is not None:
        ended = past_end(lengths.to(x.device), x.shape[1])
        x, reset = clear_past_end(x, lengths.to(x.device)), ended if reset is None else reset | ended
    return a, x, reset


def at_lengths(h: Tensor, h0: Tensor, lengths: Tensor) -> Tensor:
    """The state at each row's end: h0 where the row is empty."""
    if h.shape[1] == 0:
        return h0
    lengths = lengths.to(h.device)
    end = h[torch.arange(len(h), device=h.device), (lengths - 1).clamp(min=0)]
    return torch.where((lengths == 0).view(-1, *[1] * (h0.ndim - 1)), h0, end.to(h0.dtype))
