"""What is said of a layer is what it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import statewise.layers  # noqa: F401  registers them
from statewise.core import layers, leaves
from statewise.interpret import facts
from statewise.interpret.facts import counted


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
    ],
)
def test_the_transition_is_told(name, words):
    assert facts(layers[name].cls(**layers[name].sized(8)), steps=8).transition == words


def test_operations_are_counted():
    a, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5)
    with counted() as count:
        a(x).sigmoid()
    assert count[0] == 2 * 3 * 5 * 7 + 3 * 7


def test_more_width_costs_more():
    small, large = (facts(layers["gru"].cls(**layers["gru"].sized(width)), steps=4) for width in (8, 16))
    assert 3 < large.stream / small.stream < 4.5
