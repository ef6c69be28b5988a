"""Memory for large results.

A tensor of 32 MiB or more is memory that the process has just been given, in pages of 4 KiB, and each costs about 1 µs
when it is first written: more than computing what stands in it. Linux gives pages of 2 MiB to whoever asks for them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 1 << 22  # bytes from which on it is worth asking


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape): on a CPU with Linux, a large one lies in pages of 2 MiB wherever these can be had."""
    if type(like) is not Tensor:
        return like.new_empty(shape, dtype=dtype)
    # with cold caches new_empty takes three times as long
    made = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    size = made.numel() * made.element_size()
    if size >= LARGE and type(made) is Tensor and made.is_cpu and not torch.compiler.is_compiling():
        advise = _advise()
        if advise is not None:
            first = made.data_ptr() & -mmap.PAGESIZE  # advice of whole pages; it changes no byte of the neighbours
            advise(first, made.data_ptr() + size - first, mmap.MADV_HUGEPAGE)
    return made


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return advise  # type: ignore[no-any-return]
