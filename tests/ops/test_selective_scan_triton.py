"""The Triton kernels of the selective scan in interpreter mode, in a process of their own (see test_triton.py)."""

from __future__ import annotations

import pytest
import torch
from triton_here import MARKS, crossed, interpreted, says

from statewise.ops import selective_scan

pytestmark = MARKS

TILES = """
import importlib
import torch
from statewise.ops import selective_scan

importlib.import_module("statewise.ops.selective_scan.in_triton").TILE = 4
torch.manual_seed(0)
torch.set_num_threads(1)
reset = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
shapes = (2, 10, 35), (2, 10, 35), (35, 3), (2, 10, 3), (2, 10, 3), (2, 35, 3)
inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
inputs[1], inputs[2] = inputs[1].abs(), -inputs[2].exp()
inputs = [t.requires_grad_() for t in inputs]
results = []
for backend in ("triton", "reference"):
    y, last = selective_scan(*inputs, reset=reset, lengths=torch.tensor([10, 7]), backend=backend)
    results.append([y, last, *torch.autograd.grad(y.pow(2).sum() + last.sin().sum(), inputs)])
for p, q in zip(*results, strict=True):
    torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)
print("done")
"""


def test_equals_the_reference():
    counts = crossed(("selective_scan", "float32", 1), ("selective_scan", "bfloat16", 4), longest=12)
    assert counts[0] >= 16 and counts[1] >= 4


@pytest.mark.slow
def test_equals_the_reference_in_half_precision():
    assert min(crossed(("selective_scan", "bfloat16", 1), longest=12)) >= 16


def test_equals_the_reference_over_several_tiles_and_blocks():
    assert "done" in interpreted(TILES)


def test_without_a_gpu_it_says_so():
    x = torch.ones(1, 2, 1)
    assert "takes cuda" in says(selective_scan, x, x, x[0, :1], x, x, x[:, :1])
