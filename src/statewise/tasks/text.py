"""Real text as bytes: the King James Bible, read as one long stream."""

from __future__ import annotations

import abc
import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core import DataError, UsageError
from ..core.vary import LATER
from ..text import ByteTokenizer, save_tokenizer
from .base import SPLITS, Batch, Split, Task, register_task, rng_of
from .sources import KJV

PIECE = 1 << 22  # bytes that are counted at once


@dataclass(frozen=True)
class Bytes(Task):
    """A stream of bytes, each step asked for the next one.

    Training rows start evenly spread over the text (from a place that the seed gives) and each reads on, round and
    round: batch i + 1 continues batch i, and `reset` marks the step at which a row begins the text anew. The
    evaluation sets are 16 rows read side by side, carried the same way. Where documents have an `end`, every one
    stands behind that byte, and the state is reset there too.
    """

    length: int = 256  # steps of one batch: truncated back-propagation through time
    end: ClassVar[int | None] = None
    kind = "classification"
    metric = "bits_per_byte"
    higher_is_better = False
    carries = True
    model = "language_model"
    x_vocab = 256
    y_width = 256

    def keep(self, run: Path) -> None:
        save_tokenizer(ByteTokenizer(end=None), run)

    def readable(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    @abc.abstractmethod
    def read(self) -> dict[Split, np.ndarray]:
        """The texts (N,) uint8. Called once per process."""

    def text(self, split: Split) -> Tensor:
        """(N,) uint8."""
        return _texts(self)[split]

    def batch(self, index: int, size: int, *, seed: int, split: Split = "train") -> Batch:
        text = self.text(split)
        first = int(rng_of(seed, split).integers(len(text)))
        start = first + torch.arange(size) * len(text) // max(size, 1) + index * self.length
        return self._at((start[:, None] + torch.arange(self.length)) % len(text), text)

    def batches(self, split: Split) -> Iterator[Batch]:
        text = self.text(split)
        rows = max(1, min(16, len(text) // (4 * self.length)))
        each = (len(text) - 1) // rows
        start = torch.arange(rows)[:, None] * each
        for time in torch.arange(each).split(self.length):
            yield self._at(start + time, text)

    def _at(self, place: Tensor, text: Tensor) -> Batch:
        """x at the places (B, T), y one further; nothing is asked at the text's last byte."""
        reset, asked = place == 0, place != len(text) - 1
        x, y = text[place].long(), text[(place + 1) % len(text)].long()
        if self.end is not None:
            reset |= x == self.end
        return Batch(x, y, asked.float(), reset=reset if reset.any() else None)

    def chance(self) -> float:
        """Every byte equally likely."""
        return 8.0

    def baseline(self) -> float:
        """Bits per test byte of a table of pairs: the next byte from the last one, counted on the training text."""
        return _pairs(self)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds bits_per_byte, the cross entropy in bits."""
        found = super().metrics(out, batch)
        loss, count = found["loss"]
        return {**found, "bits_per_byte": (loss / math.log(2), count)}


@lru_cache(maxsize=4)
def _texts(task: Bytes) -> dict[Split, Tensor]:
    return {split: torch.from_numpy(text) for split, text in task.read().items()}


def by_place(whole: np.ndarray) -> dict[Split, np.ndarray]:
    """The last tenth is validation and test, half each."""
    return dict(zip(SPLITS, np.split(whole, [len(whole) * 90 // 100, len(whole) * 95 // 100])))


@lru_cache(maxsize=4)
def _pairs(task: Bytes) -> float:
    def count(split: Split) -> Tensor:
        text, found = task.text(split), torch.zeros(1 << 16, dtype=torch.int64)
        for at in range(0, len(text) - 1, PIECE):
            some = text[at : at + PIECE + 1].int()
            found += (some[:-1] * 256 + some[1:]).bincount(minlength=1 << 16)
        return found.view(256, 256).double()

    train, test = count("train"), count("test")
    single = (train.sum(0) + 1) / (train.sum() + 256)
    pair = (train + 4 * single) / (train.sum(1, keepdim=True) + 4)  # four imagined bytes of the single-byte table
    return float(-(test * pair.log2()).sum() / test.sum())


@register_task
@dataclass(frozen=True)
class Text(Bytes):
    """x       I n   t h e   b e g i n n i n
    answer     n   t h e   b e g i n n i n g     the next byte, asked at every step

    The King James Bible, 4.2 million bytes, of which the last tenth is validation and test, half each. Scored in bits
    per byte: chance 8, a table of byte pairs about 3.4.
    """

    evaluate: int = field(default=0, metadata=LATER)  # bytes that an evaluation reads, from all over a split; 0: all
    name = "text"
    data = KJV.data

    def __post_init__(self) -> None:
        if type(self.evaluate) is not int or self.evaluate < 0:
            raise UsageError(f"text: evaluate is {self.evaluate!r}; expected a number of bytes, or 0 for all")

    def batches(self, split: Split) -> Iterator[Batch]:
        for read, batch in enumerate(super().batches(split)):
            if self.evaluate and read * batch.x.numel() >= self.evaluate:
                return
            yield batch

    def read(self) -> dict[Split, np.ndarray]:
        """The text stands in a Python source file as one string literal: it is read as text, never run."""
        path = KJV.paths()["plain_text_readers_bible.py"]
        source = path.read_text(encoding="utf-8")
        start = source.find('"""')
        end = source.find('"""', start + 3)
        if start < 0 or end < 0:
            raise DataError(f"{path}: no string literal found")
        literal = ast.literal_eval(source[start : end + 3])
        return by_place(np.frombuffer(bytearray(literal.strip().encode()), np.uint8))
