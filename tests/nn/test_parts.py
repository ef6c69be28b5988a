"""Norms, gated maps, rotary embedding and the book-keeping of segments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statewise.nn import GLU, GatedMLP, RMSNorm, positions, rotate, tail


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
