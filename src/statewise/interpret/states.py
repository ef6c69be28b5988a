"""State and loss far past the training length, and whether they collapse there (Chen et al. 2024, arXiv:2410.07145)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import RecurrentLayer, UsageError, leaves, names
from ..tasks.base import Batch
from .memory import by_heads

RISE, GROWTH, ERRORS = 0.05, 2.0, 2.0  # what counts as collapse: see Followed.collapse


@dataclass(frozen=True)
class Collapse:
    """The two signs of it, and whether both are there."""

    within: float  # mean loss from half the training length to the whole
    beyond: float  # mean loss of the last quarter of the steps
    rise: float  # beyond - within
    error: float  # standard error of the rise over the rows; NaN of one row
    grown: dict[tuple[str, int], float]  # (leaf, head) to norm beyond over the largest norm within, where above GROWTH
    collapsed: bool


@dataclass(frozen=True)
class Followed:
    """Looks at a model after every so many steps. Leaves are named by depth, "0.memory"; a leaf (B, H, K, V) has heads,
    any other counts as one."""

    steps: Tensor  # (P,) steps seen at each look
    loss: Tensor  # (P, B) mean loss of the steps since the last look, in nats (squared error of regressions)
    norm: dict[str, Tensor]  # leaf to (P, H): Frobenius norm, mean over the rows
    mean: dict[str, Tensor]  # leaf to (P, H): mean of the entries
    variance: dict[str, Tensor]  # leaf to (P, H): variance of the entries of a row, mean over the rows

    def largest(self, trained: int) -> dict[str, Tensor]:
        """Leaf to (H,): the largest norm within the training length. What `Clipped` takes as its bound."""
        return {name: norm[self.steps <= trained].amax(0) for name, norm in self.norm.items()}

    def collapse(self, trained: int) -> Collapse:
        """Collapse beyond `trained` steps: the loss rises, and some head's norm leaves what training saw.

        The loss rises: its mean over the last quarter of the steps is above that from half the training length to the
        whole by more than RISE = 0.05 and, over the rows, by more than ERRORS = 2 standard errors; a loss that is no
        longer finite rises. A norm leaves its range: its mean over the last quarter is more than GROWTH = 2 times the
        largest within the training length. One without the other is no collapse: a loss may rise for another reason,
        and a state may grow without harm.
        Raises UsageError unless there is a look within the training length and the steps go on to twice of it.
        """
        early = (self.steps <= trained) & (self.steps > trained / 2)
        if not early.any() or self.steps[-1] < 2 * trained:
            raise UsageError(
                f"collapse: looks at {self.steps[0]} to {self.steps[-1]} steps; expected one from "
                f"{trained // 2 + 1} to {trained} and to go on to {2 * trained}"
            )
        late = self.steps > 0.75 * self.steps[-1]
        late &= self.steps > trained
        within, beyond = self.loss[early].mean(0), self.loss[late].mean(0)  # (B,)
        rises = beyond - within
        rise = float(rises.mean())
        error = float(rises.std() / math.sqrt(len(rises))) if len(rises) > 1 else math.nan
        grown = {}
        for name, largest in self.largest(trained).items():
            growth = self.norm[name][late].mean(0) / largest.clamp_min(torch.finfo(largest.dtype).tiny)
            for head, times in enumerate(growth.tolist()):
                if not times <= GROWTH:  # NaN has left every range
                    grown[name, head] = times
        risen = not math.isfinite(rise) or (rise > RISE and not rise <= ERRORS * error)
        return Collapse(float(within.mean()), float(beyond.mean()), rise, error, grown, risen and bool(grown))


@torch.no_grad()
def follow_states(model: RecurrentLayer[Any], batches: Iterable[Batch], *, every: int = 64) -> Followed:
    """Run a model over rows of any length, batch after batch with the state carried on, and look every `every` steps.

    batches: pieces of the same rows in order, such as [task.at(65536).batch(0, 8, seed=0, split="test")], or the
    batches of a text. Memory does not grow with the length beyond the piece at hand and the looks themselves. The
    model runs where its parameters are, in evaluation mode, and is left as it was. Leaves of integers, and of shapes
    that change (a cache that grows), are left out.
    Raises UsageError for rows that end before others (lengths), a number of rows that changes, and no steps at all.
    """
    if every < 1:
        raise UsageError(f"follow_states: every is {every}; expected at least 1")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    looks = _Looks(windows(model))
    state: Any = None
    rows, seen = None, 0
    try:
        for batch in batches:
            if batch.lengths is not None:
                raise UsageError("follow_states: rows of different lengths; expected batches without lengths")
            if rows is not None and len(batch.x) != rows:
                raise UsageError(f"follow_states: {rows} rows, then {len(batch.x)}; expected pieces of the same rows")
            rows = len(batch.x)
            for start in range(0, batch.x.shape[1], every):
                span = slice(start, start + every)
                reset = None if batch.reset is None else batch.reset[:, span].to(device)
                out, state = model(batch.x[:, span].to(device), state, reset=reset)
                seen += out.shape[1]
                looks.add(seen, losses(out, batch.y[:, span].to(device), batch.weight[:, span].to(device)), state)
    finally:
        model.train(training)
    return looks.all()


def losses(out: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean loss of each row (B,), in nats where y holds classes: (B, T, E), (B, T) or (B, T, E), (B, T). NaN where
    nothing is asked."""
    if y.is_floating_point():
        each = (out.float() - y).pow(2).mean(-1)
    else:
        each = F.cross_entropy(out.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    return (each.where(weight > 0, 0) * weight).sum(1) / weight.sum(1)


class _Looks:
    def __init__(self, windows: set[str]) -> None:
        self.windows = windows
        self.steps: list[int] = []
        self.loss: list[Tensor] = []
        self.found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.shape: dict[str, tuple[int, ...]] = {}

    def add(self, steps: int, loss: Tensor, state: Any) -> None:
        self.steps.append(steps)
        self.loss.append(loss.cpu())
        for name, leaf in zip(names(state), leaves(state), strict=True):
            if not (leaf.is_floating_point() or leaf.is_complex()) or not leaf[:1].numel():
                continue
            if self.shape.setdefault(name, tuple(leaf.shape)) != tuple(leaf.shape):
                continue
            heads = by_heads(leaf, window=name in self.windows).double()  # (B, H, n)
            norm = torch.linalg.vector_norm(heads, dim=2).mean(0)
            looked = (norm, heads.mean((0, 2)), heads.var(2, correction=0).mean(0))
            self.found.setdefault(name, []).append(tuple(t.cpu() for t in looked))  # type: ignore[arg-type]

    def all(self) -> Followed:
        if not self.steps:
            raise UsageError("follow_states: no steps in the batches")
        whole = {name: looks for name, looks in self.found.items() if len(looks) == len(self.steps)}
        norm, mean, variance = (
            {name: torch.stack([look[i] for look in looks]) for name, looks in whole.items()} for i in range(3)
        )
        return Followed(torch.tensor(self.steps), torch.stack(self.loss), norm, mean, variance)


def asked_only(followed: Followed) -> Followed:
    """The looks before which something was asked of every row."""
    keep = followed.loss.isfinite().all(1)
    parts = ({n: t[keep] for n, t in part.items()} for part in (followed.norm, followed.mean, followed.variance))
    return Followed(followed.steps[keep], followed.loss[keep], *parts)


def bounds(model: nn.Module, followed: Followed, trained: int, *, times: float = 1.0) -> list[Tensor]:
    """For each layer with a linear memory, in the order in which `change` meets them, `times` the largest norm of each
    head within the training length: bounds for `Clipped`."""
    largest = followed.largest(trained)
    return [times * largest[name] for name in memories(model) if name in largest]


def memories(model: nn.Module) -> list[str]:
    """The leaves of a model's state that are linear memories, by their names there."""
    from .memory import memory_of

    found, seen = [], set()
    for prefix, layer in _layers(model):
        if id(layer) in seen:  # shared: its first place speaks for it
            continue
        seen.add(id(layer))
        try:
            name = memory_of(layer).name  # type: ignore[arg-type]
        except UsageError:
            continue
        found.append(_joined(prefix, "" if name == "state" else name))
    return found


def windows(model: nn.Module) -> set[str]:
    """The leaves of a model's state that are what attention saw last, (B, W-1, G, K), by their names there."""
    from ..layers import Attention, EchoAttention

    found = set()
    for prefix, layer in _layers(model):
        if isinstance(layer, Attention):
            found |= {_joined(prefix, "k"), _joined(prefix, "v")}
        elif isinstance(layer, EchoAttention):
            found.add(_joined(prefix))
    return found


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layer at each depth, and where its state stands in the model's."""
    from ..models.stack import Residual

    body = next((m for m in model.modules() if isinstance(m, Residual)), None)
    if body is None:
        return [("", model)]
    return [(f"{i}.layer" if block.balanced else f"{i}", block.layer) for i, block in enumerate(body.at_depths())]


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part) or "state"
