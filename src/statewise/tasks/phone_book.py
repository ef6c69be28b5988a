"""Look up numbers in a phone book (Jelassi et al. 2024, arXiv:2402.01032; with the question before or after: Blouir et
al. 2024, arXiv:2411.01030)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core import UsageError
from .base import Batch, Split, certain, register_task
from .draws import distinct
from .generated import Generated

NAME, NUMBER = 2, 3  # tokens


@register_task
@dataclass(frozen=True)
class PhoneBook(Generated):
    """x       ann lee 4 1 7  ann fox 0 2 2  bo lee 9 9 1 | ann fox ? ? ?     entries, and then a name
    answer                                                      0 2 2     its number

    length 15: three entries of five tokens, all with different full names. `queries` of them are asked for. question:
    where the names asked for stand: "after" the book; "before" and once more after it, which is easier for a state that
    can choose what to keep. Ids: 0 the bar, 1 the question mark, then `names` first names, as many last names, and
    `numbers` parts of numbers. Chance: accuracy 1 / numbers; baseline: the parts of an entry's number in their places,
    whichever entry.
    """

    length: int = 100  # of the book
    queries: int = 1
    question: Literal["after", "before"] = "after"
    names: int = 32
    numbers: int = 32
    name = "phone_book"
    kind = "classification"
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.length < NAME + NUMBER or self.length % (NAME + NUMBER):
            raise UsageError(f"phone_book: length is {self.length}; expected a multiple of {NAME + NUMBER}")
        if self.names < 1 or self.numbers < 2 or self.names**2 < self.entries:
            given = f"{self.names}, {self.numbers}"
            raise UsageError(f"phone_book: names, numbers are {given}; expected names ** 2 >= {self.entries} and 2")
        if not 1 <= self.queries <= self.entries:
            raise UsageError(f"phone_book: queries is {self.queries}; expected 1 to {self.entries}")
        if self.question not in ("after", "before"):
            raise UsageError(f"phone_book: question is {self.question!r}; expected 'after' or 'before'")

    @property
    def entries(self) -> int:
        return self.length // (NAME + NUMBER)

    @property
    def x_vocab(self) -> int:  # type: ignore[override]
        return 2 + 2 * self.names + self.numbers

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return self.numbers

    def sample(self, size: int, rng: np.random.Generator, split: Split) -> Batch:
        person = distinct(size, self.entries, self.names**2, rng)
        name = np.stack([2 + person // self.names, 2 + self.names + person % self.names], -1)
        number = rng.integers(0, self.numbers, (size, self.entries, NUMBER))
        book = np.concatenate([name, 2 + 2 * self.names + number], -1).reshape(size, -1)
        asked = distinct(size, self.queries, self.entries, rng)[..., None]
        names, answers = np.take_along_axis(name, asked, 1), np.take_along_axis(number, asked, 1)
        question = np.concatenate([names, np.ones_like(answers)], -1).reshape(size, -1)
        bar = np.zeros((size, 1), np.int64)
        before = [names.reshape(size, -1), bar] if self.question == "before" else []
        x = np.concatenate([*before, book, bar, question], 1)
        y = np.zeros_like(x)
        y[:, -question.shape[1] :] = np.concatenate([np.zeros_like(names), answers], -1).reshape(size, -1)
        return Batch(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy((x == 1).astype(np.float32)))

    def chance(self) -> float:
        return 1 / self.numbers

    def baseline(self) -> float:
        """The number of an entry of the row, whichever."""
        return 1 / self.entries + (1 - 1 / self.entries) / self.numbers

    def oracle(self, batch: Batch) -> Tensor:
        """The number behind the name."""
        start = 2 * self.queries + 1 if self.question == "before" else 0
        book = batch.x[:, start : start + self.length].view(-1, self.entries, NAME + NUMBER)
        question = batch.x[:, start + self.length + 1 :].view(-1, self.queries, NAME + NUMBER)
        same = (question[:, :, None, :NAME] == book[:, None, :, :NAME]).all(-1)  # (B, queries, entries)
        number = book[:, :, NAME:].take_along_dim(same.long().argmax(-1)[..., None], 1)
        y = torch.zeros_like(batch.x)
        y[:, start + self.length + 1 :].view(-1, self.queries, NAME + NUMBER)[..., NAME:] = number - 2 - 2 * self.names
        return certain(y, self.numbers)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Adds number_accuracy, of whole numbers, and sequence_accuracy, of rows without a mistake."""
        right = (out.argmax(-1) == batch.y)[batch.weight > 0].view(-1, self.queries, NUMBER).all(-1)
        return {
            **super().metrics(out, batch),
            "number_accuracy": (float(right.sum()), float(right.numel())),
            "sequence_accuracy": (float(right.all(1).sum()), float(len(right))),
        }
