"""RWKV-7: the equations by explicit matrices, the first layer's value in the later ones, decays and eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch

from statewise.core import UsageError
from statewise.layers import RWKV7, RWKV7State


def drawn(seed=0, **arguments):
    torch.manual_seed(seed)
    layer = RWKV7(**arguments).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    return layer


def sigmoid(z):
    return 1 / (1 + (-z).exp())


def low_rank(module, z, f):
    y = module.up.weight @ f(module.down.weight @ z)
    return y if module.up.bias is None else y + module.up.bias


def by_matrices(layer, x, v_first=None):
    """One row x (T, D), the memory as the paper has it: values by keys. Returns y, v, memory (H, V, K)."""
    width, size = layer.inner, layer.inner // layer.heads
    memory = torch.zeros(layer.heads, size, size, dtype=torch.float64)
    before, ys, vs = torch.zeros(width, dtype=torch.float64), [], []
    for t, x_t in enumerate(x):
        x_r, x_w, x_k, x_v, x_a, x_g = (x_t + m * (before - x_t) for m in layer.mu)
        r, k, v = layer.r.weight @ x_r, layer.k.weight @ x_k, layer.v.weight @ x_v
        w = (-math.exp(-0.5) * sigmoid(low_rank(layer.decay, x_w, torch.tanh))).exp()
        a = sigmoid(low_rank(layer.rate, x_a, lambda z: z))
        g = low_rank(layer.gate, x_g, sigmoid)
        vs.append(v)
        if v_first is not None:
            v = v + (v_first[t] - v) * sigmoid(low_rank(layer.mix, x_v, lambda z: z))
        removed, written = k * layer.k_k, k * (1 + (a - 1) * layer.k_a)
        out = []
        for h in range(layer.heads):
            at = slice(h * size, (h + 1) * size)
            kappa = removed[at] / removed[at].norm()
            transition = torch.diag(w[at]) - torch.outer(kappa, kappa * a[at])
            memory[h] = memory[h] @ transition + torch.outer(v[at], written[at])
            o = memory[h] @ r[at]
            o = (o - o.mean()) / (o.var(correction=0) + 1e-5 * size).sqrt()
            o = o * layer.norm.weight[at] + layer.norm.bias[at]
            out.append(o + (r[at] * written[at] * layer.r_k[h]).sum() * v[at])
        ys.append(layer.out.weight @ (torch.cat(out) * g))
        before = x_t
    return torch.stack(ys), torch.stack(vs), memory


@torch.no_grad()
def test_the_layer_is_its_equation():
    layer = drawn(width=6, heads=2)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y, state = layer(x)
    for row in range(2):
        want, _, memory = by_matrices(layer, x[row])
        torch.testing.assert_close(y[row], want, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(state.memory[row], memory.mT, atol=1e-10, rtol=1e-8)
        assert torch.equal(state.last[row], x[row, -1])


@torch.no_grad()
def test_the_first_value_passes_from_layer_to_layer():
    first, later = drawn(0, width=6, heads=2, v_first="out"), drawn(1, width=6, heads=2, v_first="in", depth=1.0)
    x = torch.randn(2, 9, 6, dtype=torch.float64)

    def through(run_first, run_later, x):  # two layers with skips: what a model does
        y, value = run_first(x).chunk(2, -1)
        return x + y + run_later(torch.cat([x + y, value], -1))

    y = through(lambda u: first(u)[0], lambda u: later(u)[0], x)
    for row in range(2):
        one, value, _ = by_matrices(first, x[row])
        two, _, _ = by_matrices(later, x[row] + one, value)
        torch.testing.assert_close(y[row], x[row] + one + two, atol=1e-10, rtol=1e-8)

    states = {first: first.initial_state(2), later: later.initial_state(2)}

    def step(layer):
        def run(u):
            out, states[layer] = layer.step(u, states[layer])
            return out

        return run

    for t in range(9):
        torch.testing.assert_close(through(step(first), step(later), x[:, t]), y[:, t], atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_decays_and_eigenvalues_lie_in_their_ranges():
    layer = drawn(width=6, heads=2)
    for p in (layer.decay.up.bias, layer.rate.up.bias):
        p.copy_(8 * torch.randn_like(p))
    slowest = math.exp(-math.exp(-0.5))
    eye = torch.eye(3, dtype=torch.float64).expand(1, 2, 3, 3)
    found = []
    for x in 5 * torch.randn(200, 1, 6, dtype=torch.float64):
        zero, one = (layer.step(x, RWKV7State(0 * x, m))[1].memory[0] for m in (0 * eye, eye))
        found.append(torch.linalg.eigvals(one - zero))
    values = torch.cat(found)
    assert values.imag.abs().max() < 1e-6  # diag(w) - D k k^T with D > 0 is similar to a symmetric matrix
    assert slowest - 1 - 1e-9 <= values.real.min() < -0.2 and 0.99 < values.real.max() <= 1 + 1e-9
    log_w = layer._mixed(100 * torch.randn(500, 6).double(), torch.zeros(500, 6).double()).log_w
    assert log_w.exp().min() >= slowest - 1e-12 and log_w.max() <= 0


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_birth_at_every_depth(depth):
    layer = RWKV7(128, heads=2, depth=depth)
    assert layer.mu.min() >= 0 and layer.mu.max() <= 1
    assert layer.decay.down.out_features == 32 and layer.gate.down.out_features == 64
    bias = layer.decay.up.bias  # the last channels keep longest: their decay is the least
    assert bias[:16].mean() < bias[-16:].mean()
    x = torch.randn(2, 50, 128)
    y, state = layer(x)
    assert y.isfinite().all() and state.memory.abs().max() < 100


def test_a_key_of_zero_removes_nothing_and_has_a_gradient():
    layer = drawn(width=6, heads=2)
    with torch.no_grad():
        layer.k.weight.zero_()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    y, _ = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_bad_arguments_are_refused():
    with pytest.raises(UsageError, match="width 6 is not a multiple of heads 4"):
        RWKV7(6, heads=4)
    with pytest.raises(UsageError, match="v_first 'yes'"):
        RWKV7(6, heads=2, v_first="yes")
    with pytest.raises(UsageError, match="depth 2"):
        RWKV7(6, heads=2, depth=2)


@pytest.mark.parametrize("depth", [0.0, 0.25])
def test_birth_is_the_authors(depth):
    """Entry by entry, at a width whose heads and channels are easily told apart."""
    torch.manual_seed(0)
    width, size = 8, 4
    layer = RWKV7(width, heads=2, depth=depth, v_first="in")
    for i in range(width):
        part, within = i / (width - 1), 2 * (i % size) / (size - 1) - 1
        zigzag = math.copysign(within**2, within)
        mu = [1 - (i / width) ** (power * (1 - depth)) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]  # r, w, k, v, a, g
        assert layer.mu[:, i].tolist() == pytest.approx(mu, abs=1e-6)
        assert layer.k_k[i].item() == pytest.approx(0.71 - 0.1 * (part - 0.5))
        assert layer.decay.up.bias[i].item() == pytest.approx(
            -6 + 6 * part ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag, abs=1e-6
        )
        assert layer.rate.up.bias[i].item() == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * (part - 0.5), abs=1e-6)
        assert layer.mix.up.bias[i].item() == pytest.approx(0.73 - 0.4 * (part - 0.5))
    assert (layer.k_a == 1.02).all() and (layer.r_k == -0.04).all() and layer.gate.up.bias is None
    eye = torch.eye(width)
    for linear, gain in ((layer.r, 1.0), (layer.k, 0.1), (layer.v, 1.0)):
        torch.testing.assert_close(linear.weight @ linear.weight.T, gain**2 * eye, atol=1e-5, rtol=0)
    for low in (layer.decay, layer.rate, layer.gate, layer.mix):
        for linear in (low.down, low.up):
            torch.testing.assert_close(linear.weight @ linear.weight.T, 0.01 * eye, atol=1e-5, rtol=0)
