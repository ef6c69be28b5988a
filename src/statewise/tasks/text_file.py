"""The user's own text, of any size: a file, JSON lines, Parquet, or a folder of these; as bytes or as byte pairs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core import DataError, UsageError, check_sizes
from ..text import Corpus, Plan, permuted, prepare, save_tokenizer
from .base import SPLITS, Batch, Split, Task, register_task
from .sources import cache

ROWS = 16  # of an evaluation batch


@register_task
@dataclass(frozen=True)
class TextFile(Task):
    """x       # a n y   t e x t #     documents one behind the other, each behind an end (#), where the state is reset
    answer   a n y   t e x t #       the next id, asked at every step

    The text is tokenised once, into the cache, and read from there: memory does not grow with it. tokenizer: "bytes",
    or "bpe", which learns `vocab` ids from the training text. field: the name of the text in JSON lines and Parquet.

    A training row reads `span` windows of `length` ids on end, carrying its state (truncated back-propagation through
    time), and then goes on with another stretch of the text from a fresh state; the stretches come in an order drawn
    anew for each epoch, every one once. A text with fewer stretches than rows is cut into shorter ones.
    reset_documents: forget at each end. pass_state: enter a stretch with the state that the one before left.
    Evaluation reads the first `evaluate` ids of a split in 16 rows side by side.

    Scored in bits per byte, whatever the tokenizer; the end of a document counts for a byte. Chance: every id equally
    likely. Baseline: a table of byte pairs.
    """

    path: str = ""
    length: int = 256
    tokenizer: str = "bytes"
    vocab: int = 4096
    field: str = "text"
    span: int = 16
    reset_documents: bool = True
    pass_state: bool = False
    held_out: float = 0.05
    evaluate: int = 1 << 20
    skip_bad: bool = False
    name = "text_file"
    data = "your own text: set path to a file or folder of text, .jsonl or .parquet"
    kind = "classification"
    metric = "bits_per_byte"
    higher_is_better = False
    carries = True
    model = "language_model"

    def __post_init__(self) -> None:
        check_sizes("text_file", length=self.length, span=self.span, evaluate=self.evaluate)
        if self.path:
            self.plan  # noqa: B018  raises UsageError for what does not fit

    @property
    def plan(self) -> Plan:
        if not self.path:
            raise UsageError("text_file: path is not set; expected the path of a text file or folder")
        return Plan(self.path, self.field, self.tokenizer, self.vocab, self.held_out, self.skip_bad)

    @property
    def corpus(self) -> Corpus:
        """The text as ids; tokenised at the first call for these files."""
        return _corpus(self)

    def prepare(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        _prepared.pop(self.plan, None)
        _prepared[self.plan] = prepare(self.plan, corpora(), progress)
        _corpus(self)

    def remarks(self) -> list[str]:
        index, corpus = self.corpus.index, self.corpus
        parts = ", ".join(f"{split} {corpus.documents(split):,} / {corpus.tokens(split):,}" for split in SPLITS)
        found = [f"documents / ids: {parts}; split by {index['split_by']}; in {corpus.folder}"]
        if index["empty_files"]:
            found.append(f"{index['empty_files']:,} of {index['files']:,} files are empty")
        if index["skipped"]:
            found.append(
                f"left out in {index['skipped']:,} places, where it could not be read; the first: {index['reasons'][0]}"
            )
        return found

    def digest(self) -> str:
        self.prepare()  # the files may have changed since
        return self.corpus.digest

    def keep(self, run: Path) -> None:
        save_tokenizer(self.corpus.tokenizer, run)

    def readable(self, ids: Sequence[int]) -> str:
        return self.corpus.tokenizer.decode(ids)

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return self.corpus.tokenizer.vocab

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.x_vocab

    def batch(self, index: int, size: int, *, seed: int, split: Split = "train") -> Batch:
        asked = self.corpus.tokens(split) - 1
        span = max(1, min(self.span, asked // (self.length * max(size, 1))))
        stretch = span * self.length
        count = -(-asked // stretch)
        turn, window = divmod(index, span)
        starts = []
        for row in range(size):
            epoch, place = divmod(turn * size + row, count)
            starts.append(permuted(place, count, seed, split, epoch) * stretch + window * self.length)
        return self._at(starts, self.length, split, fresh=window == 0 and not self.pass_state, end=asked)

    def batches(self, split: Split) -> Iterator[Batch]:
        asked = min(self.corpus.tokens(split) - 1, self.evaluate)
        rows = max(1, min(ROWS, asked // (4 * self.length)))
        each = -(-asked // rows)
        for at in range(0, each, self.length):
            steps = min(self.length, each - at)
            yield self._at([row * each + at for row in range(rows)], steps, split, fresh=at == 0, end=asked)

    def _at(self, starts: list[int], steps: int, split: Split, *, fresh: bool, end: int) -> Batch:
        """x from each start on, y one further; nothing is asked from id `end` on."""
        corpus, ids = self.corpus, np.zeros((len(starts), steps + 1), np.int64)
        asked = np.zeros((len(starts), steps), np.float32)
        for row, start in enumerate(starts):
            found = corpus.read(split, start, min(steps, max(end - start, 0)) + 1) if start < end else ids[0, :0]
            ids[row, : len(found)] = found
            asked[row, : max(len(found) - 1, 0)] = 1
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        reset = torch.zeros_like(x, dtype=torch.bool)
        if self.reset_documents and corpus.tokenizer.end is not None:
            reset |= x == corpus.tokenizer.end
        if fresh:
            reset[:, 0] = True
        return Batch(x, y, torch.from_numpy(asked), reset=reset if bool(reset.any()) else None)

    def chance(self) -> float:
        """Every id equally likely, in bits per byte of the test split: 8 for bytes."""
        corpus = self.corpus
        return math.log2(corpus.tokenizer.vocab) * (corpus.tokens("test") - 1) / corpus.bytes("test")

    def baseline(self) -> float:
        """Bits per test byte of a table of pairs: the next byte from the last one, counted on the training text."""
        return self.corpus.baseline

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds bits_per_byte: the cross entropy in bits over the bytes that the asked ids cover."""
        found = super().metrics(out, batch)
        bits = found["loss"][0] / math.log(2)
        sizes = torch.from_numpy(_sizes(self.corpus)).to(batch.y.device)
        return {**found, "bits_per_byte": (bits, float((sizes[batch.y] * batch.weight).sum()))}


def corpora() -> Path:
    """Where tokenised text is kept: STATEWISE_CORPORA, else corpora/ in the cache of data."""
    own = os.environ.get("STATEWISE_CORPORA")
    return Path(own).expanduser() if own else cache() / "corpora"


_prepared: dict[Plan, Corpus] = {}


def _corpus(task: TextFile) -> Corpus:
    plan = task.plan
    if plan not in _prepared:
        _prepared[plan] = prepare(plan, corpora())
    corpus, need = _prepared[plan], 20 * (task.length + 2)
    size = sum(corpus.tokens(split) for split in ("train", "validation", "test"))
    if size < need:
        raise DataError(f"{plan.path}: {size} ids; length {task.length} needs {need}, of which 5 % is one test window")
    return corpus


@lru_cache(maxsize=4)
def _sizes(corpus: Corpus) -> np.ndarray:
    return corpus.tokenizer.sizes()
