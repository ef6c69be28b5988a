"""What every run of a comparison may cost: equal parameters, equal tokens, equal time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..core import RecurrentLayer, UsageError, near, put
from ..training import Experiment

SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
WIDEST = 1 << 14
BATCHES = 8  # by whose mean length tokens are turned into steps


@dataclass(frozen=True)
class Budget:
    """parameters: the width of each model is chosen so that it has this many, within a share `tolerance` of them.
    tokens: steps are chosen so that training sees this many time steps that are not padding.
    seconds: steps are chosen so that training takes this long, by the pace measured in a short trial beside other runs;
    the schedule then ends where the run ends, and a run that is stopped and resumed trains the same steps.
    With tokens and seconds the smaller number of steps holds. None: no limit.
    """

    parameters: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 10**15:
                raise UsageError(f"--budget {name}={value:g}; expected a number above 0, at most 1e15")
        if not 0 < self.tolerance < 1:
            raise UsageError(f"--budget tolerance={self.tolerance:g}; expected a share between 0 and 1, as in 0.05")

    @staticmethod
    def parse(texts: Sequence[str]) -> Budget:
        """From parameters=200k, tokens=10M, seconds=60, tolerance=0.02. Raises UsageError."""
        found: dict[str, float] = {}
        for text in texts:
            kind, equals, value = text.partition("=")
            kinds = ("parameters", "tokens", "seconds", "tolerance")
            if not equals or kind not in kinds:
                raise UsageError(f"--budget {text[:80]!r}; expected KIND=AMOUNT, as in tokens=10M; {near(kind, kinds)}")
            if kind in found:
                raise UsageError(f"--budget {kind}: given twice")
            found[kind] = amount(value, kind)
        whole: dict[str, Any] = {k: int(v) if k in ("parameters", "tokens") else v for k, v in found.items()}
        return Budget(**whole)

    @property
    def asked(self) -> dict[str, float]:
        """Kind -> amount of what is limited."""
        told = {name: getattr(self, name) for name in ("parameters", "tokens", "seconds")}
        return {name: value for name, value in told.items() if value is not None}

    def widened(self, made: Experiment) -> Experiment:
        """The experiment in the width at which its model has the wanted number of parameters.

        Raises UsageError where no width comes within the tolerance.
        """
        if self.parameters is None:
            return made
        task = made.task
        like = _Frozen(put(made.model, "width", 1), (task.x_width, task.x_vocab, task.y_width))
        width, count = width_for(like, self.parameters, self.tolerance)
        if abs(count - self.parameters) > self.tolerance * self.parameters:
            raise UsageError(
                f"--budget parameters={self.parameters}: {made.model.layer} on {task.name} comes no nearer than "
                f"{count} (width {width}); allow more with tolerance={abs(count / self.parameters - 1) * 1.01:.2g}, "
                "or ask for another number"
            )
        return put(made, "model.width", width)

    def steps_for_tokens(self, made: Experiment) -> int:
        """Training steps in which the experiment sees the wanted number of tokens: by the first batches of seed 0."""
        assert self.tokens is not None
        batch = made.train.batch
        record = repr(sorted(made.record()["task"].items(), key=str))
        if (record, batch) not in _TOKENS:
            drawn = [made.task.batch(i, batch, seed=0, split="train").tokens for i in range(BATCHES)]
            _TOKENS[record, batch] = sum(drawn) / BATCHES
        return max(1, round(self.tokens / (_TOKENS[record, batch] * made.train.accumulate)))


_TOKENS: dict[tuple[str, int], float] = {}  # task and batch size -> tokens of a batch


class _Frozen:
    """A model description of any width, and the widths of its task; equal where their texts are."""

    def __init__(self, model: Any, widths: tuple[Any, ...]):
        self.model, self.widths, self.text = model, widths, repr((model, widths))

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.text == other.text

    def __repr__(self) -> str:
        return self.text


@lru_cache(maxsize=4096)
def width_for(like: _Frozen, parameters: int, tolerance: float) -> tuple[int, int]:
    """The width with about this many parameters, and how many it has: of multiples of 8 the nearest, if it is within
    the tolerance, else of 4, of 2, of 1: heads share out round widths better.

    The count grows with the width but for what rounding to whole heads does; so doubling and halving among multiples
    of 16 finds the neighbourhood, which is then looked through.
    """
    low, high = 0, 1
    while high < WIDEST // 16 and (_count(like, 16 * high) or 0) <= parameters:
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if (_count(like, 16 * middle) or 0) <= parameters else (low, middle)
    found: dict[int, int] = {}
    for step in (8, 4, 2, 1):
        for width in range(max(step, 16 * low - 16), 16 * high + 17, step):
            if width not in found and (count := _count(like, width)) is not None:
                found[width] = count
        if found:
            best = min(found, key=lambda w: abs(found[w] - parameters))
            if abs(found[best] - parameters) <= tolerance * parameters:
                return best, found[best]
    if not found:
        raise UsageError(f"no width of {like.model.layer} from 1 to {WIDEST} can be built")
    return best, found[best]


@lru_cache(maxsize=1 << 16)
def _count(like: _Frozen, width: int) -> int | None:
    """Parameters at that width; None where the layer cannot be built so."""
    try:
        model = outline(put(like.model, "width", width), *like.widths)
    except (ValueError, TypeError, RuntimeError):
        return None
    return sum(p.numel() for p in model.parameters())


def outline(model: Any, x_width: int | None, x_vocab: int | None, y_width: int) -> RecurrentLayer[Any]:
    """The described model without memory for its weights; with it where a layer, as a reservoir, must compute them."""
    try:
        with torch.device("meta"):
            found: RecurrentLayer[Any] = model.build(x_width=x_width, x_vocab=x_vocab, y_width=y_width)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        with torch.random.fork_rng([]):
            found = model.build(x_width=x_width, x_vocab=x_vocab, y_width=y_width)
    return found


def amount(text: str, kind: str = "amount") -> float:
    """200k -> 200000, 1.5M -> 1500000, 60 -> 60, 2% -> 0.02. Raises UsageError."""
    body = text.strip().lower()
    share = body.endswith("%")
    unit = body[-1:] if body[-1:] in SIZES and body[-1:] else ""
    try:
        value = float(body[:-1] if unit or share else body)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UsageError(f"--budget {kind}={text[:80]}; expected a number, as in 200k, 10M or 60") from None
    return round(value / 100 if share else value * SIZES[unit], 9)


def often(steps: int) -> int:
    """Ten or so evaluations in a run."""
    return max(1, steps // 10)
