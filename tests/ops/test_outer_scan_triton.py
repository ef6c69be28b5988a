"""The Triton kernels of the outer-product scan in interpreter mode, in a process of their own."""

from __future__ import annotations

import pytest
import torch
from triton_here import MARKS, interpreted, says

from statewise.ops import outer_scan

pytestmark = MARKS

CROSS = """
import itertools, torch
from statewise.ops import outer_scan
from test_backends import check

torch.set_num_threads(1)
seen = set()


def new(sample):
    # a call costs a second here, whatever is in it: one of each shape and set of options
    g = sample["log_decay"]
    what = (
        sample["v"].shape,
        None if g is None else (tuple(g.shape[-2:]), g.ndim, bool((g.exp() == 0).any())),
        "reset" in sample, "lengths" in sample, sample["v"].is_contiguous(),
    )
    fresh = what not in seen and sample["v"].shape[1] <= 9 and sample["v"].shape[2] <= 4
    seen.add(what)
    return fresh


number = itertools.count()
print(check(outer_scan, "triton", torch.float32, lambda sample: new(sample) and next(number) % EVERY == 0))
"""

CHUNKS = """
import torch
from statewise.ops import outer_scan

torch.set_num_threads(1)
torch.manual_seed(0)
for sizes in ((1, 1), (3, 1)):
    q, k = torch.randn(2, 1, 70, 1, 3).unbind()
    g = torch.rand(1, 70, 2, *sizes).log() / 8
    g[:, 40] = -1e4
    inputs = [t.requires_grad_() for t in (q, k, torch.randn(1, 70, 2, 70), torch.randn(1, 2, 3, 70), g)]
    results = []
    for backend in ("triton", "torch"):
        o, last = outer_scan(*inputs[:4], log_decay=g, backend=backend)
        results.append([o, last, *torch.autograd.grad((o * o).sum() + (last * last).sum(), inputs)])
    for p, r in zip(*results):
        assert (p - r).abs().max() <= 1e-5 * r.abs().max(), (sizes, p.shape)
half = {n: t.detach().bfloat16() for n, t in zip("qkv", inputs)}
o, last = outer_scan(**half, state=inputs[3], log_decay=g, backend="triton")
want, end = outer_scan(**{n: t.float() for n, t in half.items()}, state=inputs[3], log_decay=g, backend="torch")
assert o.dtype == torch.bfloat16 and (o - want).abs().max() <= 2**-7 * want.abs().max()
assert (last - end).abs().max() <= 1e-5 * end.abs().max()
print("done")
"""


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_equals_the_reference(every):
    assert int(interpreted(f"EVERY = {every}\n" + CROSS)) >= 25 // every


def test_several_chunks_and_blocks_of_values():
    assert "done" in interpreted(CHUNKS)


def test_it_says_what_it_does_not_take():
    one, taken = torch.ones(1, 2, 1, 2), []
    for g in (None, torch.zeros(2), torch.zeros(2, 2)):
        call = dict(q=one, k=one, v=one, state=torch.zeros(1, 1, 2, 2), log_decay=g)
        taken.append("takes" not in says(outer_scan, **call, interpreted=True))
        assert "takes cuda" in says(outer_scan, **call)
    assert taken == [True, False, False]
