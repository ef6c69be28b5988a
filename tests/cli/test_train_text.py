"""train text_file: from words to a run; faults are one line and exit status 3; a run generates what it learned."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from statewise.tasks import SPLITS, TextFile
from statewise.text import load_tokenizer
from statewise.training import load, read_log

SMALL = [
    "--layer",
    "min_gru",
    "--width",
    "16",
    "--device",
    "cpu",
    "--set",
    "task.length=16",
    "task.span=2",
    "train.steps=2",
]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"body": f"{i} some words and some more words"}) + "\n" for i in range(150)))
    return path


def test_json_lines_with_a_hybrid(lines, call, tmp_path):
    words = [
        "train",
        "text_file",
        "--data",
        lines,
        "--field",
        "body",
        *SMALL,
        "--layer",
        "min_gru*2,attention(window=8)",
    ]
    said = call(*words, "--depth", "2", "--run", tmp_path / "run")
    assert said.code == 2 and "the pattern has 3 layers, the depth is 2" in said.err
    said = call(*words, "--depth", "3", "--run", tmp_path / "run")
    assert said.code == 0 and "bits_per_byte" in said.out, said
    record = json.loads((tmp_path / "run" / "experiment.json").read_text())
    assert record["task"]["field"] == "body" and record["model"]["layer"] == "min_gru*2,attention(window=8)"
    assert load_tokenizer(tmp_path / "run").end == 255
    said = call(*words, "--depth", "3", "--run", tmp_path / "run")
    assert said.code == 0 and "finished" in said.out


def test_a_run_is_named_by_its_pattern(lines, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "text_file", "--data", lines, "--field", "body", *SMALL, "--depth", "2"]
    assert call(*words, "--layer", "min_gru*1,lru(mlp=0)@a").code == 0
    assert [path.name[:-9] for path in Path("runs").iterdir()] == ["text_file-min_gru_1_lru_mlp_0_a"]


def test_byte_pairs(lines, call, tmp_path):
    pytest.importorskip("tokenizers")
    words = [
        "train",
        "text_file",
        "--data",
        lines,
        "--field",
        "body",
        *SMALL,
        "--depth",
        "1",
        "--run",
        tmp_path / "run",
    ]
    assert call(*words, "--set", "task.tokenizer=bpe", "task.vocab=270").code == 0
    model, _ = load(tmp_path / "run")
    assert model.vocab == load_tokenizer(tmp_path / "run").vocab == 270


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("utf8.txt", b"line\nline \xff\n" * 300, "utf8.txt:2: the byte at offset 10 is not UTF-8"),
        ("half.jsonl", b'{"text": "fine"}\n{"text": "ha\n', "half.jsonl:2: not JSON"),
        ("none.jsonl", b'{"body": "fine"}\n' * 300, "none.jsonl:1: field 'text' is not there"),
        ("cut.txt.gz", gzip.compress(b"some words " * 3000)[:-30], "cut.txt.gz: damaged from byte"),
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("cut.parquet", b"PAR1 no more", "cut.parquet: not a Parquet file"),
    ],
)
def test_faults(name, content, words, call, tmp_path):
    (tmp_path / name).write_bytes(content)
    said = call("train", "text_file", "--data", tmp_path / name, *SMALL, "--run", tmp_path / "run")
    assert said.code == 3 and said.err.startswith("error[3]: ") and said.err.count("\n") == 1, said
    assert words in said.err and not (tmp_path / "run").exists()


def test_skipping_what_is_bad(call, tmp_path):
    (tmp_path / "some.txt").write_bytes(b"line\nline \xff\n" * 300)
    words = ["train", "text_file", "--data", tmp_path / "some.txt", *SMALL, "--run", tmp_path / "run"]
    said = call(*words, "--set", "task.skip_bad=true")
    assert said.code == 0 and "left out in 300 places" in said.out, said


def test_what_stands_before_a_cut_is_kept(call, tmp_path):
    whole = b"".join(f"{i} some words\n".encode() for i in range(100_000))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(whole)[:-5000])
    task = TextFile(path=str(tmp_path / "cut.txt.gz"), skip_bad=True)
    kept = b"".join(task.corpus.tokenizer.decode_bytes(task.corpus.read(s, 0, 1 << 22)) for s in SPLITS)
    assert whole.startswith(kept) and len(kept) > len(whole) * 0.9
    assert any("left out in 1 place" in remark for remark in task.remarks())


@pytest.mark.slow
def test_it_learns_to_write(call, tmp_path):
    """A minute of training writes the sentence that it read, and stops where documents end."""
    pytest.importorskip("tokenizers")
    sentence = "the quick brown fox jumps over the lazy dog"
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": f"{sentence} {i % 10}"}) + "\n" for i in range(300)))
    words = ["train", "text_file", "--data", path, "--layer", "min_gru,window_attention(window=16)", "--depth", "2"]
    words += ["--width", "48", "--device", "cpu", "--set", "task.length=64", "train.steps=150", "train.lr=1e-2"]
    assert call(*words, "--run", tmp_path / "run").code == 0
    model, _ = load(tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run")
    ids = [tokenizer.end, *tokenizer.encode("the quick")]
    with torch.no_grad():
        logits, state = model(torch.tensor([ids]))
        logits = logits[:, -1]
        while len(ids) < 5 or (len(ids) < 80 and ids[-1] != tokenizer.end):
            ids.append(int(logits.argmax()))
            logits, state = model.step(torch.tensor(ids[-1:]), state)
    assert tokenizer.decode(ids)[:-2] == sentence and ids[-1] == tokenizer.end
    events, _ = read_log(tmp_path / "run" / "log.jsonl")
    assert events[-1]["score"] < 1
