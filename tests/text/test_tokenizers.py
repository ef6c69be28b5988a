"""Tokenizers: bytes to ids and back is exact, the end is no text, files are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.core import DataError, UsageError
from statewise.text import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer, save_tokenizer, train_bpe

pytest.importorskip("tokenizers")
TEXTS = [b"the quick brown fox jumps over the lazy dog. " * 20, "naïve café, 東京, 😀 — Ω\r\n\t  two  spaces".encode()]
BPE = train_bpe(TEXTS * 20, 300)


def tokenizers() -> list[Tokenizer]:
    return [ByteTokenizer(), BPE]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda t: t.kind)
@given(text=st.text())
@settings(max_examples=200)
def test_there_and_back(tokenizer, text):
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        with pytest.raises(DataError, match="half of a pair"):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == raw and tokenizer.decode(ids) == text
    assert tokenizer.end not in ids and (ids < tokenizer.vocab).all()
    assert tokenizer.sizes()[ids].sum() == len(raw)
    assert tokenizer.decode_bytes([tokenizer.end, *ids, tokenizer.end]) == raw


def test_no_text_is_the_end():
    for word in ("<|endoftext|>", "<|end|>", "\0", "ÿ"):
        for tokenizer in tokenizers():
            assert tokenizer.end not in tokenizer.encode(word)


def test_merges_shorten_and_are_learned_alike():
    assert BPE.vocab == 300 and len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert train_bpe(TEXTS * 20, 300).record() == BPE.record()
    assert train_bpe([b"ab"], 4096).vocab == 258  # 256 bytes, one merge, the end


def test_kept_as_json(tmp_path: Path):
    for tokenizer in [*tokenizers(), ByteTokenizer(end=None)]:
        save_tokenizer(tokenizer, tmp_path)
        again = load_tokenizer(tmp_path)
        assert type(again) is type(tokenizer) and again.record() == tokenizer.record() and again.end == tokenizer.end
        assert (again.encode("some text") == tokenizer.encode("some text")).all()


def test_reading_needs_no_package(tmp_path: Path):
    """Ids become text where `tokenizers` is not installed."""
    save_tokenizer(BPE, tmp_path)
    ids = BPE.encode("the fox").tolist()
    code = (
        "import sys; sys.modules['tokenizers'] = None; from statewise.core import UsageError\n"
        "from statewise.text import load_tokenizer, ByteTokenizer\n"
        f"t = load_tokenizer({str(tmp_path)!r}); assert t.decode({ids}) == 'the fox'\n"
        "assert ByteTokenizer().encode('abc').tolist() == [97, 98, 99]\n"
        "try: t.encode('x')\n"
        "except UsageError as e: print(e)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'statewise[text]'" in said.stdout, said.stderr


def damaged() -> dict[str, dict[str, object]]:
    whole = {"format": 1, "kind": "bpe", **BPE.record()}
    vocabulary = dict(BPE.vocabulary)
    vocabulary.pop("a")
    return {
        "kind": {**whole, "kind": "words"},
        "newer": {**whole, "format": 99},
        "holes": {**whole, "vocabulary": {**BPE.vocabulary, "zz": 10**6}},
        "no byte": {**whole, "vocabulary": dict(zip(vocabulary, range(len(vocabulary))))},
        "letter": {**whole, "vocabulary": {**BPE.vocabulary, "\u4e2d": len(BPE.vocabulary)}},
        "merges": {**whole, "merges": [["a"]]},
        "missing": {"format": 1, "kind": "bpe"},
        "end": {"format": 1, "kind": "bytes", "end": 7},
    }


@pytest.mark.parametrize("name", [*damaged(), "no json", "nothing"])
def test_a_damaged_file_is_one_line(name: str, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    if name != "nothing":
        path.write_text("{" if name == "no json" else json.dumps(damaged()[name]))
    with pytest.raises(DataError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_merges_of_another_vocabulary_are_refused():
    with pytest.raises(DataError, match="not a vocabulary with merges"):
        BpeTokenizer(BPE.vocabulary, [("zz", "qq")]).encode("text")


def test_what_cannot_be_encoded_or_learned():
    with pytest.raises(DataError, match="not UTF-8"):
        ByteTokenizer().encode(b"ab\xff")
    with pytest.raises(DataError, match="byte 2 of a text is not UTF-8"):
        BPE.encode(b"ab\xff")
    with pytest.raises(UsageError, match="id 300; expected 0 to 299"):
        BPE.decode([300])
    for vocab in (256, 1 << 21, True, "300"):
        with pytest.raises(UsageError, match="257"):
            train_bpe(TEXTS, vocab)
