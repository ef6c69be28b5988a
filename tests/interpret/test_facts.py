"""What is said of a layer is what it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import statewise.layers  # noqa: F401  registers them
from statewise.core import layers, leaves
from statewise.interpret import facts
from statewise.interpret.facts import counted
from statewise.models import Stack


@pytest.mark.parametrize("info", layers, ids=lambda info: info.name)
def test_every_layer_has_facts(info):
    layer = info.cls(**info.sized(8))
    found = facts(layer, steps=8)
    state = layer.initial_state(1)
    assert found.state_bytes == sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))
    assert found.equation and 0 < found.forward <= found.train and found.stream > 0
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    "name, words",
    [
        ("lru", "constant in time, each state feeds at most 2; 16 real states"),
        ("min_gru", "chosen by the input, diagonal, real; 8 systems of 1 state (linear_scan)"),
        ("gru", "not linear in the state (gru_loop)"),
        ("slstm", "not linear in the state (slstm_loop)"),
        ("cfc", "not linear in the state"),
        ("para_gru", "not linear in the state (newton)"),
        ("lightnet", "chosen by the input, diagonal, real; 1 system of 8 states, 8 copies of each (outer_scan)"),
    ],
)
def test_the_transition_is_told(name, words):
    assert facts(layers[name].cls(**layers[name].sized(8)), steps=8).transition == words


@pytest.mark.parametrize(
    "name, words",
    [
        ("delta_net", "a multiple of the identity plus rank 1"),
        ("delta_product", "a multiple of the identity plus rank 2"),
        ("rwkv7", "diagonal plus rank 1"),
        ("lmu", "constant in time, dense"),
        ("retnet", "constant in time, one decay for all states"),
        ("mamba2", "chosen by the input, one decay for all states"),
        ("gla", "chosen by the input, diagonal"),
    ],
)
def test_the_kind_of_transition_is_told(name, words):
    torch.manual_seed(0)
    assert words in facts(layers[name].cls(**layers[name].sized(32)), steps=8).transition


def test_two_recurrences_are_not_called_nonlinear():
    model = Stack(layer="min_gru", width=8, depth=2).build(x_width=3, y_width=2)
    assert facts(model, steps=4).transition == "several recurrences: linear_scan, linear_scan"


def test_operations_are_counted():
    a, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5)
    with counted() as count:
        a(x).sigmoid()
    assert count[0] == 2 * 3 * 5 * 7 + 3 * 7


def test_more_width_costs_more():
    small, large = (facts(layers["gru"].cls(**layers["gru"].sized(width)), steps=4) for width in (8, 16))
    assert 3 < large.stream / small.stream < 4.5
