"""The Triton kernels in interpreter mode, in a process of their own: the mode is chosen when triton is imported."""

from __future__ import annotations

import pytest
import torch
from triton_here import MARKS, crossed, interpreted, says

from statewise.ops import linear_scan

pytestmark = MARKS

DERIVATIVES = """
import torch
from statewise.ops import linear_scan

torch.manual_seed(0)
torch.set_num_threads(1)
reset = torch.tensor([[0, 1, 0]]).bool()
a, x, h0 = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((1, 3, 1), (1, 3, 2), (1, 2)))
run = lambda *k: linear_scan(*k, reset=reset, backend="triton")
assert torch.autograd.gradcheck(run, (a, x, h0), fast_mode=True)
assert torch.autograd.gradgradcheck(run, (a, x, h0), fast_mode=True)
print("done")
"""


def test_equals_the_reference():
    counts = crossed(
        ("linear_scan", "float32", 1), ("linear_scan", "complex64", 2), ("linear_scan", "bfloat16", 4), longest=12
    )
    assert counts[0] >= 16 and counts[1] >= 8 and counts[2] >= 4


@pytest.mark.slow
def test_equals_the_reference_in_every_dtype():
    assert min(crossed(("linear_scan", "complex64", 1), ("linear_scan", "bfloat16", 1), longest=12)) >= 16


def test_derivatives():
    assert "done" in interpreted(DERIVATIVES)


def test_without_a_gpu_it_says_so():
    x = torch.ones(1, 2, 1)
    assert "takes cuda" in says(linear_scan, x, x, x[0])
