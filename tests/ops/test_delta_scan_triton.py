"""The Triton kernels of the delta rule in interpreter mode, in a process of their own."""

from __future__ import annotations

import pytest
import torch
from triton_here import MARKS, crossed, interpreted, says

from statewise.ops import delta_scan

pytestmark = MARKS

SHAPES = """
import torch
from statewise.ops import delta_scan

torch.manual_seed(0)
torch.set_num_threads(1)
q, k, v = torch.randn(1, 70, 2, 20), torch.randn(1, 70, 2, 20), torch.randn(1, 70, 2, 35)  # several blocks of values
k = torch.nn.functional.normalize(k, dim=-1)
beta, log_decay, state = 2 * torch.rand(1, 70, 2), -torch.rand(1, 70, 2, 1, 1), torch.randn(1, 2, 20, 35)
ways = []
for backend in ("triton", "torch"):
    leaves = [t.clone().requires_grad_() for t in (q, k, v, beta, state, log_decay)]
    o, last = delta_scan(*leaves[:5], log_decay=leaves[5], backend=backend)
    ways.append([o, last, *torch.autograd.grad(o.square().sum() + last.sum(), leaves)])
torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-4)
print("done")
"""


def test_equals_the_reference():
    few = 4
    counts = crossed(
        *((name, *how) for name in ("delta_scan", "dplr_scan") for how in (("float32", 1), ("bfloat16", few))), of="q"
    )
    assert min(counts[::2]) >= 20 and min(counts[1::2]) >= 20 // few


@pytest.mark.slow
def test_equals_the_reference_in_half_precision():
    assert min(crossed(("delta_scan", "bfloat16", 1), ("dplr_scan", "bfloat16", 1), of="q")) >= 20


def test_several_blocks_of_values():
    assert "done" in interpreted(SHAPES)


def test_without_a_gpu_it_says_so():
    x = torch.ones(1, 2, 1, 1)
    assert "takes cuda" in says(delta_scan, x, x, x, x[..., 0], x[:, 0, :, None])
