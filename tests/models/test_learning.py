"""Small trainings: each parallel layer remembers what a constant answer cannot know."""

from __future__ import annotations

import pytest
import torch

from statewise.models import Stack

STEPS, BATCH = 12, 32


def adding(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """value  .3 .9 .5 .1 .7 .2
    mark    0  1  0  0  1  0
    answer                1.6   two marks, one in each half
    """
    value = torch.rand(BATCH, STEPS, generator=rng)
    mark = torch.zeros(BATCH, STEPS)
    for half in (0, STEPS // 2):
        mark.scatter_(1, half + torch.randint(STEPS // 2, (BATCH, 1), generator=rng), 1)
    return torch.stack([value, mark], -1), (value * mark).sum(1)


# a linear recurrence can not choose what it adds: that is the work of the block below it
@pytest.mark.parametrize("layer, depth", [("min_gru", 1), ("min_lstm", 1), ("lru", 2), ("s5", 2)])
def test_it_learns_to_add(layer: str, depth: int):
    model = Stack(layer, width=16, depth=depth).build(x_width=2, y_width=1)
    rng = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        x, want = adding(rng)
        loss = (model(x)[0][:, -1, 0] - want).pow(2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.5 / 6, losses[-5:]  # the best constant, 1, has the variance of the sum: 1/6
