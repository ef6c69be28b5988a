"""Statistics of the formal and synthetic tasks against closed forms; their levels, splits, lengths and metrics."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import formal_by_hand
import numpy as np
import pytest
import torch

from statewise import tasks as t
from statewise.core import UsageError, put
from statewise.tasks import SPLITS, Batch, pathfinder, tasks
from statewise.tasks.asked import Answers, Membership, majority
from statewise.tasks.automaton import Automaton
from statewise.tasks.chaos import lorenz, mackey_glass
from statewise.tasks.draws import by_weight, distinct
from statewise.tasks.dyck import mountains
from statewise.tasks.generated import Generated
from statewise.tasks.in_context_languages import languages
from statewise.tasks.list_ops import grow, values
from statewise.tasks.reber import EDGES, law
from statewise.tasks.selectiv_bench import rules
from statewise.tasks.tomita import TOMITA

FORMAL = sorted({type(case) for case in formal_by_hand.CASES}, key=lambda cls: cls.name)


def even(found: Counter[Any], wanted: dict[Any, float], total: int) -> None:
    """Counts against probabilities: none of them off by five deviations, none that cannot be."""
    assert set(found) <= set(wanted)
    assert sum(wanted.values()) == pytest.approx(1)
    for key, p in wanted.items():
        assert abs(found[key] - total * p) < 5 * (total * p * (1 - p)) ** 0.5 + 1e-6, (key, found[key], total * p)


def test_all_are_here() -> None:
    assert len(FORMAL) == 34
    assert len(formal_by_hand.CASES) > 50


# --- levels


def score(task: Generated, guess: Any, batches: int = 8) -> float:
    """The task's metric of guess(batch) on test examples."""
    total = count = 0.0
    for batch in itertools.islice(task.batches("test"), batches):
        hits, asked = task.metrics(guess(batch), batch)[task.metric]
        total, count = total + hits, count + asked
    return total / count


@pytest.mark.parametrize("cls", FORMAL, ids=lambda cls: cls.name)
def test_guessing_scores_chance(cls: type[Generated]) -> None:
    task = cls() if cls is not t.Pathfinder else t.Pathfinder(length=256, dashes=2, others=1)
    rng = torch.Generator().manual_seed(1)

    def guess(batch: Batch) -> torch.Tensor:
        if task.kind == "regression":
            return batch.y.roll(1, 0)
        out = torch.randn(*batch.y.shape, task.y_width, generator=rng)
        if cls is t.SelectivBenchNext:
            out *= 0
        if cls is t.EmbeddedReber:  # chance is between T and P
            out[..., [0, 2, 3, 5, 6]] -= 100
        return out

    assert score(task, guess) == pytest.approx(task.chance(), rel=0.12, abs=0.05)
    if task.chance() < 0.05:
        assert score(task, guess) < 0.12


@pytest.mark.parametrize(
    "cls", [c for c in FORMAL if issubclass(c, Answers | Membership)] + [t.ListOps], ids=lambda cls: cls.name
)
def test_the_commonest_answer_scores_the_baseline(cls: type[Generated]) -> None:
    """The one that is commonest in training, on the test."""
    task = cls()
    y = torch.cat([b.y[b.weight > 0] for b in (task.batch(i, 200, seed=1) for i in range(3))])
    commonest = torch.zeros(task.y_width)
    commonest[y.bincount().argmax()] = 1
    assert score(task, lambda batch: commonest.expand(*batch.y.shape, -1)) <= task.baseline() + 1e-9
    assert task.chance() <= task.baseline() + 0.01 <= 0.6
    assert majority(task) == task.baseline()


def test_baselines_of_looking_up() -> None:
    mqar = t.Mqar(pairs=4)
    first = lambda b: torch.nn.functional.one_hot(
        (b.x[:, 1] - 1 - mqar.symbols)[:, None].expand(b.y.shape), 128
    ).float()
    assert score(mqar, first) == pytest.approx(mqar.baseline(), abs=0.03)
    book = t.PhoneBook(length=30, numbers=8)

    def an_entry(batch: Batch) -> torch.Tensor:
        parts = batch.x[:, 2:5] - 2 - 2 * book.names
        out = torch.zeros(*batch.y.shape, 8)
        out[:, -3:] = torch.nn.functional.one_hot(parts, 8).float()
        return out

    assert score(book, an_entry) == pytest.approx(book.baseline(), abs=0.03)


def test_one_symbol_at_a_time_scores_the_baseline_of_selectiv_bench() -> None:
    task = t.SelectivBench(length=30)
    seen = np.zeros((task.x_width, task.y_width))
    for i in range(4):
        batch = task.batch(i, 200, seed=5)
        begins = batch.x.sum(-1) > 0
        np.add.at(seen, (batch.x[begins].argmax(-1), batch.y[begins]), 1)
    state = torch.from_numpy(seen.argmax(1))

    def guess(batch: Batch) -> torch.Tensor:
        symbol = batch.x.argmax(-1)
        symbol[:, 1::2] = symbol[:, ::2]  # the gap after each
        return 40.0 * torch.nn.functional.one_hot(state[symbol], task.y_width)

    assert score(task, guess) == pytest.approx(task.baseline(), abs=0.01)


def test_forecasts_are_of_variance_one() -> None:
    for task in (t.MackeyGlass(), t.Lorenz()):
        batch = task.batch(0, 400, seed=0)
        assert batch.x.square().mean((0, 1)).numpy() == pytest.approx(1, abs=0.06)
        assert batch.x.mean((0, 1)).numpy() == pytest.approx(0, abs=0.1)
        assert 0.5 < task.baseline() <= 1.05


# --- splits and lengths

SMALL = [
    t.EvenPairs(length=8), t.ModularBrackets(length=5), t.StringCopy(length=3, letters=4),
    t.Tomita(grammar=5, length=9),
    t.Dyck(length=8), t.Palindrome(length=5, letters=3), t.Reber(length=14), t.ElmanXor(length=12),
    t.Induction(length=4, symbols=4), t.ListOps(length=16), t.SelectivBench(length=6, noise=0.3, longest_gap=3),
    t.InContextLanguages(length=6, letters=4), t.Mqar(length=8, pairs=2, symbols=4), t.Passkey(length=5, digits=2),
]  # fmt: skip


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_splits_share_no_example_however_few_there_are(task: Generated) -> None:
    found = {}
    for split in SPLITS:
        rows = [task.identity(task.batch(i, 150, seed=s, split=split)) for i in range(4) for s in (0, 1)]
        found[split] = {tuple(np.trim_zeros(row.flatten().numpy(), "b")) for part in rows for row in part}
    assert min(map(len, found.values())) > 5
    for a, b in itertools.combinations(SPLITS, 2):
        assert not found[a] & found[b]


def test_other_lengths_share_no_example_either() -> None:
    rows = lambda task, split: {tuple(r[r > 0].tolist()) for r in task.batch(0, 300, seed=0, split=split).x}
    task = t.Palindrome(letters=2, length=8)
    assert not rows(task, "train") & rows(task.at(6), "test")
    assert rows(task, "train") & rows(task.at(6), "train")


FIXED = {"pathfinder": (1024, 2304), "delay": (300, 600)}


@pytest.mark.parametrize("name", sorted(info.name for info in tasks if issubclass(info.cls, Generated)))
def test_every_generated_task_has_other_lengths(name: str) -> None:
    task = tasks[name].cls()
    assert isinstance(task, Generated)
    steps = []
    for length in FIXED.get(name, (60, 120)):
        other = task.at(length)
        assert (other.x_width, other.x_vocab, other.y_width) == (task.x_width, task.x_vocab, task.y_width)
        batch = other.batch(0, 3, seed=0, split="test")
        assert batch.x.shape[1] >= length * 0.24
        steps.append(other.batch(0, 40, seed=0, split="test").x.shape[1] / length)
        if hasattr(task, "length") and not hasattr(task, "test_length"):
            assert put(task, "length", length) == other
    assert steps[1] == pytest.approx(steps[0], rel=0.25)


@pytest.mark.parametrize("cls", [c for c in FORMAL if issubclass(c, Answers)], ids=lambda cls: cls.name)
def test_lengths_of_strings(cls: type[Answers]) -> None:
    task = cls(shortest=9, length=14)
    for split in SPLITS:
        batch = task.batch(0, 400, seed=0, split=split)
        found = set(((batch.x > 0) & (batch.x <= task.symbols)).sum(1).tolist())
        if cls is t.StringCopy:
            found = {n // 2 for n in found}
        wanted = {int(task.fitting(np.array(n))) for n in (range(9, 15) if split != "test" else [14])}
        assert found == wanted


# --- languages


@pytest.mark.parametrize(("number", "states"), list(enumerate((2, 3, 5, 4, 4, 3, 5), 1)))
def test_tomita_automata(number: int, states: int) -> None:
    """Equal to the definition on all strings to length 12; the smallest; and members counted and drawn evenly."""
    found, task = TOMITA[number], t.Tomita(grammar=number)
    assert len(found.step) == states == len(set(classes(found)))
    for length in range(1, 13):
        text = np.array(list(itertools.product((0, 1), repeat=length)))
        inside = found.accepts(text, np.full(len(text), length))
        if length <= 10:
            assert inside.tolist() == [formal_by_hand.belongs(task, row) for row in text.tolist()]
        assert found.count(length) == inside.sum()
    rng = np.random.default_rng(number)
    for accept in (True, False):
        text = np.array(list(itertools.product((0, 1), repeat=8)))
        members = [tuple(row) for row in text[found.accepts(text, np.full(256, 8)) == accept].tolist()]
        drawn = found.draw(np.full(8000, 8), np.full(8000, accept), rng)
        even(Counter(map(tuple, drawn.tolist())), dict.fromkeys(members, 1 / len(members)), 8000)


def classes(automaton: Automaton) -> list[int]:
    """Equivalent states get the same number: Moore's refinement."""
    found = automaton.accepting.astype(int).tolist()
    for _ in found:
        keys = [(found[s], *(found[r] for r in row)) for s, row in enumerate(automaton.step.tolist())]
        found = [sorted(set(keys)).index(key) for key in keys]
    return found


def test_tomita_positives_by_length() -> None:
    """The shares among random strings that are known: 8 and 14 symbols."""
    shares = {1: (0.004, 0.00006), 3: (0.36, 0.14), 4: (0.58, 0.35), 5: (0.5, 0.5), 6: (0.34, 0.33), 7: (0.36, 0.03)}
    for number, wanted in shares.items():
        found = [TOMITA[number].count(n) / 2**n for n in (8, 14)]
        assert found == pytest.approx(wanted, rel=0.1)
    assert TOMITA[4].count(3000) > 10**700  # no overflow
    assert TOMITA[2].draw(np.array([2000]), np.array([True]), np.random.default_rng(0)).tolist() == [[1, 0] * 1000]


@pytest.mark.parametrize("number", [3, 4, 5, 6, 7])
def test_tomita_is_balanced_at_every_length(number: int) -> None:
    task = t.Tomita(grammar=number, length=20, shortest=8)
    batch = task.batch(0, 6000, seed=0)
    assert batch.lengths is not None
    for length in range(8, 21):
        rows = batch.lengths == length
        count = int(rows.sum())
        assert count / 6000 == pytest.approx(1 / 13, abs=0.03)
        if not TOMITA[number].count(length):
            continue
        assert float(batch.y[rows, length - 1].float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / count**0.5)
    some = torch.tensor([TOMITA[number].count(n) > 0 for n in range(21)])
    outside = (batch.y.sum(1) == 0) & some[batch.lengths]
    text, lengths = batch.x[outside].numpy() - 1, batch.lengths[outside].numpy()
    near = np.zeros(len(text), bool)
    for place in range(20):
        flipped = text.copy()
        flipped[:, place] ^= place < lengths
        near |= task.accepts(flipped, lengths)
    assert near.mean() > 0.45


def test_dyck_counts() -> None:
    """Catalan's numbers without a bound; 1 and 2^(n - 1) within depths 1 and 2; all drawn evenly."""
    for n in range(1, 12):
        assert mountains(n).count(2 * n) == math.comb(2 * n, n) // (n + 1)
        assert mountains(1).count(2 * n) == 1
        assert mountains(2).count(2 * n) == 2 ** (n - 1)
        assert mountains(3).count(2 * n - 1) == 0
    drawn = mountains(5).draw(np.full(7000, 8), np.ones(7000, bool), np.random.default_rng(0))
    paths = set(map(tuple, drawn.tolist()))
    assert len(paths) == 14
    even(Counter(map(tuple, drawn.tolist())), dict.fromkeys(paths, 1 / 14), 7000)


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_counting_does_not_decide_dyck(kinds: int) -> None:
    task = t.Dyck(kinds=kinds, length=20, shortest=8)
    batch = task.batch(0, 3000, seed=0)
    inside = batch.y.sum(1) == 1
    assert float(inside.float().mean()) == pytest.approx(0.5, abs=0.05)
    opens = ((batch.x > 0) & (batch.x <= kinds)).sum(1)
    closes = ((batch.x > kinds) & (batch.x <= 2 * kinds)).sum(1)
    assert (opens == closes).all()


def test_reber_lengths_are_those_of_a_walk() -> None:
    """The law of lengths against walks through the graph, edge by edge."""
    rng, longest = np.random.default_rng(0), 200
    found: Counter[int] = Counter()
    for _ in range(5000):
        state = length = 0
        while state != 7:
            state = list(EDGES[state].values())[rng.integers(len(EDGES[state]))]
            length += 1
        found[length] += 1
    wanted = law(longest)
    assert wanted[:5].sum() == 0
    assert wanted[5] == pytest.approx(1 / 8 + 1 / 8)  # BTXSE and BPVVE
    even(found, {n: float(p) for n, p in enumerate(wanted) if p}, 5000)
    batch = t.Reber(length=60).batch(0, 4000, seed=0)
    assert batch.lengths is not None
    short = law(60)
    assert float(batch.lengths.float().mean()) == pytest.approx((short * np.arange(61)).sum(), abs=0.5)


def test_reber_symbols_come_as_often_as_said() -> None:
    """y is drawn by truth: of two that may come, each half the time."""
    batch = t.EmbeddedReber(length=80).batch(0, 2000, seed=0)
    assert batch.truth is not None
    two = batch.truth[..., 1] == 0.5  # T and something else may come
    share = (batch.y[two] == 1).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.03)


def test_far_is_the_long_range_symbol_alone() -> None:
    task = t.EmbeddedReber()
    batch = task.batch(0, 500, seed=0)
    assert batch.lengths is not None
    out = task.oracle(batch)
    rows = torch.arange(500)
    out[rows, batch.lengths - 3] = out[rows, batch.lengths - 3].roll(2, -1).roll(-2, -1)[:, [0, 4, 2, 3, 1, 5, 6]]
    found = task.metrics(out, batch)
    assert found["far"][0] == 0  # T for P
    assert found["exact"][1] - found["exact"][0] == 500


# --- look-up, lists, pictures


def test_distinct_is_even() -> None:
    rng = np.random.default_rng(0)
    for count, among in ((2, 4), (2, 3)):  # drawn anew, ordered
        wanted = dict.fromkeys(
            itertools.permutations(range(among), count), math.factorial(among - count) / math.factorial(among)
        )
        even(Counter(map(tuple, distinct(6000, count, among, rng).tolist())), wanted, 6000)


def test_by_weight_draws_one_after_another() -> None:
    odds = np.array([0.5, 0.3, 0.2])
    found = by_weight(9000, 2, np.log(odds), np.random.default_rng(0))
    wanted = {(a, b): odds[a] * odds[b] / (1 - odds[a]) for a, b in itertools.permutations(range(3), 2)}
    even(Counter(map(tuple, found.tolist())), wanted, 9000)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_mqar_gaps(power: float) -> None:
    """With one pair, the place of the query has exactly the published odds."""
    task = t.Mqar(length=42, pairs=1, power=power)
    batch = task.batch(0, 6000, seed=0)
    place = (batch.weight.argmax(1) - 2) // 2
    odds = np.arange(1, 21.0) ** (power - 1)
    even(Counter(place.tolist()), dict(enumerate(odds / odds.sum())), 6000)


def test_list_ops_labels_and_lengths() -> None:
    """Values of the grown trees against a recursion over depths, tokens against generating functions."""
    depth, args, count = 4, 4, 40_000
    value, size = np.full(10, 0.1), np.array([0.0, 1.0])  # of an argument at the greatest depth
    for level in range(depth - 1):
        rows = [reduced(value, n) for n in range(2, args + 1)]
        lists = np.mean(rows, 0)
        longer = np.zeros(1)
        for n in range(2, args + 1):
            power = np.ones(1)
            for _ in range(n):
                power = np.convolve(power, size)
            longer = np.pad(longer, (0, max(0, len(power) + 2 - len(longer))))
            longer[2 : 2 + len(power)] += power / (args - 1)
        if level < depth - 2:
            value = 0.75 * 0.1 + 0.25 * lists
            size = 0.25 * longer
            size[1] += 0.75
    levels, total = grow(count, depth, args, np.random.default_rng(0), 10**6)
    even(Counter(values(levels)[0].tolist()), dict(enumerate(lists)), count)
    even(Counter(total.tolist()), {n: p for n, p in enumerate(longer) if p > 0}, count)


def reduced(value: np.ndarray, n: int) -> np.ndarray:
    """The law of an operator's result on n independent arguments of law `value`, all four operators alike."""
    upto = value.cumsum()
    largest = np.diff(upto**n, prepend=0)
    smallest = -np.diff((1 - np.concatenate([[0], upto])) ** n)
    total = np.ones(1)
    for _ in range(n):
        total = np.convolve(total, value)
    total = np.array([total[digit::10].sum() for digit in range(10)])
    middle = np.zeros(10)
    for digits in itertools.combinations_with_replacement(range(10), n):
        ways = math.factorial(n)
        for c in Counter(digits).values():
            ways //= math.factorial(c)
        middle[(digits[(n - 1) // 2] + digits[n // 2]) // 2] += ways * np.prod(value[list(digits)])
    return (largest + smallest + total + middle) / 4


def test_list_ops_windows() -> None:
    """The published window keeps 8.3 % of trees; the chance of a list at all is a quarter."""
    _, total = grow(20_000, 10, 10, np.random.default_rng(0), 2000)
    assert ((total > 500) & (total < 2000)).mean() / 4 == pytest.approx(0.083, abs=0.004)


def test_pathfinder_at_full_size() -> None:
    task = t.Pathfinder()
    batch = task.batch(0, 60, seed=0)
    assert formal_by_hand.check(batch, task.oracle(batch), formal_by_hand.by_hand(task, batch), task.kind) == 60
    answers = t.Pathfinder(length=256, dashes=2, others=0).batch(0, 1500, seed=0).y[:, -1].float()
    assert float(answers.mean()) == pytest.approx(0.5, abs=0.06)
    lit = batch.x.sum((1, 2))
    assert lit.min() >= 2 * 9 + 2 * 3 * 3 - 4  # two discs, two lines
    assert lit.max() < 100


@pytest.mark.parametrize(("length", "dashes", "dash"), [(324, 4, 3), (1024, 10, 3), (1024, 4, 10)])
def test_pathfinder_without_room_is_refused_and_does_not_draw_forever(
    length: int, dashes: int, dash: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pathfinder, "RARE", 1000)  # pictures before it gives up
    with pytest.raises(UsageError, match="had room for two lines"):
        t.Pathfinder(length=length, dashes=dashes, dash=dash).batch(0, 1, seed=0)


def test_pathfinder_with_little_room_is_drawn() -> None:
    assert len(t.Pathfinder(length=400).batch(0, 4, seed=0).x) == 4  # one picture in 400 has room


# --- grammars


def test_grammars_of_selectiv_bench() -> None:
    made = rules(40, 40, 0, 0)
    assert made.step.shape == (1601, 41)
    assert (made.step[1:, 1:] >= 0).mean() == pytest.approx(0.4, abs=0.01)
    assert (made.step[1:, 0] >= 0).mean() == pytest.approx(0.01, abs=0.008)
    assert (made.step[0] >= 0).sum() == 4
    source, symbol = (made.step >= 0).nonzero()
    assert (made.symbol[made.step[source, symbol]] == symbol).all()
    for number in range(5):
        small = rules(6, 6, 2, number)
        reached = {0}
        for _ in range(40):
            reached |= {s for s in range(39) if set(small.edges[s][: small.degree[s]].tolist()) & reached}
        assert reached == set(range(39))
    assert (rules(6, 6, 2, 0).step != rules(6, 6, 2, 1).step).any()


def test_selectiv_bench_counts_by_symbol() -> None:
    """Against a loop, on random answers and irregular gaps."""
    task = t.SelectivBench(length=8, gap=0.6, longest_gap=4, shortest_gap=1, noise=0.1)
    batch = task.batch(0, 40, seed=0)
    out = torch.randn(*batch.y.shape, task.y_width) + 3 * torch.nn.functional.one_hot(batch.y, task.y_width)
    assert batch.lengths is not None
    right = total = 0
    for b in range(40):
        heard: list[torch.Tensor] = []
        asked: list[int] = []
        for step in range(int(batch.lengths[b])):
            if batch.x[b, step].max() >= 1:
                heard.append(torch.zeros(task.y_width))
                asked.append(int(batch.y[b, step]))
            heard[-1] += out[b, step].softmax(-1)
        right += sum(int(h.argmax()) == y for h, y in zip(heard, asked, strict=True))
        total += len(heard)
    found = task.metrics(out, batch)
    assert found["accuracy"] == (right, total) == (right, 320)
    assert found["step_accuracy"] != found["accuracy"]


def test_gaps_of_selectiv_bench() -> None:
    task = t.SelectivBench(length=30, gap=0.5, shortest_gap=2, longest_gap=4, gap_start=10)
    batch = task.batch(0, 300, seed=0)
    assert batch.lengths is not None
    gaps: Counter[int] = Counter()
    for row, end in zip(batch.x.sum(-1), batch.lengths.tolist(), strict=True):
        places = [*(row > 0).nonzero()[:, 0].tolist(), end]
        after = [b - a - 1 for a, b in itertools.pairwise(places)]
        assert len(after) == 30
        assert set(after[:10]) == {0}
        gaps.update(after[10:])
    even(gaps, {0: 0.5, 2: 1 / 6, 3: 1 / 6, 4: 1 / 6}, 6000)


def test_random_languages() -> None:
    made = languages(3000, 6, 8, np.random.default_rng(0))
    assert (made.target != np.arange(6)[None, :, None]).all()
    ordered = np.sort(made.letter, -1)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    ordered = np.sort(made.target, -1)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    even(Counter(made.degree.flatten().tolist()), dict.fromkeys((1, 2, 3), 1 / 3), 18_000)
    most = made.target.max((1, 2))
    assert set(np.unique(most)) == {3, 4, 5}
    even(Counter(made.target[most == 3][:, 0, 0].tolist()), {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, int((most == 3).sum()))


def test_measures_of_what_comes_next() -> None:
    """Against their definitions, row by row, and at a model that knows what can come but not how often."""
    task = t.InContextLanguages(length=40)
    batch = task.batch(0, 30, seed=0)
    assert batch.truth is not None
    out = torch.randn(*batch.y.shape, task.y_width)
    p, legal, exact, count = out.softmax(-1), 0, 0, 0
    distance = 0.0
    for b, step in (batch.weight > 0).nonzero().tolist():
        can = batch.truth[b, step] > 0
        order = out[b, step].argsort(descending=True)
        legal += bool(can[order[0]])
        exact += bool(can[order[: int(can.sum())]].all())
        distance += float((p[b, step] - batch.truth[b, step]).abs().sum()) / 2
        count += 1
    found = task.metrics(out, batch)
    assert (found["accuracy"], found["exact"]) == ((legal, count), (exact, count))
    entropy = -torch.special.xlogy(batch.truth, batch.truth).sum(-1)
    cross = -(batch.truth * p.log()).sum(-1)
    assert found["divergence"][0] == pytest.approx(float(((cross - entropy) * batch.weight).sum()), rel=1e-5)
    assert found["overlap"][0] == pytest.approx(count - distance, rel=1e-5)
    assert task.chance() < 0.4 < task.baseline() < 1


def test_what_elmans_streams_let_know() -> None:
    xor, letters = t.ElmanXor(length=30).batch(0, 4000, seed=0), t.ElmanLetters(length=60).batch(0, 2000, seed=0)
    assert xor.truth is not None
    assert letters.truth is not None
    sure = (xor.truth == 1).any(-1)
    assert (sure == (torch.arange(30) % 3 == 1)).all()
    share = xor.y[~sure].float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.01)
    even(Counter(letters.x[:, 0].tolist()), dict.fromkeys(range(3), 1 / 3), 2000)
    open_ = ~(letters.truth == 1).any(-1)  # what comes is a consonant: of 2 + 3 + 3 letters, 3 are
    assert float(open_.float().mean()) == pytest.approx(3 / 8, abs=0.01)


# --- chaos


def test_lorenz_is_integrated_to_order_four() -> None:
    rng = np.random.default_rng(0)
    start = lorenz(rng.standard_normal((50, 3)) * 8 + [0, 0, 24], 1, 5.0)[:, -1]
    fine = lorenz(start, 1, 0.5, inner=0.0125 / 16)[:, -1]
    errors = [np.abs(lorenz(start, 1, 0.5, inner=h)[:, -1] - fine).max() for h in (0.025, 0.0125)]
    assert errors[1] < 1e-3
    assert 8 < errors[0] / errors[1] < 40
    assert np.allclose(lorenz(start, 3, 0.05)[:, 3], lorenz(start, 1, 0.15)[:, 1])


def test_mackey_glass_equals_a_finer_integration() -> None:
    """The same past, continued in steps of 1/2, 1/4 and by Heun's method in steps of 1/64 with linear interpolation."""
    rng = np.random.default_rng(0)
    past = mackey_glass(rng.uniform(0.5, 1.3, (4, 1)) + np.zeros((4, 17 * 16 + 2)), 40 * 17 * 16, 1 / 16, 17 * 16)
    ahead = 30  # time
    fine = mackey_glass(past[:, -17 * 16 - 2 :], ahead * 16, 1 / 16, 17 * 16)[:, -1]
    errors = []
    for every in (16, 8):
        seen = past[:, ::-1][:, ::every][:, : 17 * 16 // every + 2][:, ::-1]
        errors.append(np.abs(mackey_glass(seen, ahead * 16 // every, every / 16, 17 * 16 // every)[:, -1] - fine).max())
    assert errors[0] < 2e-2
    assert 8 < errors[0] / errors[1] < 64
    step, series = 1 / 64, past[0, -17 * 16 - 1 :]
    x = np.interp(np.arange(17 * 64 + 1) / 64, np.arange(17 * 16 + 1) / 16, series).tolist()
    slope = lambda now, old: 0.2 * old / (1 + old**10) - 0.1 * now
    for _ in range(ahead * 64):
        a = slope(x[-1], x[-1 - 17 * 64])
        x.append(x[-1] + step / 2 * (a + slope(x[-1] + step * a, x[-17 * 64])))
    assert x[-1] == pytest.approx(fine[0], abs=2e-3)


def test_a_hidden_lorenz_is_the_first_coordinate() -> None:
    all_three, one = (t.Lorenz(length=5, hidden=h).sample(4, np.random.default_rng(0), "train") for h in (False, True))
    assert torch.equal(all_three.x[..., :1], one.x)
    assert torch.equal(all_three.y[..., :1], one.y)
    with pytest.raises(NotImplementedError, match="hidden"):
        t.Lorenz(hidden=True).oracle(one)


# --- what is refused, and what a fault would look like


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.Reverse(length=4, shortest=5), lambda: t.StackManipulation(length=1),
        lambda: t.CycleNavigation(modulus=1),
        lambda: t.SolveEquation(products=True), lambda: t.Tomita(grammar=8), lambda: t.Reber(length=5),
        lambda: t.EmbeddedReber(nested=0), lambda: t.EmbeddedReber(length=20, nested=4), lambda: t.Dyck(depth=0),
        lambda: t.Palindrome(letters=1), lambda: t.ElmanXor(length=5), lambda: t.Mqar(length=63),
        lambda: t.Mqar(pairs=17), lambda: t.Mqar(fill="keys"),  # type: ignore[arg-type]
        lambda: t.Mqar(power=0), lambda: t.Passkey(length=6), lambda: t.Passkey(digits=0),
        lambda: t.Passkey(words="none"), lambda: t.PhoneBook(length=21),  # type: ignore[arg-type]
        lambda: t.PhoneBook(names=2), lambda: t.PhoneBook(queries=21),
        lambda: t.PhoneBook(question="both"), lambda: t.NgramLookup(n=40),  # type: ignore[arg-type]
        lambda: t.NgramLookup(given="between"), lambda: t.Induction(length=1),  # type: ignore[arg-type]
        lambda: t.ListOps(length=15), lambda: t.Pathfinder(length=1000), lambda: t.Pathfinder(length=256, dashes=9),
        lambda: t.Pathfinder(dash=2), lambda: t.SelectivBench(noise=1), lambda: t.SelectivBench(depth=0),
        lambda: t.InContextLanguages(states=3), lambda: t.MackeyGlass(horizon=15), lambda: t.MackeyGlass(length=18),
        lambda: t.MackeyGlass(step=0), lambda: t.Lorenz(horizon=0), lambda: t.Lorenz(step=2),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(make: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        make()


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(UsageError, match="make n larger"):
        t.NgramLookup(n=1, letters=2)
    with pytest.raises(UsageError, match="no grammar ends"):
        _ = t.SelectivBench(ambiguous=1, depth=30).rules


def test_a_wrong_answer_is_found() -> None:
    """The comparison by hand is not blind: one answer, one probability changed."""
    task = t.Tomita()
    batch = task.batch(0, 20, seed=0)
    wanted = formal_by_hand.by_hand(task, batch)
    oracle = task.oracle(batch)
    assert formal_by_hand.check(batch, oracle, wanted, task.kind) == 20
    with pytest.raises(AssertionError):
        formal_by_hand.check(batch._replace(y=1 - batch.y), oracle, wanted, task.kind)
    with pytest.raises(AssertionError):
        formal_by_hand.check(batch, -oracle, wanted, task.kind)
    reber = t.Reber()
    batch = reber.batch(0, 20, seed=0)
    with pytest.raises(AssertionError):
        formal_by_hand.check(batch, reber.oracle(batch).roll(1, -1), formal_by_hand.by_hand(reber, batch), reber.kind)
