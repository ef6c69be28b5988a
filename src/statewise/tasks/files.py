"""Opening the user's files: every fault gets one line that says where it is."""

from __future__ import annotations

import csv
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from ..core import DataError, UsageError

LIMIT = 2 << 30  # bytes of one file
LINE = 1 << 20  # bytes of one line of a table
LARGEST = 1e37  # of a user's numbers: what is above leaves float32 as soon as something is added


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


MISSING = ("", "na", "n/a", "nan", "null", "none", "?")


@dataclass(frozen=True)
class Table:
    """Named columns of equal length: texts as they stand in a CSV, or the arrays of a Parquet file."""

    path: Path
    columns: dict[str, list[str] | np.ndarray]
    lines: list[int] | None  # of each row in the file

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def at(self, row: int) -> str:
        return f"{self.path}:{self.lines[row]}" if self.lines else f"{self.path}: row {row + 1}"

    def numbers(self, name: str) -> np.ndarray:
        """(rows,) float64, NaN where a value is missing. Raises DataError for a text and for infinity."""
        column = self.columns[name]
        if isinstance(column, list):
            texts = [cell if cell.lower() not in MISSING else "nan" for cell in column]
            try:
                found = np.array(texts, np.float64)
            except ValueError:
                for row, cell in enumerate(texts):
                    try:
                        float(cell)
                    except ValueError:
                        wrong = f"{self.at(row)}: column {name!r} holds {cell[:40]!r}; expected a number"
                        raise DataError(f"{wrong}, or leave the column out: task.ignore={name}") from None
                raise
        elif column.dtype.kind in "fiub":
            found = column.astype(np.float64)
        else:
            raise DataError(f"{self.path}: column {name!r} holds {column.dtype} values; expected numbers")
        infinite = np.flatnonzero(np.isinf(found))
        if len(infinite):
            raise DataError(f"{self.at(infinite[0])}: column {name!r} is infinite; expected a finite number")
        large = np.flatnonzero(np.abs(found) > LARGEST)
        if len(large):
            raise DataError(
                f"{self.at(large[0])}: column {name!r} is {found[large[0]]:g}; expected at most {LARGEST:g}"
            )
        return found

    def texts(self, name: str) -> list[str]:
        column = self.columns[name]
        return column if isinstance(column, list) else ["" if cell is None else str(cell) for cell in column.tolist()]


def read_table(path: Path) -> Table:
    """A CSV or Parquet file. Raises DataError where it is not one, or has no rows or the same column twice."""
    if path.suffix.lower() in (".parquet", ".pq"):
        return _parquet(path)
    rows = csv_rows(path)
    _, header = next(rows)
    for name in header:
        if not name or header.count(name) > 1:
            fault = f"column {name!r} stands there twice" if name else "a column has no name (to_csv(index=False)?)"
            raise DataError(f"{path}:1: {_numbers(header) or fault}; the first line must name every column once")
    if fault := _numbers(header):
        raise DataError(f"{path}:1: {fault}; the first line must name every column once")
    lines, cells = [], []
    for line, row in rows:
        lines.append(line)
        cells.append(row)
    if not cells:
        raise DataError(f"{path}: a header and no rows")
    return Table(path, {name: list(column) for name, column in zip(header, zip(*cells))}, lines)


def _numbers(header: list[str]) -> str:
    """What is wrong where a first line is a row of data; 0, 1, ... are the names that pandas gives."""
    if header == [str(i) for i in range(len(header))]:
        return ""
    try:
        return f"holds numbers, {', '.join(f'{float(cell):g}' for cell in header[:3])}, and no names"
    except ValueError:
        return ""


def _parquet(path: Path) -> Table:
    regular(path)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError(f"{path}: reading Parquet needs pyarrow: pip install 'statewise[data]'") from None
    try:
        file = pq.ParquetFile(path)
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        if sum(groups) > LIMIT:
            raise DataError(f"{path}: {sum(groups)} bytes when unpacked; the limit is {LIMIT}; split the file")
        read = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0][:100]})") from None
    columns: dict[str, list[str] | np.ndarray] = {}
    for name, column in zip(read.column_names, read.columns):
        if pa.types.is_temporal(column.type):
            column = column.cast(pa.timestamp("ns")).cast(pa.int64())
        if pa.types.is_nested(column.type) or name in columns:
            raise DataError(f"{path}: column {name!r} is {column.type} or stands there twice; expected plain columns")
        columns[name] = column.to_numpy()
    if not columns or not read.num_rows:
        raise DataError(f"{path}: no rows")
    return Table(path, columns, None)


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file, or of an NPY file under the name X. Sizes are checked before anything is read.

    Raises DataError for object arrays, which are pickles, for declared sizes above 2 GiB, and for damaged files.
    """
    regular(path)
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                return {"X": _array(f"{path}", file, path.stat().st_size)}
        with zipfile.ZipFile(path) as archive:
            sizes = {item.filename: item.file_size for item in archive.infolist()}
            if sum(sizes.values()) > LIMIT:
                raise DataError(f"{path}: declares {sum(sizes.values())} bytes; the limit is {LIMIT}")
            found = {}
            for name, size in sizes.items():
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = _array(f"{path}: {name}", member, size)
            return found
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable NPZ file ({error})") from None


def _array(where: str, file: IO[bytes], size: int) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise DataError(f"{where}: NPY version {version}; expected 1.0 or 2.0")
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{where}: not an NPY array ({str(error).splitlines()[0][:100]})") from None
    if dtype.hasobject:
        raise DataError(f"{where}: an array of Python objects, which is a pickle and is never loaded; save numbers")
    if dtype.kind not in "fiubUS":
        raise DataError(f"{where}: dtype {dtype}; expected numbers or texts")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize > size:
        raise DataError(f"{where}: declares shape {shape} of {dtype}, but holds {size} bytes: damaged or cut short")
    values = np.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype)
    if values.size != count:
        raise DataError(f"{where}: {values.size} of {count} values: cut short")
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
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
