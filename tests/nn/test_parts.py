"""Norms, gated maps, rotary embedding and the book-keeping of segments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statewise.core import UsageError
from statewise.nn import GLU, Experts, GatedMLP, RMSNorm, positions, rotate, tail


def test_rms_norm_is_torchs():
    norm, x = RMSNorm(7).double(), torch.randn(3, 5, 7, dtype=torch.float64)
    norm.weight.data.normal_()
    torch.testing.assert_close(norm(x), F.rms_norm(x, (7,), norm.weight, 1e-6))


def test_rms_norm_does_not_overflow_in_half_precision():
    x = torch.full((2, 4), 3e4, dtype=torch.float16)  # its square is beyond float16
    assert torch.equal(RMSNorm(4).half()(x), torch.ones_like(x))


def test_gated_maps_act_on_each_time_alone():
    for part in (GatedMLP(4, 6), GLU(4, 4)):
        x = torch.randn(2, 5, 4)
        torch.testing.assert_close(part(x)[:, 3], part(x[:, 3]))
        assert part(torch.zeros(0, 4)).shape == (0, 4)


def experts(**options) -> Experts:
    return Experts(4, 6, **{"experts": 5, "active": 2, **options}).double()


@pytest.mark.parametrize("options", [{}, dict(normed=True), dict(shared=3), dict(active=5, normed=True)])
def test_experts_are_their_sum(options):
    part, x = experts(**options), torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    p = part.router(x).softmax(-1)
    best = p.topk(part.active).indices
    want = torch.zeros_like(x)
    for e in range(5):
        gate, value = F.linear(x, part.up[e]).chunk(2, -1)
        share = p[..., e] / (p.gather(-1, best).sum(-1) if part.normed else 1)
        taken = (best == e).any(-1)
        want = want + (taken * share)[..., None] * F.linear(F.silu(gate) * value, part.out[e])
    if part.shared is not None:
        want = want + part.shared_gate(x).sigmoid() * part.shared(x)
    torch.testing.assert_close(part(x), want)
    wrt = [x, *part.parameters()]
    for got, wanted in zip(*(torch.autograd.grad(y.sin().sum(), wrt) for y in (part(x), want)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_traced_experts_are_those_that_are_not(monkeypatch):
    part, x = experts(shared=3), torch.randn(2, 7, 4, dtype=torch.float64)
    want = part(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(part(x), want)


def test_experts_keep_what_is_not_finite_in_its_place_and_take_nothing():
    part, x = experts(), torch.randn(2, 5, 4, dtype=torch.float64)
    want = part(x)
    x[1, 3, 0] = torch.nan
    y = part(x)
    assert y[1, 3].isnan().all() and y.isnan().sum() == 4
    torch.testing.assert_close(y[0], want[0])
    assert part(x[:, :0]).shape == (2, 0, 4)
    with pytest.raises(UsageError, match="active 6; expected at most the number of experts, 5"):
        experts(active=6)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_rotation_keeps_length_and_sees_only_differences(size: int):
    q, k = torch.randn(2, 3, size, dtype=torch.float64), torch.randn(2, 3, size, dtype=torch.float64)

    def product(i: int, j: int) -> Tensor:
        return (rotate(q, torch.tensor([i, i])) * rotate(k, torch.tensor([j, j]))).sum(-1)

    torch.testing.assert_close(rotate(q, torch.tensor([7, 9])).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(product(9, 4), product(105, 100))
    assert not torch.allclose(product(9, 4), product(9, 5))
    assert torch.equal(rotate(q, torch.zeros(2, dtype=torch.int64)), q)


def test_rotation_is_exact_after_many_steps_in_float32():
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    near = (rotate(q, torch.tensor([5])) * rotate(k, torch.tensor([2]))).sum()
    far = (rotate(q, torch.tensor([10**9 + 5])) * rotate(k, torch.tensor([10**9 + 2]))).sum()
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


def test_positions_count_from_the_last_reset():
    reset = torch.rand(4, 9) < 0.3
    seen = torch.tensor([0, 3, 1, 100])
    want = []
    for row, count in zip(reset.tolist(), seen.tolist(), strict=True):
        want.append([])
        for cut in row:
            count = 0 if cut else count
            want[-1].append(count)
            count += 1
    assert positions(seen, 9, reset).tolist() == want
    assert positions(seen, 9, None)[3].tolist() == list(range(100, 109))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_tail_ends_where_the_row_ends(size: int):
    seen, lengths = torch.randn(3, size + 5, 2), torch.tensor([5, 0, 2])
    got = tail(seen, size, lengths)
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(got[b], seen[b, n : n + size])
    assert torch.equal(tail(seen, size, None), tail(seen, size, torch.tensor([5, 5, 5])))
