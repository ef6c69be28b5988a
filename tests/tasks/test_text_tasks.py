"""Byte streams: rows go on where the last batch ended, rounds are marked, every byte is asked once."""

from __future__ import annotations

import math
import wave
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from statewise.core import DataError
from statewise.tasks import SPLITS, Smiles, Split, Text, Voice
from statewise.tasks.sources import sources
from statewise.tasks.text import Bytes, by_place
from statewise.tasks.voice import from_mu_law, mu_law, samples


@dataclass(frozen=True)
class Letters(Bytes):
    name = "letters"

    def read(self) -> dict[Split, np.ndarray]:
        return by_place(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8))


@pytest.fixture
def file() -> Letters:
    return Letters(length=7)


def test_split_by_place(file: Letters) -> None:
    whole = torch.cat([file.text(split) for split in SPLITS])
    assert torch.equal(whole, torch.from_numpy(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8)))
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


def test_the_state_is_reset_at_each_end_of_a_document(file: Letters) -> None:
    class Lines(Letters):
        end = ord("e")

    plain, lines = ([task.batch(i, 3, seed=1) for i in range(500)] for task in (file, Lines(length=7)))
    for a, b in zip(plain, lines):
        assert torch.equal(a.x, b.x)
        begins = torch.zeros_like(a.x, dtype=torch.bool) if a.reset is None else a.reset
        found = torch.zeros_like(b.x, dtype=torch.bool) if b.reset is None else b.reset
        assert torch.equal(found, begins | (b.x == ord("e")))
    assert any(batch.reset is not None for batch in plain)  # the text begins anew


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


def here(source: str) -> None:
    if not sources[source].here():
        pytest.skip(f"data set {source} is not in the cache: statewise data get {source}")


def test_molecules_are_each_there_once() -> None:
    here("smiles")
    parts = [bytes(Smiles().text(split).numpy()) for split in SPLITS]
    parts.append(bytes(Smiles(scaffolds=True).text("test").numpy()))
    assert all(part[:1] == part[-1:] == b"\n" for part in parts)
    molecules = [part[1:-1].split(b"\n") for part in parts]
    assert [len(part) for part in molecules] == [1579663, 5000, 5000, 5000]
    assert len({molecule for part in molecules for molecule in part}) == 1579663 + 15000
    for molecule in (molecule.decode("ascii") for part in molecules[1:] for molecule in part):
        assert molecule.count("(") == molecule.count(")")
        assert molecule.count("[") == molecule.count("]")
        assert all(molecule.count(ring) % 2 == 0 for ring in "123456")


def test_scores_of_molecules() -> None:
    here("smiles")
    task = Smiles()
    batch = task.batch(5, 8, seed=0)
    assert batch.reset is not None
    assert torch.equal(batch.reset, batch.x == ord("\n"))
    assert 10 <= int(batch.reset.sum()) <= 100  # 8 x 256 characters, 36 a molecule
    assert 2 < task.baseline() < 2.6
    assert task.readable(batch.x[0].tolist()).isascii()


def test_levels_of_sound() -> None:
    sound = np.arange(-32768, 32768).astype(np.int16)
    levels = mu_law(sound)
    assert (np.diff(levels.astype(int)) >= 0).all()
    assert levels[[0, 32768, -1]].tolist() == [0, 128, 255]
    assert np.array_equal(mu_law(from_mu_law(np.arange(256))), np.arange(256))
    error = np.abs(sound.astype(float) - from_mu_law(levels))
    assert (error <= 3 + 0.025 * np.abs(sound.astype(float))).all()  # steps of equal ratio: log(256) / 255 = 0.022


def test_a_voice_is_no_text(tmp_path: Any) -> None:
    Voice().keep(tmp_path)
    assert not list(tmp_path.iterdir())
    assert Voice().readable([10, 200]) == "10 200"
    Smiles().keep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_voice() -> None:
    here("voice")
    task = Voice()
    assert [len(task.text(split)) for split in SPLITS] == [1960512, 117834, 117115]
    assert 5 < task.baseline() < 6
    heard = []
    for split in SPLITS:
        stretches = np.lib.stride_tricks.sliding_window_view(task.text(split).numpy(), 64)
        loud = stretches[np.ptp(stretches, 1) > 64]
        assert len(loud) > len(stretches) / 2
        heard.append({hash(one.tobytes()) for one in loud})
    assert not heard[0] & heard[1]
    assert not heard[0] & heard[2]
    assert not heard[1] & heard[2]


@pytest.mark.parametrize("form", [(2, 2, 8000), (1, 1, 8000), (1, 2, 16000), None])
def test_another_sound_is_refused(form: Any, tmp_path: Any) -> None:
    path = tmp_path / "a.wav"
    if form is None:
        path.write_bytes(b"RIFF")
    else:
        with wave.open(str(path), "wb") as file:
            file.setparams((*form, 0, "NONE", ""))
            file.writeframes(bytes(64))
    with pytest.raises(DataError, match=r"a.wav: (not a WAV file|channels, bytes and rate are .* expected 1, 2, 8000)"):
        samples(path)
