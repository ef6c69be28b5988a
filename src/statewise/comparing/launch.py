"""Where the processes that train cells run: here, or wherever an engine puts them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Process(Protocol):
    """What the pool needs of a running cell; a Popen has it."""

    def poll(self) -> int | None:
        """None while it runs, else its exit status; below zero the signal that ended it."""

    def terminate(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it now."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""


@dataclass(frozen=True)
class Setup:
    """How each cell is run: processes at a time, threads of each, device, bytes of address space (0 for no limit); and
    the lengths of test examples that its model is scored at beside its own, where its task is a generated one."""

    workers: int = 1
    threads: int = 1
    device: str = "cpu"
    memory: int = 0
    lengths: tuple[int, ...] = ()


class Engine(Protocol):
    """Something that starts the worker of a cell. `name` is what its rows say."""

    name: str

    def start(self, record: dict[str, Any], place: Path, setup: Setup, lock: int) -> Process:
        """Begin to train the experiment of a record in a run folder. lock: descriptor that keeps the results folder."""


class Local:
    """Processes of this machine."""

    name = "local"

    def start(self, record: dict[str, Any], place: Path, setup: Setup, lock: int) -> subprocess.Popen[bytes]:
        return spawn(record, place, setup, [lock] if lock >= 0 else [])


def spawn(record: dict[str, Any], place: Path, setup: Setup, descriptors: list[int]) -> subprocess.Popen[bytes]:
    """A worker on this machine. It saves and ends when the other end of its standard input is closed."""
    place.mkdir(parents=True, exist_ok=True)
    count = str(setup.threads)
    env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    command = [sys.executable, "-m", "statewise.comparing.worker", str(place), "--threads", count]
    if setup.lengths:
        command += ["--lengths", ",".join(map(str, setup.lengths))]
    with (place / "stderr.txt").open("wb") as errors:
        process = subprocess.Popen(
            [*command, "--device", setup.device, "--memory", str(setup.memory)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env=env, pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C in the terminal is for the driver, which passes it on
        )  # fmt: skip
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: its exit status says why
        process.stdin.write(json.dumps(record).encode() + b"\n")
        process.stdin.flush()
    return process
