"""explain stretches an op's sample call to the shape that is asked for."""

from __future__ import annotations

import pytest
import torch

from statewise.cli.explain import arguments_for
from statewise.ops import ops

LOOPS = {
    "elman_loop": {"h0": (8, 64), "w_ih": (64, 64), "w_hh": (64, 64), "b_ih": (64,), "b_hh": (64,)},
    "gru_loop": {"h0": (8, 64), "w_ih": (192, 64), "w_hh": (192, 64), "b_ih": (192,), "b_hh": (192,)},
    "lstm_loop": {"h0": (8, 64), "c0": (8, 64), "w_ih": (256, 64), "w_hh": (256, 64), "b_ih": (256,), "b_hh": (256,)},
    "jordan_loop": {"s0": (8, 64), "w_ih": (64, 64), "w_sh": (64, 64), "w_hy": (64, 64), "b_ih": (64,), "b_hy": (64,)},
    "linear_scan": {"a": (8, 20, 64), "h0": (8, 64)},
}


@pytest.mark.parametrize("name", ops)
def test_every_width_follows_the_shape(name):
    arguments = arguments_for(ops[name], (8, 20, 64), torch.float32, torch.device("cpu"))
    shapes = {key: tuple(value.shape) for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    assert shapes == {"x": (8, 20, 64)} | LOOPS[name]
    assert ops[name].check is None or ops[name].check(**arguments) is None
