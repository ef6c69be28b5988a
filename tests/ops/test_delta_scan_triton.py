"""The Triton kernels of the delta rule in interpreter mode, in a process of their own."""

from __future__ import annotations

import torch
from triton_here import MARKS, interpreted, says

from statewise.ops import delta_scan

pytestmark = MARKS

CROSS = """
import torch
from statewise.ops import delta_scan, dplr_scan
from test_backends import check

torch.set_num_threads(1)
for op in (delta_scan, dplr_scan):
    for dtype in (torch.float32, torch.bfloat16):
        print(op.name, dtype, check(op, "triton", dtype))
"""

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
    lines = interpreted(CROSS).splitlines()
    assert len(lines) == 4 and all(int(line.split()[-1]) >= 20 for line in lines)


def test_several_blocks_of_values():
    assert "done" in interpreted(SHAPES)


def test_without_a_gpu_it_says_so():
    x = torch.ones(1, 2, 1, 1)
    assert "takes cuda" in says(delta_scan, x, x, x, x[..., 0], x[:, 0, :, None])
