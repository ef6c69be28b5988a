"""The user's own text file, as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core import DataError, UsageError
from .base import register_task
from .files import regular
from .text import Bytes


@register_task
@dataclass(frozen=True)
class TextFile(Bytes):
    """x       a n y   t e x t     the bytes of a file, one long stream
    answer     n y   t e x t .     the next byte, asked at every step

    The first 90 % train, the next 5 % are for validation, the last 5 % for the test. A byte-order mark is dropped; a
    file with NUL bytes is refused as binary. Chance 8 bits per byte; baseline: a table of byte pairs.
    """

    path: str = ""
    name = "text_file"
    data = "your own file: set path"

    def read(self) -> np.ndarray:
        if not self.path:
            raise UsageError("text_file: path is not set; expected the path of a text file")
        path, need = Path(self.path).expanduser(), 20 * (self.length + 2)
        if regular(path) < need:
            size = path.stat().st_size
            raise DataError(f"{path}: {size} bytes; length {self.length} needs {need}, of which 5 % is one test window")
        whole = np.fromfile(path, np.uint8)
        if bytes(whole[:2]) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")
        if bytes(whole[:3]) == b"\xef\xbb\xbf":
            whole = whole[3:].copy()
        nul = np.flatnonzero(whole == 0)
        if len(nul):
            line = int((whole[: nul[0]] == 10).sum()) + 1
            raise DataError(f"{path}:{line}: a NUL byte; expected text, this looks like a binary file")
        return whole
