"""The machine: its processors, its free memory, and a folder held by one process alone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import UsageError
from .files import FLAGS, NO_LINK, shown, write_error

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


MOST_THREADS = 1024  # torch takes any number, and crashes where the system gives no more


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(count: int, least: int = 0) -> None:
    """Let torch use so many threads; 0 leaves it to torch. Raises UsageError for a number that no machine has."""
    if not least <= count <= MOST_THREADS:
        raise UsageError(f"--threads {count}; expected {least} to {MOST_THREADS}")
    if count:
        torch.set_num_threads(count)


def free_memory() -> int | None:
    """Bytes that can be had without swapping, or up to the limit set for this process; None where nothing says."""
    told = []
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        told.append(limit)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            facts = dict(line.split(":") for line in lines)
        told.append(int(facts["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
            told.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(told, default=None)


@contextlib.contextmanager
def locked(folder: Path, *, patience: float = 0.0, advice: str = "wait for it or choose another run") -> Iterator[int]:
    """Hold a folder alone; yields the descriptor of its lock, which children that inherit it hold too.

    The system lets go of the lock when all of them have ended, however they end. Where the process that took it is gone
    but its children are not, waits for them, at most `patience` seconds. On Windows nothing is held, and -1 yielded:
    two writers are then the user's to avoid.

    Raises UsageError naming the process that holds it, DataError where the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield -1
        return
    path, end = folder / "lock", time.monotonic() + patience
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | FLAGS | NO_LINK, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                if _alive(holder) or time.monotonic() >= end:
                    who = f"process {holder}" if _alive(holder) or not patience else "what an ended process started"
                    raise UsageError(f"{shown(folder)}: {who} is at work there; {advice}") from None
                time.sleep(0.1)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield fd
    finally:
        os.close(fd)


def _alive(pid: str) -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
