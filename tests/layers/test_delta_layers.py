"""DeltaNet, Gated DeltaNet, DeltaProduct: the equations by explicit matrices, recall, eigenvalues, counting."""

from __future__ import annotations

import math

import pytest
import torch

from statewise.core import UsageError
from statewise.layers import DeltaNet, DeltaProduct, DeltaState, GatedDeltaNet
from statewise.nn import unit

SIZES = dict(heads=2, key=3, value=2)
CASES = [
    (DeltaNet, dict(width=4, **SIZES)),
    (DeltaNet, dict(width=4, **SIZES, taps=None, negative=True)),
    (GatedDeltaNet, dict(width=4, **SIZES)),
    (GatedDeltaNet, dict(width=4, **SIZES, values_per_key=3, taps=2, negative=True)),
    (DeltaProduct, dict(width=4, **SIZES, corrections=3)),
    (DeltaProduct, dict(width=4, **SIZES, corrections=2, taps=None, negative=False, forget=True)),
    (DeltaProduct, dict(width=4, **SIZES, corrections=2, gate=True)),
]


def drawn(cls, arguments, seed=0):
    """A layer in float64 with all parameters of order one."""
    torch.manual_seed(seed)
    layer = cls(**arguments).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    return layer


def sigmoid(number):
    return 1 / (1 + math.exp(-number))


def silu(vector):
    return torch.tensor([c * sigmoid(c) for c in vector.tolist()], dtype=torch.float64)


def by_matrices(layer, x):
    """One row x (T, D): every matrix of every step and head written out."""
    n, sharing, twice = layer.corrections, layer.values_per_key, 2 if layer.negative else 1
    key, value, heads = layer.key, layer.value, layer.heads * layer.values_per_key
    eye, ys = torch.eye(key, dtype=torch.float64), []
    memory = [torch.zeros(key, value, dtype=torch.float64) for _ in range(heads)]
    z = [layer.qkv.weight @ x_t for x_t in x]
    for t, x_t in enumerate(x):
        if layer.conv is None:
            c = silu(z[t])
        else:
            c = silu(sum(w * z[t - j] for j, w in enumerate(layer.conv.weight) if t >= j))
        q_end, k_end = layer.heads * key, layer.heads * key * (1 + n)
        o = []
        for h in range(heads):
            g = h // sharing
            q = c[g * key : (g + 1) * key]
            transition, written = eye, torch.zeros(key, value, dtype=torch.float64)
            if layer.decay is not None:
                dt = math.log1p(math.exp(float(layer.decay.weight[h] @ x_t + layer.dt_bias[h])))
                transition = eye * math.exp(-math.exp(layer.a_log[h]) * dt)
            for j in range(n):
                k = c[q_end + (j * layer.heads + g) * key :][:key]
                k = k / (k @ k + 1e-6).sqrt()
                v = c[k_end + (j * heads + h) * value :][:value]
                beta = twice * sigmoid(float(layer.beta.weight[j * heads + h] @ x_t))
                erase = eye - beta * torch.outer(k, k)
                transition, written = erase @ transition, erase @ written + beta * torch.outer(k, v)
            memory[h] = transition @ memory[h] + written
            read = memory[h].T @ (q / (q @ q + 1e-6).sqrt()) / math.sqrt(key)
            o.append(read / (read.pow(2).mean() + 1e-5).sqrt() * layer.norm.weight)
        o = torch.cat(o)
        if layer.gate is not None:
            o = o * silu(layer.gate.weight @ x_t)
        ys.append(layer.out.weight @ o)
    return torch.stack(ys), torch.stack(memory)


@pytest.mark.parametrize("cls, arguments", CASES)
@torch.no_grad()
def test_the_layer_is_its_equation(cls, arguments):
    layer = drawn(cls, arguments)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    y, state = layer(x)
    for row in range(2):
        want, memory = by_matrices(layer, x[row])
        torch.testing.assert_close(y[row], want, atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(state.memory[row], memory, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("negative", [False, True])
def test_a_product_of_one_is_delta_net(negative):
    arguments = dict(width=4, **SIZES, negative=negative)
    one, product = drawn(DeltaNet, arguments), DeltaProduct(**arguments, corrections=1).double()
    product.load_state_dict(one.state_dict())
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(product(x), one(x), atol=0, rtol=0)


@pytest.mark.parametrize("a_log", [-torch.inf, -800.0])
def test_without_decay_the_gated_rule_is_the_rule(a_log):
    arguments = dict(width=4, **SIZES, corrections=2)
    plain, gated = drawn(DeltaProduct, arguments), DeltaProduct(**arguments, forget=True).double()
    found = gated.load_state_dict(plain.state_dict(), strict=False)
    assert found.missing_keys == ["a_log", "dt_bias", "decay.weight"]
    with torch.no_grad():
        gated.a_log.fill_(a_log)
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(gated(x), plain(x))


def test_rates_beyond_what_float32_holds_have_gradients():
    layer = GatedDeltaNet(3, heads=2, key=2, value=3)
    torch.nn.init.constant_(layer.a_log, 100.0)
    torch.nn.init.constant_(layer.dt_bias, -200.0)  # steps of 0: infinity times them is no number
    x = torch.randn(2, 9, 3, requires_grad=True)
    layer(x)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *layer.parameters()))


def test_a_gate_that_forgets_all_leaves_the_last_step():
    layer = drawn(GatedDeltaNet, dict(width=4, **SIZES, taps=None))
    with torch.no_grad():
        layer.a_log.fill_(50.0)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    y, _ = layer(x)
    torch.testing.assert_close(y, torch.stack([layer(x[:, t : t + 1])[0][:, 0] for t in range(6)], 1))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def by_table(layer, rows):
    """Set the maps of a layer of one head by the rows that one-hot tokens select: q, all k, all v, all beta."""
    table = torch.tensor(rows, dtype=torch.float64).T
    with torch.no_grad():
        layer.qkv.weight.copy_(table[: layer.qkv.out_features])
        layer.beta.weight.copy_(table[layer.qkv.out_features :])
        layer.out.weight.fill_(1)
    return layer


def test_orthonormal_keys_recall_their_pairs_and_overwriting_spares_the_others():
    keys, values = 1000 * torch.eye(4, dtype=torch.float64), 3 * torch.randn(5, 4, dtype=torch.float64)
    layer = DeltaNet(9, heads=1, key=4, value=4, taps=None).double()
    with torch.no_grad():  # a token is (key, value, strength)
        layer.qkv.weight.zero_()
        layer.qkv.weight[0:4, 0:4] = layer.qkv.weight[4:8, 0:4] = layer.qkv.weight[8:12, 4:8] = torch.eye(4)
        layer.beta.weight.zero_()
        layer.beta.weight[0, 8] = 1
        layer.out.weight.zero_()
        layer.out.weight[:4] = torch.eye(4)
        order = torch.tensor([0, 1, 2, 3, 1])  # the second key is written again
        write = torch.cat([keys[order], values, torch.full((5, 1), 60.0)], 1)
        read = torch.cat([keys, torch.zeros(4, 4), torch.full((4, 1), -60.0)], 1)
        y, state = layer(torch.cat([write, read])[None])
    want = torch.nn.functional.silu(values[[0, 4, 2, 3]])
    torch.testing.assert_close(state.memory[0, 0], want, atol=1e-10, rtol=1e-10)
    o = want / 2  # divided by sqrt(K)
    torch.testing.assert_close(y[0, 5:, :4], o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def transitions(layer, x):
    """(T, H, K, K): the matrix of every step, from what the step makes of the unit states."""
    layer, found = layer.double(), []
    state = layer.initial_state(1)
    eye = torch.eye(layer.key, layer.value, dtype=torch.float64).expand_as(state.memory)
    for x_t in x[:, None].unbind():
        zero, one = (layer.step(x_t, DeltaState(state.taps, m))[1] for m in (0 * eye, eye))
        state = layer.step(x_t, state)[1]
        found.append((one.memory - zero.memory)[0])
    return torch.stack(found)


@pytest.mark.parametrize("negative, low", [(False, 0), (True, -1)])
def test_eigenvalues_of_a_step(negative, low):
    layer = drawn(DeltaNet, dict(width=4, heads=2, key=3, value=3, negative=negative))
    a = transitions(layer, 3 * torch.randn(60, 4, dtype=torch.float64))
    torch.testing.assert_close(a, a.mT)
    values = torch.linalg.eigvalsh(a)
    assert values.min() > low - 1e-9 and values.max() < 1 + 1e-9
    assert values.min() < low + 0.2  # and the range is used
    assert (values > 1 - 1e-9).sum(-1).eq(2).all()  # all but one direction are untouched


def moved_before_it_came_back(a, v):
    """|A v - v| - |A^3 v - v|: at most 0 if A is symmetric with eigenvalues in [0, 1], where 1 - l^3 >= 1 - l."""
    return (a @ v - v).norm() - (a @ a @ a @ v - v).norm()


def counter():
    """Tokens begin, turn, stay. Two mirrors at 60 degrees turn the memory by 120."""
    ask_and_mirrors, off, full = [50.0, 0.0, 50.0, 0.0, 25.0, 25 * 3**0.5], -60.0, 60.0
    rows = [
        [*ask_and_mirrors, 30.0, 0.0, 0.0, off],
        [*ask_and_mirrors, 0.0, 0.0, full, full],
        [*ask_and_mirrors, 0.0, 0.0, off, off],
    ]
    return by_table(DeltaProduct(3, heads=1, key=2, value=1, corrections=2, taps=None).double(), rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_two_reflections_a_step_count_to_three(dtype):
    layer = counter().to(dtype)
    tokens = torch.randint(1, 3, (1, 400), generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 0
    y, state = layer(torch.nn.functional.one_hot(tokens, 3).to(dtype))
    turns = (tokens == 1).cumsum(1)
    assert turns.max() > 150
    torch.testing.assert_close(y[0, :, 0].sign().long(), torch.where(turns[0] % 3 == 0, 1, -1))
    start = layer(torch.nn.functional.one_hot(tokens[:, :1], 3).to(dtype))[1]
    torch.testing.assert_close(
        state.memory.norm(), start.memory.norm(), atol=0, rtol=1e-4
    )  # b = 2 neither grows nor dies


def test_one_correction_that_only_erases_cannot_come_back_but_two_reflections_can():
    layer = drawn(DeltaNet, dict(width=4, heads=1, key=2, value=2))
    for a in transitions(layer, 3 * torch.randn(100, 4, dtype=torch.float64))[:, 0]:
        assert moved_before_it_came_back(a, torch.randn(2, dtype=torch.float64)) <= 1e-12
        assert a.trace() >= 1 - 1e-9
    two, turn, eye = counter(), torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    columns = [two.step(turn, DeltaState(None, column[None, None, :, None]))[1].memory[0, 0] for column in eye]
    a = torch.cat(columns, 1)
    c, s = math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)
    torch.testing.assert_close(a, torch.tensor([[c, -s], [s, c]], dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(a @ a @ a, torch.eye(2, dtype=torch.float64), atol=1e-8, rtol=0)
    assert a.trace() < -0.99 and moved_before_it_came_back(a, torch.randn(2, dtype=torch.float64)) > 0.5


def test_unit_vectors_have_a_gradient_at_zero():
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(unit(zero).sum(), zero)
    torch.testing.assert_close(grad, torch.full_like(grad, 1e3))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, x)
    assert unit(1e6 * x).norm(dim=-1).sub(1).abs().max() < 1e-12


def test_birth_of_the_gates():
    torch.manual_seed(0)
    layer = GatedDeltaNet(8, heads=200, key=2, value=2)
    dt, a = torch.nn.functional.softplus(layer.dt_bias), layer.a_log.exp()
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and 0.2 < (dt < 0.01).float().mean() < 0.8
    assert a.max() <= 16 and 6 < a.mean() < 10


@pytest.mark.parametrize("name", ["heads", "key", "value", "corrections", "taps"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} is 0"):
        DeltaProduct(**{**dict(width=4, **SIZES, corrections=2), name: 0})


@pytest.mark.parametrize("cls, arguments", CASES)
def test_birth_of_the_maps(cls, arguments):
    """Each map by itself is Xavier uniform, with gain 2^-2.5: queries, keys and values too, made by one product."""
    torch.manual_seed(0)
    layer = cls(**{**arguments, "width": 40, "heads": 4, "key": 16})
    maps = [*layer.qkv.weight.split(layer.sizes), layer.beta.weight, layer.out.weight]
    maps += [linear.weight for linear in (layer.decay, layer.gate) if linear is not None]
    for weight in maps:
        bound = 2**-2.5 * math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max() <= bound
