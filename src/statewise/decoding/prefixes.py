"""States behind prompts that come again: a system prompt, a dialogue, the trunk of a tree."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, check_sizes, join, nbytes, tree_map
from .position import Position, check_prompt, read


class PrefixCache:
    """position after a prompt = position after its longest known beginning, and on from there.

    Keeps the positions after prompts that were read, by the SHA-256 of their ids: at most `entries` of them and
    `limit` bytes, the longest unused going first. A recurrent state is small, so that thousands fit. It holds for the
    weights that the model had: `clear` it after training on.
    """

    def __init__(self, model: RecurrentLayer[Any], *, entries: int = 256, limit: int = 1 << 28):
        check_sizes("PrefixCache", entries=entries, limit=limit)
        self.model, self.entries, self.limit = model, entries, limit
        self.known: OrderedDict[tuple[int, bytes], Position] = OrderedDict()
        self.bytes = 0
        self.ids_read = self.ids_asked = 0

    def clear(self) -> None:
        self.known.clear()
        self.bytes = 0

    def read(self, ids: Tensor, lengths: Tensor | None = None) -> Position:
        """As `read` of the model, row by row, ids (B, T). What had to be read is remembered."""
        check_prompt(self.model, ids, lengths)
        ends = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
        return join([self._row(row[None, :end]) for row, end in zip(ids, ends, strict=True)])

    def _row(self, ids: Tensor) -> Position:
        steps = ids.shape[1]
        keys = _digests(ids[0].tolist(), sorted({n for n, _ in self.known if n <= steps} | {steps}))
        key = next((k for k in reversed(keys) if k in self.known), None)
        at = None
        if key is not None:
            self.known.move_to_end(key)
            at = self.known[key]
        start = 0 if key is None else key[0]
        self.ids_asked += steps
        self.ids_read += steps - start
        if at is None or start < steps:
            # a copy: a view, as of the last row of logits, would keep all that it is a view of
            at = tree_map(torch.clone, read(self.model, ids[:, start:], at))
            self._keep(keys[-1], at)
        return at

    def _keep(self, key: tuple[int, bytes], at: Position) -> None:
        size = nbytes(at)
        if size > self.limit:
            return
        self.known[key] = at
        self.bytes += size
        while len(self.known) > self.entries or self.bytes > self.limit:
            self.bytes -= nbytes(self.known.popitem(last=False)[1])


def _digests(ids: list[int], ends: Iterable[int]) -> list[tuple[int, bytes]]:
    """(length, digest of so many ids) for each of the ends, which go up."""
    digest, start, found = hashlib.sha256(), 0, []
    for end in ends:
        digest.update(torch.tensor(ids[start:end], dtype=torch.int64).numpy().tobytes())
        found.append((end, digest.digest()))
        start = end
    return found
