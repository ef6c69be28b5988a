"""What a newcomer gets wrong in Python is told in one line that says what is wrong and what is expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise.core import Cell, UsageError, join, layers, register_layer, save_state, stream
from statewise.decoding import Sampling, generate
from statewise.interpret import dynamics
from statewise.layers import LRU, MinGRU
from statewise.models import LanguageModel, Stack
from statewise.serving import export_step
from statewise.tasks import Digits

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def made(name: str) -> Any:
    torch.manual_seed(0)
    if name == "lru":
        return LRU(width=8, hidden=6)
    if name == "gru":
        return statewise.GRU(8, 6, batch_first=True).layer()
    if name == "ids":
        return LanguageModel("min_gru", width=8, depth=1).build(x_vocab=5, y_width=5)
    return Stack(layer="lru", width=6, depth=2).build(x_width=8, x_vocab=None, y_width=5)


@pytest.mark.parametrize("name", ["lru", "gru", "stack"])
@pytest.mark.parametrize(
    ("x", "rows", "said"),
    [
        (X[:, None].expand(4, 3, 8), 4, r"x has shape \(4, 3, 8\); expected \(B, D\), one time of all rows"),
        (X[:, :4], 4, r"expected a last dimension of 8"),
        (X.long(), 4, r"dtype torch.int64; expected floating point: convert with x.float\(\)"),
        (X, 3, "has batch 3, x has batch 4"),
        (X, None, r"step needs a state; begin with initial_state\(4\)"),
    ],
)
def test_step_says_what_does_not_fit(name: str, x: Tensor, rows: int | None, said: str) -> None:
    layer = made(name)
    with pytest.raises(UsageError, match=said) as error:
        layer.step(x, None if rows is None else layer.initial_state(rows))
    assert "\n" not in str(error.value)


def test_an_id_beyond_the_vocabulary_is_named_by_step() -> None:
    model = made("ids")
    with pytest.raises(UsageError, match="id 7 at row 1, step 0; expected 0 to 4"):
        model.step(torch.tensor([1, 7]), model.initial_state(2))


def test_an_error_of_the_cell_itself_stays_what_it_is() -> None:
    class Broken(Summed):
        def transition(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            raise AttributeError("of mine")

    with pytest.raises(AttributeError, match="of mine"):
        Broken(8).step(X, Broken(8).initial_state(4))


class Summed(Cell[Tensor]):
    """h_t = h_{t-1} + x_t."""

    def __init__(self, width: int):
        super().__init__()
        self.width = self.out_width = width

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.width)

    def transition(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return h + u, h + u


class OneThing(Summed):
    def transition(self, u: Tensor, h: Tensor) -> Any:
        return h + u


class Growing(Summed):
    def transition(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return u, torch.cat([h, u], -1)


def test_a_transition_returns_two_things_and_a_state_of_the_same_kind() -> None:
    two = torch.randn(2, 5, 8)  # whose rows would be taken for the two things
    for run in (lambda: OneThing(8)(two), lambda: OneThing(8).step(two[:, 0], torch.zeros(2, 8))):
        with pytest.raises(UsageError, match="OneThing: transition returns one tensor; expected two things"):
            run()
    with pytest.raises(UsageError, match=r"Growing: transition makes a state of .*16.* out of one of .*8"):
        Growing(8)(two)


def test_states_and_streams() -> None:
    lru, other = made("lru"), MinGRU(width=8, hidden=3)
    with pytest.raises(UsageError, match="is not that of LRU"):
        save_state("never written", lru, other.initial_state(2))
    with pytest.raises(UsageError, match=r"x.unbind\(1\)"):
        next(stream(lru, X[:, None]))
    with pytest.raises(UsageError, match="no states"):
        join([])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: generate(made("ids"), "The sea", 3), "the prompt is a str; expected ids"),
        (lambda: generate(made("ids"), torch.tensor([[1]]), 2.5), "max_new_tokens is 2.5; expected a whole number"),
        (lambda: generate(made("ids"), torch.tensor([[1]]), 3, Sampling(), rng=7), r"Generator\(\).manual_seed\(7\)"),
        (lambda: export_step(torch.nn.GRU(3, 4), "never written"), "export: a GRU; expected a layer"),
        (lambda: dynamics(torch.nn.GRU(3, 4), X), "dynamics: a GRU; expected a layer"),
        (lambda: dynamics(made("lru"), X), r"x has shape \(4, 8\); expected \(B, T, D\)"),
        (lambda: Digits().rows("dev"), "digits: split 'dev'; expected one of train, validation, test"),
    ],
)
def test_calls_around_layers(call: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_layer_that_is_defined_anew_takes_its_place_and_no_other_does() -> None:
    told: Any = {"paper": "none", "examples": [{"width": 3}], "sized": lambda width: {"width": width}}

    def define() -> type:
        @register_layer("defined_twice", **told)
        class Twice(Summed):
            pass

        return Twice

    try:
        first, second = define(), define()
        assert layers["defined_twice"].cls is second is not first
        with pytest.raises(UsageError, match=r"already registered by .*Twice.*; choose another name"):
            register_layer("defined_twice", **told)(Growing)
    finally:
        del layers._entries["defined_twice"]
    with pytest.raises(UsageError, match="'my layer'; expected letters"):
        register_layer("my layer", **told)
    with pytest.raises(UsageError, match="is no layer"):
        register_layer("plain", **told)(torch.nn.GRU)
