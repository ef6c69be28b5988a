"""CfC and LTC: their equations in plain loops, the authors' package, the differential equation of LTC, time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from statewise.core import UsageError
from statewise.layers import LTC, CfC


def drawn(layer, scale=0.6):
    """float64, with parameters that are all different from where they begin."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in layer.double().parameters():
            p.copy_(torch.randn_like(p) * scale)
    return layer


def irregular(batch=2, steps=7, features=2):
    torch.manual_seed(2)
    x = torch.randn(batch, steps, features, dtype=torch.float64)
    return torch.cat([x, torch.rand(batch, steps, 1, dtype=torch.float64) * 3], -1)


def arrays(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softplus(z):
    return np.log1p(np.exp(z))


def cfc_by_equation(layer, x):
    """One row, x (T, D + 1) with the time in its last column."""
    p, h, ys = arrays(layer), np.zeros(layer.out_width), []
    for row in x:
        z = p["inp.weight"] @ row[:-1] + p["recurrent"] @ h + p["inp.bias"]
        for n in range(len(layer.maps)):
            z = p[f"maps.{n}.weight"] @ (1.7159 * np.tanh(0.666 * z)) + p[f"maps.{n}.bias"]
        if layer.form == "solution":
            h = -p["a"] * np.exp(-row[-1] * (abs(p["w"]) + abs(z))) * z + p["a"]
        else:
            g, k, a, b = np.split(z, 4)
            s = sigmoid(a * row[-1] + b)
            h = np.tanh(g) * (1 if layer.form == "ungated" else 1 - s) + s * np.tanh(k)
        ys.append(h)
    return np.stack(ys)


@pytest.mark.parametrize("backbone", [0, 1, 3])
@pytest.mark.parametrize("form", ["gated", "ungated", "solution"])
def test_cfc_is_its_equation(form, backbone):
    layer = drawn(CfC(3, 4, units=5, backbone=backbone, form=form, dt="input"))
    x = irregular()
    y, last = layer(x)
    want = torch.tensor(np.stack([cfc_by_equation(layer, row.numpy()) for row in x]))
    assert_close(y, want, atol=1e-12, rtol=0)
    assert_close(last, want[:, -1], atol=1e-12, rtol=0)


def ltc_by_equation(layer, x):
    p, v, ys = arrays(layer), np.zeros(layer.out_width), []
    leak, capacity = softplus(p["leak"]), softplus(p["capacity"])
    for row in x:
        d = row[-1] / layer.unfolds
        for _ in range(layer.unfolds):
            new = np.empty_like(v)
            for n in range(len(v)):
                pull, rate = leak[n] * p["rest"][n], leak[n]
                for kind, senders in (("sensory", row[:-1]), ("recurrent", v)):
                    w, slope, middle, e = (p[f"{kind}.{name}"] for name in ("w", "slope", "middle", "reversal"))
                    for j, sender in enumerate(senders):
                        f = softplus(w[j, n]) * sigmoid(slope[j, n] * (sender - middle[j, n]))
                        pull, rate = pull + f * e[j, n], rate + f
                new[n] = (v[n] + d / capacity[n] * pull) / (1 + d / capacity[n] * rate)
            v = new
        ys.append(v)
    return np.stack(ys)


@pytest.mark.parametrize("unfolds", [1, 4])
def test_ltc_is_its_equation(unfolds):
    layer = drawn(LTC(3, 4, unfolds=unfolds, dt="input"))
    x = irregular()
    want = np.stack([ltc_by_equation(layer, row.numpy()) for row in x])
    assert_close(layer(x)[0], torch.tensor(want), atol=1e-12, rtol=0)


def row_by_row(peer, x, state):
    """Their `timespans` of a batch do not reach the rows they belong to: (B,) is broadcast against (B, N)."""
    found = [peer(row[None, :, :-1], h[None], timespans=row[None, :, -1])[0] for row, h in zip(x, state, strict=True)]
    return torch.cat(found)


@pytest.mark.parametrize("ours, theirs", [("gated", "default"), ("ungated", "no_gate"), ("solution", "pure")])
@pytest.mark.parametrize("backbone", [0, 2])
def test_cfc_equals_the_authors_package(ours, theirs, backbone):
    ncps = pytest.importorskip("ncps.torch")
    peer = drawn(ncps.CfC(2, 4, mode=theirs, backbone_units=5, backbone_layers=backbone))
    layer = CfC(3, 4, units=5, backbone=backbone, form=ours, dt="input").double()
    cell = peer.rnn_cell
    heads = [cell.ff1] if ours == "solution" else [cell.ff1, cell.ff2, cell.time_a, cell.time_b]
    maps = [m for m in (cell.backbone or []) if isinstance(m, torch.nn.Linear)]
    weights = [m.weight for m in maps] + [torch.cat([m.weight for m in heads])]
    biases = [m.bias for m in maps] + [torch.cat([m.bias for m in heads])]
    with torch.no_grad():
        layer.inp.weight.copy_(weights[0][:, :2])
        layer.recurrent.copy_(weights[0][:, 2:])
        layer.inp.bias.copy_(biases[0])
        for linear, w, b in zip(layer.maps, weights[1:], biases[1:], strict=True):
            linear.weight.copy_(w)
            linear.bias.copy_(b)
        if ours == "solution":
            layer.a.copy_(cell.A[0])
            layer.w.copy_(cell.w_tau[0])
    x = irregular()
    h0 = torch.randn(2, 4, dtype=torch.float64)
    assert_close(layer(x, h0)[0], row_by_row(peer, x, h0), atol=1e-12, rtol=0)


def test_ltc_equals_the_authors_package():
    ncps = pytest.importorskip("ncps.torch")
    torch.manual_seed(0)
    peer = ncps.LTC(2, 4, ode_unfolds=5, epsilon=0.0, implicit_param_constraints=True).double()
    layer = LTC(3, 4, unfolds=5, dt="input").double()
    theirs = peer.rnn_cell._params

    with torch.no_grad():
        for prefix, ours in (("sensory_", layer.sensory), ("", layer.recurrent)):
            ours.w.copy_(theirs[prefix + "w"])
            ours.slope.copy_(theirs[prefix + "sigma"])
            ours.middle.copy_(theirs[prefix + "mu"])
            ours.reversal.copy_(theirs[prefix + "erev"])
        layer.leak.copy_(theirs["gleak"])
        layer.rest.copy_(theirs["vleak"])
        layer.capacity.copy_(theirs["cm"])
    x = irregular()
    v0 = torch.randn(2, 4, dtype=torch.float64)
    want = row_by_row(peer, x, v0)
    assert_close(layer(x, v0)[0], want, atol=1e-12, rtol=0)


def test_ltc_solves_its_differential_equation():
    """Against Runge-Kutta of fourth order with steps so fine that it is exact; the error falls as 1 / unfolds."""
    layer = drawn(LTC(3, 5, dt="input"))
    x, v = irregular(batch=1, steps=1), torch.randn(1, 5, dtype=torch.float64)
    x[..., -1] = 1.5

    def slope(v):
        f, f_e = layer.recurrent(v)
        g, g_e = layer.sensory(x[:, 0, :-1])
        leak, capacity = (torch.nn.functional.softplus(p) for p in (layer.leak, layer.capacity))
        return (leak * (layer.rest - v) + f_e + g_e - (f + g) * v) / capacity

    want, d = v, 1.5 / 400
    with torch.no_grad():
        for _ in range(400):
            a = slope(want)
            b = slope(want + d / 2 * a)
            c = slope(want + d / 2 * b)
            want = want + d / 6 * (a + 2 * b + 2 * c + slope(want + d * c))
        errors = []
        for layer.unfolds in (40, 80, 160):
            errors.append((layer(x, v)[1] - want).abs().max().item())
    assert errors[0] < 0.05 and [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2], rel=0.1)


def test_ltc_in_two_halves_of_a_step():
    one, two = drawn(LTC(3, 4, unfolds=6, dt="input")), drawn(LTC(3, 4, unfolds=3, dt="input"))
    x = irregular()
    halves = x.repeat_interleave(2, 1) * torch.tensor([1.0, 1.0, 0.5])
    assert_close(one(x)[0], two(halves)[0][:, 1::2], atol=1e-13, rtol=0)


def test_no_time_no_change():
    """At dt = 0 LTC stays; CfC is at its gate's bias, whatever a is; below 0 time stands still."""
    x = irregular()
    x[..., -1] = 0
    v0 = torch.randn(2, 4, dtype=torch.float64)
    y, last = drawn(LTC(3, 4, dt="input"))(x, v0)
    assert torch.equal(last, v0) and torch.equal(y, v0[:, None].expand_as(y))
    layer = drawn(CfC(3, 4, backbone=0, dt="input"))
    y = layer(x)[0]
    with torch.no_grad():
        layer.inp.weight[8:12] += 1
        assert torch.equal(layer(x)[0], y)
        layer.inp.weight[12:] += 1
    assert not torch.allclose(layer(x)[0], y)
    back = x.clone()
    back[..., -1] = -2.0
    assert torch.equal(layer(back)[0], layer(x)[0])


@pytest.mark.parametrize("dt", [1e-6, 0.3, 1e6])
def test_ltc_stays_between_what_pulls_it(dt):
    layer = LTC(2, 6, unfolds=2, dt=dt).double()
    x = 10 * torch.randn(3, 50, 2, dtype=torch.float64)
    pulls = torch.cat([p.detach().flatten() for p in (layer.rest, layer.sensory.reversal, layer.recurrent.reversal)])
    y = layer(x)[0].detach()
    assert min(0, pulls.min()) <= y.min() and y.max() <= max(0, pulls.max())


def test_a_constant_time_is_that_time_in_every_step():
    x = irregular()
    x[..., -1] = 0.7
    for make in (CfC, LTC):
        by_input, constant = drawn(make(3, 4, dt="input")), drawn(make(2, 4, dt=0.7))
        assert_close(by_input(x)[0], constant(x[..., :-1])[0], atol=1e-13, rtol=0)


def test_cfc_goes_to_its_second_state_with_time():
    layer = drawn(CfC(3, 4, backbone=0, dt="input"))
    with torch.no_grad():
        layer.inp.weight[8:12], layer.recurrent[8:12], layer.inp.bias[8:12] = 0, 0, 1  # a = 1
        x = irregular(steps=1)
        x[..., -1] = 1e4
        z = layer.inp(x[:, 0, :-1])
    assert_close(layer(x)[1], torch.tanh(z[:, 4:8]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [CfC, LTC])
def test_what_cannot_be_is_refused(make):
    for dt in (0.0, -1.0, math.inf, math.nan, "time"):
        with pytest.raises(UsageError, match="dt is"):
            make(3, 4, dt=dt)
    with pytest.raises(UsageError, match="width 1 with dt"):
        make(1, 4, dt="input")
    with pytest.raises(UsageError, match="form 'pure'"):
        CfC(3, 4, form="pure")
    with pytest.raises(UsageError, match="backbone -1"):
        CfC(3, 4, backbone=-1)
