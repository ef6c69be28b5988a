"""Predict the next symbol of a random string: several symbols may be right, each with its probability."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Batch
from .generated import Generated


class NextSymbol(Generated):
    """Batches have `truth`. The loss is the cross entropy of what came, so that the best there is is the entropy."""

    kind = "classification"
    metric = "accuracy"
    spare = 40

    def oracle(self, batch: Batch) -> Tensor:
        """The probabilities that the next symbol is drawn by."""
        assert batch.truth is not None
        return batch.truth.log().clamp_min(-40)

    def metrics(self, out: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """accuracy: the most active symbol can follow. exact: all that can follow are more active than all others.
        certain: the answer where there is but one. overlap: 1 - the total variation between model and truth.
        divergence: of the model from the truth, in nats."""
        assert batch.truth is not None
        count = float(batch.weight.sum())
        can, asked = batch.truth > 0, batch.weight > 0
        out = out.float()
        best = can.gather(-1, out.argmax(-1, keepdim=True))[..., 0]
        exact = out.masked_fill(~can, torch.inf).amin(-1) > out.masked_fill(can, -torch.inf).amax(-1)
        one = asked & (can.sum(-1) == 1)
        apart = torch.special.xlogy(batch.truth, batch.truth) - batch.truth * out.log_softmax(-1)
        overlap = torch.minimum(out.softmax(-1), batch.truth).sum(-1)
        return {
            "loss": (float(self.loss(out, batch)) * count, count),
            "accuracy": (float((best & asked).sum()), count),
            "exact": (float((exact & asked).sum()), count),
            "certain": (float((best & one).sum()), float(one.sum())),
            "overlap": (float(overlap[asked].sum()), count),
            "divergence": (float(apart.sum(-1)[asked].sum()), count),
        }


def share(task: Generated, metric: str, guess: Tensor) -> float:
    """The metric, over the test set, of the same answer (E,) at every step."""
    found = [task.metrics(guess.expand(*b.y.shape[:2], -1), b)[metric] for b in task.batches("test")]
    return sum(total for total, _ in found) / sum(count for _, count in found)
