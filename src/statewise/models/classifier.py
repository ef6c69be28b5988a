"""Sequence classification that streams: at every step, the answer given what was seen so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import RecurrentLayer, Traits, check_input, clear_past_end, wide
from ..nn import positions, tail
from ..ops import linear_scan


class ClassifierState(NamedTuple):
    inner: Any  # of the model below
    mean: Tensor  # (B, E) of its outputs since the start or the last reset
    seen: Tensor  # (B,) int64 how many those are


class Classifier(RecurrentLayer[ClassifierState]):
    """y_t = mean_{s <= t} model(x)_s, as m_t = m_{t-1} + (model(x)_t - m_{t-1}) / t.

    The last step's y is the answer for the whole sequence, and each earlier one the answer had it ended there. To
    answer from the last step's features alone, use the model as it is.
    """

    def __init__(self, model: RecurrentLayer[Any]):
        super().__init__()
        self.width, self.out_width, self.vocab = model.width, model.out_width, model.vocab
        self.traits = Traits(resets=model.traits.resets)
        self.model = model

    def initial_state(self, batch: int) -> ClassifierState:
        weight = next(self.model.parameters())
        mean = weight.new_zeros(batch, self.out_width, dtype=wide(weight.dtype))
        return ClassifierState(
            self.model.initial_state(batch), mean, torch.zeros(batch, dtype=torch.int64, device=weight.device)
        )

    def forward(
        self,
        x: Tensor,
        state: ClassifierState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ClassifierState]:
        check_input(self, x, state, reset, lengths)
        inner, mean, seen = self.initial_state(x.shape[0]) if state is None else state
        y, inner = self.model(x, None if state is None else inner, reset=reset, lengths=lengths)
        if lengths is not None:
            lengths = lengths.to(x.device)
        count = 1 + positions(seen, x.shape[1], reset)  # (B, T)
        share = 1 / count.to(mean.dtype)[..., None]
        means, mean = linear_scan(1 - share, share * y, mean, reset=reset, lengths=lengths)
        seen = tail(torch.cat([seen[:, None], count], 1), 1, lengths)[:, 0]
        means = means if lengths is None else clear_past_end(means, lengths)
        return means.to(y.dtype), ClassifierState(inner, mean, seen)

    def step(self, x: Tensor, state: ClassifierState) -> tuple[Tensor, ClassifierState]:
        y, inner = self.model.step(x, state.inner)
        seen = state.seen + 1
        share = 1 / seen.to(state.mean.dtype)[:, None]
        mean = (1 - share) * state.mean + share * y
        return mean.to(y.dtype), ClassifierState(inner, mean, seen)
