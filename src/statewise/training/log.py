"""The log of a run: JSON lines, only ever appended, each with a checksum; and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from ..core.files import FLAGS, NO_LINK, open_checked, write_error


class Log:
    """Appends records to a file. A record is one line, so a kill tears at most the last one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | FLAGS | NO_LINK, 0o666)
            size = os.lseek(self._fd, 0, os.SEEK_END)
            if size:
                os.lseek(self._fd, -1, os.SEEK_END)
            self._torn = bool(size) and os.read(self._fd, 1) != b"\n"
        except OSError as error:
            raise write_error(path, error) from error

    def write(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Append a record. Raises ResourceError when the disk is full."""
        try:
            left = memoryview(b"\n" * self._torn + encode(record))
            while left:
                left = left[os.write(self._fd, left) :]
                self._torn = bool(left)  # by a kill or a full disk: the next record must not join it
            if sync:
                os.fsync(self._fd)
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def encode(record: dict[str, Any]) -> bytes:
    """One line: the record with the CRC-32 of its own text, without the CRC, as last entry."""
    body = json.dumps(_finite(record), allow_nan=False)
    return f'{body[:-1]}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def decode(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None for a line that is torn or damaged."""
    body, found, tail = line.rstrip(b"\n").rpartition(b', "crc": "')
    if not found or tail != f'{zlib.crc32(body + b"}"):08x}"}}'.encode():
        return None
    record: dict[str, Any] = json.loads(body + b"}")
    return record


def read_log(path: str | os.PathLike[str], offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole records from a byte offset on, and the offset to go on from: call it again to follow a live run.

    A torn or damaged line is left out. A file that is not there yet is empty.
    """
    if not os.path.lexists(path):
        return [], 0
    with open_checked(path) as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return [record for line in whole.splitlines() if (record := decode(line)) is not None], offset + len(whole)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


class TensorBoard:
    """Scalars for TensorBoard; does nothing where it is not installed."""

    def __init__(self, folder: Path):
        self._folder, self._writer = folder, None
        self.available = importlib.util.find_spec("tensorboard") is not None

    def write(self, record: dict[str, Any]) -> None:
        if not self.available or record["event"] not in ("train", "evaluate"):
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))  # type: ignore[assignment,no-untyped-call]
        place = record.get("split", "train")
        for name, value in {**record, **record.get("metrics", {})}.items():
            if isinstance(value, float) and name not in ("time", "eta"):
                self._writer.add_scalar(f"{place}/{name}", value, record["step"])  # type: ignore[attr-defined]

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
