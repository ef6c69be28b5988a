"""How much memory something takes, and memory that is kept out of measured times."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import torch

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def peak_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which the memory in use rises at most while `work` runs; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # what glibc keeps of earlier work would hide what this needs
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark falls to what is resident now
        before = _resident("VmRSS")
        work()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, StopIteration):
        return None


def keep_freed() -> None:
    """Have this process keep what is freed for what comes next, where its C library is glibc.

    A tensor of 32 MiB is otherwise memory that the system has just handed out, every time, and handing it out takes up
    to ten times as long as writing it: a measurement of that.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _resident(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
