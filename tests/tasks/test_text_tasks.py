"""Byte streams: rows go on where the last batch ended, rounds are marked, every byte is asked once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statewise.core import DataError, UsageError
from statewise.tasks import SPLITS, Text, TextFile
from statewise.tasks.sources import sources


@pytest.fixture
def file(tmp_path: Path) -> TextFile:
    rng = np.random.default_rng(0)
    path = tmp_path / "words.txt"
    path.write_bytes(bytes(rng.integers(97, 123, 3000, dtype=np.uint8)))
    return TextFile(path=str(path), length=7)


def test_split_by_place(file: TextFile) -> None:
    whole = torch.cat([file.text(split) for split in SPLITS])
    assert bytes(whole.numpy()) == Path(file.path).read_bytes()
    assert [len(file.text(split)) for split in SPLITS] == [2700, 150, 150]


@pytest.mark.parametrize("size", [1, 4, 5])
def test_rows_go_on(file: TextFile, size: int) -> None:
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


def test_rows_are_spread_and_seeds_differ(file: TextFile) -> None:
    text = bytes(file.text("train").numpy()) * 2
    firsts = [text.index(bytes(row.to(torch.uint8).numpy())) for row in file.batch(0, 4, seed=3).x]
    assert np.diff(sorted(firsts)).tolist() == [675] * 3
    assert not torch.equal(file.batch(0, 4, seed=3).x, file.batch(0, 4, seed=4).x)
    assert torch.equal(file.batch(9, 4, seed=3).x, file.batch(9, 4, seed=3).x)


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_reads_rows_side_by_side(file: TextFile, split: Any) -> None:
    text = file.text(split)
    x, y = (torch.cat([getattr(batch, part) for batch in file.batches(split)], 1) for part in ("x", "y"))
    assert torch.equal(x.flatten(), text[: x.numel()].long())
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x.numel() > len(text) - 1 - len(x)


def test_bits(file: TextFile) -> None:
    batch = file.batch(0, 2, seed=0)
    found = file.metrics(torch.zeros(2, 7, 256), batch)
    assert found["bits_per_byte"][0] / found["bits_per_byte"][1] == pytest.approx(8) == file.chance()
    assert found["loss"][0] / found["loss"][1] == pytest.approx(8 * math.log(2))
    assert math.log2(26) < file.baseline() < 5.4  # letters at random; the table has little to count


def test_baseline_is_the_entropy_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "ab"
    path.write_bytes(b"abcd" * 5000)
    assert TextFile(path=str(path)).baseline() < 0.02
    path = tmp_path / "coin"
    path.write_bytes(bytes(np.random.default_rng(0).integers(48, 50, 100000, dtype=np.uint8)))
    assert TextFile(path=str(path)).baseline() == pytest.approx(1, abs=0.01)


def test_the_bible() -> None:
    if not sources["text"].here():
        pytest.skip("data set text is not in the cache: statewise data get text")
    task = Text()
    assert bytes(task.text("train")[:54].numpy()) == b"In the beginning God created the heaven and the earth."
    assert bytes(task.text("test")[-5:].numpy()) == b"Amen."
    assert sum(len(task.text(split)) for split in SPLITS) == 4185991
    assert 3 < task.baseline() < 3.6


BAD = {
    "missing": (None, "no such file"),
    "empty": (b"", "the file is empty"),
    "short": (b"some words", r"10 bytes; length 256 needs 5160"),
    "utf16": ("text\n" * 5000).encode("utf-16"),
    "nul": (b"words\n" * 1000 + b"\0" + b"words\n" * 1000, r":1001: a NUL byte"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    found = BAD[name]
    content, said = found if isinstance(found, tuple) else (found, ":1: the file is UTF-16")
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        TextFile(path=str(path)).batch(0, 2, seed=0)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_folders_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "folder"), (tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "device")):
        with pytest.raises(DataError, match=f"is a {kind}; expected a file"):
            TextFile(path=str(path)).read()


def test_no_path() -> None:
    with pytest.raises(UsageError, match="path is not set"):
        TextFile().read()


def test_a_mark_of_order_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"line\r\n" * 2000)
    assert bytes(TextFile(path=str(path)).read()[:6]) == b"line\r\n"
