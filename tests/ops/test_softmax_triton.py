"""The Triton kernels of the running averages in interpreter mode, in copies of one process."""

from __future__ import annotations

import pytest
import torch
from triton_here import MARKS, compiled, crossed, interpreted, says

from statewise.ops import log_sum_exp_scan

pytestmark = MARKS

START = """
import torch
from statewise.ops import log_sum_exp_scan, softmax_scan
from statewise.ops.softmax_scan import SoftmaxState, nothing_seen

torch.set_num_threads(1)
torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def averages(backend, score, v, m, u, w, **masks):
    o, last = softmax_scan(score, v, SoftmaxState(m, u.square() + 1, w), backend=backend, **masks)
    return o, last.u, last.w


def logs(backend, x, z0, **masks):
    return log_sum_exp_scan(x, z0, backend=backend, **masks)
"""

BLOCKS = """
masks = dict(lengths=torch.tensor([4, 0, 7]), reset=torch.rand(3, 7) < 0.3)
score, v = normal(3, 7, 2), normal(3, 7, 2, 150)
for function, inputs in (
    (averages, (score, v, normal(3, 2), normal(3, 2), normal(3, 2, 150))),
    (logs, (normal(3, 7, 150), normal(3, 150))),
):
    found = []
    for backend in ("triton", "reference"):
        outs = function(backend, *inputs, **masks)
        found.append([*outs, *torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs)])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)
print("done")
"""

BOUNDS = """
for high in (0.0, 1e4):  # the sum of 500 equal terms, which are far above what is added to their log
    z, _ = log_sum_exp_scan(torch.full((1, 500), high), torch.full((1,), -torch.inf), backend="triton")
    want = high + torch.arange(1, 501).double().log()
    torch.testing.assert_close(z[0].double(), want, rtol=2e-7, atol=2e-6)
x = normal(3, 6, 4).detach()
x[1, 3, 1], x[2, 4:] = torch.nan, torch.inf
x, state = x.requires_grad_(), nothing_seen(3, 4, 2, like=x)
v = normal(3, 6, 4, 2)
for function, inputs in ((averages, (x, v, *state)), (logs, (x, torch.zeros(3, 4).double().requires_grad_()))):
    outs = function("triton", *inputs, lengths=torch.tensor([6, 6, 4]))
    o = outs[0]
    assert o[1, 3:, 1].isnan().all() and not o[2, 4:].any(), function
    (dx,) = torch.autograd.grad(sum(o.sum() for o in outs), x)
    for t in (o, dx):
        assert t[[0, 2]].isfinite().all() and t[1, :, [0, 2, 3]].isfinite().all(), function
    assert o[1, :3].isfinite().all() and not dx[2, 4:].any(), function
print("done")
"""

TRACED = """
inputs = normal(2, 3, 2), normal(2, 3, 2, 3), normal(2, 2), normal(2, 2), normal(2, 2, 3)
for function, inputs in ((averages, inputs), (logs, (normal(2, 3, 4), normal(2, 4)))):
    found = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        outs = run("triton", *inputs)
        found.append([*outs, *torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs)])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    try:
        outs = function("triton", *inputs)
        (slope, *_) = torch.autograd.grad(outs[0].sin().sum(), inputs, create_graph=True)
        torch.autograd.grad(slope.sum(), inputs)
    except NotImplementedError as error:
        print("first derivatives only" in str(error))
"""


COMPILED = """
import importlib
from triton_here import compiles

scans = importlib.import_module("statewise.ops.softmax_scan.in_triton")
for number, low in (("*fp32", -3.4028234663852886e38), ("*fp64", -1.7976931348623157e308)):
    fixed = {"LOWEST": low, "HIGHEST": -low, "HAS_RESET": True, "V": 64}
    for name in ("_forward_kernel", "_backward_kernel", "_log_forward_kernel", "_log_backward_kernel"):
        print(compiles(getattr(scans, name), number, fixed))
"""


SAMPLES = [("softmax_scan", 20), ("log_sum_exp_scan", 18)]


@pytest.mark.parametrize("name, least", SAMPLES)
def test_equals_the_reference(name: str, least: int):
    """float64 is that of the tests below."""
    of = "score" if name == "softmax_scan" else "x"
    counts = crossed((name, "float32", 1), (name, "bfloat16", 4), of=of)
    assert counts[0] >= least and counts[1] >= least // 4


@pytest.mark.slow
@pytest.mark.parametrize("name, least", SAMPLES)
def test_equals_the_reference_in_every_dtype(name: str, least: int):
    of = "score" if name == "softmax_scan" else "x"
    assert min(crossed((name, "float64", 1), (name, "bfloat16", 1), of=of)) >= least


def test_equals_the_reference_over_several_blocks():
    assert "done" in interpreted(START + BLOCKS)


def test_large_sums_and_what_is_not_finite():
    assert "done" in interpreted(START + BOUNDS)


def test_traced():
    assert interpreted(START + TRACED).split() == ["True"] * 2


def test_compiles_for_a_gpu_that_is_not_here(tmp_path):
    assert compiled(COMPILED, tmp_path) == ["True"] * 8


def test_without_a_gpu_it_says_so():
    x = torch.ones(1, 2)
    assert says(log_sum_exp_scan, x, x[:, 0], interpreted=True) == "ok"
    assert "takes cuda" in says(log_sum_exp_scan, x, x[:, 0])
