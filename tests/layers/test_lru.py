"""LRU: impulse response, size of the state at birth, decays next to one."""

from __future__ import annotations

import torch

from statewise.layers import LRU


def test_the_impulse_response_is_a_sum_of_powers():
    layer = LRU(2, 5).double()
    x = torch.zeros(2, 12, 2, dtype=torch.float64)
    x[0, 0, 0] = x[1, 0, 1] = 1  # row i is the response to an impulse in channel i
    lam = torch.exp(torch.complex(-layer.nu.exp(), layer.theta.exp()))
    b, c = torch.complex(layer.b[:, 0], layer.b[:, 1]), torch.complex(layer.c[..., 0], -layer.c[..., 1])
    y, _ = layer(x)
    for t in range(12):
        want = (c @ torch.diag(layer.log_gamma.exp() * lam**t) @ b).real
        want = want + torch.diag(layer.d) if t == 0 else want
        torch.testing.assert_close(y[:, t].mT, want)


def test_gamma_keeps_the_state_at_the_size_of_its_input():
    torch.manual_seed(0)
    layer = LRU(8, 64, r_min=0.9, r_max=0.99)
    _, h = layer(torch.randn(64, 500, 8))
    assert 0.4 < h.abs().pow(2).mean() < 2.5  # |B x|^2 is 1 on average


def test_decays_next_to_one_have_a_gamma_and_a_gradient():
    layer = LRU(1, 50, r_min=0.999999, r_max=0.9999999)
    assert (layer.log_gamma > -20).all()
    y, _ = layer(torch.randn(1, 5, 1))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_every_parameter_gives_a_stable_system():
    layer = LRU(2, 4)
    with torch.no_grad():
        layer.nu.copy_(torch.tensor([-30.0, -5.0, 5.0, 30.0]))
    y, _ = layer(torch.ones(1, 1000, 2))
    assert y.isfinite().all() and layer._lam().abs().max() <= 1
