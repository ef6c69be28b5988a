"""The formal and synthetic tasks at tiny sizes, and their answers by slow loops that share nothing with the tasks."""

from __future__ import annotations

import itertools
import re
import statistics
from typing import Any

import torch

from statewise import tasks as t
from statewise.tasks import Batch
from statewise.tasks.generated import Generated

CASES: list[Generated] = [
    t.EvenPairs(),
    t.CycleNavigation(length=12),
    t.CycleNavigation(modulus=3, length=30, shortest=9),
    t.ModularArithmetic(),
    t.ModularArithmetic(modulus=2, length=20),
    t.Reverse(length=12),
    t.Reverse(letters=5),
    t.StackManipulation(),
    t.ModularBrackets(),
    t.ModularBrackets(length=25, modulus=7, products=True),
    t.SolveEquation(),
    t.Duplicate(length=15),
    t.MissingDuplicate(length=31),
    t.OddsFirst(),
    t.OddsFirst(length=11, letters=4),
    t.BucketSort(length=20),
    t.BinaryAddition(),
    t.BinaryMultiplication(),
    t.ComputeSqrt(length=31),
    *(t.Tomita(grammar=number, length=24) for number in range(1, 8)),
    t.Reber(),
    t.Reber(length=12),
    t.EmbeddedReber(),
    t.EmbeddedReber(length=30, nested=3),
    t.Dyck(length=20),
    t.Dyck(length=20, kinds=1, depth=3),
    t.Dyck(length=24, letters=3, shortest=10),
    t.Palindrome(length=16),
    t.Palindrome(letters=2, length=20, marker=True, shortest=9),
    t.ElmanXor(length=40),
    t.ElmanLetters(length=31),
    t.Mqar(),
    t.Mqar(length=32, pairs=8, symbols=10, power=1.0, fill="values"),
    t.Passkey(length=40),
    t.Passkey(length=20, digits=3, words="random", vocabulary=4),
    t.PhoneBook(length=40),
    t.PhoneBook(length=30, queries=3, question="before", names=3, numbers=4),
    t.StringCopy(length=15),
    t.NgramLookup(),
    t.NgramLookup(length=20, n=3, given="before", letters=4),
    t.Induction(),
    t.Induction(length=12, symbols=5),
    t.ListOps(length=60),
    t.ListOps(length=200, depth=4, args=5),
    t.Pathfinder(length=256, dashes=2, others=1),
    t.SelectivBench(length=20),
    t.SelectivBench(length=15, gap=0.7, shortest_gap=2, longest_gap=5, noise=0.2),
    t.SelectivBench(length=20, ambiguous=4, depth=3, plain=3, gap=0.3, gap_start=5, violating=True, grammar=1),
    t.SelectivBenchNext(length=20),
    t.SelectivBenchNext(length=15, ambiguous=5, depth=2, plain=2, grammar=3),
    t.InContextLanguages(length=60),
    t.InContextLanguages(length=50, states=4, letters=4, string=6),
    t.MackeyGlass(length=50),
    t.MackeyGlass(length=40, delay=8, horizon=5, step=2.0),
    t.Lorenz(length=12),
]


def by_hand(task: Generated, batch: Batch) -> dict[tuple[int, int], Any]:
    """(row, step) -> the answer; where several symbols may come, what each one's probability is."""
    found: dict[tuple[int, int], Any] = {}
    for b, row in enumerate(batch.x.tolist()):
        if batch.lengths is not None:
            row = row[: int(batch.lengths[b])]
        for step, answer in answers(task, row, batch, b).items():
            found[b, step] = answer
    return found


def answers(task: Any, row: list[Any], batch: Batch, b: int) -> dict[int, Any]:
    if isinstance(task, t.StringCopy):
        half = len(row) // 2
        assert row[half] == task.letters + 1
        assert row[half + 1 :] == row[:half]
        assert task.letters + 1 not in row[:half]
        return {half + i: s for i, s in enumerate([*(s - 1 for s in row[:half]), task.letters])}
    if isinstance(task, t.tasks["even_pairs"].cls.__mro__[1]):  # Answers: a string and questions
        said = [token - 1 for token in row if token <= task.symbols]
        assert row == [s + 1 for s in said] + [task.symbols + 1] * (len(row) - len(said))
        return {len(said) + i: answer for i, answer in enumerate(transduced(task, said))}
    if isinstance(task, t.Tomita | t.Dyck | t.Palindrome):
        assert min(row) >= 1
        return {len(row) - 1: int(belongs(task, [token - 1 for token in row]))}
    return OTHERS[type(task)](task, row, batch, b)


def transduced(task: Any, said: list[int]) -> list[int]:
    n, m = len(said), getattr(task, "modulus", 0)
    match task.name:
        case "even_pairs":
            return [sum(a != b for a, b in itertools.pairwise(said)) % 2]
        case "cycle_navigation":
            place = 0
            for s in said:
                place = (place + (0, 1, m - 1)[s]) % m
            return [place]
        case "modular_arithmetic":
            terms: list[list[int]] = [[1, said[0]]]  # sign, factors
            for operator, digit in zip(said[1::2], said[2::2], strict=True):
                if operator == m + 2:
                    terms[-1].append(digit)
                else:
                    terms.append([1 if operator == m else -1, digit])
            return [sum(product(term) for term in terms) % m]
        case "modular_brackets":
            return [bracketed(said, m)]
        case "solve_equation":
            assert said[-2] == m + 6
            right = [d for d in range(m) if bracketed([d if s == m + 5 else s for s in said[:-2]], m) == said[-1]]
            assert len(right) == 1
            return right
        case "stack_manipulation":
            stack: list[int] = []
            for s in said:
                if s == 2:
                    stack = stack[:-1]
                else:
                    stack.append(s if s < 2 else s - 3)
            return [*reversed(stack), 2]
        case "reverse":
            return said[::-1]
        case "duplicate":
            return said + said
        case "odds_first":
            return said[1::2] + said[0::2]
        case "bucket_sort":
            return sorted(said)
        case "missing_duplicate":
            gap = said.index(task.letters)
            first, second = said[: n // 2], said[n // 2 :]
            missing = (second if gap < n // 2 else first)[gap % (n // 2)]
            first[gap:] = [missing, *first[gap + 1 :]] if gap < n // 2 else first[gap:]
            second[gap - n // 2 :] = [missing, *second[gap - n // 2 + 1 :]] if gap >= n // 2 else second[gap - n // 2 :]
            return [missing]
        case "binary_addition" | "binary_multiplication":
            at = said.index(2)
            a, b = said[:at], said[at + 1 :]
            assert a and b
            return without_zeros(added(a, b) if task.name == "binary_addition" else multiplied(a, b))
        case "compute_sqrt":
            number, root = int("".join(map(str, said)), 2), 0
            for place in reversed(range(len(said))):
                if (root + (1 << place)) ** 2 <= number:
                    root += 1 << place
            return without_zeros([int(c) for c in reversed(f"{root:b}")])
    raise AssertionError(task.name)


def product(factors: list[int]) -> int:
    found = 1
    for factor in factors:
        found *= factor
    return found


def bracketed(said: list[int], m: int) -> int:
    """Recursive descent over digits, + - * ( )."""
    if said[0] != m + 3:
        return said[0] % m if len(said) == 1 else -said[1] % m
    assert said[-1] == m + 4
    inside, deep = said[1:-1], 0
    for i, s in enumerate(inside):
        deep += (s == m + 3) - (s == m + 4)
        if deep == 0 and i and m <= s < m + 3:
            a, b = bracketed(inside[:i], m), bracketed(inside[i + 1 :], m)
            return (a + b, a - b, a * b)[s - m] % m
    return bracketed(inside, m)


def added(a: list[int], b: list[int]) -> list[int]:
    carry, found = 0, []
    for x, y in itertools.zip_longest(a, b, fillvalue=0):
        carry, bit = divmod(x + y + carry, 2)
        found.append(bit)
    return [*found, carry]


def multiplied(a: list[int], b: list[int]) -> list[int]:
    found = [0]
    for place, bit in enumerate(b):
        if bit:
            found = added(found, [0] * place + a)
    return found


def without_zeros(bits: list[int]) -> list[int]:
    bits = list(bits)
    while len(bits) > 1 and bits[-1] == 0:
        bits.pop()
    return [*bits, 2]


def belongs(task: Any, said: list[int]) -> bool:
    if isinstance(task, t.Palindrome):
        middle = not task.marker or said[len(said) // 2] == task.letters == max(said)
        assert middle
        return said == said[::-1]
    if isinstance(task, t.Dyck):
        stack: list[int] = []
        for s in said:
            if s < task.kinds:
                stack.append(s)
                if len(stack) > task.depth:
                    return False
            elif s < 2 * task.kinds and (not stack or stack.pop() != s - task.kinds):
                return False
        return not stack
    word = "".join(map(str, said))
    runs = [(symbol, len(list(run)) % 2) for symbol, run in itertools.groupby(word)]
    ones, zeros = word.count("1"), word.count("0")
    bad = any(a == ("1", 1) and ("0", 1) in runs[i:] for i, a in enumerate(runs))
    return (
        zeros == 0,
        re.fullmatch("(10)*", word) is not None,
        not bad,
        "000" not in word,
        zeros % 2 == ones % 2 == 0,
        (zeros - ones) % 3 == 0,
        re.fullmatch("0*1*0*1*", word) is not None,
    )[task.grammar - 1]


INNER = re.compile("B(?:TS*X(?:XT*VP)*(?:S|XT*VV)|PT*V(?:V|P(?:XT*VP)*(?:S|XT*VV)))E")
FOLLOWS = {  # of the grammar's strings: after which prefixes what may come
    "start": {"B": "b"}, "b": {"T": "t", "P": "p"}, "t": {"S": "t", "X": "tx"}, "p": {"T": "p", "V": "pv"},
    "tx": {"X": "p", "S": "last"}, "pv": {"P": "tx", "V": "last"}, "last": {"E": "over"}, "over": {},
}  # fmt: skip


def reber(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    word, d = "".join("BTSXPVE"[i] for i in row), task.depth
    for level in range(d):
        assert word[2 * level] == "B"
        assert word[len(word) - 1 - 2 * level] == "E"
        assert word[2 * level + 1] == word[len(word) - 2 - 2 * level]
    inner = word[2 * d : len(word) - 2 * d]
    assert INNER.fullmatch(inner)
    sets = [s for level in range(d) for s in ("TP", "B")]
    node = "start"
    for symbol in inner:
        node = FOLLOWS[node][symbol]
        sets.append("".join(FOLLOWS[node]))
    sets = ["B", *sets][1:] if not d else sets
    for level in reversed(range(d)):
        sets[-1] = word[2 * level + 1]
        sets += ["E", ""]
    return {step: {"BTSXPVE".index(s): 1 / len(can) for s in can} for step, can in enumerate(sets) if can}


def elman_xor(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    return {i: {row[i] ^ row[i - 1]: 1.0} if i % 3 == 1 else {0: 0.5, 1: 0.5} for i in range(len(row))}


def elman_letters(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    due = ""
    for i, letter in enumerate("bdgaiu"[token] for token in row):
        if due:
            assert letter == due[0]
            due = due[1:]
        else:
            due = {"b": "a", "d": "ii", "g": "uu"}[letter]
        found[i] = {"bdgaiu".index(due[0]): 1.0} if due else dict.fromkeys(range(3), 1 / 3)
    return found


def mqar(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    told = 2 * task.pairs
    book = dict(zip(row[0:told:2], row[1:told:2], strict=True))
    assert len(book) == len(set(book.values())) == task.pairs
    asked = {i: row[i] for i in range(told, len(row)) if 1 <= row[i] <= task.symbols}
    assert sorted(asked.values()) == sorted(book)
    assert all(i % 2 == 0 for i in asked)
    return {i: book[key] - 1 - task.symbols for i, key in asked.items()}


def passkey(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    words = row[: task.length]
    first, second = (i for i, token in enumerate(words) if token == 10)
    assert second - first == task.digits + 1
    assert row[task.length :] == [11] * task.digits
    rest = words[:first] + words[second + 1 :]
    assert all(token >= 12 for token in rest)
    if task.words == "repeat":
        assert all(a == b for a, b in zip(rest, rest[task.vocabulary :]))
    return {task.length + i: digit for i, digit in enumerate(words[first + 1 : second])}


def phone_book(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    parts = [list(part) for bar, part in itertools.groupby(row, lambda token: token == 0) if not bar]
    book, question = parts[-2:]
    numbers = {tuple(book[i : i + 2]): book[i + 2 : i + 5] for i in range(0, len(book), 5)}
    assert len(numbers) == task.entries
    assert (len(parts) == 3) == (task.question == "before")
    found = {}
    for i in range(0, len(question), 5):
        for j, part in enumerate(numbers[tuple(question[i : i + 2])]):
            assert question[i + 2 + j] == 1
            found[len(row) - len(question) + i + 2 + j] = part - 2 - 2 * task.names
    names = [question[i + j] for i in range(0, len(question), 5) for j in range(2)]
    assert len(parts) == 2 or parts[0] == names
    return found


def ngram(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    before, after = row[: row.index(0)], row[row.index(0) + 1 :]
    key, text = (before, after[:-1]) if task.given == "before" else (after, before)
    places = [i for i in range(len(text) - task.n + 1) if text[i : i + task.n] == key]
    assert len(places) == 1
    return {len(row) - 1: text[places[0] + task.n] - 1}


def induction(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    assert row.count(0) == 2
    assert row[-1] == 0
    return {len(row) - 1: row[row.index(0) + 1] - 1}


def list_ops(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    assert task.length / 4 < len(row) < task.length

    def read(i: int, depth: int) -> tuple[int, int]:
        """The value that begins at token i, and where the next begins."""
        assert depth <= task.depth
        if row[i] < 10:
            return row[i], i + 1
        operator, found = row[i], []
        i += 1
        while row[i] != 14:
            value, i = read(i, depth + 1)
            found.append(value)
        assert 2 <= len(found) <= task.args
        does = (min, max, lambda v: int(statistics.median(v)), lambda v: sum(v) % 10)[operator - 10]
        return does(found), i + 1

    value, end = read(0, 1)
    assert end == len(row)
    return {len(row) - 1: value}


def pathfinder(task: Any, row: list[list[float]], batch: Batch, b: int) -> dict[int, Any]:
    side = task.side
    lit = {divmod(i, side) for i, (pixel,) in enumerate(row) if pixel}
    square = lambda r, c: {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    discs = [place for place in lit if square(*place) <= lit]
    assert len(discs) == 2
    points = lit - set().union(*(square(*place) - {place} for place in discs))
    reached, todo = {discs[0]}, [discs[0]]
    while todo:
        r, c = todo.pop()
        near = {(i, j) for i in range(r - 3, r + 4) for j in range(c - 3, c + 4)} & points - reached
        reached |= near
        todo += near
    return {len(row) - 1: int(discs[1] in reached)}


def selectiv_bench(task: Any, row: list[list[float]], batch: Batch, b: int) -> dict[int, Any]:
    rules, state, found, elements = task.rules, 0, {}, 0
    for i, values in enumerate(row):
        on = [symbol for symbol, value in enumerate(values) if value >= 1]
        assert len(on) <= 1
        assert all(value < 1 + task.noise + 1e-6 for value in values)
        following = [int(s) for s in rules.edges[state][: rules.degree[state]]]
        can = [s for s in following if [int(rules.symbol[s])] == on]
        assert len(can) <= 1
        if can:
            state, elements = can[0], elements + 1
        found[i] = state
    assert elements == task.length
    return found


def selectiv_bench_next(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    rules, state, found = task.rules, 0, {}
    for i, symbol in enumerate(row):
        (state,) = (int(s) for s in rules.edges[state][: rules.degree[state]] if rules.symbol[s] == symbol)
        following = [int(rules.symbol[s]) for s in rules.edges[state][: rules.degree[state]]]
        found[i] = {s: 1 / len(following) for s in following}
    return found


def in_context(task: Any, row: list[int], batch: Batch, b: int) -> dict[int, Any]:
    """What may come is a function of the string so far; at most 3 letters, equally likely."""
    assert batch.truth is not None
    assert row[0] == 0
    seen: dict[tuple[int, ...], list[float]] = {}
    found, prefix = {}, tuple[int, ...]()
    for i, token in enumerate(row):
        prefix = () if token == 0 else (*prefix, token)
        assert len(prefix) <= task.string
        odds = batch.truth[b, i].tolist()
        assert seen.setdefault(prefix, odds) == odds
        can = {letter: p for letter, p in enumerate(odds) if p}
        assert all(abs(p - 1 / len(can)) < 1e-6 for p in can.values())
        assert 1 <= len(can) <= 3
        following = row[i + 1] if i + 1 < len(row) else (int(batch.y[b, i]) + 1) * int(batch.weight[b, i])
        if following:
            assert following - 1 in can
            found[i] = can
    return found


def series(task: Any, row: list[list[float]], batch: Batch, b: int) -> dict[int, Any]:
    ahead = row[task.horizon :] + batch.y[b, len(row) - task.horizon :].tolist()
    return dict(enumerate(ahead)) if isinstance(task, t.Lorenz) else dict(list(enumerate(ahead))[task.delay + 1 :])


OTHERS = {
    t.Reber: reber, t.EmbeddedReber: reber, t.ElmanXor: elman_xor, t.ElmanLetters: elman_letters, t.Mqar: mqar,
    t.Passkey: passkey, t.PhoneBook: phone_book, t.NgramLookup: ngram, t.Induction: induction, t.ListOps: list_ops,
    t.Pathfinder: pathfinder, t.SelectivBench: selectiv_bench,
    t.SelectivBenchNext: selectiv_bench_next, t.InContextLanguages: in_context,
    t.MackeyGlass: series, t.Lorenz: series,
}  # fmt: skip


def check(batch: Batch, oracle: torch.Tensor, wanted: dict[tuple[int, int], Any], kind: str) -> int:
    """Every answer of the batch and of the oracle against `wanted`; how many there were."""
    y, out = batch.y.tolist(), (oracle if kind == "regression" else oracle.softmax(-1)).tolist()
    for (b, step), answer in wanted.items():
        if kind == "regression":
            values = answer if isinstance(answer, list) else [answer]
            assert all(abs(u - v) < 1e-6 for u, v in zip(values, y[b][step], strict=True))
            assert all(abs(u - v) < 1e-5 for u, v in zip(values, out[b][step], strict=True)), (b, step)
        else:
            odds = answer if isinstance(answer, dict) else {answer: 1.0}
            assert y[b][step] in odds, (b, step)
            assert all(abs(p - odds.get(i, 0)) < 1e-5 for i, p in enumerate(out[b][step])), (b, step)
    return len(wanted)
