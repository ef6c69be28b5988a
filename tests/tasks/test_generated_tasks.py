"""Generated tasks: the answers by an independent loop, the statistics by closed form, the splits apart."""

from __future__ import annotations

import itertools
from typing import Any

import formal_by_hand
import numpy as np
import pytest
import torch

from statewise.core import UsageError, leaves
from statewise.tasks import (
    SPLITS,
    Adding,
    Batch,
    Copy,
    Delay,
    Events,
    Parity,
    Recall,
    SelectiveCopy,
    Task,
    WordProblem,
    tasks,
)
from statewise.tasks.base import certain
from statewise.tasks.generated import Generated
from statewise.tasks.word_problem import few, table

CASES: list[Generated] = [
    Adding(length=2),
    Adding(length=17),
    Adding(),
    Copy(length=3, copied=3, symbols=5),
    Copy(),
    SelectiveCopy(length=9, copied=4, symbols=3),
    SelectiveCopy(),
    Parity(),
    Parity(shortest=9, longest=12, test_longest=20, streaming=True),
    Delay(length=64, delay=20),
    Delay(length=16, delay=0, band=1.0),
    Events(),
    Events(length=12, clocks=2),
    Recall(),
    Recall(length=9, pairs=3, symbols=3),
    *(WordProblem(group, length=9, test_length=21) for group in ("Z2", "Z5", "S3", "S4", "A5", "S5", "Z60")),  # type: ignore[arg-type]
    WordProblem("S4", length=9, test_length=21, moves="few"),
    *formal_by_hand.CASES,
]


def test_every_generated_task_is_here() -> None:
    generated = {info.cls for info in tasks if issubclass(info.cls, Generated)}
    assert generated == {type(case) for case in CASES}
    assert len(generated) == 42


def by_hand(task: Task, batch: Batch) -> dict[tuple[int, int], Any]:
    """(row, step) -> answer, by a slow loop over x that shares nothing with the tasks."""
    if any(task is case for case in formal_by_hand.CASES):
        return formal_by_hand.by_hand(task, batch)  # type: ignore[arg-type]
    found: dict[tuple[int, int], Any] = {}
    for b, row in enumerate(batch.x.tolist()):
        if isinstance(task, Adding):
            found[b, len(row) - 1] = sum(value for value, mark in row if mark == 1)
        elif isinstance(task, Copy | SelectiveCopy):
            seen: list[int] = []
            for t, token in enumerate(row):
                if 1 <= token <= task.symbols:
                    seen.append(token)
                elif token == task.symbols + 1:
                    found[b, t] = seen.pop(0) - 1
            assert not seen
        elif isinstance(task, Parity):
            end = int(batch.lengths[b])  # type: ignore[index]
            for t in range(end):
                if task.streaming or t == end - 1:
                    found[b, t] = row[: t + 1].count(1) % 2
        elif isinstance(task, Delay):
            for t in range(task.delay, len(row)):
                found[b, t] = row[t - task.delay][0]
        elif isinstance(task, Recall):
            told = dict(zip(row[0 : 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2], strict=True))
            assert len(told) == len(set(told.values())) == task.pairs
            for t in range(2 * task.pairs, len(row)):
                if row[t]:
                    found[b, t] = told.pop(row[t]) - 1 - task.symbols
            assert not told
        elif isinstance(task, Events):
            found |= {(b, t): clock for t, clock in next_strokes(row, batch.weight[b]).items()}
        elif isinstance(task, WordProblem):
            product: tuple[int, ...] | None = None
            for t, element in enumerate(row):
                moves = ELEMENTS[task.group][element]
                product = moves if product is None else tuple(moves[place] for place in product)
                found[b, t] = ELEMENTS[task.group].index(product)
    return found


def even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


ELEMENTS: dict[str, list[tuple[int, ...]]] = {
    **{f"S{n}": list(itertools.permutations(range(n))) for n in (3, 4, 5)},
    "A5": [p for p in itertools.permutations(range(5)) if even(p)],
    **{f"Z{n}": [tuple((i + turn) % n for i in range(n)) for turn in range(n)] for n in (2, 5, 60)},
}


def next_strokes(row: list[list[float]], asked: torch.Tensor) -> dict[int, int]:
    """Step -> which clock strikes next, by writing down when each struck. asked: believed where rounding decides."""
    found, now, told = {}, 0.0, [list[float]() for _ in row[0][1:]]
    for t, (gap, *struck) in enumerate(row):
        now += gap
        told[struck.index(1)].append(now)
        if all(len(times) > 1 for times in told):
            due = sorted((2 * times[-1] - times[-2], clock) for clock, times in enumerate(told))
            least = min(due[0][0] - now, due[1][0] - due[0][0])
            if least > 0.02 + 1e-5 or (least > 0.02 - 1e-5 and asked[t]):
                found[t] = due[0][1]
    return found


@pytest.mark.parametrize("task", CASES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_oracle_equal_a_loop(task: Generated, split: Any) -> None:
    rows, checked = 100 if split == "train" else 50, 0
    for index in range(2 if split == "train" else 1):
        batch = task.batch(index, rows, seed=3, split=split)
        wanted = by_hand(task, batch)
        assert {tuple(place) for place in (batch.weight > 0).nonzero().tolist()} == set(wanted)
        oracle = task.oracle(batch)
        assert oracle.shape == (*batch.y.shape[:2], task.y_width)
        checked += formal_by_hand.check(batch, oracle, wanted, task.kind)
    assert checked >= rows


@pytest.mark.parametrize("task", CASES, ids=str)
def test_a_perfect_answer_scores_perfectly(task: Generated) -> None:
    totals: dict[str, list[float]] = {}
    rows = 0
    doubt = 0.0  # the least loss there is, where the next symbol is a matter of chance
    for batch in task.batches("test"):
        rows += len(batch.x)
        if batch.truth is not None:
            came = batch.truth.gather(-1, batch.y[..., None])[..., 0]
            doubt -= float(came.log()[batch.weight > 0].double().sum())
        for name, (total, count) in task.metrics(task.oracle(batch), batch).items():
            sums = totals.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += count
    assert rows == task.examples == 1024
    score = {name: total / count for name, (total, count) in totals.items()}
    assert score["loss"] == pytest.approx(doubt / totals["loss"][1], abs=1e-9, rel=1e-5)
    assert task.metric in score
    assert score.get("divergence", 0) == pytest.approx(0, abs=1e-6)
    for name in score.keys() - {"loss", "divergence"}:
        assert score[name] == pytest.approx(1.0)


@pytest.mark.parametrize("task", CASES, ids=str)
def test_batches_are_pure(task: Generated) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = task.batch(5, 16, seed=2)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(task.batch(5, 16, seed=2)), strict=True))
    others = [task.batch(6, 16, seed=2), task.batch(5, 16, seed=3), task.batch(5, 16, seed=2, split="validation")]
    assert all(other.x.shape != first.x.shape or not torch.equal(other.x, first.x) for other in others)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("task", CASES, ids=str)
def test_small_batches(task: Generated, size: int) -> None:
    batch = task.batch(0, size, seed=0)
    assert len(batch.x) == len(batch.y) == len(batch.weight) == size


def content(x: torch.Tensor) -> set[bytes]:
    """Examples without the zeros at their ends."""
    return {row.numpy().tobytes().rstrip(b"\0") for row in x}


@pytest.mark.parametrize(
    "task",
    [
        Copy(length=2, copied=2, symbols=12),
        SelectiveCopy(length=5, copied=2, symbols=4),
        Parity(longest=9, test_longest=12),
    ],
    ids=str,
)
def test_splits_share_no_example_even_where_there_are_few(task: Generated) -> None:
    found = {
        split: set().union(*(content(task.batch(i, 200, seed=s, split=split).x) for i in range(10) for s in (0, 1)))
        for split in SPLITS
    }
    assert min(len(examples) for examples in found.values()) > 10
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not found[a] & found[b]


def test_too_few_examples_is_an_error_not_a_loop() -> None:
    with pytest.raises(UsageError, match="too few different examples"):
        for split in SPLITS:
            Parity(shortest=1, longest=1, test_longest=1).batch(0, 8, seed=0, split=split)


def test_sharing_out_leaves_parity_alone() -> None:
    """The hash that owns an example must not see the answer."""
    for split in SPLITS:
        batch = Parity(shortest=20, longest=20, test_longest=21).batch(0, 4000, seed=0, split=split)
        odd = (batch.y * batch.weight).sum() / len(batch.x)
        assert abs(float(odd) - 0.5) < 4 * 0.5 / 4000**0.5


def test_adding_statistics() -> None:
    task = Adding(length=30)
    batches = [task.batch(i, 2000, seed=0) for i in range(10)]
    y = torch.cat([b.y[:, -1, 0] for b in batches])
    n = len(y)
    assert float(y.mean()) == pytest.approx(1, abs=4 * (1 / 6 / n) ** 0.5)
    assert float((y - 1).square().mean()) == pytest.approx(task.baseline(), rel=0.05)
    assert float((y[1:] - y[:-1]).square().mean()) == pytest.approx(task.chance(), rel=0.05)
    marks = torch.cat([b.x[..., 1] for b in batches])
    assert (marks[:, :15].sum(1) == 1).all()
    assert (marks[:, 15:].sum(1) == 1).all()
    assert marks.mean(0).numpy() == pytest.approx(np.full(30, 1 / 15), abs=5 * (1 / 15 / n) ** 0.5)


@pytest.mark.parametrize("task", [Copy(symbols=6), SelectiveCopy(symbols=6), Parity()], ids=str)
def test_guessing_scores_chance(task: Generated) -> None:
    hits = asked = 0.0
    for i in range(20):
        batch = task.batch(i, 200, seed=0)
        constant = torch.zeros(*batch.y.shape, task.y_width)
        constant[..., 1] = 1
        total, count = task.metrics(constant, batch)["accuracy"]
        hits, asked = hits + total, asked + count
    assert hits / asked == pytest.approx(task.chance(), abs=4 * (0.25 / asked) ** 0.5)
    assert task.baseline() == task.chance()


def test_selective_copy_scatters_and_copy_does_not() -> None:
    scattered = SelectiveCopy(length=20, copied=4).batch(0, 4000, seed=0).x[:, :20] > 0
    assert scattered.float().mean(0).numpy() == pytest.approx(np.full(20, 0.2), abs=0.035)
    start = Copy(length=20, copied=4).batch(0, 100, seed=0).x[:, :20] > 0
    assert start[:, :4].all()
    assert not start[:, 4:].any()


def test_one_mistake_costs_one_sequence() -> None:
    task = Copy()
    batch = task.batch(0, 10, seed=0)
    out = task.oracle(batch)
    out[3, -1] = -out[3, -1]
    found = task.metrics(out, batch)
    assert found["accuracy"] == (49, 50)
    assert found["sequence_accuracy"] == (9, 10)


@pytest.mark.parametrize(
    "group, order", [("Z2", 2), ("Z5", 5), ("S3", 6), ("S4", 24), ("A5", 60), ("S5", 120), ("Z60", 60)]
)
def test_group_tables(group: Any, order: int) -> None:
    """Closed, with the identity first, inverses, and the associative law."""
    times = table(group)
    everything = np.arange(order)
    assert times.shape == (order, order)
    assert (np.sort(times, 0) == everything[:, None]).all()
    assert (np.sort(times, 1) == everything).all()
    assert (times[0] == everything).all()
    assert (times[:, 0] == everything).all()
    reached = set(few(group).tolist())
    for _ in range(60):
        reached |= {int(times[i, j]) for i in few(group) for j in reached}
    assert len(reached) == order
    assert len(few(group)) == 2 + (group[0] != "Z")
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 500))
    assert (times[times[a, b], c] == times[a, times[b, c]]).all()
    assert ((times == times.T).all()) == (group[0] == "Z")


def test_word_problem_baseline_and_parts() -> None:
    task = WordProblem("S3", length=5, test_length=20)
    batch = task.batch(0, 4000, seed=0, split="test")
    newest = certain(batch.x, task.order)
    found = {name: total / count for name, (total, count) in task.metrics(newest, batch).items()}
    assert found["accuracy"] == pytest.approx(task.baseline(), abs=0.01)
    assert found["accuracy_trained"] == pytest.approx((1 + 4 / 6) / 5, abs=0.02)
    assert found["accuracy_beyond"] == pytest.approx(1 / 6, abs=0.01)
    assert "accuracy_beyond" not in task.metrics(task.oracle(short := task.batch(0, 8, seed=0)), short)
    share = torch.bincount(batch.y.flatten(), minlength=6) / batch.y.numel()
    assert share.numpy() == pytest.approx(np.full(6, 1 / 6), abs=0.01)


@pytest.mark.parametrize("band", [0.1, 1.0])
def test_delay_is_of_variance_one_and_of_low_frequencies(band: float) -> None:
    task = Delay(length=200, delay=50, band=band)
    batch = task.batch(0, 2000, seed=0)
    assert float(batch.x.mean()) == pytest.approx(0, abs=0.03)
    assert batch.x.square().mean(0).numpy() == pytest.approx(1, abs=0.2)
    assert float(batch.x.square().mean()) == pytest.approx(task.baseline(), abs=0.03)
    asked = batch.weight > 0
    another = (batch.y - batch.y.flip(0))[asked]
    assert float(another.square().mean()) == pytest.approx(task.chance(), abs=0.1)
    window = torch.hann_window(200)[:, None]  # the noise does not repeat after 200 steps, so its spectrum leaks
    power = torch.fft.rfft(batch.x * window, dim=1).abs().square().mean(0)[:, 0]
    low = power[: int(100 * band) + 3].sum() / power.sum()
    assert float(low) > 0.999


def test_events_baseline_is_a_rule_and_not_the_answer() -> None:
    task = Events()
    assert task.chance() < task.baseline() < 0.8
    batch = task.batch(0, 2000, seed=0)
    share = torch.bincount(batch.y[batch.weight > 0], minlength=4) / batch.weight.sum()
    assert share.numpy() == pytest.approx(np.full(4, 1 / 4), abs=0.02)
    assert (batch.weight.sum(1) > 0).float().mean() > 0.99


@pytest.mark.parametrize(
    "make",
    [
        lambda: WordProblem("S6"),  # type: ignore[arg-type]
        lambda: WordProblem(length=9, test_length=8),
        lambda: Delay(length=10, delay=10),
        lambda: Delay(length=10, band=0.01),
        lambda: Events(clocks=1),
        lambda: Events(length=5),
        lambda: Recall(pairs=5, symbols=4),
        lambda: Recall(length=11),
    ],
)
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        make()


def test_parity_lengths() -> None:
    task = Parity()
    train, test = task.batch(0, 3000, seed=0), task.batch(0, 3000, seed=0, split="test")
    assert train.lengths is not None
    assert test.lengths is not None
    assert (int(train.lengths.min()), int(train.lengths.max())) == (3, 40)
    assert (int(test.lengths.min()), int(test.lengths.max())) == (40, 256)
    assert train.x.shape[1] == 40
    assert train.tokens == int(train.lengths.sum())
    assert task.batch(0, 4, seed=0).x.shape[1] == int(task.batch(0, 4, seed=0).lengths.max())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Adding(length=1), "length 1; expected at least 2"),
        (lambda: Copy(copied=50), "copied is 50; expected 1 to length = 40"),
        (lambda: Copy(copied=0), "copied is 0"),
        (lambda: SelectiveCopy(symbols=1), "symbols is 1"),
        (lambda: Parity(shortest=5, longest=4), "lengths are 5, 4, 256"),
    ],
)
def test_wrong_fields(make: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()
