"""Elman, GRU and LSTM with heads, and by Newton's method: equal to the loop, Jacobians right, wrong ones found."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from statewise.core import NumericError, UsageError, leaves
from statewise.layers import Elman, GRULayer, LSTMLayer
from statewise.layers.gated_cell import by_gate
from statewise.ops import observe
from statewise.ops.newton import Layout, Structure, by_tangents, watched

KINDS = {
    "elman": lambda **more: Elman(3, 6, **more),
    "relu": lambda **more: Elman(3, 6, nonlinearity="relu", **more),
    "gru": lambda **more: GRULayer(3, 6, **more),
    "lstm": lambda **more: LSTMLayer(3, 6, **more),
}
HEADS = [1, 2, 6]


def drawn(layer, scale=0.4):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in layer.double().parameters():
            p.copy_(torch.randn_like(p) * scale)
    return layer


def pair(kind, heads, scale=0.4):
    return tuple(drawn(KINDS[kind](heads=heads, parallel=how), scale) for how in ("newton", "loop"))


def case(steps=60):
    torch.manual_seed(4)
    x = torch.randn(3, steps, 3, dtype=torch.float64)
    reset = torch.rand(3, steps) < 0.05
    return x, {"reset": reset, "lengths": torch.tensor([steps, 17, 0])}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_newton_equals_the_loop(kind, heads):
    by_newton, loop = pair(kind, heads)
    x, masks = case()
    for more in ({}, masks):
        found = []
        for layer in (by_newton, loop):
            v = x.clone().requires_grad_()
            y, last = layer(v, **more)
            total = y.square().sum() + sum(s.sum() for s in leaves(last))
            found.append([y, *leaves(last), *torch.autograd.grad(total, [v, *layer.parameters()])])
        for a, b in zip(*found, strict=True):
            assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_jacobians_are_what_differentiation_gives(kind, heads):
    layer = drawn(KINDS[kind](heads=heads))
    n, size = 6, 6 // heads
    if kind == "lstm":
        groups = torch.arange(2 * n).view(2, heads, size).transpose(0, 1).flatten(1)
        structure = Structure.of(groups.tolist())
    else:
        structure = Structure(n, size)
    u = torch.randn(5, len(layer.inp.weight), dtype=torch.float64)

    def step(u, state):
        seen = torch.linalg.lstsq(layer.inp.weight, (u - layer.inp.bias).T).solution.T  # an x with W x + b = u
        return layer.transition(seen, state)

    with torch.no_grad():
        layer.inp.weight.copy_(torch.randn_like(layer.inp.weight))
        u = layer.inp(torch.randn(5, 3, dtype=torch.float64))
        h = torch.randn(5, structure.numbers, dtype=torch.float64)
        want = by_tangents(step, Layout.of(layer.initial_state(1)), structure)(u, h)
        got = layer.linearise(u, h)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_newton_is_what_runs_when_asked_for_and_only_then(kind):
    for layer, runs in zip(pair(kind, 2), (1, 0), strict=True):
        with watched() as found:
            layer(case()[0])
        assert len(found) == runs
        called: list[str] = []
        with observe(lambda op, *_, called=called: called.append(op.name)):
            layer(case()[0])
        assert any(name.endswith("_loop") for name in called) == (not runs)


@pytest.mark.parametrize("kind", ["elman", "gru", "lstm"])
def test_chaos_is_left_to_the_loop(kind):
    """Weights so large that rounding is amplified: the same answer, told as steps that were taken one at a time."""
    by_newton, loop = pair(kind, 1, scale=4.0)
    x = case(300)[0]
    with watched() as found:
        y = by_newton(x)[0]
    assert_close(y, loop(x)[0], atol=1e-10, rtol=0)
    if kind == "elman":
        assert max(found[0].sequential) > 0


@pytest.mark.parametrize("kind", ["elman", "gru", "lstm"])
def test_a_wrong_jacobian_is_found(kind, monkeypatch):
    layer = drawn(KINDS[kind](parallel="newton"))
    right = layer.linearise
    monkeypatch.setattr(layer, "linearise", lambda u, h: (right(u, h)[0], 0.5 * right(u, h)[1]))
    y, _ = layer(case()[0])
    assert_close(y, drawn(KINDS[kind]())(case()[0])[0], atol=1e-9, rtol=0)  # late, not wrong
    with pytest.raises(NumericError, match="Jacobian"):
        y.square().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_a_dense_matrix_with_zeros(kind):
    heads, dense = drawn(KINDS[kind](heads=3)), KINDS[kind]().double()
    gates = dense.recurrent.shape[0] // 6
    with torch.no_grad():
        r = by_gate(heads.recurrent, gates)
        dense.recurrent.copy_(torch.cat([torch.block_diag(*r[g]) for g in range(gates)]))
        for name, p in dense.named_parameters():
            if name != "recurrent":
                p.copy_(heads.get_parameter(name))
    x, masks = case()
    assert_close(heads(x, **masks)[0], dense(x, **masks)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 3])
def test_blocks_start_orthogonal(kind, heads):
    layer = KINDS[kind](heads=heads)
    for block in layer.recurrent.reshape(-1, 6 // heads, 6 // heads):
        assert_close(block @ block.T, torch.eye(6 // heads), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_is_refused(kind):
    with pytest.raises(UsageError, match="hidden 6 is not a multiple of heads 4"):
        KINDS[kind](heads=4)
    with pytest.raises(UsageError, match="parallel 'scan'"):
        KINDS[kind](parallel="scan")
