"""Text as ids and back: bytes, or byte pairs merged as the text at hand has them (Sennrich et al. 2016, 1508.07909).

Nothing is downloaded: a tokenizer of byte pairs is trained on the user's own text with the package `tokenizers`, and
kept as JSON. Reading ids back needs no package.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..core import DataError, UsageError, read_json, write_json
from ..core.files import check_format, shown

FORMAT = 1
NAME = "tokenizer.json"
LIMIT = 1 << 27  # bytes of a tokenizer's file


class Tokenizer(abc.ABC):
    """text <-> ids in [0, vocab). Bytes to ids and back is exact: decode_bytes(encode(text)) is the text.

    end: the id that stands before the first document and after each one; no text encodes to it. None where a model was
    trained on one endless text.
    """

    kind: ClassVar[str]
    vocab: int
    end: int | None

    @property
    @abc.abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """The bytes that each id stands for; none for the end."""

    @abc.abstractmethod
    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Each text, UTF-8, as ids (N,) int64, without an end. Raises DataError for bytes that are not UTF-8."""

    @abc.abstractmethod
    def record(self) -> dict[str, Any]:
        """Plain values from which `from_record` makes it again."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """(N,) int64."""
        raw = text if isinstance(text, bytes) else _utf8(text)
        return self.encode_many([raw])[0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, ends left out. Raises UsageError for a number that is no id."""
        pieces = self.pieces
        found = [int(i) for i in ids]
        for i in found:
            if not 0 <= i < self.vocab:
                raise UsageError(f"id {i}; expected 0 to {self.vocab - 1}")
        return b"".join(pieces[i] for i in found)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8, such as a letter cut in two, become the replacement sign."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def sizes(self) -> np.ndarray:
        """(vocab,) int64: how many bytes each id covers. An end counts for one: it is what separates documents."""
        found = np.array([len(piece) for piece in self.pieces], np.int64)
        if self.end is not None:
            found[self.end] = 1
        return found


class ByteTokenizer(Tokenizer):
    """Every byte is an id. The end is 0xFF, a byte that no UTF-8 holds, so that 256 ids are enough."""

    kind = "bytes"
    vocab = 256

    def __init__(self, *, end: int | None = 255):
        if end not in (None, 255):
            raise UsageError(f"ByteTokenizer: end is {end!r}; expected 255 or None")
        self.end = end
        self._pieces = [bytes([i]) if i != end else b"" for i in range(256)]

    @property
    def pieces(self) -> Sequence[bytes]:
        return self._pieces

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        for text in texts:
            if self.end is not None and b"\xff" in text:
                raise DataError(f"byte {text.index(0xFF)} of a text is 0xFF, which is not UTF-8")
        return [np.frombuffer(text, np.uint8).astype(np.int64) for text in texts]

    def record(self) -> dict[str, Any]:
        return {"end": self.end}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ByteTokenizer:
        return cls(end=record["end"])


class BpeTokenizer(Tokenizer):
    """Byte pairs merged in the order of `merges`, within words; the end is the last id, beyond all that text can be.

    vocabulary: what each id spells, in the alphabet of GPT-2 that writes any byte as a printable letter.
    """

    kind = "bpe"

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]):
        letters = {letter: byte for byte, letter in alphabet().items()}
        self.vocabulary, self.merges = dict(vocabulary), [(a, b) for a, b in merges]
        if sorted(self.vocabulary.values()) != list(range(len(self.vocabulary))):
            raise DataError(f"BpeTokenizer: {len(self.vocabulary)} words do not have the ids from 0 on")
        if missing := [letter for letter in letters if letter not in self.vocabulary]:
            raise DataError(f"BpeTokenizer: {len(missing)} of 256 bytes have no id, so not every text has ids")
        self.end = len(self.vocabulary)
        self.vocab = self.end + 1
        words = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        try:
            self._pieces = [bytes(letters[letter] for letter in word) for word in words] + [b""]
        except KeyError as error:
            raise DataError(f"BpeTokenizer: the vocabulary holds {error}, which stands for no byte") from None
        self._inner: Any = None

    @property
    def pieces(self) -> Sequence[bytes]:
        return self._pieces

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        if self._inner is None:
            self._inner = _inner(self.vocabulary, self.merges)
        words = [_text(text) for text in texts]
        return [np.array(found.ids, np.int64) for found in self._inner.encode_batch(words, add_special_tokens=False)]

    def record(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary, "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> BpeTokenizer:
        return cls(record["vocabulary"], [(a, b) for a, b in record["merges"]])


def train_bpe(texts: Iterable[bytes], vocab: int) -> BpeTokenizer:
    """Learn merges from texts (UTF-8), until there are `vocab` ids, the end included, or no pair is left to merge.

    The same texts give the same tokenizer. Raises UsageError below 257 ids and where `tokenizers` is not installed.
    """
    if isinstance(vocab, bool) or not isinstance(vocab, int) or not 257 <= vocab <= 1 << 20:
        raise UsageError(f"train_bpe: vocab is {vocab!r}; expected a whole number from 257 to {1 << 20}")
    inner = _inner({}, [])
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator((_text(text) for text in texts), trainer)
    found = json.loads(inner.to_str())["model"]
    return BpeTokenizer(found["vocab"], [(a, b) for a, b in found["merges"]])


def _inner(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    try:
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, pre_tokenizers
    except ImportError:
        raise UsageError("byte pairs need the package tokenizers: pip install 'statewise[text]'") from None
    try:
        engine = Engine(models.BPE(dict(vocabulary), [*merges]) if vocabulary else models.BPE())
    except BaseException as error:  # a panic of the engine is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(f"BpeTokenizer: not a vocabulary with merges: {str(error)[:100]}") from None
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return engine


KINDS: dict[str, type[ByteTokenizer] | type[BpeTokenizer]] = {"bytes": ByteTokenizer, "bpe": BpeTokenizer}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write it as tokenizer.json into a folder."""
    path = folder / NAME
    write_json(path, {"format": FORMAT, "kind": tokenizer.kind, **tokenizer.record()})
    return path


def load_tokenizer(place: str | Path) -> Tokenizer:
    """The tokenizer of a run, a corpus, or a file that `save_tokenizer` wrote.

    Raises DataError where there is none, and for a file that is damaged or of another kind.
    """
    path = Path(place)
    if path.is_dir():
        path = path / NAME
    try:
        record = read_json(path, limit=LIMIT)
        check_format(record.get("format"), FORMAT, shown(path))
        return KINDS[record["kind"]].from_record(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(path)}: not a tokenizer of statewise ({str(error)[:100]})") from None


def alphabet() -> dict[int, str]:
    """Byte -> printable letter: itself where it prints in Latin-1, else the next free letter from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest: Iterator[int] = iter(range(0x100, 0x200))
    return {byte: chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)}


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"letter {error.start} of the text is half of a pair, which UTF-8 cannot hold") from None


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} of a text is not UTF-8") from None
