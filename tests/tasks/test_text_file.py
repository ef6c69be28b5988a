"""The user's text as a task: packing equals separate documents, each id is asked once an epoch, resume to the bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from statewise.core import DataError, UsageError
from statewise.models import LanguageModel
from statewise.tasks import SPLITS, Text, TextFile
from statewise.text import load_tokenizer
from statewise.training import Experiment, Train, data_hash, fit, load

WORDS = ["the", "a", "king", "said", "unto", "them", "and", "he", "went", "forth", "into", "his", "house"]


def documents(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 30))) for i in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> TextFile:
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents(90)))
    return TextFile(path=str(path), length=16, span=3)


def ids(task: TextFile, split: str) -> torch.Tensor:
    return torch.from_numpy(task.corpus.read(split, 0, task.corpus.tokens(split)))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_every_id_is_asked_once_in_an_epoch(file: TextFile, size: int) -> None:
    """Stretches of 48 ids, in an order drawn anew for each epoch; a row goes on where it was."""
    text = ids(file, "train")
    count = -(-(len(text) - 1) // 48)
    asked, turns = torch.zeros(len(text), dtype=torch.int64), -(-count * 2 // size)
    after: dict[int, int] = {}
    places: list[list[int]] = []
    for turn in range(turns):
        rows = [[] for _ in range(size)]
        for window in range(3):
            batch = file.batch(3 * turn + window, size, seed=1)
            assert batch.x.shape == batch.y.shape == (size, 16)
            for row in range(size):
                steps = int(batch.weight[row].sum())
                assert (batch.weight[row, :steps] == 1).all()
                rows[row].append(torch.cat([batch.x[row, :steps], batch.y[row, steps - 1 : steps]]) if steps else None)
        for row in range(size):
            parts = [part for part in rows[row] if part is not None]
            whole = torch.cat([*(part[:-1] for part in parts[:-1]), parts[-1]])
            found = [p for p in range(count) if torch.equal(text[p * 48 : p * 48 + len(whole)], whole)]
            places.append(found)
            number = turn * size + row
            if number < 2 * count:
                assert len(found) >= 1
                after[number] = found[0]
                asked[found[0] * 48 : found[0] * 48 + len(whole) - 1] += 1
    assert (asked[:-1] == 2).all() and asked[-1] == 0
    orders = [[after[i] for i in range(count)], [after[i] for i in range(count, 2 * count)]]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count)) and orders[0] != orders[1]
    assert orders[0] != list(range(count))


def test_rows_are_fresh_where_a_stretch_or_a_document_begins(file: TextFile) -> None:
    end = file.corpus.tokenizer.end
    for index in range(12):
        batch = file.batch(index, 5, seed=2)
        want = batch.x == end
        want[:, 0] |= index % 3 == 0
        assert torch.equal(torch.zeros_like(want) if batch.reset is None else batch.reset, want)
    free = replace(file, reset_documents=False, pass_state=True)
    assert all(free.batch(i, 5, seed=2).reset is None for i in range(12))
    assert free.batch(3, 5, seed=2).x.equal(file.batch(3, 5, seed=2).x)


def test_packed_equals_separate_documents(file: TextFile) -> None:
    """The loss of a model over the packed split, window after window, is that over each document alone."""
    model = LanguageModel("gru,window_attention(window=5,heads=2)", width=8, depth=2).build(x_vocab=256, y_width=256)
    model = model.double().eval()
    tokenizer, state, packed = file.corpus.tokenizer, None, 0.0
    one = replace(file, length=13)
    n = one.corpus.tokens("test")
    with torch.no_grad():
        for at in range(0, n - 1, 13):
            batch = one._at([at], min(13, n - 1 - at), "test", fresh=at == 0, end=n - 1)
            out, state = model(batch.x, state, reset=batch.reset)
            packed += float(F.cross_entropy(out[0], batch.y[0], reduction="sum"))
        alone = 0.0
        text = ids(file, "test").tolist()
        ends = [i for i, token in enumerate(text) if token == tokenizer.end]
        for a, b in itertools.pairwise(ends):
            x, y = torch.tensor([text[a:b]]), torch.tensor(text[a + 1 : b + 1])
            alone += float(F.cross_entropy(model(x)[0][0], y, reduction="sum"))
    assert packed == pytest.approx(alone, rel=1e-12)


def test_evaluation_asks_every_id_once(file: TextFile) -> None:
    for split in SPLITS:
        text = ids(file, split)
        batches = list(file.batches(split))
        asked = sum(float(batch.weight.sum()) for batch in batches)
        assert asked == len(text) - 1
        y = torch.cat([batch.y for batch in batches], 1)
        weight = torch.cat([batch.weight for batch in batches], 1) > 0
        assert torch.equal(y[weight], text[1:])
        assert batches[0].reset is not None and batches[0].reset[:, 0].all()
    some = replace(file, evaluate=100)
    assert sum(float(batch.weight.sum()) for batch in some.batches("train")) == 100


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bits_per_byte_of_knowing_nothing_is_chance(file: TextFile, tokenizer: str) -> None:
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    task = replace(file, tokenizer=tokenizer, vocab=300)
    bits = count = 0.0
    for batch in task.batches("test"):
        found = task.metrics(torch.zeros(*batch.x.shape, task.x_vocab), batch)
        bits, count = bits + found["bits_per_byte"][0], count + found["bits_per_byte"][1]
    text = sum(len(text.encode()) + 1 for text in documents(90))
    assert sum(task.corpus.bytes(split) for split in SPLITS) == text and count == task.corpus.bytes("test")
    assert bits / count == pytest.approx(task.chance())
    if tokenizer == "bytes":
        assert task.chance() == 8.0
    else:  # fewer ids for the same bytes
        ids_per_byte = (task.corpus.tokens("test") - 1) / task.corpus.bytes("test")
        assert ids_per_byte < 0.8 and task.chance() == pytest.approx(math.log2(300) * ids_per_byte)
    assert 1 < task.baseline() < 4.5


def test_a_pure_function_of_its_arguments(file: TextFile) -> None:
    again = TextFile(path=file.path, length=16, span=3)
    for index in (0, 7, 1000):
        one, two = file.batch(index, 4, seed=5), again.batch(index, 4, seed=5)
        assert torch.equal(one.x, two.x) and torch.equal(one.y, two.y)
    assert not torch.equal(file.batch(0, 4, seed=5).x, file.batch(0, 4, seed=6).x)
    rows = file.batch(1, 4, seed=5).x
    assert len({tuple(row) for row in rows.tolist()}) == 4  # a text of few stretches is cut finer, not repeated


# ---- training


def toy(task: TextFile, **train: Any) -> Experiment:
    asked = {"steps": 14, "batch": 3, "evaluate_every": 5, **train}
    return Experiment(task, LanguageModel("gru,min_gru@a", width=8, depth=3, dropout=0.1), Train(**asked), seed=3)


def trained(made: Experiment, run: Path | None = None, stop_at: int | None = None) -> list[float]:
    losses: list[float] = []

    class Enough(Exception):
        pass

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            losses.append(event["loss"])
            if event["step"] == stop_at:
                raise Enough

    with contextlib.suppress(Enough):
        fit(made, run, on_event=note)
    return losses


@pytest.mark.parametrize("stop_at", [1, 4, 7, 13])
def test_resumed_in_the_middle_of_an_epoch_to_the_bit(file: TextFile, stop_at: int, tmp_path: Path) -> None:
    made = toy(file, checkpoint_every=1)
    trained(made, tmp_path / "calm")
    trained(made, tmp_path / "cut", stop_at)
    trained(made, tmp_path / "cut")
    calm, cut = (load(tmp_path / name)[0].state_dict() for name in ("calm", "cut"))
    assert all(torch.equal(calm[name], cut[name]) for name in calm)


def test_a_run_keeps_its_tokenizer(file: TextFile, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    made = toy(replace(file, tokenizer="bpe", vocab=280), steps=2)
    fit(made, tmp_path / "run")
    Path(file.path).unlink()
    model, experiment = load(tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.vocab == model.vocab == 280 and experiment == made
    text = "the king said"
    logits, _ = model(torch.from_numpy(tokenizer.encode(text))[None])
    assert tokenizer.decode(tokenizer.encode(text)) == text and logits.shape[-1] == 280


def test_changed_text_is_noticed(file: TextFile, tmp_path: Path) -> None:
    fit(toy(file, steps=2), tmp_path / "run")
    first = data_hash(file)
    path = Path(file.path)
    path.touch()
    assert data_hash(file) == first
    path.write_text(path.read_text().replace("king", "duke"))
    assert data_hash(file) != first
    with pytest.raises(UsageError, match="are not those that this run began with"):
        fit(toy(file, steps=2), tmp_path / "run")


def test_a_model_learns_more_than_pairs(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("one, two, three, four, five, six, seven; " * 400)
    made = Experiment(
        TextFile(path=str(path), length=64, span=4),
        LanguageModel("gru", width=32, depth=1),
        Train(steps=120, batch=8, lr=1e-2, evaluate_every=0),
    )
    assert fit(made).score < made.task.baseline() / 2


# ---- what it refuses

BAD = {
    "missing": (None, "no such file"),
    "empty": (b"", "the file is empty"),
    "short": (b"some words " * 20, r"ids; length 256 needs 5160"),
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


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "FIFO"), (Path("/dev/zero"), "device")):
        with pytest.raises(DataError, match=f"is a .*{kind}"):
            TextFile(path=str(path)).prepare()


def test_a_mark_of_order_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"line\r\n" * 2000)
    task = TextFile(path=str(path))
    assert task.corpus.tokenizer.decode_bytes(task.corpus.read("train", 0, 8)) == b"line\r\nl"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "path is not set"),
        ({"path": "x", "length": 0}, "length is 0"),
        ({"path": "x", "span": 0}, "span is 0"),
        ({"path": "x", "tokenizer": "letters"}, "tokenizer 'letters'"),
        ({"path": "x", "held_out": 0.7}, "held_out"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TextFile(**fields).prepare()


def test_several_at_once_make_it_once(file: TextFile) -> None:
    """Processes that want the same text wait for the first; threads stand for them here."""
    from statewise.tasks.text_file import corpora
    from statewise.text import prepare

    seen: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: seen.append(prepare(file.plan, corpora(), lambda *e: seen.append("made")).digest)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen) - {"made"}) == 1 and len(seen) - seen.count("made") == 4
    once: list[str] = []
    prepare(replace(file, field="text", held_out=0.06).plan, corpora(), lambda *e: once.append("made"))
    assert seen.count("made") == len(once)


def test_a_text_task_keeps_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    Text().keep(tmp_path)
    assert load_tokenizer(tmp_path).end is None
