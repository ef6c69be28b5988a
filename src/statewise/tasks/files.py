"""Opening the user's files: every fault gets one line that says where it is."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..core import DataError

LIMIT = 2 << 30  # bytes of one file
LINE = 1 << 20  # bytes of one line of a table


def regular(path: Path, limit: int = LIMIT) -> int:
    """The size of a plain, readable, non-empty file. Raises DataError, and never blocks on a pipe or device."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file (from {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "device")
        raise DataError(f"{path}: is a {kind}; expected a file")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: not readable: permission denied")
    if found.st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if found.st_size > limit:
        raise DataError(f"{path}: {found.st_size} bytes; the limit is {limit}; split the file")
    return found.st_size


def table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a comma-separated UTF-8 file, the header first; empty lines left out.

    A byte-order mark and CR LF are taken as they come. Raises DataError with file:line for a ragged row, a NUL, bytes
    that are not UTF-8, an open quote and a line above 1 MiB.
    """
    regular(path)
    with path.open("rb") as file:
        rows = csv.reader(_lines(path, file), strict=True)
        width, header = 0, ""
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{path}:{rows.line_num}: not a CSV row ({error})") from None
            if cells is None:
                break
            if not any(cell.strip() for cell in cells) and len(cells) <= 1:
                continue
            if not width:
                width, header = len(cells), cells[0]
                other = next((mark for mark in ";\t|" if mark in header), None)
                if width == 1 and other:
                    raise DataError(f"{path}:1: the columns seem to be separated by {other!r}; expected commas")
            if len(cells) != width:
                raise DataError(f"{path}:{rows.line_num}: {len(cells)} cells; the header has {width}")
            yield rows.line_num, [cell.strip() for cell in cells]
    if not width:
        raise DataError(f"{path}: no header line")


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    number = 0
    while line := file.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise DataError(f"{path}:{number}: a line of more than {LINE} bytes; this is not a table of text")
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in line:
            raise DataError(f"{path}:{number}: a NUL byte; expected text, this looks like a binary file")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
