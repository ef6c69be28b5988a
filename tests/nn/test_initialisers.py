"""Where eigenvalues begin: on the ring, on the spectrum of LegS, log-uniformly."""

from __future__ import annotations

import math

import pytest
import torch

from statewise.core import UsageError
from statewise.nn import inverse_softplus, legs_normal, log_uniform, ring


def test_ring_is_uniform_by_area():
    nu, theta = ring(20_000, r_min=0.4, r_max=0.9, max_phase=2.0)
    radius = torch.exp(-nu.exp())
    assert radius.min() >= 0.4 and radius.max() <= 0.9
    share = (radius < 0.7).double().mean().item()
    assert share == pytest.approx((0.7**2 - 0.4**2) / (0.9**2 - 0.4**2), abs=0.02)
    assert theta.exp().min() > 0 and theta.exp().max() <= 2.0
    assert theta.exp().mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("bad", [{"r_min": -0.1}, {"r_max": 1.0}, {"r_min": 0.95}, {"max_phase": 0.0}])
def test_ring_refuses(bad: dict[str, float]):
    with pytest.raises(UsageError, match="expected"):
        ring(3, **{"r_min": 0.1, "r_max": 0.9, "max_phase": 1.0, **bad})


@pytest.mark.parametrize("states", [2, 8, 64])
def test_legs_normal_rebuilds_hippo(states: int):
    frequency, v = legs_normal(states)
    assert (frequency > 0).all() and v.shape == (states, states // 2)
    eye = torch.eye(states // 2, dtype=v.dtype)
    torch.testing.assert_close(v.mH @ v, eye)
    normal = 2 * (v * (-0.5 + 1j * frequency) @ v.mH).real
    n = torch.arange(states, dtype=torch.float64)
    p = (n + 0.5).sqrt()
    for i in range(states):  # HiPPO-LegS, entry by entry
        for j in range(states):
            want = -math.sqrt((2 * i + 1) * (2 * j + 1)) if i > j else -(i + 1) if i == j else 0
            assert (normal[i, j] - p[i] * p[j]).item() == pytest.approx(want, abs=1e-9 * states**2)
    with pytest.raises(UsageError, match="even"):
        legs_normal(states + 1)


def test_log_uniform_covers_its_decades():
    x = log_uniform(10_000, 1e-3, 1e-1).exp()
    assert x.min() >= 1e-3 and x.max() <= 1e-1
    assert (x < 1e-2).double().mean().item() == pytest.approx(0.5, abs=0.02)
    for low, high in ((0.0, 1.0), (1.0, 0.5), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(UsageError, match="expected"):
            log_uniform(3, low, high)


def test_inverse_softplus_is_the_inverse():
    y = torch.tensor([1e-12, 1e-3, 1.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(y), threshold=50), y, rtol=1e-12, atol=0)
