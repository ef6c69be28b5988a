"""The Triton kernels of the gated loops in interpreter mode, in copies of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_here import MARKS, compiled, crossed, interpreted, says

from statewise.ops import Op, elman_loop, lstm_loop

pytestmark = MARKS

START = """
import torch
from statewise.ops import elman_loop, gru_loop, lstm_loop, slstm_loop
from statewise.ops.gated_loop import fresh_slstm

torch.set_num_threads(1)
torch.manual_seed(0)
CELLS = ((elman_loop, 1, 1), (gru_loop, 3, 1), (lstm_loop, 4, 2), (slstm_loop, 4, 4))


def call(gates, parts, batch, steps, hidden, heads):
    x = torch.randn(batch, steps, gates * hidden, dtype=torch.float64)
    state = torch.randn(parts, batch, hidden, dtype=torch.float64).abs().unbind()
    r = torch.randn(heads, gates * hidden // heads, hidden // heads, dtype=torch.float64) / 4
    biases = torch.randn(2, gates * hidden, dtype=torch.float64).unbind()
    return [t.clone().requires_grad_() for t in (x, *state, r, *biases)]


def run(op, backend, inputs, **masks):
    x, *state, r, b, c = inputs
    return op(x, *state, None, r, b, c, backend=backend, **masks)
"""

BLOCKS = """
lengths = torch.arange(35) % 6  # blocks of rows end at different times
reset = torch.rand(35, 5) < 0.2
for op, gates, parts in CELLS:
    inputs = call(gates, parts, 35, 5, 36, 2)
    found = []
    for backend in ("triton", "reference"):
        outs = run(op, backend, inputs, lengths=lengths, reset=reset)
        found.append([*outs, *torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs)])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)
print("done")
"""

BOUNDS = """
clean = lambda t, where: bool(t[where].isfinite().all())
for op, gates, parts in CELLS:
    inputs = call(gates, parts, 3, 6, 4, 2)
    with torch.no_grad():
        inputs[0].view(3, 6, gates, 4)[1, 3, :, :2] = torch.nan  # row 1, head 0, from step 3 on
        inputs[0][2, 4:] = torch.inf  # padding
        inputs[1][0] = torch.nan  # a row that is reset at once
    reset = torch.zeros(3, 6, dtype=torch.bool)
    reset[0, 0] = True
    h, *last = run(op, "triton", inputs, reset=reset, lengths=torch.tensor([6, 6, 4]))
    assert clean(h, ([0, 2],)) and clean(h[1], (slice(3),)) and clean(h[1, :, 2:], ()), op
    assert h[1, 3:, :2].isnan().all() and not h[2, 4:].any()
    dx, dh0 = torch.autograd.grad(h.sum() + sum(t.sum() for t in last), inputs[:2])
    dx = dx.view(3, 6, gates, 4)
    assert clean(dx, ([0, 2],)) and clean(dx[1, :, :, 2:], ()) and not dx[2, 4:].any() and not dh0[0].any(), op
print("done")
"""

SMALL = """
for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
    x = torch.cat([torch.logspace(-8, 1.2, 30), -torch.logspace(-8, 1.2, 30)]).to(dtype).view(60, 1, 1)
    h, _ = elman_loop(x, torch.zeros(60, 1, dtype=dtype), None, torch.zeros(1, 1, dtype=dtype), backend="triton")
    torch.testing.assert_close(h, x.tanh(), rtol=tolerance, atol=0)
    # an input gate that stays shut, a forget gate that is nearly open: m adds up the logs of the latter
    x = torch.tensor([-1e3, 0, 0, 0], dtype=dtype).repeat(6, 50, 1)
    x[..., 1] = torch.tensor([-90.0, -3.0, 0.0, 3.0, 14.0, 30.0])[:, None]
    one = torch.ones(6, 1, dtype=dtype)
    *_, m = slstm_loop(x, one, one, one, 0 * one, None, torch.zeros(4, 1, dtype=dtype), backend="triton")
    want = 50 * torch.nn.functional.logsigmoid(x[:, 0, 1].double()).clamp(min=-20)
    torch.testing.assert_close(m[1:, 0].double(), want[1:], rtol=20 * tolerance, atol=0)
    assert m[0] == -1e3  # what was there fades until the shut gate lets in more
print("done")
"""

TRACED = """
for op, gates, parts in CELLS:
    inputs = call(gates, parts, 2, 3, 4, 2)
    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        outs = function(op, "triton", inputs)
        found.append([*outs, *torch.autograd.grad(sum(o.sin().sum() for o in outs), inputs)])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    try:
        outs = run(op, "triton", inputs)
        (slope, *_) = torch.autograd.grad(outs[0].sin().sum(), inputs, create_graph=True)
        torch.autograd.grad(slope.sum(), inputs)
    except NotImplementedError as error:
        print("first derivatives only" in str(error))
"""


COMPILED = """
import importlib
import torch
from triton_here import compiles

loops = importlib.import_module("statewise.ops.gated_loop.in_triton")
for cell, kind, dtype in CELLS:
    dtype = getattr(torch, dtype)
    state, r = torch.zeros(1, 1, 16, dtype=dtype), torch.zeros(1, 1, 16)
    _, fixed = loops._launch(state, r, torch.zeros(1), cell, kind, 0.5)
    warps, number = fixed.pop("num_warps"), "*fp64" if dtype == torch.float64 else "*fp32"
    for kernel, more in (
        (loops._forward_kernel, {"KEEP": True}), (loops._backward_kernel, {"SLOPES": loops.CELLS[cell].slopes})
    ):
        print(compiles(kernel, number, fixed | more, num_warps=warps))
"""


SAMPLES = [("elman_loop", 18), ("gru_loop", 16), ("lstm_loop", 16), ("slstm_loop", 20)]


@pytest.mark.parametrize("name, least", SAMPLES)
def test_equals_the_reference(name: str, least: int):
    """float64 is that of the tests below."""
    counts = crossed((name, "float32", 1), (name, "bfloat16", 4))
    assert counts[0] >= least and counts[1] >= least // 4


@pytest.mark.slow
@pytest.mark.parametrize("name, least", SAMPLES)
def test_equals_the_reference_in_every_dtype(name: str, least: int):
    assert min(crossed((name, "float64", 1), (name, "bfloat16", 1))) >= least


def test_equals_the_reference_over_blocks_of_rows_of_uneven_lengths():
    assert "done" in interpreted(START + BLOCKS)


def test_what_is_not_finite_stays_in_its_row_and_head():
    assert "done" in interpreted(START + BOUNDS)


def test_tanh_and_log_sigmoid_are_right_where_they_are_tiny():
    assert "done" in interpreted(START + SMALL)


def test_traced():
    assert interpreted(START + TRACED).split() == ["True"] * 4


KINDS = [("elman", "tanh", "float64"), ("gru", "", "float32"), ("lstm", "", "float64"), ("slstm", "exp", "float32")]
OTHERS = [("elman", "relu", "float32"), ("slstm", "sigmoid", "float32")]


@pytest.mark.parametrize("cells", [KINDS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["each", "others"])
def test_compiles_for_a_gpu_that_is_not_here(tmp_path, cells):
    assert compiled(f"CELLS = {cells}\n" + COMPILED, tmp_path) == ["True"] * 2 * len(cells)


def test_it_says_what_it_does_not_take():
    calls: list[tuple[Op, list[Tensor | None], dict[str, Tensor]]] = []
    for op, gates, parts in ((elman_loop, 1, 1), (lstm_loop, 4, 2)):
        for hidden, dtype in ((64, torch.float32), (128, torch.float32), (64, torch.float64)):
            x, state = torch.ones(1, 2, gates * hidden, dtype=dtype), [torch.ones(1, hidden, dtype=dtype)] * parts
            calls.append((op, [x, *state, None, torch.ones(gates * hidden, hidden, dtype=dtype)], {}))
    one, four = torch.ones(1, 1), torch.ones(4, 1)
    calls.append((lstm_loop, [one[None], one, one, four, four], {"w_hr": one}))
    calls.append((lstm_loop, [one[None], one, one, four, four, None, None, one], {}))
    taken = ["takes" not in says(op, *args, interpreted=True, **kwargs) for op, args, kwargs in calls]
    assert taken == [True, True, True, True, False, False, False, False]
    assert all("takes cuda" in says(op, *args, **kwargs) for op, args, kwargs in calls)
