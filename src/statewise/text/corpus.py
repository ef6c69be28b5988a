"""A corpus: text tokenised once, kept as numbers that can be read from any place, checked by hash.

    FOLDER/index.json        what it was made of, the sizes of its splits, the SHA-256 of every shard, what was left out
           tokenizer.json
           train-00000.npy   uint8, uint16 or uint32, SHARD ids each but the last: numpy.load(mmap_mode="r") takes it
           validation-00000.npy, test-00000.npy

The ids of a split are one stream: END document END document ... END. A model that forgets at each END reads every
document from the same fresh state, whatever stands before it, and is asked for every id of it and for its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..core import DataError, StatewiseError, UsageError, read_json
from ..core.files import FLAGS, check_format, hash_file, json_bytes, shown, sync_directory, write_error, write_synced
from .reading import TextSource, documents, listing
from .tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, save_tokenizer, train_bpe

FORMAT = 1
SPLITS = ("train", "validation", "test")
SHARD = 1 << 23  # ids in a shard
FEW = 20  # documents: with fewer, the text is split by place
SAMPLE = 32 << 20  # bytes of text that a tokenizer is trained on
LEAST = 1 << 16  # bytes of a file that it is trained on, where the file has them
GATHER = 1 << 20  # bytes that are tokenised at once
REASONS = 20  # of what was left out, that are kept
INDEX_LIMIT = 1 << 28

Progress = Callable[[str, int, int], None]  # (what is done, so much, of so much)


@dataclass(frozen=True)
class Plan:
    """What a corpus is made of and how.

    held_out: the share of the documents that goes to validation, and the same again to the test. Which one does depends
    on how it begins alone, so that a document that stands there twice is on one side. Fewer than 20 documents are split
    by place: the first part of the text trains, the last but one is for validation, the last for the test.
    skip_bad: leave out what cannot be read, counted and named in the index, instead of refusing it.
    """

    path: str
    field: str = "text"
    tokenizer: str = "bytes"
    vocab: int = 4096  # of tokenizer "bpe"
    held_out: float = 0.05
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer not in ("bytes", "bpe"):
            raise UsageError(f"tokenizer {self.tokenizer!r}; expected 'bytes' or 'bpe'")
        if not 0 < self.held_out < 0.5:
            raise UsageError(f"held_out {self.held_out!r}; expected above 0 and below 0.5")

    @property
    def key(self) -> str:
        """Names the folder of the corpus."""
        made = asdict(self) | {"path": os.path.abspath(os.path.expanduser(self.path))}
        if self.tokenizer == "bytes":
            del made["vocab"]
        return hashlib.sha256(json.dumps([FORMAT, made], sort_keys=True).encode()).hexdigest()[:16]


class Corpus:
    """A corpus in its folder. Every shard is compared with its hash when a process first reads from it, and
    again when the file was replaced."""

    def __init__(self, folder: Path):
        """Raises DataError for a folder that holds none, or one whose files are not of the size they had."""
        self.folder = folder
        try:
            self.index = read_json(folder / "index.json", limit=INDEX_LIMIT)
        except UsageError as error:
            raise DataError(f"{error}; {self._advice()}") from None
        check_format(self.index.get("format"), FORMAT, shown(folder / "index.json"))
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.dtype = np.dtype(self.index["dtype"])
        for split in SPLITS:
            for shard in self.index["splits"][split]["shards"]:
                path = folder / shard["file"]
                size = path.stat().st_size if path.is_file() else -1
                if size != shard["size"]:
                    found = f"{size} bytes" if size >= 0 else "not there"
                    raise DataError(f"{shown(path)}: {found}; expected {shard['size']} bytes; {self._advice()}")

    def tokens(self, split: str) -> int:
        """Ids in a split, its ends included."""
        return int(self.index["splits"][split]["tokens"])

    def documents(self, split: str) -> int:
        return int(self.index["splits"][split]["documents"])

    def bytes(self, split: str) -> int:
        """Bytes of text in a split, one more for each document: what `Tokenizer.sizes` adds up to."""
        return int(self.index["splits"][split]["bytes"]) + self.documents(split)

    @property
    def baseline(self) -> float:
        """Bits per byte of the test split by a table of byte pairs counted on the training split."""
        return float(self.index["baseline"])

    @property
    def digest(self) -> str:
        """Stands for the ids of all splits and the tokenizer."""
        shards = [shard["sha256"] for split in SPLITS for shard in self.index["splits"][split]["shards"]]
        return hashlib.sha256(json.dumps([shards, self.index["tokenizer"]]).encode()).hexdigest()[:16]

    def read(self, split: str, start: int, count: int) -> np.ndarray:
        """Ids from `start` on, (<= count,) int64: fewer at the end. Raises DataError for a damaged shard.

        Read by place rather than mapped: a file that is cut short is an error with a name, not the end of the process.
        """
        end = min(start + count, self.tokens(split))
        parts, shards = [], self.index["splits"][split]["shards"]
        while start < end:
            number, inside = divmod(start, self.index["shard"])
            size = min(end - start, self.index["shard"] - inside)
            path = self.folder / shards[number]["file"]
            try:
                at = path.stat()
                _verified(path, (at.st_ino, at.st_mtime_ns, at.st_size), shards[number]["sha256"], self._advice())
                part = np.fromfile(path, self.dtype, size, offset=shards[number]["data"] + inside * self.dtype.itemsize)
            except OSError as error:
                if isinstance(error, StatewiseError):
                    raise
                raise DataError(f"{shown(path)}: {error.strerror or error}") from error
            if len(part) != size:
                raise DataError(f"{shown(path)}: cut short at id {inside + len(part)}; {self._advice()}")
            parts.append(part)
            start += size
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def _advice(self) -> str:
        return f"it is damaged: delete {shown(self.folder)}, and the text is tokenised again"


@lru_cache(maxsize=1 << 16)
def _verified(path: Path, version: tuple[int, ...], sha256: str, advice: str) -> None:
    """version: what is another one when another process has put a file of the same name in its place."""
    if hash_file(path)[1] != sha256:
        raise DataError(f"{shown(path)}: its SHA-256 is not the one in the index; {advice}")


def prepare(plan: Plan, place: Path, progress: Progress | None = None) -> Corpus:
    """The corpus of a plan in `place`, tokenised now unless that was done and the files are as they were then.

    It appears by one rename, of an older one by two: what is interrupted leaves what there was, which the next call
    puts back where the kill came between the two. Other processes wait for it.

    Raises DataError for what cannot be read, with file and line, ResourceError where the disk is full.
    """
    files = listing(Path(plan.path).expanduser())
    sources = _digest_of(files)
    final = place / plan.key
    if (found := _current(final, sources)) is not None:
        return found
    beside, aside = place / f"{plan.key}.new", place / f"{plan.key}.old"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place / f"{plan.key}.lock"):
            if aside.exists() and not final.exists():  # a process was killed between the two renames
                os.rename(aside, final)
            for left in (beside, aside):
                shutil.rmtree(left, ignore_errors=True)
            if (found := _current(final, sources)) is not None:
                return found
            try:
                beside.mkdir()
                _write(plan, files, sources, beside, progress or (lambda what, done, total: None))
                if final.exists():
                    os.rename(final, aside)
                os.rename(beside, final)
                sync_directory(place)
                shutil.rmtree(aside, ignore_errors=True)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StatewiseError):
            raise
        raise write_error(final, error) from error
    return Corpus(final)


def _current(folder: Path, sources: str) -> Corpus | None:
    if not (folder / "index.json").is_file():
        return None
    corpus = Corpus(folder)
    return corpus if corpus.index.get("sources") == sources else None


def _digest_of(files: list[TextSource]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.changed}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process holds the file. On Windows nothing is held."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | FLAGS, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# ---- making one


class Losses:
    """What cannot be read: refused, or counted."""

    def __init__(self, skip: bool):
        self.skip, self.count, self.reasons = skip, 0, list[str]()

    def __call__(self, reason: str) -> None:
        if not self.skip:
            raise DataError(f"{reason}; skip_bad=true goes on without what cannot be read")
        self.count += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(reason)


class Parts:
    """The documents of all files as (split, begins a document, piece), split by how they begin or by place."""

    def __init__(self, plan: Plan, files: list[TextSource]):
        self.plan, self.files = plan, files
        self.total: int | None = None  # bytes of text, where they are split by place

    def __call__(
        self, losses: Losses, moved: Callable[[int], None] = lambda n: None
    ) -> Iterator[tuple[str, bool, bytes]]:
        done, before = 0, 0
        for file in self.files:
            start = before
            for pieces in documents(file, self.plan.field, losses, lambda n: moved(start + n)):  # noqa: B023
                split, opened = "", False
                for piece in pieces:
                    for place, part in self._cut(piece, done) if self.total is not None else [("", piece)]:
                        if self.total is None:
                            place = split or self._by_beginning(part)
                        yield place, not opened or place != split, part
                        split, opened = place, True
                        done += len(part)
            before += file.size
            moved(before)

    def by_place(self) -> None:
        """Split by place from now on; reads everything once to know how much it is."""
        self.total = None
        self.total = sum(len(part) for _, _, part in self(Losses(True)))

    def _by_beginning(self, piece: bytes) -> str:
        draw = int.from_bytes(hashlib.blake2b(piece[: 1 << 16], digest_size=8).digest(), "big") / 2**64
        return SPLITS[1 if draw < self.plan.held_out else 2 if draw < 2 * self.plan.held_out else 0]

    def _cut(self, piece: bytes, done: int) -> Iterator[tuple[str, bytes]]:
        """A piece that begins behind `done` bytes, cut where the splits meet, not inside a letter."""
        assert self.total is not None
        start = 0
        for split, share in zip(SPLITS, (1 - 2 * self.plan.held_out, 1 - self.plan.held_out, 2.0), strict=True):
            end = min(max(int(self.total * share + 1e-6) - done, start), len(piece))
            while start < end < len(piece) and piece[end] & 0xC0 == 0x80:
                end -= 1
            if end > start:
                yield split, piece[start:end]
            start = end


def _write(plan: Plan, files: list[TextSource], sources: str, folder: Path, progress: Progress) -> None:
    parts, size = Parts(plan, files), sum(file.size for file in files)
    texts = [file for file in files if file.size]
    if all(file.kind == "text" for file in texts) and len(texts) < FEW:
        parts.by_place()
    while True:
        tokenizer = _tokenizer(plan, parts, progress)
        losses = Losses(plan.skip_bad)
        made = _encode(parts, tokenizer, losses, folder, lambda n: progress("tokenise", min(n, size), size))
        count = sum(part["documents"] for part in made["splits"].values())
        if parts.total is not None or (count >= FEW and all(part["documents"] for part in made["splits"].values())):
            break
        for path in folder.glob("*.npy"):
            path.unlink()
        parts.by_place()
    empty = [split for split in SPLITS if not made["splits"][split]["documents"]]
    if empty:
        total = sum(part["bytes"] for part in made["splits"].values())
        raise DataError(f"{shown(plan.path)}: {total} bytes of text in all; too few for a {empty[0]} split")
    save_tokenizer(tokenizer, folder)
    index = {
        "format": FORMAT,
        "plan": asdict(plan),
        "sources": sources,
        "files": len(files),
        "empty_files": len(files) - len(texts),
        "split_by": "place" if parts.total is not None else "document",
        "tokenizer": hash_file(folder / "tokenizer.json")[1],
        **made,
        "skipped": losses.count,
        "reasons": losses.reasons,
    }
    write_synced(folder / "index.json", [json_bytes(index)])
    sync_directory(folder)


def _tokenizer(plan: Plan, parts: Parts, progress: Progress) -> Tokenizer:
    """Bytes, or byte pairs of the beginning of the training text: SAMPLE bytes of all, of each file as is its share.

    A packed file may hold more than its size says, so each may give LEAST at the least, unless there are so many files
    that this would be half of the sample.
    """
    if plan.tokenizer == "bytes":
        return ByteTokenizer()
    total, count = sum(file.size for file in parts.files), len(parts.files)
    least = min(LEAST, SAMPLE // (2 * count))
    some = [(parts, SAMPLE)] if parts.total is not None else [
        (Parts(plan, [file]), least + (SAMPLE - count * least) * file.size // max(total, 1)) for file in parts.files
    ]  # fmt: skip

    def texts() -> Iterator[bytes]:
        for of, left in some:
            for split, _, piece in of(Losses(True)):
                if left <= 0:
                    break
                if split == "train":
                    yield piece[:left].decode("utf-8", "ignore").encode()  # a letter cut in two is left out
                    left -= len(piece)

    progress("train the tokenizer", 0, 1)
    return train_bpe(texts(), plan.vocab)


def _encode(
    parts: Parts, tokenizer: Tokenizer, losses: Losses, folder: Path, moved: Callable[[int], None]
) -> dict[str, Any]:
    """Tokenise and write all documents; what the index says of them."""
    dtype = np.dtype(np.uint8 if tokenizer.vocab <= 1 << 8 else np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
    writers = {split: Writer(folder, split, dtype) for split in SPLITS}
    pairs = {split: Pairs() for split in SPLITS}
    waiting: list[tuple[str, bool, bytes]] = []
    gathered = 0

    def flush() -> None:
        for (split, begins, piece), ids in zip(
            waiting, tokenizer.encode_many([piece for _, _, piece in waiting]), strict=True
        ):
            writers[split].add(ids, tokenizer.end if begins else None)
            writers[split].bytes += len(piece)
            pairs[split].add(piece, begins)
        waiting.clear()

    for part in parts(losses, moved):
        waiting.append(part)
        gathered += len(part[2]) + 64
        if gathered >= GATHER:
            flush()
            gathered = 0
    flush()
    baseline = pairs["test"].cost(pairs["train"])
    return {
        "dtype": dtype.name,
        "shard": SHARD,
        "splits": {split: writer.close(tokenizer.end) for split, writer in writers.items()},
        "baseline": baseline,
    }


class Writer:
    """The stream of a split, written shard by shard."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.waiting: list[np.ndarray] = []
        self.held = self.tokens = self.documents = self.bytes = 0
        self.shards: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, end: int | None) -> None:
        """Append ids, behind an end where a document begins."""
        if end is not None:
            self.waiting.append(np.array([end], self.dtype))
            self.documents += 1
        self.waiting.append(ids.astype(self.dtype))
        self.held += len(ids) + (end is not None)
        while self.held >= SHARD:
            self._shard(SHARD)

    def close(self, end: int | None) -> dict[str, Any]:
        """Write the rest and the last end; what the index says of the split."""
        self.waiting.append(np.array([end] * bool(self.documents), self.dtype))
        self.held += bool(self.documents)
        while self.held:
            self._shard(min(self.held, SHARD))
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self.shards}

    def _shard(self, size: int) -> None:
        ids = np.concatenate(self.waiting)
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (size,)}
        )
        name = f"{self.split}-{len(self.shards):05d}.npy"
        written, digest = write_synced(self.folder / name, [head.getvalue(), ids[:size].tobytes()])
        self.shards.append({"file": name, "size": written, "data": len(head.getvalue()), "sha256": digest})
        self.waiting, self.held = [ids[size:].copy()], self.held - size
        self.tokens += size


class Pairs:
    """How often each byte follows each other one, 0xFF being the end of a document."""

    def __init__(self) -> None:
        self.count = np.zeros((256, 256), np.int64)
        self.waiting: list[bytes] = []
        self.held = 0

    def add(self, piece: bytes, begins: bool) -> None:
        self.waiting += [b"\xff", piece] if begins else [piece]
        self.held += len(piece) + begins
        if self.held >= GATHER:
            self._add_up()

    def _add_up(self) -> None:
        text = np.frombuffer(b"".join(self.waiting), np.uint8).astype(np.int64)
        if len(text):
            self.count += np.bincount(text[:-1] * 256 + text[1:], minlength=1 << 16).reshape(256, 256)
            self.waiting, self.held = [text[-1:].astype(np.uint8).tobytes()], 1

    def cost(self, known: Pairs) -> float:
        """Bits per byte of these pairs by the table of the others, each row with four imagined bytes of single ones."""
        for pairs in (self, known):
            pairs.add(b"", begins=True)
            pairs._add_up()
        if not self.count.any():
            return 8.0
        single = (known.count.sum(0) + 1) / (known.count.sum() + 256)
        table = (known.count + 4 * single) / (known.count.sum(1, keepdims=True) + 4)
        return float(-(self.count * np.log2(table)).sum() / self.count.sum())
