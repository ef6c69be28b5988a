"""Where a text ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import UsageError


@dataclass(frozen=True)
class Stop:
    """At one of `ids`, or where what was written holds one of `strings`; at the latest after max_new_tokens.

    decode: ids to text, such as a tokenizer's; needed for strings. The id that ends a row is its last; rows that ended
    earlier than others are filled with the first of `ids`, or with 0. A string that began in the prompt does not count.
    Raises UsageError for strings without decode and for an empty string.
    """

    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    def __post_init__(self) -> None:
        if self.strings and self.decode is None:
            raise UsageError(f"Stop: strings {list(self.strings)} need decode, from ids to text")
        if "" in self.strings:
            raise UsageError("Stop: an empty string would end every text at once")

    @property
    def pad(self) -> int:
        return self.ids[0] if self.ids else 0

    @property
    def window(self) -> int:
        """How many of the last ids decide: an id is at least one byte of a string that it is part of."""
        return max((len(s.encode()) + 3 for s in self.strings), default=1)

    def ended(self, last: Tensor) -> Tensor:
        """last (N, n) the ids written, or the last `window` of them, newest last -> (N,) bool."""
        found = torch.zeros(len(last), dtype=torch.bool, device=last.device)
        for stop in self.ids:
            found = found | (last[:, -1] == stop)
        if self.strings:
            assert self.decode is not None
            texts = [self.decode(row) for row in last[:, -self.window :].tolist()]
            hit = [any(s in text for s in self.strings) for text in texts]
            found = found | torch.tensor(hit, dtype=torch.bool, device=last.device)
        return found
