"""S5 against the dense real system that it diagonalises."""

from __future__ import annotations

import pytest
import torch

from statewise.core import UsageError
from statewise.layers import S5
from statewise.nn import legs_normal


def test_it_is_the_zero_order_hold_of_the_normal_part_of_legs():
    dt, blocks, states = 0.07, 2, 8
    torch.set_default_dtype(torch.float64)
    layer = S5(3, states, blocks=blocks, dt_min=dt, dt_max=dt)
    frequency, v = legs_normal(states // blocks)
    one = 2 * (v * (-0.5 + 1j * frequency) @ v.mH).real
    a, v = torch.block_diag(one, one), torch.block_diag(v, v)
    b = 2 * (v @ torch.complex(layer.b[:, 0], layer.b[:, 1])).real
    c = 2 * (torch.complex(layer.c[..., 0], -layer.c[..., 1]) @ v.mH).real
    big = torch.zeros(states + 3, states + 3)
    big[:states, :states], big[:states, states:] = a, b
    held = torch.linalg.matrix_exp(big * dt)  # both halves of the hold at once
    step, push = held[:states, :states], held[:states, states:]
    x, h = torch.randn(1, 40, 3), torch.zeros(states)
    y, _ = layer(x)
    for t in range(40):
        h = step @ h + push @ x[0, t]
        torch.testing.assert_close(y[0, t], c @ h + layer.d * x[0, t])


def test_it_holds_half_of_the_states():
    layer = S5(4, 16, blocks=4)
    assert layer.initial_state(2).shape == (2, 8)
    assert layer.initial_state(2).dtype == torch.complex64


@pytest.mark.parametrize("states, blocks", [(7, 1), (0, 1), (8, 3), (8, 0)])
def test_it_refuses_states_that_do_not_pair_up(states: int, blocks: int):
    with pytest.raises(UsageError, match=r"multiple|at least 1"):
        S5(2, states, blocks=blocks)
