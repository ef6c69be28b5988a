"""Book-keeping along time, for layers whose state is a window of the past."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

QUERIES = 128  # at least so many at a time, so that a narrow window does not make tiny products


def stretches(steps: int, window: int) -> Iterator[tuple[int, int]]:
    """Where stretches of time begin and end, so long that to look at a window from all of each costs T (W + 128).

    >>> list(stretches(300, 10))
    [(0, 128), (128, 256), (256, 300)]
    """
    size = max(window, QUERIES)
    return ((start, min(start + size, steps)) for start in range(0, steps, size))


def positions(seen: Tensor, steps: int, reset: Tensor | None) -> Tensor:
    """How many steps lie between the start of its segment and each t: (B, T) int64.

    seen (B,) int64: steps before t = 0; reset (B, T) bool begins a segment at t.

    >>> positions(torch.tensor([5]), 4, torch.tensor([[False, False, True, False]])).tolist()
    [[5, 6, 0, 1]]
    """
    t = torch.arange(steps, device=seen.device)
    start = -seen[:, None]
    if reset is not None:
        start = torch.where(reset, t, start).cummax(1).values
    return t - start


def tail(seen: Tensor, size: int, lengths: Tensor | None) -> Tensor:
    """The last `size` entries of rows that end at size + lengths[b]: seen (B, size + T, ...) -> (B, size, ...).

    A copy, so that a state does not keep the sequence it came from in memory.

    >>> tail(torch.tensor([[1, 2, 3, 4, 5]]), 2, torch.tensor([1])).tolist()
    [[2, 3]]
    """
    if lengths is None:
        return seen[:, seen.shape[1] - size :].clone()
    at = lengths[:, None] + torch.arange(size, device=seen.device)
    at = at.view(*at.shape, *[1] * (seen.ndim - 2)).expand(-1, -1, *seen.shape[2:])
    return seen.gather(1, at)
