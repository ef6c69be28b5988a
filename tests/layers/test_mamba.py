"""Mamba against its equations written out, its initialisation, and an implementation of others."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from statewise.core import UsageError
from statewise.layers import Mamba


@pytest.mark.parametrize("inner_norm", [False, True])
def test_is_the_paper_s_equations_written_out(inner_norm: bool):
    torch.set_default_dtype(torch.float64)
    layer = Mamba(5, states=3, taps=3, dt_rank=2, bias=True, inner_norm=inner_norm)
    x = torch.randn(2, 12, 5)
    u, z = layer.inp(x).chunk(2, -1)
    weight = layer.conv.weight.flip(0).T[:, None]  # conv1d wants the oldest tap first
    u = F.silu(F.conv1d(F.pad(u.mT, (2, 0)), weight, layer.conv.bias, groups=10).mT)
    r, b, c = (u @ layer.select.weight.T).split([2, 3, 3], -1)
    if inner_norm:
        r, b, c = (t / (t.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() for t in (r, b, c))
    dt = F.softplus(layer.dt(r))
    h, ys = torch.zeros(2, 10, 3), []
    for t in range(12):
        decay = torch.exp(dt[:, t, :, None] * -layer.a_log.exp())
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
        ys.append((h * c[:, t, None]).sum(-1) + layer.d * u[:, t])
    want = layer.out(torch.stack(ys, 1) * F.silu(z))
    got, state = layer(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(state.h, h)


def test_starts_as_the_paper_does():
    layer = Mamba(40)
    assert layer.dt_rank == 3 and layer.inner == 80 and layer.states == 16
    torch.testing.assert_close(layer.a_log.exp(), torch.arange(1.0, 17).expand(80, 16))
    assert (layer.d == 1).all() and layer.dt.weight.abs().max() <= 3**-0.5
    dt = F.softplus(layer.dt.bias).detach()
    assert 1e-3 * 0.999 <= dt.min() < 3e-3 and 0.03 < dt.max() <= 0.1 * 1.001
    assert dt.log().mean() == pytest.approx(math.log(0.01), abs=0.6)
    assert layer.inp.bias is None and layer.out.bias is None and layer.conv.bias is not None


def test_the_step_size_has_a_floor():
    dt = F.softplus(Mamba(8, dt_min=1e-9, dt_max=1e-9).dt.bias)
    torch.testing.assert_close(dt, torch.full_like(dt, 1e-4))


def test_rates_beyond_what_float32_holds_have_gradients():
    layer = Mamba(4, states=2)
    torch.nn.init.constant_(layer.a_log, 100.0)
    x = torch.randn(2, 9, 4, requires_grad=True)
    layer(x)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *layer.parameters())) and layer.select.weight.grad.any()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(dt_min=0.0),
        dict(dt_min=0.2),
        dict(states=0),
        dict(dt_rank=0),
        dict(expand=0),
        dict(taps=0),
        dict(norm_eps=0.0),
    ],
)
def test_it_refuses_what_makes_no_sense(wrong: dict):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Mamba(4, **wrong)


def test_equals_mambapy():
    peer = pytest.importorskip("mambapy.mamba", reason="mambapy is not installed")
    torch.set_default_dtype(torch.float64)
    layer, x = Mamba(20, states=6), torch.randn(2, 33, 20)
    block = peer.MambaBlock(peer.MambaConfig(d_model=20, n_layers=1, d_state=6))
    with torch.no_grad():
        for theirs, ours in (
            (block.in_proj.weight, layer.inp.weight),
            (block.conv1d.weight, layer.conv.weight.flip(0).T[:, None]),
            (block.conv1d.bias, layer.conv.bias),
            (block.x_proj.weight, layer.select.weight),
            (block.dt_proj.weight, layer.dt.weight),
            (block.dt_proj.bias, layer.dt.bias),
            (block.A_log, layer.a_log),
            (block.D, layer.d),
            (block.out_proj.weight, layer.out.weight),
        ):
            theirs.copy_(ours)
    # theirs works in float32 inside
    torch.testing.assert_close(layer(x)[0], block(x), rtol=1e-5, atol=1e-6)
