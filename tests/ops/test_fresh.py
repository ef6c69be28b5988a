"""Large results lie in large pages, and are like any other tensor."""

import re
import sys
from pathlib import Path

import pytest
import torch

from statewise.ops import fresh


@pytest.mark.parametrize("shape", [(0,), (3, 4), (1 << 20,), (5, 1 << 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
def test_it_is_the_tensor_that_was_asked_for(shape, dtype):
    made = fresh.empty(torch.empty(0), *shape, dtype=dtype)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    assert torch.equal(made.fill_(1), torch.ones(shape, dtype=dtype))


def test_meta_tensors_are_left_alone():
    assert fresh.empty(torch.empty(0, device="meta"), 1 << 24).device.type == "meta"


def _flags(place: int) -> list[str]:
    """What the kernel was told about the memory at an address."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(span[1], 16) <= place < int(span[2], 16)
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no memory at {place:#x}")


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MiB are asked for on Linux only")
def test_large_memory_is_asked_for_in_large_pages():
    """Whether they can be had is the machine's business."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel knows no large pages")
    held = fresh.empty(torch.empty(0), 1 << 25).fill_(1)  # 128 MiB
    assert held.sum() == 1 << 25 and "hg" in _flags(held.data_ptr() + (1 << 26))


def test_small_memory_is_taken_as_it_comes(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(fresh, "_advise", lambda: lambda first, size, advice: asked.append(size))
    fresh.empty(torch.empty(0), fresh.LARGE // 4 - 1)
    assert not asked
    fresh.empty(torch.empty(0), fresh.LARGE // 4)
    assert asked and asked[0] >= fresh.LARGE
