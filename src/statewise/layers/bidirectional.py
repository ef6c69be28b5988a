"""Two causal layers, one of them reading backwards (Schuster & Paliwal 1997, doi:10.1109/78.650093)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import RecurrentLayer, UsageError


class Bidirectional(nn.Module):
    """y_t = [f(x_1 .. x_t), g(x_T .. x_t)]: what stands before t and what after it. It has no stream and no state.

    forward_layer, backward_layer: two layers of the protocol that take the same x; each starts from its initial state.
    """

    def __init__(self, forward_layer: RecurrentLayer[Any], backward_layer: RecurrentLayer[Any]):
        super().__init__()
        if forward_layer is backward_layer:
            raise UsageError("Bidirectional: the same layer was given twice; expected two, each with its own weights")
        if (forward_layer.width, forward_layer.vocab) != (backward_layer.width, backward_layer.vocab):
            raise UsageError(
                f"Bidirectional: the layers take x of width {forward_layer.width} and {backward_layer.width}; "
                f"expected the same"
            )
        self.forward_layer, self.backward_layer = forward_layer, backward_layer
        self.width, self.vocab = forward_layer.width, forward_layer.vocab
        self.out_width = forward_layer.out_width + backward_layer.out_width

    def forward(self, x: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> y (B, T, E + E'), zero from lengths[b] on. A reset parts the row: neither side sees across it.

        Raises UsageError as the two layers do.
        """
        y, _ = self.forward_layer(x, reset=reset, lengths=lengths)
        back = None if reset is None else backward_in_time(_after(reset), lengths)
        z, _ = self.backward_layer(backward_in_time(x, lengths), reset=back, lengths=lengths)
        return torch.cat([y, backward_in_time(z, lengths)], -1)

    def summary(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, E + E'): each layer's output where it has read the whole row. Rows of length 0 give zeros."""
        y = self(x, lengths=lengths)
        parts = self.forward_layer.out_width
        if y.shape[1] == 0:
            return y.new_zeros(y.shape[0], self.out_width)
        if lengths is None:
            return torch.cat([y[:, -1, :parts], y[:, 0, parts:]], -1)
        last = (lengths.to(x.device) - 1).clamp(min=0)
        return torch.cat([y[torch.arange(y.shape[0], device=x.device), last, :parts], y[:, 0, parts:]], -1)


def backward_in_time(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, T, ...) with each row reversed within its length; what stands past the end stays there."""
    if lengths is None:
        return x.flip(1)
    t, end = torch.arange(x.shape[1], device=x.device), lengths.to(x.device)[:, None]
    index = torch.where(t < end, end - 1 - t, t)
    return x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 2)).expand_as(x))


def _after(reset: Tensor) -> Tensor:
    """'Forget just before t' as 'forget just after t': the same cuts for a reader who comes from the other side."""
    return torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1)
