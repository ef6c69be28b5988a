"""The workers of comparisons without the seconds that a new process takes to import torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from several import copies
from statewise.comparing import launch, worker

new_process = launch.spawn


class Copy:
    """What `launch.spawn` gives, where the worker is a copy of a process that has imported everything."""

    def __init__(self, record: dict[str, Any], place: Path, setup: launch.Setup, descriptors: list[int]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        words = [str(place), "--threads", str(setup.threads), "--device", setup.device, "--memory", str(setup.memory)]
        words += ["--lengths", ",".join(map(str, setup.lengths))] if setup.lengths else []
        read, self.input = os.pipe()  # what closes with this object, or with this process, ends the worker
        os.write(self.input, json.dumps(record).encode() + b"\n")
        with (place / "stderr.txt").open("wb") as errors:
            held = [DupFdLater(fd) for fd in (read, errors.fileno(), *descriptors)]
            self.process = copies().Process(target=work, args=(words, dict(os.environ), held), daemon=True)
            self.process.start()
        os.close(read)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()

    def __del__(self) -> None:
        os.close(self.input)


class DupFdLater:
    """A descriptor on its way to another process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> Any:
        return _arrived, (DupFd(self.fd),)


def _arrived(found: Any) -> int:
    return int(found.detach())


def work(words: list[str], environment: dict[str, str], descriptors: list[int]) -> None:
    os.setsid()
    os.dup2(descriptors[0], 0)
    os.dup2(descriptors[1], 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv[1:] = words
    sys.exit(worker.main())
