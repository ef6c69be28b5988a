"""The linear system that is read out computes what the layer computes."""

from __future__ import annotations

import pytest
import torch

import statewise.layers  # noqa: F401  registers them
from statewise.core import UsageError, layers
from statewise.interpret import dynamics
from statewise.interpret.dynamics import SYSTEMS
from statewise.ops import delta_scan, dplr_scan, linear_scan, ops, outer_scan, selective_scan, softmax_scan
from statewise.testing import build

NONLINEAR = {
    "elman", "jordan", "lstm", "gru", "reservoir", "attention", "window_attention", "para_gru", "para_lstm", "cfc",
    "ltc", "ngram_heads", "slstm", "conv_slstm", "routing_attention",
}  # fmt: skip
LINEAR = [info for info in layers if info.name not in NONLINEAR]


def read(info, example):
    layer = build(info.cls, example)
    x = torch.randn(2, 6, layer.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return layer, x, dynamics(layer, x)


@pytest.mark.parametrize(
    "info, example", [pytest.param(i, e, id=f"{i.name}{n}") for i in LINEAR for n, e in enumerate(i.examples)]
)
def test_the_matrix_times_the_input_is_the_output(info, example):
    layer, x, found = read(info, example)
    heads = found.x.shape[2]
    assert found.matrix.shape[:2] == (2, heads)
    values = found.x.permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, H, T R, V)
    y = (found.matrix @ values).unflatten(2, (6, -1)).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(y, found.y, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(found.apply(found.x), found.y, atol=1e-10, rtol=1e-9)
    if found.op == "step":
        torch.testing.assert_close(found.y[:, :, 0, :, 0], layer(x)[0], atol=1e-12, rtol=0)


def test_layers_were_found():
    assert len(LINEAR) >= 5 and {info.name for info in LINEAR} >= {"lru", "s5", "min_gru"}


def test_the_past_is_all_that_counts():
    _, _, found = read(layers["min_gru"], dict(width=3, hidden=4))
    assert torch.equal(found.matrix, found.matrix.tril()) and found.matrix.abs().sum() > 0


@pytest.mark.parametrize("name", ["gru", "elman"])
def test_a_nonlinear_layer_is_refused(name):
    info = layers[name]
    with pytest.raises(UsageError, match="not linear in its state"):
        read(info, info.examples[0])


OPS = {op.name: op for op in (linear_scan, outer_scan, delta_scan, dplr_scan, selective_scan, softmax_scan)}


@pytest.mark.parametrize("name", OPS)
def test_every_sample_of_the_op(name):
    """Resets, groups, every kind of decay: the system gives what the op gives from an empty state."""
    tried = 0
    for sample in OPS[name].samples("cpu", torch.float64):
        sample = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in sample.items()
        }
        if sample.get("lengths") is not None or 0 in next(iter(sample.values())).shape:
            continue
        found = SYSTEMS[name](ops[name], dict(sample))
        torch.testing.assert_close(found.apply(found.x), found.y, atol=1e-9, rtol=1e-8)
        tried += 1
    assert tried >= 1
