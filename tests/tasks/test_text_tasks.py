"""Byte streams: rows go on where the last batch ended, rounds are marked, every byte is asked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from statewise.tasks import SPLITS, Text
from statewise.tasks.sources import sources
from statewise.tasks.text import Bytes


@dataclass(frozen=True)
class Letters(Bytes):
    name = "letters"

    def read(self) -> np.ndarray:
        return np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8)


@pytest.fixture
def file() -> Letters:
    return Letters(length=7)


def test_split_by_place(file: Letters) -> None:
    whole = torch.cat([file.text(split) for split in SPLITS])
    assert bytes(whole.numpy()) == file.read().tobytes()
    assert [len(file.text(split)) for split in SPLITS] == [2700, 150, 150]


@pytest.mark.parametrize("size", [1, 4, 5])
def test_rows_go_on(file: Letters, size: int) -> None:
    text, steps = file.text("train").long(), 1200
    batches = [file.batch(i, size, seed=3) for i in range(steps // 7 + 400)]
    x, y = (torch.cat([getattr(batch, part) for batch in batches], 1) for part in ("x", "y"))
    reset = torch.cat([torch.zeros_like(b.x, dtype=torch.bool) if b.reset is None else b.reset for b in batches], 1)
    weight = torch.cat([batch.weight for batch in batches], 1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x.shape[1] > len(text)
    for b in range(size):
        (starts,) = reset[b].nonzero(as_tuple=True)
        assert len(starts) >= 1
        assert torch.equal(x[b, starts[0] : starts[0] + 100], text[:100])
        assert (starts.diff() == len(text)).all()
        asked_not = (weight[b] == 0).nonzero()[:, 0]
        inner = starts[starts > 0]
        assert set((inner - 1).tolist()) <= set(asked_not.tolist())  # the first byte after the last is no question
        assert len(asked_not) - len(inner) in (0, 1)
    assert weight[:, : len(text)].sum(1).tolist() == [len(text) - 1] * size


def test_rows_are_spread_and_seeds_differ(file: Letters) -> None:
    text = bytes(file.text("train").numpy()) * 2
    firsts = [text.index(bytes(row.to(torch.uint8).numpy())) for row in file.batch(0, 4, seed=3).x]
    assert np.diff(sorted(firsts)).tolist() == [675] * 3
    assert not torch.equal(file.batch(0, 4, seed=3).x, file.batch(0, 4, seed=4).x)
    assert torch.equal(file.batch(9, 4, seed=3).x, file.batch(9, 4, seed=3).x)


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_reads_rows_side_by_side(file: Letters, split: Any) -> None:
    text = file.text(split)
    x, y = (torch.cat([getattr(batch, part) for batch in file.batches(split)], 1) for part in ("x", "y"))
    assert torch.equal(x.flatten(), text[: x.numel()].long())
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x.numel() > len(text) - 1 - len(x)


def test_bits(file: Letters) -> None:
    batch = file.batch(0, 2, seed=0)
    found = file.metrics(torch.zeros(2, 7, 256), batch)
    assert found["bits_per_byte"][0] / found["bits_per_byte"][1] == pytest.approx(8) == file.chance()
    assert found["loss"][0] / found["loss"][1] == pytest.approx(8 * math.log(2))
    assert math.log2(26) < file.baseline() < 5.4  # letters at random; the table has little to count


def test_the_bible() -> None:
    if not sources["text"].here():
        pytest.skip("data set text is not in the cache: statewise data get text")
    task = Text()
    assert bytes(task.text("train")[:54].numpy()) == b"In the beginning God created the heaven and the earth."
    assert bytes(task.text("test")[-5:].numpy()) == b"Amen."
    assert sum(len(task.text(split)) for split in SPLITS) == 4185991
    assert 3 < task.baseline() < 3.6
