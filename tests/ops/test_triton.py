"""The Triton kernels in interpreter mode, in a process of their own: the mode is chosen when triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

CROSS = """
import torch
from statewise.ops import linear_scan
from test_backends import check

torch.set_num_threads(1)
for dtype in (torch.float32, torch.float64, torch.complex64, torch.bfloat16):
    print(dtype, check(linear_scan, "triton", dtype))
"""

DERIVATIVES = """
import torch
from statewise.ops import linear_scan

torch.manual_seed(0)
for dtype in (torch.float64, torch.complex128):
    a, x, h0 = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((2, 3, 2), (2, 3, 2), (2, 2)))
    for decay in (a, a[0, 0].detach().requires_grad_()):
        run = lambda *k: linear_scan(*k, reset=torch.tensor([[0, 1, 0], [0, 0, 1]]).bool(), backend="triton")
        assert torch.autograd.gradcheck(run, (decay, x, h0), atol=1e-8, rtol=1e-6)
        assert torch.autograd.gradgradcheck(run, (decay, x, h0), atol=1e-6, rtol=1e-5)
print("done")
"""


def _interpreted(code: str) -> str:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_equals_the_reference():
    assert len(_interpreted(CROSS).splitlines()) == 4


def test_derivatives():
    assert "done" in _interpreted(DERIVATIVES)


def test_without_a_gpu_it_says_so():
    code = """
import torch
from statewise.ops import linear_scan
x = torch.ones(1, 2, 1)
print(linear_scan.explain(x, x, x[0])["triton"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "takes cuda" in done.stdout
