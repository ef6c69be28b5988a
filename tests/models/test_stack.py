"""Descriptions of stacks: what they build, what they refuse, how they start."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from statewise.core import Unknown, UsageError, layers
from statewise.models import Residual, Stack, examples
from statewise.nn import GLU


@pytest.mark.parametrize("name", layers.names())
def test_every_layer_stacks(name: str):
    model = Stack(name, width=16, depth=2).build(x_width=3, y_width=5)
    y, state = model(torch.randn(2, 4, 3))
    assert y.shape == (2, 4, 5) and len(state) == 2
    assert model(torch.randn(2, 4, 3), state)[0].isfinite().all()


def test_there_were_layers_and_examples():
    assert len(layers) >= 12
    assert len({name for name, _ in examples()}) == len(examples()) >= 10


def test_ids_are_embedded():
    model = Stack("min_gru", width=8, depth=1).build(x_vocab=7, y_width=2)
    assert model.vocab == 7
    y, state = model(torch.randint(7, (2, 5)))
    assert y.shape == (2, 5, 2)
    assert model.step(torch.tensor([0, 6]), state)[0].shape == (2, 2)
    with pytest.raises(UsageError, match="id 7"):
        model(torch.tensor([[7]]))


def test_args_override_the_ordinary_size():
    model = Stack("min_gru", width=8, depth=1, args={"hidden": 3}).build(x_width=1, y_width=1)
    assert model.initial_state(1)[0].shape == (1, 3)


def test_a_description_is_json():
    stack = Stack("lru", args={"r_min": 0.5}, pool="mean")
    assert Stack(**json.loads(json.dumps(asdict(stack)))) == stack


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer": "gruu"}, "unknown layer 'gruu'; near: gru"),
        ({"args": {"hiden": 3}}, "gru has no argument 'hiden'; near: hidden"),
        ({"args": {"width": 3}}, "set the width of the stack"),
        ({"layer": "lru", "args": {"r_min": "x"}}, "lru does not take"),
        ({"args": {"hidden": "64"}}, "hidden is '64'"),
        ({"width": 0}, "width is 0"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"mlp": -1.0}, "mlp is -1.0"),
        ({"mlp": float("nan")}, "mlp is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"norm": "rsm"}, "unknown norm 'rsm'; near: rms"),
        ({"pool": "max"}, "pool 'max'"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], words: str):
    with pytest.raises(UsageError, match=words):
        replace(Stack(), **change).build(x_width=1, y_width=1)


def test_exactly_one_kind_of_input():
    for widths in ({}, {"x_width": 1, "x_vocab": 1}):
        with pytest.raises(UsageError, match="exactly one"):
            Stack().build(**widths, y_width=1)
    with pytest.raises(Unknown):
        Stack("nothing like it").build(x_width=1, y_width=1)


def test_a_linear_layer_gets_a_nonlinearity():
    for name in ("lru", "s5", "short_conv"):
        assert isinstance(Stack(name).blocks()[0].back, GLU)
    assert not isinstance(Stack("min_gru").blocks()[0].back, GLU)


def test_dropout_acts_in_training_only():
    model = Stack("min_gru", width=8, dropout=0.5).build(x_width=2, y_width=1)
    x = torch.randn(2, 6, 2)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_depth_does_not_blow_up_the_start():
    x = torch.randn(8, 20, 4)
    sizes = [Stack("min_gru", width=32, depth=depth).build(x_width=4, y_width=1).eval() for depth in (1, 16)]
    shallow, deep = (_stream(model, x).std().item() for model in sizes)
    assert deep < 2 * shallow


def _stream(model: Residual, x: torch.Tensor) -> torch.Tensor:
    """What arrives at the head."""
    h = model.embed(x)
    for block in model.blocks:
        h, _ = block(h)
    return h


def test_the_residual_sum_stays_wide_under_autocast():
    model = Stack("lru", width=8).build(x_width=2, y_width=1)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = model(torch.randn(1, 3, 2))
    assert seen == [torch.float32] * 2 and y.dtype == torch.float32


def test_a_seed_draws_the_layer_of_a_block_before_its_mlp():
    def first(**options):
        torch.manual_seed(0)
        return Stack("gru", width=4, depth=1, **options).build(x_width=2, y_width=3).blocks[0].layer.state_dict()

    plain = first(mlp=0.0)
    for options in (dict(mlp=2.0), dict(experts=3)):
        for name, weight in first(**options).items():
            assert torch.equal(weight, plain[name]), (options, name)
