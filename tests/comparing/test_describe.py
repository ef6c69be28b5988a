"""What a report says of a task: ids as numbers unless they are text, and the length that was trained."""

from __future__ import annotations

import pytest

from statewise.comparing import describe_task
from statewise.comparing.describe import examples
from statewise.tasks import Mqar, Parity, TextFile, WordProblem

WORDS = "Every good boy deserves fudge, and öther things. "


def test_large_vocabularies_are_not_taken_for_text():
    task = Mqar()
    assert task.x_vocab >= 128
    for example in examples(task):
        ids = [int(word) for word in example["text"].removesuffix(" …").split()]  # numbers, one for each id
        assert len(ids) > 4 and all(0 <= i < task.x_vocab for i in ids)


@pytest.mark.parametrize("settings", [{}, {"tokenizer": "bpe", "vocab": 300}], ids=["bytes", "bpe"])
def test_text_is_read_as_text(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path / "cache"))
    path = tmp_path / "own.txt"
    path.write_text(WORDS * 400, encoding="utf-8")
    shown = examples(TextFile(path=str(path), length=32, **settings))
    assert shown and all(e["text"].removesuffix(" …").strip("\ufffd") in WORDS * 100 for e in shown)


def test_the_length_of_training_is_said_where_there_is_one():
    assert describe_task(Parity(longest=17))["train_length"] == 17
    assert describe_task(WordProblem(length=12))["train_length"] == 12
