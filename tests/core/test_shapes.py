"""The shapes in annotations are the shapes that go in and come out."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from beartype import beartype
from torch import Tensor, nn

from statewise.core import Cell, UsageError, chunked, layer, unroll


class Sum(Cell[Tensor]):
    """h_t = h_{t-1} + x_t."""

    width = out_width = 2

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))

    def initial_state(self, batch: int) -> Tensor:
        return self.gain.new_zeros(batch, 2)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = state + u * self.gain
        return h, h


@pytest.mark.parametrize("run", [unroll, lambda *a, **k: chunked(a[0], a[1], [1, 2], **k)], ids=["unroll", "chunked"])
def test_shapes_are_checked_where_layers_are_run(run):
    x, good = torch.ones(3, 3, 2), {"reset": torch.zeros(3, 3).bool(), "lengths": torch.tensor([3, 0, 2])}
    assert run(Sum(), x, **good)[0].shape == (3, 3, 2)
    wrong = [{"reset": torch.zeros(3, 2).bool()}, {"reset": torch.zeros(3, 3)}, {"lengths": torch.tensor([1, 2])}]
    for given in wrong:
        with pytest.raises(jaxtyping.TypeCheckError):
            run(Sum(), x, **given)


@pytest.fixture
def typed(monkeypatch):
    """A function of core.layer, its annotations checked."""
    monkeypatch.setattr(layer, "jaxtyping", jaxtyping, raising=False)
    return lambda name: jaxtyping.jaxtyped(typechecker=beartype)(getattr(layer, name))


def test_past_end(typed):
    past_end = typed("past_end")
    assert past_end(torch.tensor([1, 0]), 3).tolist() == [[False, True, True], [True, True, True]]
    assert past_end(torch.tensor([], dtype=torch.int32), 3).shape == (0, 3)
    for lengths in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor(1)):
        with pytest.raises(jaxtyping.TypeCheckError):
            past_end(lengths, 3)


def test_clear_past_end(typed):
    clear = typed("clear_past_end")
    for shape in ((2, 3), (2, 3, 1), (2, 3, 4, 5), (2, 0, 1)):
        assert clear(torch.ones(shape), torch.tensor([2, 0]))[1].eq(0).all()
    for y, lengths in ((torch.ones(3), torch.tensor([1])), (torch.ones(2, 3), torch.tensor([1]))):
        with pytest.raises(jaxtyping.TypeCheckError):
            clear(y, lengths)


def test_a_mistake_of_the_user_is_still_told_in_words():
    with pytest.raises(UsageError, match="sum T = 3"):
        chunked(Sum(), torch.ones(1, 3, 2), [2])
