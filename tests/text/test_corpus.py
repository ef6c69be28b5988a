"""Corpora: nothing lost, nothing twice, the same however it is stored, and every fault named where it is."""

from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from statewise.core import DataError, UsageError
from statewise.text import Corpus, Plan, prepare, reading
from statewise.text import corpus as corpus_module
from statewise.text.corpus import SPLITS

WORDS = [
    "alpha",
    "Bravo",
    "naïve",
    "東京",
    "😀😀",
    "tab\there",
    "line\nend",
    'quote"s',
    "back\\slash",
    "\u2028",
    "x" * 40,
]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) + f" {i}" for i in range(count)]


def write(folder: Path, kind: str, found: list[str], field: str = "text") -> Path:
    """The same documents in different clothes."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("jsonl", "jsonl.gz"):
        rows = [json.dumps({"n": [{"text": "no"}], field: t, "m": {field: "no"}}, ensure_ascii=i % 2 > 0)
                for i, t in enumerate(found)]  # fmt: skip
        raw = ("\n".join(rows) + "\n").encode()
        path = folder / f"some.{kind}"
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
        return path
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        path = folder / "some.parquet"
        pq.write_table(pa.table({"n": range(len(found)), field: found}), path, row_group_size=7)
        return path
    for i, text in enumerate(found):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return folder


def stream(corpus: Corpus, split: str) -> np.ndarray:
    return corpus.read(split, 0, corpus.tokens(split))


def read_back(corpus: Corpus) -> dict[str, list[str]]:
    found = {}
    for split in SPLITS:
        ids = stream(corpus, split)
        assert ids[0] == ids[-1] == corpus.tokenizer.end
        (ends,) = np.nonzero(ids == corpus.tokenizer.end)
        found[split] = [corpus.tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(ends)]
        assert len(found[split]) == corpus.documents(split)
        assert corpus.tokenizer.sizes()[ids[1:]].sum() == corpus.bytes(split)
    return found


def every(back: dict[str, list[str]]) -> list[str]:
    return [text for split in SPLITS for text in back[split]]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("kind", ["folder", "jsonl", "jsonl.gz", "parquet"])
def test_every_document_is_there_once(kind, tokenizer, tmp_path):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    found = texts(120)
    path = write(tmp_path / "data", kind, found, "body")
    corpus = prepare(Plan(str(path), "body", tokenizer, 400), tmp_path)
    back = read_back(corpus)
    assert Counter(every(back)) == Counter(found)
    assert all(back[split] for split in SPLITS) and len(back["train"]) > 90
    assert corpus.index["split_by"] == "document"
    if tokenizer == "bytes":  # however it is stored, the same documents are held out
        other = prepare(Plan(str(write(tmp_path / "other", "folder", found))), tmp_path)
        assert {s: set(t) for s, t in read_back(other).items()} == {s: set(t) for s, t in back.items()}


def test_a_document_that_stands_twice_is_on_one_side(tmp_path):
    found = texts(60)
    back = read_back(prepare(Plan(str(write(tmp_path / "d", "jsonl", found * 3))), tmp_path))
    sides = [set(back[split]) for split in SPLITS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


@pytest.mark.parametrize("kind", ["folder", "jsonl"])
def test_few_documents_are_split_by_place(kind, tmp_path):
    found = [text * 5 for text in texts(3)]
    corpus = prepare(Plan(str(write(tmp_path / "d", kind, found)), held_out=0.1), tmp_path)
    assert corpus.index["split_by"] == "place"
    pieces = every(read_back(corpus))
    assert "".join(pieces) == "".join(found)  # in order, cut between letters
    size = sum(len(text.encode()) for text in found)
    assert [corpus.index["splits"][s]["bytes"] / size for s in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


@pytest.mark.parametrize("block", [16, 64, 1000])
def test_pieces_of_any_size_are_the_same_text(block, tmp_path, monkeypatch):
    """Lines, letters and escapes cut anywhere: what is read does not depend on how much is read at once."""
    found = texts(150)
    pairs = [write(tmp_path / kind, kind, found) for kind in ("jsonl", "parquet", "folder")]
    want = [read_back(prepare(Plan(str(path)), tmp_path / "whole")) for path in pairs]
    monkeypatch.setattr(reading, "BLOCK", block)
    for path, wanted in zip(pairs, want, strict=True):
        got = read_back(prepare(Plan(str(path)), tmp_path / "small"))
        assert Counter(every(got)) == Counter(every(wanted))


def test_shards_are_one_stream(tmp_path, monkeypatch):
    path = write(tmp_path / "d", "jsonl", texts(80))
    whole = prepare(Plan(str(path)), tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "SHARD", 1000)
    parts = prepare(Plan(str(path)), tmp_path / "parts")
    assert len(parts.index["splits"]["train"]["shards"]) > 5
    for split in SPLITS:
        ids = stream(whole, split)
        assert np.array_equal(stream(parts, split), ids)
        for start, count in ((0, 0), (990, 25), (999, 1), (1000, 1), (len(ids) - 3, 10), (len(ids), 4)):
            assert np.array_equal(parts.read(split, start, count), ids[start : start + count])
    shard = parts.index["splits"]["train"]["shards"][1]
    mapped = np.load(parts.folder / shard["file"], mmap_mode="r")
    assert mapped.dtype == np.uint8 and np.array_equal(mapped, stream(whole, "train")[1000:2000])


def test_made_once_until_the_files_change(tmp_path):
    path = write(tmp_path / "d", "jsonl", texts(50))
    first = prepare(Plan(str(path)), tmp_path / "c")
    made = (first.folder / "index.json").stat().st_ino
    again = prepare(Plan(str(path)), tmp_path / "c")
    assert (again.folder / "index.json").stat().st_ino == made and again.digest == first.digest
    os.utime(path, ns=(1, 1))
    touched = prepare(Plan(str(path)), tmp_path / "c")
    assert (touched.folder / "index.json").stat().st_ino != made and touched.digest == first.digest
    path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert prepare(Plan(str(path)), tmp_path / "c").digest != first.digest
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == ["", ".lock"]


# ---- faults


LINES = {  # of a JSON Lines file, and what is said of them
    "utf8 line": (b'{"text": "ab\xff\xfecd"}', "byte 13 of the line is not UTF-8"),
    "not json": (b'{"text": "ab', "not JSON"),
    "no field": (b'{"body": "ab"}', "field 'text' is not there; expected text; the line has body"),
    "number": (b'{"text": 3}', "field 'text' is a int"),
    "list": (b"[1]", "a JSON list"),
    "surrogate": (b'{"text": "\\ud83d"}', "the text holds half of a surrogate pair"),
    "deep": (b'{"text": ' + b"[" * 50_000, "n"),
}


def faults(folder: Path, kind: str) -> tuple[Path, str, list[str]]:
    """A path, the words of the one line that it earns, and the documents that are left without what cannot be read."""
    found = texts(60)
    lines = [json.dumps({"text": t}).encode() for t in found]
    folder.mkdir()
    path = folder / "some.jsonl"
    if kind in LINES:
        lines[30], said = LINES[kind]
        words = rf"some\.jsonl:31: {said}"
    elif kind == "gz":
        whole = gzip.compress(b"\n".join(lines), mtime=0)
        path = folder / "some.jsonl.gz"
        path.write_bytes(whole[: len(whole) // 2])
        return path, r"some\.jsonl\.gz: damaged from byte \d+ on", []
    elif kind == "text":
        write(folder, "folder", found)
        (folder / "0030.txt").write_bytes(b"first line\nsecond \xc3(line\nthird\xe6")
        return (
            folder,
            r"0030\.txt:2: the byte at offset 18 is not UTF-8",
            [*found[:30], "first line\nsecond (line\nthird", *found[31:]],
        )
    elif kind == "binary":
        write(folder, "folder", found)
        (folder / "0030.txt").write_bytes(b"PNG\n\0\0\x01")
        return folder, r"0030\.txt:2: a NUL byte at offset 4", [*found[:30], *found[31:]]
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        path = folder / "some.parquet"
        if kind == "parquet null":
            pq.write_table(pa.table({"text": [*found[:30], None, *found[31:]]}), path)
            return path, r"some\.parquet: row 31: column 'text' is empty", [*found[:30], *found[31:]]
        if kind == "parquet column":
            pq.write_table(pa.table({"body": found}), path)
            return path, r"some\.parquet: column 'text' is not there; expected text; it has body", []
        pq.write_table(pa.table({"text": found}), path, row_group_size=20, compression="none", use_dictionary=False)
        whole = bytearray(path.read_bytes())
        if kind == "parquet cut":
            path.write_bytes(whole[:-100])
            return path, r"some\.parquet: not a Parquet file", []
        at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
        whole[at : at + 40] = b"\xff" * 40
        path.write_bytes(whole)
        return path, r"some\.parquet: rows 21 to 40: damaged", [*found[:20], *found[40:]]
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    return path, words, [*found[:30], *found[31:]]


FAULTS = [*LINES, "gz", "text", "binary", "parquet null", "parquet column", "parquet cut", "parquet damaged"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_line_or_counted(kind, tmp_path):
    path, words, left = faults(tmp_path / "data", kind)
    with pytest.raises(DataError, match=words) as error:
        prepare(Plan(str(path)), tmp_path / "c")
    assert "\n" not in str(error.value) and error.value.code == 3 and len(str(error.value)) < 500
    assert not [p for p in (tmp_path / "c").iterdir() if p.suffix != ".lock"]  # no litter
    if left:
        corpus = prepare(Plan(str(path), skip_bad=True), tmp_path / "c")
        assert Counter(every(read_back(corpus))) == Counter(left)
        assert corpus.index["skipped"] == len(corpus.index["reasons"]) == (2 if kind == "text" else 1)


def test_empty_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no file"):
        prepare(Plan(str(tmp_path / "empty")), tmp_path / "c")
    (tmp_path / "empty" / "one.txt").write_bytes(b"")
    with pytest.raises(DataError, match="1 files, all of them empty"):
        prepare(Plan(str(tmp_path / "empty")), tmp_path / "c")
    with pytest.raises(DataError, match=r"one\.txt: the file is empty"):
        prepare(Plan(str(tmp_path / "empty" / "one.txt")), tmp_path / "c")
    with pytest.raises(DataError, match="no such file"):
        prepare(Plan(str(tmp_path / "none")), tmp_path / "c")
    folder = write(tmp_path / "d", "folder", texts(90))
    (folder / "0000a.txt").write_bytes(b"")
    corpus = prepare(Plan(str(folder)), tmp_path / "c")
    assert corpus.index["empty_files"] == 1 and sum(corpus.documents(s) for s in SPLITS) == 90
    (tmp_path / "tiny.txt").write_text("ab")
    with pytest.raises(DataError, match="2 bytes of text in all; too few"):
        prepare(Plan(str(tmp_path / "tiny.txt")), tmp_path / "c")


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "index"])
def test_a_damaged_shard_is_named_and_made_anew(how, tmp_path):
    path = write(tmp_path / "d", "jsonl", texts(50))
    whole = prepare(Plan(str(path)), tmp_path / "c")
    shard = whole.folder / "train-00000.npy"
    if how == "index":
        (whole.folder / "index.json").write_text("{")
    elif how == "gone":
        shard.unlink()
    else:
        raw = bytearray(shard.read_bytes())
        raw[500] ^= 1
        shard.write_bytes(raw if how == "flip" else raw[:-10])
    corpus_module._verified.cache_clear()
    with pytest.raises(DataError, match=r"index\.json" if how == "index" else r"train-00000\.npy") as e:
        stream(prepare(Plan(str(path)), tmp_path / "c"), "train")
    assert "\n" not in str(e.value) and "tokenised again" in str(e.value)
    import shutil

    shutil.rmtree(whole.folder)
    assert prepare(Plan(str(path)), tmp_path / "c").digest == whole.digest


def test_a_corpus_that_another_process_replaced_is_not_read_as_the_old_one(tmp_path):
    path = write(tmp_path / "d", "jsonl", texts(50))
    old = prepare(Plan(str(path)), tmp_path / "c")
    stream(old, "train")
    write(tmp_path / "d", "jsonl", [text[::-1] for text in texts(50)])
    new = prepare(Plan(str(path)), tmp_path / "c")
    assert new.folder == old.folder
    stream(new, "train")
    with pytest.raises(DataError, match="its SHA-256 is not the one"):
        stream(old, "train")


def test_a_line_cut_short_behind_the_check_is_no_crash(tmp_path, monkeypatch):
    path = write(tmp_path / "d", "jsonl", texts(50))
    corpus = prepare(Plan(str(path)), tmp_path / "c")
    stream(corpus, "train")
    shard = corpus.folder / "train-00000.npy"
    monkeypatch.setattr(corpus_module, "_verified", lambda *given: None)
    os.truncate(shard, 200)
    with pytest.raises(DataError, match=r"train-00000\.npy: cut short at id"):
        stream(corpus, "train")


LONG = """
import json, resource, sys
from pathlib import Path
from statewise.text import Plan, prepare
folder, kind, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
text = ("one line of words \\u00e9 \\U0001f600 " * 40000)[:1 << 20]
path = folder / ("long.jsonl" if kind == "jsonl" else "long.txt")
with open(path, "w", encoding="utf-8") as file:
    if kind == "jsonl":
        file.write('{"id": {"text": "no"}, "list": [1, "]"], "text": "')
    for _ in range(size):
        file.write(json.dumps(text)[1:-1] if kind == "jsonl" else text)
    if kind == "jsonl":
        file.write('", "more": null}\\n')
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = prepare(Plan(str(path)), folder / "c")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
want = size * len(text.encode())
assert sum(corpus.index["splits"][s]["bytes"] for s in ("train", "validation", "test")) == want
part = corpus.tokenizer.decode_bytes(corpus.read("train", 1, 1 << 20))
assert part == (text * 2).encode()[: 1 << 20]
print((after - before) / 1024)
"""


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_long_line_takes_constant_memory(kind, tmp_path):
    """A line of 50 MB and more: memory grows by what a shard takes, not by the line."""
    words = [sys.executable, "-c", LONG, str(tmp_path), kind, "50"]
    grown = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert grown < 60


def test_a_long_line_that_is_broken_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 64)
    path = tmp_path / "long.jsonl"
    fine = "\n".join(json.dumps({"text": t}) for t in texts(30))
    for line, words in (
        ('{"text": "' + "ab" * 100, "without a closing quote"),
        ('{"texts": "' + "ab" * 100 + '"}', "no text in a field 'text'"),
        ('{"text": 3, "b": "' + "ab" * 100 + '"}', "no text in a field 'text'"),
        ('{"text": "' + "ab" * 100 + '", "b": [1, 2', "a bracket is not closed"),
        ('{"text": "' + "ab" * 100 + r'\x"}', "not JSON"),
    ):
        path.write_text(fine + "\n" + line + "\n" + fine)
        with pytest.raises(DataError, match=f"long.jsonl:31: .*{words}"):
            prepare(Plan(str(path)), tmp_path / "c")
        corpus = prepare(Plan(str(path), skip_bad=True), tmp_path / "c")
        found = Counter(every(read_back(corpus)))
        assert all(found[text] == 2 for text in texts(30)) and corpus.index["skipped"] == 1


SLOW = """
import sys, time
from pathlib import Path
from statewise.text import Plan, prepare
calls = 0
def progress(what, done, total):
    global calls
    calls += 1
    if calls == 5:
        print("in the middle", flush=True)
        time.sleep(600)
prepare(Plan(sys.argv[1]), Path(sys.argv[2]), progress)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_tokenising_leaves_nothing_broken(sent, tmp_path):
    path = write(tmp_path / "d", "folder", texts(60))
    words = [sys.executable, "-c", SLOW, str(path), str(tmp_path / "c")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in the middle\n"
        process.send_signal(sent)
    assert process.returncode != 0
    made = [p for p in (tmp_path / "c").iterdir() if p.suffix != ".lock"]
    assert made == [] if sent == signal.SIGINT else all(p.suffix == ".new" for p in made)
    corpus = prepare(Plan(str(path)), tmp_path / "c")
    assert sum(corpus.documents(s) for s in SPLITS) == 60
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("back", [True, False])
def test_killed_between_the_renames_the_old_corpus_is_still_there(back, tmp_path):
    """back: the text is what it was again. Else it stays the new one, and is tokenised."""
    path = write(tmp_path / "d", "jsonl", texts(50))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    first, place, whole = prepare(Plan(str(path)), tmp_path / "c"), tmp_path / "c", path.read_bytes()
    made = (first.folder / "index.json").stat().st_ino
    path.write_bytes(whole + json.dumps({"text": "one more"}).encode())

    def killed() -> None:
        def rename(old: Path, new: Path) -> None:
            if Path(new) == first.folder:
                os._exit(9)
            kept(old, new)

        kept, os.rename = os.rename, rename
        prepare(Plan(str(path)), place)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    if back:
        path.write_bytes(whole)
        os.utime(path, ns=times)
    corpus = prepare(Plan(str(path)), place)
    assert sum(corpus.documents(s) for s in SPLITS) == 50 + (not back)
    assert ((corpus.folder / "index.json").stat().st_ino == made) == back
    assert sorted(p.suffix for p in place.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("count", [3, 200])
def test_a_tokenizer_is_trained_on_no_more_than_its_sample(count, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "SAMPLE", 4000)
    seen: list[int] = []

    def train(found, vocab):
        seen.append(sum(len(piece) for piece in found))
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "train_bpe", train)
    path = write(tmp_path / "d", "folder", ["some words and more " * 20] * count)
    with pytest.raises(KeyboardInterrupt):
        prepare(Plan(str(path), tokenizer="bpe"), tmp_path / "c")
    assert 1000 < seen[0] <= 4000


def test_progress_goes_to_the_end(tmp_path):
    path, seen = write(tmp_path / "d", "folder", texts(90)), []
    prepare(Plan(str(path)), tmp_path / "c", lambda *event: seen.append(event))
    done = [n for what, n, _ in seen if what == "tokenise"]
    assert done == sorted(done) and done[-1] == seen[-1][2] == sum(p.stat().st_size for p in path.iterdir())


def test_what_a_plan_does_not_take():
    for wrong in ({"tokenizer": "words"}, {"held_out": 0.5}, {"held_out": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Plan("x", **wrong)


def test_baseline_is_the_entropy_of_pairs(tmp_path):
    (tmp_path / "ab.txt").write_bytes(b"abcd" * 50_000)
    assert prepare(Plan(str(tmp_path / "ab.txt")), tmp_path / "c").baseline < 0.02
    coin = bytes(np.random.default_rng(0).integers(48, 50, 300_000, dtype=np.uint8))
    (tmp_path / "coin.txt").write_bytes(coin)
    assert prepare(Plan(str(tmp_path / "coin.txt")), tmp_path / "c").baseline == pytest.approx(1, abs=0.01)
