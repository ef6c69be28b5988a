"""How the next id is chosen: the likeliest, or drawn from a distribution that is sharpened and cut.

top-p: Holtzman et al. 2019, arXiv:1904.09751. min-p: Nguyen et al. 2024, arXiv:2407.01082. Repetition penalty: Keskar
et al. 2019, arXiv:1909.05858.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import NumericError, UsageError, wide

Randomness = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """p = softmax(z / temperature) of the logits z, cut in this order, and made to sum to one again.

    temperature 0 takes the likeliest id. top_k: the k likeliest. top_p: the fewest likeliest ids that have at least
    this much probability together. min_p: ids of at least min_p times the probability of the likeliest.
    repetition_penalty r: before all this, z of an id seen before, in the prompt too, becomes z / r where it is
    positive and z r where not; 1 for none. Order and meaning are those of transformers.

    Raises UsageError for a field out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0"),
        ):
            if not ok:
                raise UsageError(f"Sampling: {name} is {getattr(self, name)}; expected {expected}")

    @property
    def random(self) -> bool:
        return self.temperature > 0

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:
        """logits (B, V), seen (B, V) bool -> p (B, V), float32 or wider. Raises NumericError where logits are NaN."""
        check_numbers(logits)
        z = logits.to(wide(logits.dtype))
        if self.repetition_penalty != 1:
            z = torch.where(seen, torch.where(z > 0, z / self.repetition_penalty, z * self.repetition_penalty), z)
        if self.temperature == 0:
            return torch.zeros_like(z).scatter(1, z.argmax(-1, keepdim=True), 1)
        z = z / self.temperature
        if self.top_k is not None and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k).values[:, -1:], -torch.inf)
        p = z.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            high, order = p.sort(dim=-1, descending=True, stable=True)
            spare = high.cumsum(-1) - high >= self.top_p  # enough stands before it
            p = p.masked_fill(torch.zeros_like(spare).scatter(1, order, spare), 0)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0)
        return p / p.sum(-1, keepdim=True)

    def choose(self, logits: Tensor, seen: Tensor, rng: Randomness) -> Tensor:
        """The next ids (B,) int64. rng: as of `draw`; not needed at temperature 0."""
        if self.temperature == 0 and self.repetition_penalty == 1:
            check_numbers(logits)
            return logits.argmax(-1)
        p = self.probabilities(logits, seen)
        return draw(p, rng) if self.random else p.argmax(-1)


GREEDY = Sampling(temperature=0)


def check_numbers(logits: Tensor) -> None:
    """Raise NumericError for logits (B, V) that hold a NaN."""
    if bool(logits.isnan().any()):
        raise NumericError(f"the logits of row {int(logits.isnan().any(-1).nonzero()[0])} are not numbers")


def draw(p: Tensor, rng: Randomness) -> Tensor:
    """Ids (B,) by weights p (B, V) >= 0, one uniform number per row: from one generator, or from one per row, so that
    what a row draws does not depend on the rows beside it. Raises UsageError without a generator, or too few."""
    if rng is None:
        raise UsageError("drawing needs a generator: rng=torch.Generator().manual_seed(0), or one for each row")
    if isinstance(rng, torch.Generator):
        u = torch.rand(len(p), generator=rng, dtype=torch.float64, device=rng.device)
    elif isinstance(rng, int):
        raise UsageError(f"rng is {rng}; expected torch.Generator().manual_seed({rng})")
    elif len(rng) != len(p):
        raise UsageError(f"rng: {len(rng)} generators for {len(p)} rows; expected one, or one for each row")
    else:
        u = torch.cat([torch.rand(1, generator=r, dtype=torch.float64, device=r.device) for r in rng])
    below = p.double().cumsum(-1)
    total = below[:, -1:]
    place = torch.minimum(u.to(p.device)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(below, place, right=True)[:, 0]  # never an id of weight 0
