"""Autoregressive models of ids: text as bytes, symbols, tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core import RecurrentLayer, Traits, UsageError, clear_past_end
from .stack import Residual, Stack, embedding


@dataclass(frozen=True)
class LanguageModel(Stack):
    """Describes a TokenModel on such a stack. tied: the logits are products with the embedding."""

    tied: bool = True

    def build(self, *, x_width: int | None = None, x_vocab: int | None = None, y_width: int) -> TokenModel:
        """A model from ids (B, T) below x_vocab to logits (B, T, x_vocab). Raises UsageError where widths differ."""
        if x_vocab is None or x_width is not None or y_width != x_vocab:
            raise UsageError(
                f"LanguageModel: x_width {x_width}, x_vocab {x_vocab}, y_width {y_width}; expected x_vocab = y_width"
            )
        self.check()
        if self.pool != "none":
            raise UsageError(f"LanguageModel: pool {self.pool!r}; expected 'none'")
        table = embedding(self.width, None, x_vocab)
        body = self.residual(table, None)
        return TokenModel(body, None if self.tied else nn.Linear(self.width, x_vocab))


class TokenModel(RecurrentLayer[Any]):
    """logits_t = W features(x)_t, where W is the embedding itself if head is None. Its state is the body's."""

    def __init__(self, body: Residual, head: nn.Linear | None):
        super().__init__()
        self.width, self.vocab = body.width, body.vocab
        self.traits = Traits(resets=body.traits.resets)
        self.body, self.head = body, head
        self.out_width = body.width if head is None else head.out_features

    def initial_state(self, batch: int) -> Any:
        return self.body.initial_state(batch)

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        h, state = self.body(x, state, reset=reset, lengths=lengths)
        y = self.logits(h)
        return (y if lengths is None else clear_past_end(y, lengths.to(x.device))), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, state = self.body.step(x, state)
        return self.logits(h), state

    def logits(self, h: Tensor) -> Tensor:
        """What the body gives (..., D) -> (..., vocab)."""
        y = F.linear(h, self.body.embed.weight) if self.head is None else self.head(h)
        return y.to(h.dtype)
