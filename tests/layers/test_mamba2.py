"""Mamba-2: the equations by explicit loops, its dual form by one masked matrix, decays at both ends, birth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from statewise.core import UsageError
from statewise.layers import Mamba2

CASES = [
    dict(width=3, heads=2, value=3, key=4),
    dict(width=3, heads=6, value=2, key=3, groups=3, bias=True, taps=2),
    dict(width=3, heads=4, value=2, key=2, groups=2, conv_bias=False, dt_limits=(0.3, 0.6)),
]


def drawn(arguments):
    torch.manual_seed(0)
    layer = Mamba2(**arguments).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    return layer


def sigmoid(number):
    return 1 / (1 + math.exp(-number))


def by_loops(layer, u):
    """One row u (T, D): every head, state and channel of its own."""
    heads, groups, key, value = layer.heads, layer.groups, layer.key, layer.value
    inner, rows = heads * value, [layer.in_proj(u_t) for u_t in u]
    h = torch.zeros(heads, value, key, dtype=torch.float64)
    low, high = layer.dt_limits
    ys = []
    for t, row in enumerate(rows):
        z, dt_raw = row[:inner], row[-heads:]
        c = sum(w * rows[t - j][inner:-heads] for j, w in enumerate(layer.conv.weight) if t >= j)
        c = c if layer.conv.bias is None else c + layer.conv.bias
        c = torch.tensor([n * sigmoid(n) for n in c.tolist()], dtype=torch.float64)
        y = torch.zeros(inner, dtype=torch.float64)
        for i in range(heads):
            group = i * groups // heads
            x = c[i * value :][:value]
            b, read = c[inner + group * key :][:key], c[inner + (groups + group) * key :][:key]
            dt = min(max(math.log1p(math.exp(float(dt_raw[i] + layer.dt_bias[i]))), low), high)
            for p in range(value):
                h[i, p] = math.exp(-dt * math.exp(layer.a_log[i])) * h[i, p] + dt * b * x[p]
                y[i * value + p] = read @ h[i, p] + layer.d[i] * x[p]
        y = y * torch.tensor([n * sigmoid(n) for n in z.tolist()], dtype=torch.float64)
        parts = [part / (part.pow(2).mean() + 1e-5).sqrt() for part in y.split(inner // groups)]
        ys.append(layer.out_proj(torch.cat(parts) * layer.norm.weight))
    return torch.stack(ys), h


def by_one_matrix(layer, u):
    """The dual form: y = (C B^T * L) (dt x) with L_ts = a_t ... a_{s+1}, one lower triangular matrix per head."""
    inner, shared = layer.heads * layer.value, layer.groups * layer.key
    z, xbc, dt = layer.in_proj(u).split([inner, inner + 2 * shared, layer.heads], -1)
    kernel = layer.conv.weight.T.flip(-1)[:, None]  # newest last
    xbc = F.conv1d(F.pad(xbc.mT, (len(layer.conv.weight) - 1, 0)), kernel, layer.conv.bias, groups=len(kernel)).mT
    x, b, c = F.silu(xbc).split([inner, shared, shared], -1)
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limits)
    total = (-layer.a_log.exp() * dt).cumsum(1).mT  # (B, H, T)
    steps = u.shape[1]
    later = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    mask = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    b, c = (m.unflatten(-1, (layer.groups, -1)) for m in (b, c))
    scores = torch.einsum("btgn,bsgn->bgts", c, b).repeat_interleave(layer.heads // layer.groups, 1)
    x = x.unflatten(-1, (layer.heads, -1))
    y = torch.einsum("bhts,bshp->bthp", scores * mask, dt[..., None] * x) + layer.d[:, None] * x
    y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (layer.groups, -1))
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return layer.out_proj(y.flatten(-2) * layer.norm.weight)


@pytest.mark.parametrize("arguments", CASES)
@torch.no_grad()
def test_the_layer_is_its_equation(arguments):
    layer = drawn(arguments)
    u = torch.randn(2, 8, 3, dtype=torch.float64)
    y, state = layer(u)
    for row in range(2):
        want, h = by_loops(layer, u[row])
        torch.testing.assert_close(y[row], want, atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(state.memory[row], h.mT, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("arguments", CASES)
def test_the_layer_is_attention_with_a_decaying_mask(arguments):
    layer = drawn(arguments)
    u = torch.randn(2, 70, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(u)[0], by_one_matrix(layer, u), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("a_log", [-torch.inf, 6.0, 80.0])
def test_no_decay_and_full_decay(a_log):
    layer = drawn(CASES[0])
    with torch.no_grad():
        layer.a_log.fill_(a_log)
    u = torch.randn(2, 30, 3, dtype=torch.float64)
    y, state = layer(u)
    torch.testing.assert_close(y, by_one_matrix(layer, u), atol=1e-10, rtol=1e-8)
    (y.sum() + state.memory.sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_rates_beyond_what_float32_holds_have_gradients():
    layer = Mamba2(**CASES[0])
    torch.nn.init.constant_(layer.a_log, 100.0)
    torch.nn.init.constant_(layer.dt_bias, -200.0)  # steps of 0: infinity times them is no number
    x = torch.randn(2, 9, layer.width, requires_grad=True)
    layer(x)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *layer.parameters()))


def test_time_steps_keep_within_their_limits():
    layer = drawn(CASES[2])
    dt = layer.encode(10 * torch.randn(500, 3, dtype=torch.float64)).dt
    assert dt.min() == 0.3 and dt.max() == 0.6


def test_birth():
    torch.manual_seed(0)
    layer = Mamba2(4, heads=300, value=1, key=2)
    dt, a = F.softplus(layer.dt_bias), layer.a_log.exp()
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and 0.3 < (dt < 0.01).float().mean() < 0.7  # evenly by logarithm
    assert a.min() >= 0.999 and a.max() <= 16.01 and 7 < a.mean() < 10
    assert layer.d.eq(1).all()


def test_bad_arguments_are_refused():
    with pytest.raises(UsageError, match="heads 3 is not a multiple of groups 2"):
        Mamba2(4, heads=3, value=2, key=2, groups=2)
    for limits in ((0.5, 0.1), (-1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(UsageError, match="dt_limits"):
            Mamba2(4, heads=3, value=2, key=2, dt_limits=limits)
    for eps in (0.0, -1.0, math.inf):
        with pytest.raises(UsageError, match="eps"):
            Mamba2(4, heads=3, value=2, key=2, eps=eps)
