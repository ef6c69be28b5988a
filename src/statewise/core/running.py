"""Running a layer: step by step, in pieces, one input at a time. The shapes are checked as the tests run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UsageError
from .layer import RecurrentLayer, S, clear_past_end
from .state import leaves, tree_map, where

if TYPE_CHECKING:
    import jaxtyping


def unroll(
    layer: RecurrentLayer[S],
    x: jaxtyping.Shaped[Tensor, "B T *D"],
    state: S | None = None,
    *,
    reset: jaxtyping.Bool[Tensor, "B T"] | None = None,
    lengths: jaxtyping.Int[Tensor, " B"] | None = None,
) -> tuple[jaxtyping.Shaped[Tensor, "B T E"], S]:
    """The definition of forward: step, T times (T >= 1)."""
    state = layer.initial_state(x.shape[0]) if state is None else state
    if lengths is not None:
        lengths = lengths.to(x.device)
        x = clear_past_end(x, lengths)
    ys = []
    for t, x_t in enumerate(x.unbind(1)):
        before = state if reset is None else where(reset[:, t], layer.initial_state(x.shape[0]), state)
        y, new = layer.step(x_t, before)
        state = new if lengths is None else where(t < lengths, new, state)
        ys.append(y)
    y = torch.stack(ys, 1)
    return (y if lengths is None else clear_past_end(y, lengths)), state


def chunked(
    layer: RecurrentLayer[S],
    x: jaxtyping.Shaped[Tensor, "B T *D"],
    sizes: Sequence[int],
    state: S | None = None,
    *,
    reset: jaxtyping.Bool[Tensor, "B T"] | None = None,
    lengths: jaxtyping.Int[Tensor, " B"] | None = None,
) -> tuple[jaxtyping.Shaped[Tensor, "B T E"], S]:
    """forward piece by piece, the state carried across: streaming in blocks, truncated BPTT. sizes sum to T.

    Raises UsageError for sizes that do not.
    """
    if isinstance(sizes, int):
        raise UsageError(f"chunks of {sizes} steps; expected the size of every chunk: [{sizes}, {sizes}, ...]")
    if not sizes or min(sizes) < 0 or sum(sizes) != x.shape[1]:
        raise UsageError(f"chunks of {list(sizes)} steps; expected sizes of at least 0 with sum T = {x.shape[1]}")
    state = layer.initial_state(x.shape[0]) if state is None else state
    ys, start = [], 0
    for size in sizes:
        span = slice(start, start + size)
        y, state = layer(
            x[:, span],
            state,
            reset=None if reset is None else reset[:, span],
            lengths=None if lengths is None else (lengths - start).clamp(0, size),
        )
        ys.append(y)
        start += size
    return torch.cat(ys, 1), state


def stream(layer: RecurrentLayer[S], inputs: Iterable[Tensor], state: S | None = None) -> Iterator[tuple[Tensor, S]]:
    """Answer inputs (B, D) one by one in constant memory: yields (y (B, E), state after it)."""
    if isinstance(inputs, Tensor):
        raise UsageError(f"stream: a tensor {tuple(inputs.shape)}; expected inputs (B, D) one by one: x.unbind(1)")
    for x in inputs:
        state = layer.initial_state(x.shape[0]) if state is None else state
        y, state = layer.step(x, state)
        yield y, state


class Step(nn.Module):
    """step with the leaves of the state as plain arguments and results: (x, *state) -> (y, *state), for exporters."""

    def __init__(self, layer: RecurrentLayer[Any]):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        given = iter(state)
        y, after = self.layer.step(x, tree_map(lambda _: next(given), self.layer.initial_state(1)))
        return (y, *leaves(after))
