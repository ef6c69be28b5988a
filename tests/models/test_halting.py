"""How deep a model thinks: weights of the depths, what they cost, and that training pays for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from statewise.core import Cost, UsageError, costs, settled
from statewise.models import Classifier, Halting, LanguageModel, Residual, Stack
from statewise.tasks import Adding, Copy
from statewise.training import Experiment, Train, fit
from statewise.training.evaluate import evaluate

UNIVERSAL = Stack("window_attention(window=8,heads=2)@one", width=8, depth=4, depth_embedding=True, ponder=1.0)


def halting(*odds: float) -> tuple[Halting, list[Tensor]]:
    """Five depths, of which depth n halts with probability odds[n], and what they give: 1, 10, 100, ..."""
    made = Halting(1, 5, nn.Identity(), ponder=1.0)
    nn.init.ones_(made.gate.weight)
    nn.init.zeros_(made.gate.bias)
    reads = [torch.tensor([[math.log(p / (1 - p))]]) for p in odds]
    return made, reads


def think(made: Halting, reads: list[Tensor]) -> tuple[float, float]:
    """Answer and N + w_N of one place."""
    so_far = made.begin(torch.zeros(1, 1))
    for depth in range(5):
        after = torch.full((1, 1), 10.0**depth)
        so_far = made.weigh(depth, reads[min(depth, len(reads) - 1)], after, so_far)
    return so_far.answer.item(), so_far.used.item()


@pytest.mark.parametrize(
    "odds, weights",
    [
        ((0.4,), (0.4, 0.4, 0.2)),
        ((0.3, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.1)),
        ((0.995,), (1.0,)),  # less than 0.01 is left: no other step for that
        ((0.9, 0.2), (0.9, 0.1)),
        ((0.1,), (0.1, 0.1, 0.1, 0.1, 0.6)),  # has not halted: the last depth takes all that is left
    ],
)
def test_weights_are_the_odds_and_then_what_is_left(odds: tuple[float, ...], weights: tuple[float, ...]) -> None:
    answer, used = think(*halting(*odds))
    assert sum(weights) == pytest.approx(1)
    assert answer == pytest.approx(sum(w * 10**n for n, w in enumerate(weights)), rel=1e-5)
    assert used == pytest.approx(len(weights) + weights[-1], rel=1e-5)


def test_at_birth_half_of_the_depths_are_used() -> None:
    for depth in (4, 6, 12):
        model = replace(UNIVERSAL, depth=depth).build(x_width=3, y_width=2)
        _, state = model(torch.randn(2, 5, 3))
        assert (state[-1].total / 5).tolist() == pytest.approx([depth / 2] * 2, abs=1.01)


def test_one_that_never_halts_is_the_plain_stack() -> None:
    model = UNIVERSAL.build(x_width=3, y_width=2)
    assert isinstance(model, Residual) and model.halting is not None
    nn.init.constant_(model.halting.gate.bias, -50.0)
    x = torch.randn(2, 6, 3)
    y, state = model(x)
    plain = replace(UNIVERSAL, ponder=None).build(x_width=3, y_width=2)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(y, plain(x)[0])
    assert len(model.blocks) == 1 and len(state) == 5
    torch.testing.assert_close(state[-1].total, torch.full((2,), 6 * (4 + 1.0)))


def test_one_that_halts_at_once_uses_one_depth() -> None:
    model = UNIVERSAL.build(x_width=3, y_width=2)
    assert isinstance(model, Residual) and model.halting is not None
    nn.init.constant_(model.halting.gate.bias, 50.0)
    _, state = model(torch.randn(2, 6, 3), lengths=torch.tensor([6, 2]))
    assert state[-1].total.tolist() == [12.0, 4.0]  # N = 1, w = 1, at each place before the end


def test_depth_embedding_tells_the_depths_of_one_block_apart() -> None:
    torch.manual_seed(0)
    model = replace(UNIVERSAL, ponder=None).build(x_width=3, y_width=2)
    assert isinstance(model, Residual) and model.signal is not None and model.signal.shape == (4, 8)
    x = torch.randn(1, 4, 3)
    before = model(x)[0]
    with torch.no_grad():
        model.signal.copy_(model.signal.flip(0))
    assert not torch.allclose(model(x)[0], before)


def test_costs_are_found_wherever_they_stand() -> None:
    paid = Cost(torch.tensor([3.0, 4.0]))
    state = (torch.ones(2), None, (paid, torch.zeros(2)))
    assert [total.tolist() for total in costs(state)] == [[3, 4]]
    after = settled(state)
    assert costs(after)[0].tolist() == [0, 0] and after[0] is state[0] and costs(state)[0].tolist() == [3, 4]
    assert costs(torch.ones(2)) == [] == costs(None)
    classifier = replace(UNIVERSAL, pool="mean").build(x_width=3, y_width=2)
    tokens = LanguageModel("gru@one", width=4, depth=2, ponder=0.1).build(x_vocab=3, y_width=3)
    assert isinstance(classifier, Classifier)
    assert len(costs(classifier.initial_state(1))) == len(costs(tokens.initial_state(1))) == 1


def trained(ponder: float, steps: int = 30) -> dict[str, float]:
    model = replace(UNIVERSAL, layer="min_gru@one", ponder=ponder)
    experiment = Experiment(Copy(length=4, copied=2), model, Train(steps=steps, batch=8, lr=0.02))
    return fit(experiment).metrics["test"]


def test_training_pays_for_thinking() -> None:
    free, dear = trained(1e-9), trained(1.0)
    assert dear["cost"] < 0.9 * free["cost"] / 1e-9
    assert 2 <= dear["cost"] <= 5


def test_the_loss_of_training_is_the_tasks_and_the_mean_cost_of_a_step() -> None:
    task, losses = Copy(length=4, copied=2), []
    experiment = Experiment(task, UNIVERSAL, Train(steps=1, batch=8, clip=0.0))
    fit(experiment, on_event=lambda event: losses.append(event["loss"]) if event["event"] == "train" else None)
    torch.manual_seed(experiment.seed)
    model = UNIVERSAL.build(x_vocab=task.x_vocab, y_width=task.y_width)
    batch = task.batch(0, 8, seed=0)
    with torch.no_grad():
        y, state = model(batch.x)
    assert losses == [pytest.approx((task.loss(y, batch) + state[-1].total.sum() / batch.x.numel()).item(), rel=1e-5)]
    found = evaluate(task, [batch, batch], lambda batch, state: model(batch.x, state), torch.device("cpu"))
    assert found["cost"] == pytest.approx(state[-1].total.mean().item() / batch.x.shape[1], rel=1e-5)


def test_a_record_without_halting_is_what_it_was() -> None:
    plain = Experiment(Adding(length=4), Stack("gru")).record()["model"]
    assert not {"ponder", "depth_embedding"} & plain.keys()
    halts = Experiment(Adding(length=4), UNIVERSAL)
    assert Experiment.from_record(halts.record()) == halts


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ponder": -1.0}, "ponder is -1.0"),
        ({"ponder": "1"}, "ponder is '1'"),
        ({"ponder": float("inf")}, "ponder is inf"),
        ({"depth": 1}, "ponder 1.0 at depth 1"),
        ({"depth_embedding": 1}, "depth_embedding is 1; expected true or false"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(UNIVERSAL, **change).build(x_width=1, y_width=1)  # type: ignore[arg-type]
