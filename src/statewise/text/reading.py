"""Documents out of files of any size, in pieces, so that memory does not grow with a file, a line or a text.

Text files (one document each), JSON lines (one per line) and Parquet (one per row), the first two also as .gz; or a
folder of these. What cannot be taken is told with file and line, and nothing is left out in silence.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..core import DataError, UsageError
from ..core.files import open_checked, shown

BLOCK = 1 << 20  # bytes that are read, and at most stand in a piece
ENDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}

Complain = Callable[[str], None]  # raises, or notes what is left out


@dataclass(frozen=True)
class TextSource:
    """One file: how it is read, its size and when it changed."""

    path: Path
    name: str  # inside its folder
    kind: str  # "text", "jsonl" or "parquet"
    size: int
    changed: int


def listing(path: Path) -> list[TextSource]:
    """The files of a path, in the order of their names; hidden ones are left out.

    Raises DataError where there is none, or where the path is neither a file nor a folder. Blocks on nothing.
    """
    if not path.is_dir():
        with open_checked(path) as file:
            found = os.fstat(file.fileno())
        if not found.st_size:
            raise DataError(f"{shown(path)}: the file is empty")
        return [TextSource(path, path.name, _kind(path), found.st_size, found.st_mtime_ns)]
    files = []
    for inside in sorted(path.rglob("*")):
        name = inside.relative_to(path)
        if inside.is_file() and not any(part.startswith(".") for part in name.parts):
            found = inside.stat()
            files.append(TextSource(inside, str(name), _kind(inside), found.st_size, found.st_mtime_ns))
    if not any(file.size for file in files):
        what = f"{len(files)} files, all of them empty" if files else "no file"
        raise DataError(f"{shown(path)}: the folder holds {what}; expected text, .jsonl or .parquet")
    return files


def _kind(path: Path) -> str:
    return ENDS.get((path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower(), "text")


def documents(
    source: TextSource, field: str, complain: Complain, moved: Callable[[int], None] = lambda n: None
) -> Iterator[Iterator[bytes]]:
    """The documents of a file, each as pieces: valid UTF-8 of at most BLOCK bytes, cut between words where it can be.

    field: the name of the text in JSON lines and Parquet. complain is called with each thing that cannot be taken; if
    it returns, that is left out: of a text file the bytes, of the others the line or row (what came before in a line
    longer than BLOCK stays), of a damaged file the rest. moved is called with the bytes of the file read so far. Take
    the pieces of a document before the next one.
    """
    if source.kind == "parquet":
        yield from _parquet(source, field, complain, moved)
        return
    with open_checked(source.path) as raw:
        packed = source.path.suffix.lower() == ".gz"
        file = gzip.GzipFile(fileobj=raw) if packed else io.BufferedReader(cast(io.RawIOBase, raw), BLOCK)
        damaged = lambda error: complain(f"{shown(source.path)}: damaged from byte {raw.tell()} on ({error})")
        told = lambda: moved(raw.tell())
        reader = Reader(file, damaged)
        if source.kind == "jsonl":
            yield from _json_lines(source.path, reader, field, complain, told)
        else:
            yield _text(source.path, reader, complain, told)


class Reader:
    """A file that ends where it is damaged, having said so."""

    def __init__(self, file: io.BufferedReader[Any] | gzip.GzipFile, damaged: Callable[[Exception], None]):
        self.file, self.damaged, self.ended = file, damaged, False

    def read(self, size: int) -> bytes:
        parts, left = [], size
        while left and (part := self._or_end(self.file.read1, left)):  # read() would drop what stands before damage
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def readline(self, size: int) -> bytes:
        return self._or_end(self.file.readline, size)

    def _or_end(self, take: Callable[[int], bytes], size: int) -> bytes:
        if self.ended:
            return b""
        try:
            return take(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.ended = True
            self.damaged(error)
            return b""


def _text(path: Path, file: Reader, complain: Complain, told: Callable[[], None]) -> Iterator[bytes]:
    line, at, left = 1, 0, b""  # `at` is the place in the file of the first byte of `left`
    block = file.read(BLOCK)
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        complain(f"{shown(path)}:1: the file is UTF-16; save it as UTF-8")
        return
    if block.startswith(b"\xef\xbb\xbf"):
        block, at = block[3:], 3
    while block:
        after = file.read(BLOCK)
        told()
        text = left + block
        nul = text.find(0)
        if nul >= 0:
            line += text.count(b"\n", 0, nul)
            complain(f"{shown(path)}:{line}: a NUL byte at offset {at + nul}; expected text, this looks like a binary "
                     "file")  # fmt: skip
            return
        good, done, bad = _valid(text, last=not after)
        for start in bad:
            number = line + text.count(b"\n", 0, start)
            complain(f"{shown(path)}:{number}: the byte at offset {at + start} is not UTF-8")
        cut = _between_words(good) if after else len(good)
        left = good[cut:] + text[done:]
        line += text.count(b"\n", 0, len(text) - len(left))
        at += len(text) - len(left)
        if cut:
            yield good[:cut]
        block = after


def _valid(text: bytes, *, last: bool) -> tuple[bytes, int, list[int]]:
    """The UTF-8 in a text, how much of the text was looked at, and where bytes are that are none.

    A letter cut off at the end is not looked at, unless the text is the last.
    """
    kept: list[bytes] = []
    bad: list[int] = []
    start = 0
    while True:
        try:
            text[start:].decode()
            return b"".join([*kept, text[start:]]), len(text), bad
        except UnicodeDecodeError as error:
            kept.append(text[start : start + error.start])
            if start + error.end == len(text) and error.reason == "unexpected end of data" and not last:
                return b"".join(kept), start + error.start, bad
            bad.append(start + error.start)
            start += error.end


def _between_words(text: bytes) -> int:
    """Where a text may be cut: behind its last line, else before its last word, else at its end."""
    near = max(0, len(text) - 4096)
    line, word = text.rfind(b"\n", near) + 1, text.rfind(b" ", near)
    return line if line > 0 else word if word > 0 else len(text)


def in_pieces(text: bytes) -> Iterator[bytes]:
    """A text, UTF-8, as pieces of at most BLOCK bytes."""
    start = 0
    while len(text) - start > BLOCK:
        part, _, _ = _valid(text[start : start + BLOCK], last=False)
        part = part[: _between_words(part)]
        yield part
        start += len(part)
    if start < len(text):
        yield text[start:]


# ---- JSON lines


def _json_lines(
    path: Path, file: Reader, field: str, complain: Complain, told: Callable[[], None]
) -> Iterator[Iterator[bytes]]:
    number = 0
    while line := file.readline(BLOCK):
        number += 1
        told()
        where = f"{shown(path)}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) >= BLOCK - 3 and not line.endswith(b"\n"):
            long = LongLine(line, file)
            yield _told(long.texts(field), where, complain)
            long.skip()
        elif line.strip():
            try:
                text = _field(json.loads(line), field)
            except (ValueError, RecursionError) as error:
                complain(f"{where}: {_said(error)}")
            else:
                yield in_pieces(text)


def _told(pieces: Iterator[bytes], where: str, complain: Complain) -> Iterator[bytes]:
    try:
        yield from pieces
    except ValueError as error:
        complain(f"{where}: {_said(error)}")


def _said(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} of the line is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return str(error) if not isinstance(error, RecursionError) else "nested too deeply"


def _field(record: object, field: str) -> bytes:
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}; expected an object with a field {field!r}")
    if not isinstance(text := record.get(field), str):
        has = ", ".join(map(str, record))[:80]
        raise ValueError(
            f"field {field!r} is {'a ' + type(text).__name__ if field in record else 'not there'}; expected text; "
            f"the line has {has or 'no field'}"
        )
    return _encoded(text)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which UTF-8 cannot hold") from None


_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SIGN = re.compile(rb'[{}\[\],:"]')


class LongLine:
    """A JSON object that stands in one line too long to be held, read from left to right."""

    def __init__(self, first: bytes, file: Reader):
        self.text, self.at, self.file = first, 0, file

    def more(self) -> bool:
        """Drop what was read, add the next block; False at the end of the line."""
        if self.text.endswith(b"\n"):
            return False
        block = self.file.readline(BLOCK)
        self.text, self.at = self.text[self.at :] + block, 0
        return bool(block)

    def skip(self) -> None:
        """Go to the end of the line."""
        self.at = len(self.text)
        while self.more():
            self.at = len(self.text)

    def sign(self) -> str:
        """The next bracket, comma, colon or quote; "" at the end."""
        while (found := _SIGN.search(self.text, self.at)) is None:
            self.at = len(self.text)
            if not self.more():
                return ""
        self.at = found.end()
        return found[0].decode()

    def string(self) -> Iterator[bytes]:
        """What stands up to the closing quote, by pieces of UTF-8. Raises ValueError."""
        while True:
            found = _INSIDE.match(self.text, self.at)
            assert found is not None  # it matches the empty text
            end = found.end()
            if self.text[end : end + 1] == b'"':
                yield _unquoted(self.text[self.at : end])
                self.at = end + 1
                return
            for back in range(13):  # not in the midst of a letter, an escape or a pair of them
                try:
                    piece = _unquoted(self.text[self.at : max(end - back, self.at)])
                    break
                except ValueError:
                    if back == 12:
                        raise
            yield piece
            self.at = max(end - back, self.at)
            if not self.more():
                raise ValueError("not JSON: a text without a closing quote")

    def texts(self, field: str) -> Iterator[bytes]:
        """The text of a field of the outermost object. Raises ValueError where it is not there or not a text."""
        depth, name, value, seen = 0, b"", False, False
        while sign := self.sign():
            if sign == '"':
                mine = depth == 1 and value and name == field.encode()
                name = b"" if depth == 1 and not value else name
                for piece in self.string():
                    if mine:
                        seen = True
                        yield piece
                    elif depth == 1 and not value:
                        name = (name + piece)[:BLOCK]
            elif sign in "{[":
                depth += 1
            elif sign in "}]":
                depth -= 1
                if depth <= 0:
                    break
            elif depth == 1:
                value = sign == ":"
        if depth != 0:
            raise ValueError("not JSON: a bracket is not closed")
        if not seen:
            raise ValueError(f"no text in a field {field!r}")


def _unquoted(raw: bytes) -> bytes:
    """The inside of a JSON string as UTF-8."""
    return _encoded(json.loads(b'"' + raw + b'"'))


# ---- Parquet


def _parquet(
    source: TextSource, field: str, complain: Complain, moved: Callable[[int], None]
) -> Iterator[Iterator[bytes]]:
    """One row after the other; a row group that cannot be read is left out as a whole."""
    path = source.path
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError(f"{shown(path)}: reading Parquet needs pyarrow: pip install 'statewise[data]'") from None
    try:
        file = pq.ParquetFile(path)
        kind = file.schema_arrow.field(field).type if field in file.schema_arrow.names else None
    except (pa.ArrowException, OSError) as error:
        complain(f"{shown(path)}: not a Parquet file ({_first_line(error)})")
        return
    with file:
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            is_what = "not there" if kind is None else f"of type {kind}"
            complain(f"{shown(path)}: column {field!r} is {is_what}; expected text; it has "
                     f"{', '.join(file.schema_arrow.names)[:80]}")  # fmt: skip
            return
        row, groups = 0, file.num_row_groups
        for group in range(groups):
            size = file.metadata.row_group(group).num_rows
            done = 0
            try:
                for batch in file.iter_batches(64, row_groups=[group], columns=[field]):
                    for cell in batch.column(0):
                        done += 1
                        if cell.as_buffer() is None:
                            complain(f"{shown(path)}: row {row + done}: column {field!r} is empty (null)")
                            continue
                        text = cell.as_buffer().to_pybytes()
                        good, _, bad = _valid(text, last=True)
                        for at in bad:
                            complain(f"{shown(path)}: row {row + done}: byte {at} is not UTF-8")
                        yield in_pieces(good)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, DataError):
                    raise
                complain(f"{shown(path)}: rows {row + done + 1} to {row + size}: damaged ({_first_line(error)})")
            row += size
            moved(source.size * (group + 1) // groups)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
