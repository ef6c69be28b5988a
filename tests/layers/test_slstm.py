"""sLSTM: its equations in plain loops without a stabiliser, heads, exponential gates, what it starts with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from statewise.core import UsageError
from statewise.layers import SLSTM, ConvSLSTM


def drawn(layer, scale=0.5):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in layer.double().parameters():
            p.copy_(torch.randn_like(p) * scale)
    return layer


def arrays(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def blocks(r, hidden):
    """R as one matrix (4, N, N), zero between heads."""
    r = r[None] if r.ndim == 2 else r
    heads, size = len(r), r.shape[-1]
    full = np.zeros((4, hidden, hidden))
    for g in range(4):
        for h in range(heads):
            at = slice(h * size, (h + 1) * size)
            full[g, at, at] = r[h, g * size : (g + 1) * size]
    return full


def by_equation(gates, r, forget):
    """As the paper has it, with gates that grow as they like. gates (T, 4, N)."""
    h = c = n = np.zeros(gates.shape[-1])
    ys = []
    for row in gates:
        i, f, z, o = (row[g] + r[g] @ h for g in range(4))
        f = sigmoid(f) if forget == "sigmoid" else np.exp(f)
        c, n = f * c + np.exp(i) * np.tanh(z), f * n + np.exp(i)
        h = sigmoid(o) * c / n
        ys.append(h)
    return np.stack(ys)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
def test_slstm_is_its_equation(heads, forget):
    layer = drawn(SLSTM(3, 4, heads=heads, forget=forget))
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    p = arrays(layer)
    r = blocks(p["recurrent"], 4)
    want = [by_equation((row @ p["inp.weight"].T + p["inp.bias"]).reshape(9, 4, 4), r, forget) for row in x.numpy()]
    assert_close(layer(x)[0], torch.tensor(np.stack(want)), atol=1e-12, rtol=0)


def headwise(weight, x):
    size = weight.shape[-1]
    return np.concatenate([w @ x[n * size : (n + 1) * size] for n, w in enumerate(weight)])


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
def test_conv_slstm_is_its_equation(forget):
    layer = drawn(ConvSLSTM(6, heads=2, taps=3, forget=forget))
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    p, padded = arrays(layer), np.concatenate([np.zeros((2, 6)), x[0].numpy()])
    gates = []
    for t in range(8):
        a = p["conv.bias"] + sum(p["conv.weight"][j] * padded[2 + t - j] for j in range(3))
        a = a * sigmoid(a)
        sources = {"i": a, "f": a, "z": padded[2 + t], "o": padded[2 + t]}
        gates.append([headwise(p[f"{name}.weight"], source) for name, source in sources.items()])
    h = by_equation(np.array(gates) + p["bias"].reshape(4, 6), blocks(p["recurrent"], 6), forget).reshape(8, 2, 3)
    normed = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    want = normed.reshape(8, 6) * p["norm.weight"]
    assert_close(layer(x)[0][0], torch.tensor(want), atol=1e-10, rtol=0)


def test_heads_do_not_hear_each_other():
    layer = drawn(SLSTM(3, 6, heads=3))
    state = layer.initial_state(1)
    moved = state._replace(h=state.h + torch.tensor([0.0, 0, 1, 1, 0, 0]))
    x = torch.randn(1, 5, 3, dtype=torch.float64)
    changed = (layer(x, moved)[0] != layer(x, state)[0]).any(1)[0]
    assert changed.tolist() == [False, False, True, True, False, False]


def test_one_dense_head_is_blocks_that_are_all_there():
    dense, two = drawn(SLSTM(3, 4)), drawn(SLSTM(3, 4, heads=2))
    with torch.no_grad():
        dense.recurrent.copy_(torch.tensor(blocks(arrays(two)["recurrent"], 4)).flatten(0, 1))
        dense.inp.load_state_dict(two.inp.state_dict())
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    assert_close(dense(x)[0], two(x)[0], atol=1e-14, rtol=0)


def test_a_later_input_outweighs_all_earlier_ones():
    """What gates below 1 cannot do: one input with i' = 200 wipes out what was held, and no number overflows."""
    layer = drawn(SLSTM(1, 1), 0.0)
    with torch.no_grad():
        layer.inp.weight[0], layer.inp.bias[1], layer.inp.bias[3] = 200.0, 50.0, 50.0  # i' = 200 x; f = o = 1
        layer.inp.weight[2] = -3.0
    x = torch.tensor([[[0.0], [0.0], [1.0], [0.0]]], dtype=torch.float64)
    y = layer(x)[0].flatten().tolist()
    assert y == pytest.approx([0, 0, np.tanh(-3), np.tanh(-3)], abs=1e-12)
    assert layer(50 * x)[0].isfinite().all()


def test_where_forget_gates_begin():
    bias = SLSTM(3, 6, heads=2, place=0.5).inp.bias.detach()
    want = [5 - 12 * r**0.95 for r in (0, 0.5, 1)] * 2
    assert bias[6:12].tolist() == pytest.approx(want, abs=1e-5) and not bias[:6].any() and not bias[12:].any()
    conv = ConvSLSTM(6, heads=2, place=0.5)
    assert torch.equal(conv.bias, bias) and not conv.recurrent.any()


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
def test_the_average_holds_over_a_long_time(forget):
    """With open gates h is the mean of all tanh(z), whatever their number."""
    layer = drawn(SLSTM(1, 1, forget=forget), 0.0).float()
    with torch.no_grad():
        layer.inp.weight[2], layer.inp.bias[3] = 1.0, 99.0
        layer.inp.bias[1] = 99.0 if forget == "sigmoid" else 0.0
    x = torch.randn(1, 2000, 1)
    want = x.double().tanh().cumsum(1) / torch.arange(1, 2001)[:, None]
    assert_close(layer(x)[0].double(), want, atol=1e-5, rtol=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="not a multiple of heads 3"):
        SLSTM(3, 4, heads=3)
    with pytest.raises(UsageError, match="forget 'exponential'"):
        ConvSLSTM(4, heads=2, forget="exponential")
    with pytest.raises(UsageError, match="place 2"):
        SLSTM(3, 4, place=2.0)
