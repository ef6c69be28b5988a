"""Forecasting of series: at every step, the next values of every channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, Traits, UsageError, check_input, clear_past_end
from .stack import Stack


@dataclass(frozen=True)
class Forecasting:
    """Describes a Forecaster on a Stack. The horizon is y_width / x_width."""

    stack: Stack = field(default_factory=Stack)

    def build(self, *, x_width: int | None = None, x_vocab: int | None = None, y_width: int) -> Forecaster:
        """A model from x (B, T, D) to y (B, T, horizon * D). Raises UsageError where the widths do not fit."""
        if x_width is None or x_vocab is not None:
            raise UsageError("Forecasting: x must be numbers (x_width), not ids; use LanguageModel for ids")
        return Forecaster(self.stack.build(x_width=x_width, y_width=y_width))


class Forecaster(RecurrentLayer[Any]):
    """y_t = (x_t + f_1, ..., x_t + f_H), f = model(x)_t: the next H values of D channels as changes from the last one.

    model: x (B, T, D) -> (B, T, H D), horizon-major: y.unflatten(-1, (H, D)). Its state is the model's.
    """

    def __init__(self, model: RecurrentLayer[Any]):
        super().__init__()
        if model.vocab is not None or model.out_width % model.width:
            raise UsageError(
                f"Forecaster: the model maps {model.width} channels to {model.out_width}; expected a multiple of them"
            )
        self.width, self.out_width = model.width, model.out_width
        self.horizon = model.out_width // model.width
        self.traits = Traits(resets=model.traits.resets)
        self.model = model

    def initial_state(self, batch: int) -> Any:
        return self.model.initial_state(batch)

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        check_input(self, x, state, reset, lengths)
        y, state = self.model(x, state, reset=reset, lengths=lengths)
        y = y + x.repeat(1, 1, self.horizon)
        return (y if lengths is None else clear_past_end(y, lengths.to(x.device))), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.model.step(x, state)
        return y + x.repeat(1, self.horizon), state


@torch.no_grad()
def forecast(model: RecurrentLayer[Any], history: Tensor, steps: int, state: Any = None) -> Tensor:
    """The `steps` values after history (B, T, D), T >= 1: (B, steps, D).

    Beyond its horizon H = out_width / width the model is fed its own forecasts, H at a time, and forecasts on.
    """
    if history.shape[1] == 0:
        raise UsageError("forecast: the history is empty; expected at least one step")
    if model.vocab is not None or model.out_width % model.width:
        raise UsageError(f"forecast: the model maps {model.width} channels to {model.out_width}; expected a multiple")
    pieces, block, found = [], history, 0
    while found < steps:
        y, state = model(block, state)
        block = y[:, -1].unflatten(-1, (-1, model.width))  # (B, H, D)
        pieces.append(block)
        found += block.shape[1]
    return torch.cat(pieces, 1)[:, :steps] if pieces else history[:, :0]
