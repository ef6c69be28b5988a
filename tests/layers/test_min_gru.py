"""minGRU and minLSTM: closed forms, bounds, saturated gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise.core import UsageError
from statewise.layers import MinGRU, MinLSTM


def test_min_gru_is_the_papers_log_space_scan():
    layer = MinGRU(3, 4, candidate="positive").double()
    x = torch.randn(2, 30, 3, dtype=torch.float64)
    k, c = layer.inp(x).chunk(2, -1)
    log_g = torch.where(c >= 0, (F.relu(c) + 0.5).log(), -F.softplus(-c))
    total = (-F.softplus(k)).cumsum(1)
    want = torch.exp(total + torch.logcumsumexp(-F.softplus(-k) + log_g - total, 1))
    torch.testing.assert_close(layer(x)[0], want)


def test_min_lstm_gates_are_shares_of_their_sum():
    layer = MinLSTM(3, 4).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    f, i, c = layer.inp(x).chunk(3, -1)
    f, i = f.sigmoid(), i.sigmoid()
    u = layer.encode(x)
    torch.testing.assert_close(u.a, f / (f + i))
    torch.testing.assert_close(u.x, i / (f + i) * c)


@pytest.mark.parametrize("cls", [MinGRU, MinLSTM])
def test_the_state_is_an_average_of_candidates(cls: type):
    layer = cls(3, 4).double()
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    c = layer.inp(x).chunk(3 if cls is MinLSTM else 2, -1)[-1]
    y, _ = layer(x)
    assert (y.abs() <= c.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("cls", [MinGRU, MinLSTM])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_saturated_gates_stay_finite(cls: type, size: float):
    layer = cls(3, 4)
    x = (size * torch.randn(2, 20, 3)).requires_grad_()
    y, _ = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_decays_are_float32_in_bfloat16():
    layer = MinGRU(1, 1).bfloat16()
    with torch.no_grad():
        layer.inp.weight.zero_()
        layer.inp.bias.copy_(torch.tensor([-7.0, 1.0]))  # 1 - z = 0.9991, which bfloat16 rounds to 1
    u = layer.encode(torch.zeros(1, 1, 1, dtype=torch.bfloat16))
    assert u.a.dtype == torch.float32 and 0.999 < u.a.item() < 0.9995


def test_an_unknown_candidate_is_refused():
    for cls in (MinGRU, MinLSTM):
        with pytest.raises(UsageError, match="'linear' or 'positive'"):
            cls(2, 2, candidate="tanh")
