"""N-gram heads: what came the last times that the same n symbols had just come (Akyürek et al. 2024,
arXiv:2401.12973)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core import RecurrentLayer, check_input, check_sizes, clear_past_end, clone, register_layer, wide
from ..nn import positions, stretches, tail

OF_CHANNELS, OF_STEPS = 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D  # whose powers, modulo 2^64, make hashes of bits
HALF = 2**32


class NgramHeadsState(NamedTuple):
    symbols: Tensor  # (B, W + n) int64 hashes of the sign patterns of the last steps, newest last
    x: Tensor  # (B, W, D) the last inputs, newest last, zero where there was none
    seen: Tensor  # (B,) int64 steps since the start or the last reset


@register_layer(
    "ngram_heads",
    paper="arXiv:2401.12973",
    examples=[dict(width=2, window=16, n=2), dict(width=1, window=3, n=3)],
    sized=lambda width: dict(width=width, window=1024),
)
class NgramHeads(RecurrentLayer[NgramHeadsState]):
    """y_t = W_0 x_t + sum_{m <= n} W_m mean{x_s: t - W <= s < t, the m symbols before s are the m that end with t}.

    The symbol of a step is the pattern of signs of its channels. In front of a stack, where x is an embedding behind a
    norm, a symbol thus is an id, and the m-th head gives the mean embedding of what followed these m ids so far:
    the in-context (m + 1)-gram model. No parameter says where to look. A mean over nothing is zero. Deeper in a stack
    the signs hardly ever come again, so that there the layer is little more than W_0: put it first, as in
    "ngram_heads(mlp=0),gla*2".

    A reset hides all that came before it. Time grows as T (W + 128); state: the last W inputs and W + n hashes of 64
    bits (two patterns are the same if their hashes are). A step that is not finite makes NaN of every answer that sees
    it, and of no other. The map starts as in torch.nn.Linear. Raises UsageError for sizes below 1.
    """

    place: Tensor

    def __init__(self, width: int, *, window: int, n: int = 3):
        super().__init__()
        check_sizes("NgramHeads", width=width, window=window, n=n)
        self.width = self.out_width = width
        self.window, self.n = window, n
        self.out = nn.Linear((1 + n) * width, width)
        place = torch.full((width,), OF_CHANNELS).cumprod(0)
        self.register_buffer("place", torch.stack([place & HALF - 1, place >> 32]), persistent=False)

    def initial_state(self, batch: int) -> NgramHeadsState:
        weight = self.out.weight
        return NgramHeadsState(
            self.place.new_zeros(batch, self.window + self.n),
            weight.new_zeros(batch, self.window, self.width, dtype=wide(weight.dtype)),
            self.place.new_zeros(batch),
        )

    def forward(
        self,
        x: Tensor,
        state: NgramHeadsState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, NgramHeadsState]:
        check_input(self, x, state, reset, lengths)
        state = self.initial_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x, clone(state)
        if lengths is None:
            return self._look(x, state, reset, None)
        lengths = lengths.to(x.device)
        y, state = self._look(clear_past_end(x, lengths), state, reset, lengths)
        return clear_past_end(y, lengths), state

    def step(self, x: Tensor, state: NgramHeadsState) -> tuple[Tensor, NgramHeadsState]:
        y, state = self._look(x[:, None], state, None, None)
        return y[:, 0], state

    def _look(
        self, x: Tensor, state: NgramHeadsState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, NgramHeadsState]:
        position = positions(state.seen, x.shape[1], reset)  # (B, T)
        symbols = torch.cat([state.symbols, self._symbols(x)], 1)  # time t stands at W + n + t
        values = torch.cat([state.x, x.to(state.x.dtype)], 1)  # time t stands at W + t
        heads = self._means(symbols, values, position)
        y = self.out(torch.cat([x, *(head.to(x.dtype) for head in heads)], -1)).to(x.dtype)
        return y, self._after(symbols, values, state.seen, position, lengths)

    def _symbols(self, x: Tensor) -> Tensor:
        """The hash of every step's signs, (B, T), modulo 2^64, from sums that onnxruntime, too, has no need to round.

        It adds whole numbers of 64 bits in float64.
        """
        low, high = ((x > 0)[..., None, :] * self.place).sum(-1).unbind(-1)
        return low + HALF * high

    def _means(self, symbols: Tensor, values: Tensor, position: Tensor) -> list[Tensor]:
        """What followed the last 1, ..., n symbols: (B, W + n + T), (B, W + T, D), (B, T) -> n times (B, T, D)."""
        window, steps = self.window, position.shape[1]
        bad = ~values.isfinite().all(-1)
        values = torch.cat([values.masked_fill(bad[..., None], 0), bad[..., None].to(values.dtype)], -1)
        found, last = [], torch.zeros_like(symbols)
        for m in range(1, self.n + 1):
            last = symbols + OF_STEPS * nn.functional.pad(last[:, :-1], (1, 0))  # the last m; of the first m - 1, fewer
            ends, begins = last[:, window + self.n :], last[:, self.n - 1 : -1]  # by time t and, of what led to it, s
            blocks = []
            for start, stop in stretches(steps, window):
                at = torch.arange(start, stop, device=symbols.device)[:, None]
                s = torch.arange(start - window, stop, device=symbols.device)
                back = (position[:, start:stop] - m).clamp(max=window)[..., None]  # m symbols before s are to be seen
                same = ends[:, start:stop, None] == begins[:, None, start : stop + window]
                same &= (s < at) & (s >= at - back)
                total = same.to(values.dtype) @ values[:, start : stop + window]  # (B, queries, D + 1)
                mean = total[..., :-1] / same.sum(-1, keepdim=True).clamp_min(1)
                blocks.append(mean.masked_fill(total[..., -1:] > 0, torch.nan))
            found.append(torch.cat(blocks, 1))
        return found

    def _after(
        self, symbols: Tensor, values: Tensor, seen: Tensor, position: Tensor, lengths: Tensor | None
    ) -> NgramHeadsState:
        seen = tail(torch.cat([seen[:, None], position + 1], 1), 1, lengths)[:, 0]
        gone = torch.arange(self.window, device=seen.device) < self.window - seen[:, None]  # before the last reset
        values = tail(values, self.window, lengths).masked_fill(gone[..., None], 0)
        return NgramHeadsState(tail(symbols, self.window + self.n, lengths), values, seen)
