"""Which data a task reads: a hash that tells other data from the same, at little cost."""

from __future__ import annotations

import hashlib
import os
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..core import DataError, leaves
from ..core.files import shown
from ..tasks.base import SPLITS, Task
from ..tasks.finite import Finite
from ..tasks.generated import Generated
from ..tasks.text import Bytes

BLOCK = 1 << 20


def data_hash(task: Task) -> str:
    """Sixteen hexadecimal digits; of tasks drawn on the spot, whose settings are their data, "generated".

    Of a task that knows its own: that. Of a user's file or folder: its bytes. Of other finite sets and texts: all that
    is in them. Of all else: the evaluation batches of every split. The first two are read once per process and content.

    Raises DataError for a file that cannot be read.
    """
    if isinstance(task, Generated):
        return "generated"
    if (known := task.digest()) is not None:
        return known
    if path := getattr(task, "path", ""):
        return _of_files(tuple(_listed(Path(path).expanduser())))
    return _of_rows(task) if isinstance(task, Finite | Bytes) else _of_batches(task)


def _listed(path: Path) -> list[tuple[str, str, int, int]]:
    """(path, name inside the folder, size, time of change) of each file, in the order of names."""
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    try:
        found = [(p, p.stat()) for p in inside]
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}; looked for from {shown(os.getcwd())}") from error
    return [(str(p), str(p.relative_to(path)), stat.st_size, stat.st_mtime_ns) for p, stat in found]


@lru_cache(maxsize=4)
def _of_files(files: tuple[tuple[str, str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, name, size, _ in files:
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        try:
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{shown(path)}: {error.strerror}") from error
    return digest.hexdigest()[:16]


@lru_cache(maxsize=8)
def _of_rows(task: Finite | Bytes) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        if isinstance(task, Bytes):
            _add(digest, task.text(split), split)
            continue
        rows = task.rows(split)
        for f in fields(rows):
            if isinstance(t := getattr(rows, f.name), Tensor):
                _add(digest, t, f.name)
    return digest.hexdigest()[:16]


def _of_batches(task: Task) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for batch in task.batches(split):
            for leaf in leaves(batch):
                _add(digest, leaf, split)
    return digest.hexdigest()[:16]


def _add(digest: hashlib._Hash, t: Tensor, name: str) -> None:
    digest.update(f"{name}{t.dtype}{list(t.shape)}".encode())
    digest.update(t.contiguous().numpy().data)
