"""explain stretches an op's sample call to the shape that is asked for."""

from __future__ import annotations

import pytest
import torch

from statewise.cli.explain import arguments_for
from statewise.ops import ops

WIDTH, HEADS = (8, 20, 64), (8, 20, 6, 64)  # of x, of the queries
HEAD, STATE = {"q": HEADS, "k": HEADS, "v": HEADS}, {"state": (8, 6, 64, 64)}

STRETCHED = {
    "elman_loop": {"x": WIDTH, "h0": (8, 64), "w_ih": (64, 64), "w_hh": (64, 64), "b_ih": (64,), "b_hh": (64,)},
    "gru_loop": {"x": WIDTH, "h0": (8, 64), "w_ih": (192, 64), "w_hh": (192, 64), "b_ih": (192,), "b_hh": (192,)},
    "lstm_loop": {
        "x": WIDTH,
        "h0": (8, 64),
        "c0": (8, 64),
        "w_ih": (256, 64),
        "w_hh": (256, 64),
        "b_ih": (256,),
        "b_hh": (256,),
    },
    "slstm_loop": {
        "x": WIDTH,
        **dict.fromkeys(("h0", "c0", "n0", "m0"), (8, 64)),
        **dict.fromkeys(("w_ih", "w_hh"), (256, 64)),
        **dict.fromkeys(("b_ih", "b_hh"), (256,)),
    },
    "jordan_loop": {
        "x": WIDTH,
        "s0": (8, 64),
        "w_ih": (64, 64),
        "w_sh": (64, 64),
        "w_hy": (64, 64),
        "b_ih": (64,),
        "b_hy": (64,),
    },
    "linear_scan": {"a": WIDTH, "x": WIDTH, "h0": (8, 64)},
    "log_sum_exp_scan": {"x": WIDTH, "z0": (8, 64)},
    "long_conv": {"u": WIDTH, "kernel": (64, 20)},
    "selective_scan": {
        "x": WIDTH,
        "dt": WIDTH,
        "a": (64, 64),
        "b": (8, 20, 64),
        "c": (8, 20, 64),
        "state": (8, 64, 64),
    },
    "softmax_scan": {"score": WIDTH, "v": (8, 20, 64, 64), "state": [(8, 64), (8, 64), (8, 64, 64)]},
    "block_scan": {"a": (8, 20, 6, 64, 64), "x": HEADS, "h0": (8, 6, 64)},
    "outer_scan": HEAD | STATE,
    "delta_scan": HEAD | STATE | {"beta": HEADS[:3]},
    "dplr_scan": HEAD | STATE | {"a": HEADS, "b": HEADS},
}


@pytest.mark.parametrize("name", ops)
def test_every_width_follows_the_shape(name):
    asked = next(shape for shape in STRETCHED[name].values() if len(shape) >= 3)
    arguments = arguments_for(ops[name], asked, torch.float32, torch.device("cpu"))
    shapes = {key: _shapes(value) for key, value in arguments.items() if value is not None}
    assert shapes == STRETCHED[name]
    assert ops[name].check is None or ops[name].check(**arguments) is None


def _shapes(value):
    return [_shapes(part) for part in value] if isinstance(value, tuple) else tuple(value.shape)
