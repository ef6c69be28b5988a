"""Tasks on real data: shapes, splits, epochs, purity. Sets that are not in the cache are skipped, and say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from statewise.core import DataError, UsageError, leaves
from statewise.tasks import SPLITS, Forecast, GeneFamilies, Task, Ucr, tasks
from statewise.tasks.finite import Classify, Finite, Sequences, stratified
from statewise.tasks.forecast import COUNT, HORIZON, _read
from statewise.tasks.gene_families import related
from statewise.tasks.sources import sources
from statewise.tasks.ucr import CLASSES, read_ts

SIZES: dict[str, tuple[str, tuple[int, int, int], int, tuple[int, int]]] = {  # source, rows, classes, lengths
    "digits": ("digits", (1200, 297, 300), 10, (8, 8)),
    "mnist_rows": ("mnist", (3500, 500, 1000), 10, (28, 28)),
    "mnist_pixels": ("mnist", (3500, 500, 1000), 10, (784, 784)),
    "fashion_mnist_rows": ("fashion_mnist", (55000, 5000, 10000), 10, (28, 28)),
    "fashion_mnist_pixels": ("fashion_mnist", (55000, 5000, 10000), 10, (784, 784)),
    "spoken_digits": ("spoken_digits", (2100, 300, 600), 10, (6, 92)),
    "ucr": ("ucr", (225, 45, 370), 9, (7, 29)),
    "gene_families": ("gene_families", (2541, 363, 725), 7, (5, 1024)),
}


def here(source: str) -> None:
    if source == "digits":  # comes with scikit-learn: where that is installed, it is there
        pytest.importorskip("sklearn")
        assert sources[source].here()
    elif not sources[source].here():
        pytest.skip(f"data set {source} is not in the cache: statewise data get {source}")


def made(name: str) -> Any:
    here(SIZES[name][0])
    return tasks[name].cls()


def test_every_labelled_set_is_here() -> None:
    labelled = {info.name for info in tasks if issubclass(info.cls, Classify)}
    assert labelled == set(SIZES)
    assert len(labelled) == 8


@pytest.mark.parametrize("name", SIZES)
def test_rows_classes_lengths(name: str) -> None:
    task = made(name)
    _, rows, classes, (shortest, longest) = SIZES[name]
    assert tuple(len(task.rows(split)) for split in SPLITS) == rows
    assert task.y_width == classes
    for split in SPLITS:
        part = task.rows(split)
        assert sorted(part.y.unique().tolist()) == list(range(classes))
        share = part.y.bincount().float() / len(part)
        assert float((share - 1 / classes).abs().max()) < {"ucr": 0.15, "gene_families": 0.2}.get(name, 0.01)
    every = torch.cat([task.rows(split).lengths for split in SPLITS])
    assert (int(every.min()), int(every.max())) == (shortest, longest)


@pytest.mark.parametrize("name", SIZES)
def test_batch_form(name: str) -> None:
    task = made(name)
    batch = task.batch(0, 6, seed=0)
    size, steps = batch.x.shape[:2]
    assert size == 6
    assert batch.x.shape[2] == task.x_width
    assert (batch.x.dtype, batch.y.dtype, batch.weight.dtype) == (torch.float32, torch.int64, torch.float32)
    assert batch.y.shape == batch.weight.shape == (6, steps)
    ends = batch.lengths if batch.lengths is not None else torch.full((6,), steps)
    assert int(ends.max()) == steps
    assert batch.tokens == int(ends.sum())
    for b in range(6):
        assert batch.weight[b].nonzero().tolist() == [[int(ends[b]) - 1]]
        assert not batch.x[b, int(ends[b]) :].any()
        assert (batch.y[b] == batch.y[b, 0]).all()


@pytest.mark.parametrize("name", ["digits", "mnist_rows", "spoken_digits", "ucr"])
def test_splits_share_no_row(name: str) -> None:
    task = made(name)
    found = [{row.numpy().tobytes() for batch in task.batches(split) for row in _cut(batch)} for split in SPLITS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not found[a] & found[b]


def _cut(batch: Any) -> list[torch.Tensor]:
    ends = [batch.x.shape[1]] * len(batch.x) if batch.lengths is None else batch.lengths.tolist()
    return [row[:end].contiguous() for row, end in zip(batch.x, ends)]


@pytest.mark.parametrize("name", ["digits", "spoken_digits"])
def test_standardised_or_scaled(name: str) -> None:
    task = made(name)
    steps = torch.cat([step for batch in task.batches("train") for step in _cut(batch)])
    if name == "digits":
        assert (float(steps.min()), float(steps.max())) == (0, 1)
    else:
        assert steps.mean(0).abs().max() < 1e-4
        assert (steps.std(0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["digits", "mnist_rows", "spoken_digits", "ucr"])
def test_chance_and_a_linear_rule_above_it(name: str) -> None:
    task = made(name)
    assert 0.05 < task.chance() < 0.2
    assert 0.8 < task.baseline() < 1


def test_permuted_is_one_order_for_all() -> None:
    here("digits")
    plain, permuted = (tasks["digits"].cls(pixels=True, permuted=p) for p in (False, True))  # type: ignore[call-arg]
    a, b = next(plain.batches("test")).x[..., 0], next(permuted.batches("test")).x[..., 0]
    assert not torch.equal(a, b)
    assert torch.equal(a.sort(1).values, b.sort(1).values)
    c, d = (next(task.batches("train")).x[..., 0] for task in (plain, permuted))
    constant = [t for t in range(64) if len(set(map(tuple, (a[:, [t]].tolist())))) == 1]
    order = {
        t: [u for u in range(64) if torch.equal(torch.cat([a[:, t], c[:, t]]), torch.cat([b[:, u], d[:, u]]))]
        for t in range(64)
    }
    assert all(order[t] for t in range(64))
    assert sum(len(order[t]) == 1 for t in range(64)) >= 64 - len(constant) - 4


class Toy(Classify):
    """Seven sequences whose one value is their number."""

    name = "toy"
    x_width = 1
    y_width = 7

    def load(self) -> Any:
        rows = Sequences.of([np.full((1 + i % 3, 1), float(i)) for i in range(7)], np.arange(7))
        return dict.fromkeys(SPLITS, rows)


def test_every_example_once_an_epoch_in_a_new_order() -> None:
    task: Finite = Toy()
    for size in (1, 3, 7, 10, 20):
        seen = torch.cat([task.batch(i, size, seed=5).y[:, 0] for i in range(21)])[: 7 * 3]
        epochs = seen.view(-1, 7)
        assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in epochs)
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs) > 1
    whole = torch.cat([task.batch(i, 1, seed=5).y[:, 0] for i in range(21)])
    assert torch.equal(whole, torch.cat([task.batch(i, 3, seed=5).y[:, 0] for i in range(7)]))
    assert not torch.equal(whole[:7], torch.cat([task.batch(i, 7, seed=6).y[:, 0] for i in range(1)]))


def test_padding() -> None:
    batch = Toy().rows("test").select(torch.tensor([2, 0, 4]))
    assert batch.x[..., 0].tolist() == [[2, 2, 2], [0, 0, 0], [4, 4, 0]]
    assert batch.weight.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [3, 1, 2]


def test_evaluation_is_every_row_once_in_order() -> None:
    assert torch.cat([batch.y[:, 0] for batch in Toy().batches("test")]).tolist() == list(range(7))


@pytest.mark.parametrize("name", ["digits", "spoken_digits"])
def test_batches_are_pure(name: str) -> None:
    task = made(name)
    first = task.batch(70, 32, seed=2)
    task.batch(3, 32, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(task.batch(70, 32, seed=2)), strict=True))


def test_shared_speakers_are_told_beside_the_score() -> None:
    assert "same speakers" in tasks["spoken_digits"].cls.data


def test_stratified_shares() -> None:
    y = np.repeat([0, 1, 2], [50, 30, 20])
    parts = stratified(y, (70, 10, 20), "key")
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    for part, shares in zip(parts, ((35, 21, 14), (5, 3, 2), (10, 6, 4))):
        assert np.abs(np.bincount(y[part]) - shares).max() <= 1
    assert all((a == b).all() for a, b in zip(parts, stratified(y, (70, 10, 20), "key")))


@pytest.mark.parametrize("name", [info.name for info in tasks])
def test_how_to_get_the_data_is_one_line(name: str) -> None:
    cls: type[Task] = tasks[name].cls
    assert cls.data
    assert "\n" not in cls.data
    assert cls.__doc__
    if cls.data not in ("generated",) and "your own" not in cls.data:
        assert any(f"statewise data get {source.name}" in cls.data for source in sources)


@pytest.mark.parametrize("name", [*SIZES, "text", "smiles", "voice", "forecast"])
def test_absent_data_says_what_to_run(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path))
    monkeypatch.setattr("statewise.tasks.sources._installed", lambda source, member: None)
    source = SIZES[name][0] if name in SIZES else name
    task = tasks[name].cls()
    with pytest.raises(DataError, match=f"statewise data get {source}$"):
        task.load() if isinstance(task, Finite) else task.read()  # type: ignore[attr-defined]


def test_absent_data_of_a_field(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path))
    monkeypatch.setattr("statewise.tasks.sources._installed", lambda source, member: None)
    for task, source in ((Ucr(problem="PLAID"), "plaid"), (Forecast(series="m1_monthly"), "competitions")):
        with pytest.raises(DataError, match=f"statewise data get {source}$"):
            task.load()
        assert source in task.data


PROBLEMS: dict[str, tuple[tuple[int, int, int], int, int, tuple[int, int]]] = {  # rows, channels, classes, lengths
    "ACSF1": ((84, 16, 100), 1, 10, (1460, 1460)),
    "ArrowHead": ((30, 6, 175), 1, 3, (251, 251)),
    "BasicMotions": ((34, 6, 40), 6, 4, (100, 100)),
    "GunPoint": ((42, 8, 150), 1, 2, (150, 150)),
    "ItalyPowerDemand": ((56, 11, 1029), 1, 2, (24, 24)),
    "JapaneseVowels": ((225, 45, 370), 12, 9, (7, 29)),
    "OSULeaf": ((167, 33, 242), 1, 6, (427, 427)),
    "PickupGestureWiimoteZ": ((42, 8, 50), 1, 10, (29, 361)),
    "PLAID": ((444, 88, 537), 1, 11, (100, 1344)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_ucr(problem: Any) -> None:
    task, (rows, channels, classes, lengths) = Ucr(problem=problem), PROBLEMS[problem]
    here("plaid" if problem == "PLAID" else "ucr")
    assert tuple(len(task.rows(split)) for split in SPLITS) == rows
    assert (task.x_width, task.y_width) == (task.rows("test").values.shape[1], len(task.rows("test").y.unique()))
    assert (task.x_width, task.y_width) == (channels, classes)
    assert len(task.rows("train").y.unique()) == classes
    every = torch.cat([task.rows(split).lengths for split in SPLITS])
    assert (int(every.min()), int(every.max())) == lengths
    found = [{row.numpy().tobytes() for batch in task.batches(split) for row in _cut(batch)} for split in SPLITS]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    steps = torch.cat([step for batch in task.batches("train") for step in _cut(batch)]).double()
    assert steps.mean(0).abs().max() < 1e-4
    assert (steps.std(0) - 1).abs().max() < 2e-2
    assert task.baseline() > task.chance() + 0.1
    assert f"    {problem} " in (Ucr.__doc__ or "")
    assert f"{rows[0]} + {rows[1]} / {rows[2]}" in (Ucr.__doc__ or "")


def test_another_problem_is_named() -> None:
    assert set(PROBLEMS) == set(CLASSES)
    with pytest.raises(UsageError, match="problem is 'Trace'; expected one of ACSF1, ArrowHead"):
        Ucr(problem="Trace")  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ["1,2,x:1", "1,2:3,4,5:1", "1,2,3:7"])
def test_a_faulty_line_is_told(line: str, tmp_path: Any) -> None:
    path = tmp_path / "a.ts"
    path.write_text(f"# said\n@classLabel true 1 2\n@data\n0.5,1:2,3:2\n{line}\n")
    with pytest.raises(DataError, match=r"a.ts:5: not a line of a .ts file"):
        read_ts(path)


def letters(gene: np.ndarray, size: int) -> list[bytes]:
    whole = gene.tobytes()
    return [whole[i : i + size] for i in range(len(whole) - size + 1)]


def joined(genes: list[np.ndarray], size: int) -> set[tuple[int, int]]:
    """The pairs of genes that have `size` letters in a row in common, or are both so joined to a third."""
    seen: dict[bytes, int] = {}
    group = list(range(len(genes)))
    for i, gene in enumerate(genes):
        for one in letters(gene, size):
            old, new = group[seen.setdefault(one, i)], group[i]
            group = [old if g == new else g for g in group]
    return {(i, j) for i in range(len(genes)) for j in range(i) if group[i] == group[j]}


def test_genes_that_share_a_stretch_are_related() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(30):
        genes = [rng.choice(np.frombuffer(b"ACGT", np.uint8), rng.integers(1, 300)) for _ in range(25)]
        for i in range(1, len(genes)):  # some get a stretch of another, of 50 to 75 letters
            source = genes[int(rng.integers(0, i))]
            size = int(rng.integers(50, 76))
            if rng.random() < 0.6 and len(source) >= size and len(genes[i]) >= size:
                a, b = int(rng.integers(0, len(source) - size + 1)), int(rng.integers(0, len(genes[i]) - size + 1))
                genes[i][b : b + size] = source[a : a + size]
        group = related(genes)
        pairs = {(i, j) for i in range(len(genes)) for j in range(i) if group[i] == group[j]}
        assert joined(genes, 63) <= pairs <= joined(genes, 32)
        found += len(pairs)
    assert found > 100


def test_no_gene_of_a_split_is_known_from_another() -> None:
    here("gene_families")
    task = GeneFamilies(length=1 << 20)
    genes: dict[str, list[np.ndarray]] = {}
    for split in SPLITS:
        part = task.rows(split)
        assert set(part.values.sum(1).tolist()) == {0, 1}
        code = (part.values * torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).sum(1, dtype=torch.uint8).numpy()
        genes[split] = [code[start : start + size] for start, size in zip(part.starts.tolist(), part.lengths.tolist())]
    assert sum(len(part) for part in genes.values()) == len({g.tobytes() for part in genes.values() for g in part})
    seen: set[int] = set()
    for split in ("validation", "test", "train"):
        own = {hash(one) for gene in genes[split] for one in letters(gene, 63)}
        assert not own & seen
        if split != "train":
            seen |= own
    shares = [task.rows(split).y.bincount() / len(task.rows(split)) for split in SPLITS]
    assert max(float((share - shares[0]).abs().max()) for share in shares) < 0.02


def test_genes_are_cut_from_their_beginning() -> None:
    here("gene_families")
    short, long = (next(GeneFamilies(length=n).batches("test")) for n in (50, 400))
    assert short.x.shape[1] == 50
    assert torch.equal(short.x, long.x[:, :50])
    assert 0.25 < GeneFamilies().chance() < 0.35
    assert GeneFamilies().chance() + 0.05 < GeneFamilies().baseline() < 0.6


FORECASTS = [
    Forecast(),
    Forecast(horizon=1),
    Forecast(series="sunspots"),
    Forecast(series="elnino"),
    Forecast(series="m3_monthly", horizon=18),
    Forecast(series="m1_yearly", horizon=6),
    Forecast(series="m3_other"),
    Forecast(series="tourism_monthly", horizon=24),
]
COMPETING = [Forecast(series=name, horizon=HORIZON[name]) for name in COUNT]  # type: ignore[arg-type]


@pytest.mark.parametrize("task", FORECASTS, ids=str)
def test_forecast_asks_for_the_future(task: Forecast) -> None:
    """Every asked answer, undone, is a value of the series; and the three parts ask for different values."""
    here("competitions" if task.series in COUNT else "forecast")
    series, ends = _read(task.series)
    whole = np.concatenate(series)
    offsets = np.cumsum([0, *map(len, series)])
    scale: list[float] = []
    targets = {}
    for split in SPLITS:
        part = task.rows(split)
        assert part.asked is not None
        steps = part.asked.nonzero()[:, 0].numpy()
        owner = np.searchsorted(offsets, steps, side="right") - 1
        for k in range(1, task.horizon + 1):
            assert (steps + k < offsets[owner + 1]).all()
        first, last = {
            "train": (np.zeros(len(ends)), [e[0] for e in ends]),
            "validation": ([e[0] for e in ends], [e[1] for e in ends]),
            "test": ([e[1] for e in ends], [len(s) for s in series]),
        }[split]
        place = steps - offsets[owner]
        assert (place + 1 >= np.array(first)[owner]).all()
        assert (place + task.horizon < np.array(last)[owner]).all()
        for k in (1, task.horizon):
            change = whole[steps + k] - whole[steps]
            y = part.y[steps, k - 1].double().numpy()
            ratio = change[np.abs(y) > 1e-3] / y[np.abs(y) > 1e-3]
            assert np.ptp(ratio) <= 1e-3 * np.abs(ratio).max()
            scale.append(float(ratio.mean()))
        targets[split] = steps
    assert np.ptp(scale[::2]) < 1e-3 * scale[0]
    for split in ("validation", "test"):
        asked = sum(float(batch.weight.sum()) for batch in task.batches(split))  # type: ignore[arg-type]
        assert asked == len(targets[split])  # each once
    covered = sum(float(batch.weight.sum()) for batch in task.batches("train"))
    assert covered >= len(targets["train"])


@pytest.mark.parametrize("task", COMPETING, ids=str)
def test_a_competition_asks_for_its_own_test(task: Forecast) -> None:
    """From where a series' training part ends, for as long as the competition asks; validation as much before."""
    here("competitions")
    series, ends = _read(task.series)
    assert len(series) == COUNT[task.series]
    starts = np.cumsum([0, *map(len, series)])[:-1]
    part = {split: task.rows(split) for split in SPLITS}
    for split, last in (("validation", 0), ("test", 1)):
        asked = part[split].asked  # type: ignore[index]
        assert asked is not None
        whole = np.array([np.isfinite(s[e[last] - 1 : e[last] + task.horizon]).all() for s, e in zip(series, ends)])
        origins = starts + np.array([e[last] - 1 for e in ends])
        assert asked.nonzero()[:, 0].tolist() == origins[whole].tolist()
        assert whole.mean() > 0.97
    assert all(len(s) == e[1] + task.horizon and e[1] == e[0] + task.horizon for s, e in zip(series, ends))
    assert task.chance() > task.baseline() > 0


@pytest.mark.parametrize("task", FORECASTS[:3], ids=str)
def test_forecast_inputs_are_causal(task: Forecast) -> None:
    """What comes later changes no input before it."""
    here("forecast")
    from statewise.tasks.windows import ahead

    values = _read(task.series)[0][0][:300, None].copy()
    changed = values.copy()
    changed[200:] += 50
    a, b = (ahead("x", [v], [(250, 280)], task.horizon, 52)[0].x for v in (values, changed))
    assert np.array_equal(a[:200], b[:200])
    assert not np.array_equal(a[200], b[200])


def test_forecast_scores() -> None:
    here("forecast")
    task = Forecast()
    assert task.chance() > 1.5
    assert 0.4 < task.baseline() < 1.1
    batch = next(task.batches("test"))
    perfect, zero = task.metrics(batch.y, batch), task.metrics(torch.zeros_like(batch.y), batch)
    assert perfect["skill"][0] / perfect["skill"][1] == pytest.approx(1)
    assert zero["skill"][0] == pytest.approx(0)
    assert perfect["loss"][0] == 0


def test_missing_values_are_carried_and_never_asked() -> None:
    from statewise.tasks.windows import ahead, carried

    nan = np.nan
    assert carried(np.array([[nan], [1.0], [nan], [nan], [4.0]]))[:, 0].tolist() == [1, 1, 1, 1, 4]
    values = np.arange(40.0)[:, None] ** 1.5
    values[10] = nan
    (track,) = ahead("x", [values], [(30, 35)], 2, 5)
    asked = np.flatnonzero(track.asked["train"])
    assert set(asked) == set(range(28)) - {8, 9, 10}
    assert np.isfinite(track.x).all()
    assert np.isfinite(track.y).all()
