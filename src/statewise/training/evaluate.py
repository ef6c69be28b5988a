"""Scores of a trained model: over a fixed evaluation set, and at lengths that training never saw."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import (
    RecurrentLayer,
    StatewiseError,
    UsageError,
    costs,
    leaves,
    read_json,
    settled,
    tree_map,
    write_json,
)
from ..core.errors import out_of_memory
from ..tasks.base import Batch, Task
from ..tasks.generated import Generated
from .checkpoint import load

Run = Callable[[Batch, Any], tuple[Tensor, Any]]  # (batch, state or None) -> outputs (B, T, E), state

MEASURED = "measured.json"  # beside result.json: what was measured of a finished run; its entries become columns
DRAWN = 1 << 17  # steps drawn at once, and
RUN = 1 << 15  # run at once: as many as 128 rows of 256, whatever the length, but at least one row
TOKENS, FEWEST = 1 << 20, 64  # of one length: all test examples while they have a million steps, then fewer, not below


def evaluate(task: Task, batches: Iterable[Batch], run: Run, device: torch.device) -> dict[str, float]:
    """Every metric of the task over the batches; NaN where nothing is asked. Carries the state where the task does.

    Where the model's state holds costs: "cost" too, what a step adds to the training loss on average.
    """
    totals: dict[str, tuple[float, float]] = {}
    state = None
    for batch in batches:
        batch = batch.to(device)
        fits = state is not None and len(leaves(state)[0]) == len(batch.x)
        out, after = run(batch, state if fits else None)
        state = settled(after) if task.carries and leaves(after) else None
        found = task.metrics(out.float(), batch)
        if paid := costs(after):
            found = {**found, "cost": (float(torch.stack(paid).sum()), batch.tokens)}
        for name, (value, count) in found.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + value, before[1] + count)
    return {name: value / count if count else math.nan for name, (value, count) in totals.items()}


def sound(task: Task, metrics: Mapping[str, float]) -> bool:
    """Whether the score is a number, and of numbers: outputs of NaN have an accuracy, but no loss."""
    return math.isfinite(metrics.get(task.metric, math.nan)) and not math.isnan(metrics.get("loss", 0.0))


@dataclass(frozen=True)
class LengthScore:
    """Scores on test examples of one length, as `Task.at` makes them. `score` is the task's metric."""

    length: int
    steps: int  # of the longest row, with what the task puts around the length
    examples: int
    chance: float  # at this length, as the baseline is
    baseline: float
    score: float | None  # None where `failed` says why
    metrics: dict[str, float]
    failed: str | None = None


def score_lengths(
    model: RecurrentLayer[Any], task: Task, lengths: Sequence[int], *, precision: str = "float32"
) -> list[LengthScore]:
    """The curve of length generalisation: the model's scores on `task.at(length)` for each length, in rising order.

    Where rows have up to 1,024 steps the examples are those of the test split, so that where `task.at(length) == task`
    the score is that of `fit`; beyond, as many as have a million steps together, at least 64. At most 32,768 steps are
    run at once, or one row: memory grows with the length only beyond that. A length at which the model fails (out of
    memory, outputs that are not finite) says so and the others go on.

    model: as `load(run)` gives it; it is run where its parameters are, in evaluation mode, and left as it was.
    precision: "bfloat16" to run under autocast, as training may have.
    Raises UsageError where the task cannot have one of the lengths.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run(batch: Batch, state: Any) -> tuple[Tensor, Any]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            found: tuple[Tensor, Any] = model(batch.x, state, reset=batch.reset, lengths=batch.lengths)
        return found

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [_score(made, length, run, device) for length, made in at_lengths(task, lengths).items()]
    finally:
        model.train(training)


def at_lengths(task: Task, lengths: Sequence[int]) -> dict[int, Generated]:
    """The task at each length, in rising order.

    Raises UsageError: a task that reads its data, a length that the task cannot have or that is named twice.
    """
    if not isinstance(task, Generated):
        raise UsageError(f"task {task.name!r} reads its data, whose lengths are given; generated tasks take lengths")
    doubled = [v for i, v in enumerate(lengths) if v in lengths[:i]]
    if doubled:
        raise UsageError(f"lengths: {doubled[0]} is named twice")
    found = {}
    for length in sorted(lengths):
        if type(length) is not int or length < 1:
            raise UsageError(f"lengths: {length!r}; expected whole numbers above 0")
        found[length] = made = task.at(length)
        made.batch(0, 1, seed=0, split="test")  # too short a length has too few examples for three splits
        if (made.x_width, made.x_vocab, made.y_width) != (task.x_width, task.x_vocab, task.y_width):
            raise UsageError(
                f"task {task.name!r} has other inputs or answers at length {length}; a model does not fit both"
            )
    return found


def add_lengths(
    run: str | os.PathLike[str], lengths: Sequence[int], *, device: str = "cpu", refuse: bool = True
) -> list[LengthScore]:
    """Scores of a finished run at these lengths, kept in the run one by one: what was found before is not computed
    again, a length that failed is.

    refuse=False: a length that the task cannot have is a score that failed, beside the others.
    Raises DataError where there is no run; UsageError as `score_lengths` does.
    """
    path = Path(run) / MEASURED
    kept = read_json(path) if path.exists() else {}
    found = {entry["length"]: LengthScore(**entry) for entry in kept.get("scores_by_length") or []}
    missing = [length for length in lengths if length not in found or found[length].failed]
    if missing:
        model, experiment = load(run)
        task, precision = experiment.task, experiment.train.precision
        refused = [] if refuse else list(_refused(task, missing))
        missing = [length for length in missing if length not in {score.length for score in refused}]
        at_lengths(task, missing)  # what cannot be had is said before anything is computed
        model = model.to(device)
        one_by_one = (score_lengths(model, task, [length], precision=precision)[0] for length in sorted(missing))
        for score in itertools.chain(refused, one_by_one):
            found[score.length] = score
            kept["scores_by_length"] = [asdict(found[length]) for length in sorted(found)]
            write_json(path, kept)
    return [found[length] for length in sorted(lengths)]


def refusal(task: Task, lengths: Sequence[int]) -> UsageError | None:
    """Why the task cannot have the lengths; None where it can."""
    try:
        at_lengths(task, lengths)
    except UsageError as error:
        return error
    return None


def _refused(task: Task, lengths: Sequence[int]) -> Iterator[LengthScore]:
    """A score that failed for each length that the task cannot have."""
    for length in lengths:
        if error := refusal(task, [length]):
            chance, baseline = float(task.chance()), float(task.baseline())
            yield LengthScore(length, 0, 0, chance, baseline, None, {}, str(error))


def _score(task: Generated, length: int, run: Run, device: torch.device) -> LengthScore:
    steps = task.batch(0, 1, seed=0, split="test").x.shape[1]  # about: the longest of one row
    block = max(1, min(task.block, DRAWN // steps))
    count = math.ceil(min(task.examples, max(FEWEST, TOKENS // steps)) / block)
    longest = 0

    def batches() -> Iterator[Batch]:
        nonlocal longest
        for index in range(count):
            drawn = task.batch(index, block, seed=0, split="test")
            longest = max(longest, drawn.x.shape[1])
            rows = max(1, RUN // drawn.x.shape[1])
            for start in range(0, block, rows):
                yield tree_map(lambda leaf: leaf[start : start + rows], drawn)  # noqa: B023

    metrics: dict[str, float] = {}
    score, failed = None, None
    try:
        metrics = evaluate(task, batches(), run, device)
        if sound(task, metrics):
            score = metrics[task.metric]
        else:
            failed = "the outputs are not finite, or nothing is asked"
    except (StatewiseError, MemoryError, RuntimeError) as error:
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        failed = f"out of memory: {words}" if out_of_memory(error) else words
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    chance, baseline = float(task.chance()), float(task.baseline())
    return LengthScore(length, longest or steps, count * block, chance, baseline, score, finite, failed)
