"""Folders held alone, errors that say that memory ran out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from statewise.core import UsageError
from statewise.core.errors import out_of_memory
from statewise.core.machine import cores, free_memory, locked


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    words = f"process {os.getpid()} is at work there; try later"
    with locked(tmp_path), pytest.raises(UsageError, match=words), locked(tmp_path, advice="try later"):
        pass
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_children_hold_it_too_and_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path) as fd:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[fd]
        )
    (tmp_path / "lock").write_text("999999999\n")  # a parent that is gone
    with pytest.raises(UsageError, match="is at work there"), locked(tmp_path):
        pass
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        child.communicate()  # which ends it

    monkeypatch.setattr(time, "sleep", wait)
    with locked(tmp_path, patience=600):
        assert child.returncode == 0 and len(waits) == 1


def test_the_words_of_torch_are_known() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    assert out_of_memory(found.value) and out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not out_of_memory(RuntimeError("shapes do not fit"))


def test_there_is_a_machine() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert (free_memory() or 2**24) > 2**20
