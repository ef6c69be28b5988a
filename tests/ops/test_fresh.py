"""Large results lie in large pages, and are like any other tensor."""

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


def _huge_kib():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MiB are asked for on Linux only")
def test_large_memory_comes_in_large_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no large pages")
    before = _huge_kib()
    held = fresh.empty(torch.empty(0), 1 << 25).fill_(1)  # 128 MiB
    assert _huge_kib() - before > 64 << 10 and held.sum() == 1 << 25
