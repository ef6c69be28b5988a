"""Grids, budgets, searches and what is made of their rows; real kills, real silence, real workers."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from statewise.cli import main
from statewise.comparing import (
    Budget,
    Cell,
    Plan,
    Range,
    Search,
    Setup,
    compare,
    grouped,
    locked,
    ordered,
    pool,
    read_results,
    read_rows,
    run_cells,
    where,
)
from statewise.comparing.budget import amount
from statewise.comparing.plan import TRIAL_STEPS, board_of
from statewise.comparing.pool import run_dir
from statewise.core import UsageError, layers
from statewise.models import Stack
from statewise.tasks import Parity, tasks
from statewise.training import Experiment, Train, read_log
from statewise.training.log import Log

pytestmark = pytest.mark.timeout(400)  # starting a worker takes seconds, many where the machine is shared

TRAIN = Train(steps=20, evaluate_every=10)
PARITY = Experiment(Parity(longest=8, test_longest=10), Stack(width=8, depth=1), TRAIN)
RECALL = Experiment(tasks["mqar"].cls(length=16, pairs=2), Stack(width=8, depth=1), TRAIN)


# ---- plans


def test_a_plan_is_a_product():
    grid = {"model.width": (4, 8), "train.lr": (1e-3, 1e-2), "parity:task.longest": (6, 7)}
    plan = Plan((PARITY, RECALL), ("gru", "lru"), seeds=3, grid=grid)
    cells = plan.first()
    assert len({c.key for c in cells}) == len(cells) == plan.count() == 2 * 3 * (2 * 2 * 2 + 2 * 2)
    of = {board: [c for c in cells if c.board == board] for board in {c.board for c in cells}}
    assert {board: len(found) for board, found in of.items()} == {
        "parity longest=6 test_longest=10": 24, "parity longest=7 test_longest=10": 24, board_of(RECALL.task): 24
    }  # fmt: skip
    for c in cells:
        e = c.experiment
        assert c.overrides["model.width"] == e.model.width and c.overrides["train.lr"] == e.train.lr == c.lr
        assert c.label == f"{e.model.layer} width={e.model.width} lr={e.train.lr:g}" and c.tried == {}
        assert e.task == (RECALL.task if e.task.name == "mqar" else Parity(longest=e.task.longest, test_longest=10))
        assert ("task.longest" in c.overrides) == (e.task.name == "parity")
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)  # something of every layer first


def test_rates_are_chosen_for_each_line_by_itself():
    plan = Plan((PARITY, RECALL), ("gru", "lru"), seeds=2, lrs=(1e-3, 1e-2), grid={"model.width": (4, 8)})
    first = plan.first()
    assert len(first) == 2 * 2 * 2 * 2 and {c.seed for c in first} == {0} and plan.count() == 16 + 8
    rng = random.Random(1)
    rows = {c.key: {"status": "done", "validation_score": rng.random()} for c in first}
    best: dict[tuple[str, str], Cell] = {}
    for c in first:
        line = (c.board, c.label)
        if line not in best or rows[c.key]["validation_score"] > rows[best[line].key]["validation_score"]:
            best[line] = c
    rest = plan.rest(rows)
    assert {(c.board, c.label, c.lr) for c in rest} == {(*line, c.lr) for line, c in best.items()} and len(rest) == 8
    assert len({c.lr for c in rest}) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": {"model.width": ()}}, "no values"),
        ({"grid": {"copy:task.length": (1,)}}, "no task 'copy'"),
        ({"grid": {"train.lr": (1.0,)}, "lrs": (1e-3, 1e-2)}, "--lr say the same thing twice"),
        ({"grid": {"model.width": (4,)}, "budget": Budget(parameters=1000)}, "--budget parameters say the same"),
        ({"minutes": 1.0, "budget": Budget(seconds=3)}, "both say how long"),
        ({"grid": {f"model.args.x{i}": tuple(range(10)) for i in range(30)}}, "at most 100000"),
        ({"bases": (PARITY, PARITY)}, "named twice"),
    ],
)
def test_plans_that_make_no_sense(change, words):
    with pytest.raises(UsageError, match=words):
        Plan(**{"bases": (PARITY,), "layers": ("gru",), **change})


# ---- budgets


def parameters_of(made: Experiment) -> int:
    task = made.task
    model = made.model.build(x_width=task.x_width, x_vocab=task.x_vocab, y_width=task.y_width)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("base", [pytest.param(PARITY, marks=pytest.mark.slow), RECALL], ids=["parity", "mqar"])
def test_every_layer_gets_its_width(base):
    import statewise.layers  # noqa: F401

    plan = Plan((base,), tuple(layers.names()), seeds=1, budget=Budget(parameters=60_000))
    counts = {c.layer: parameters_of(c.experiment) for c in plan.first()}
    assert len(counts) >= 25 and all(abs(n - 60_000) <= 3000 for n in counts.values()), counts
    assert len({c.experiment.model.width for c in plan.first()}) > 5
    assert all(c.budget == {"parameters": 60_000} and c.overrides == {} for c in plan.first())


@pytest.mark.parametrize("layer", ["gru", "attention", "mamba"])
def test_the_roundest_width_within_the_tolerance(layer):
    made = Budget(parameters=20_000).widened(Experiment(PARITY.task, Stack(layer, depth=1)))
    far = {
        w: abs(parameters_of(Experiment(PARITY.task, Stack(layer, width=w, depth=1))) - 20_000) for w in range(1, 80)
    }
    step = next(s for s in (8, 4, 2, 1) if any(far[w] <= 1000 for w in range(s, 80, s)))
    assert made.model.width == min(range(step, 80, step), key=lambda w: far[w])


def test_a_width_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"gru on parity comes no nearer than \d+ \(width 1\); allow more with"):
        Budget(parameters=5).widened(PARITY)


def test_tokens_become_steps():
    plan = Plan((PARITY, RECALL), ("gru", "lru"), seeds=1, budget=Budget(tokens=9000))
    for c in plan.first():
        e = c.experiment
        seen = sum(e.task.batch(i, e.train.batch, seed=0).tokens for i in range(e.train.steps))
        one = seen / e.train.steps
        assert abs(seen - 9000) < 0.05 * 9000 + one, (c.board, seen)
        assert e.train.evaluate_every == max(1, e.train.steps // 10)
    assert len({c.experiment.train.steps for c in plan.first() if c.board.startswith("mqar")}) == 1
    twice = Experiment(RECALL.task, RECALL.model, Train(batch=8, accumulate=4))
    alike = Experiment(RECALL.task, RECALL.model, Train(batch=32))
    assert Budget(tokens=9000).steps_for_tokens(twice) == Budget(tokens=9000).steps_for_tokens(alike)


def test_amounts():
    assert [amount(t) for t in ("200k", "10M", "1.5m", "60", "2%", "1e3")] == [2e5, 1e7, 1.5e6, 60, 0.02, 1000]
    asked = Budget.parse(["parameters=200k", "tokens=10M", "seconds=60", "tolerance=2%"])
    assert asked == Budget(200_000, 10_000_000, 60.0, 0.02)
    for text in ("tokens", "tokens=", "tokens=-1", "tokens=k", "tokens=nan", "tolerance=2", "parameters=inf"):
        with pytest.raises(UsageError, match="--budget"):
            Budget.parse([text])


def test_seconds_become_steps_by_measured_paces():
    plan = Plan((PARITY,), ("gru", "lru"), seeds=2, lrs=(1e-3, 1e-2), budget=Budget(seconds=10, tokens=10**6))
    trials = plan.trials()
    assert len(trials) == 2 and {c.experiment.train.steps for c in trials} == {TRIAL_STEPS}
    paces = {c.key: (0.01 if c.layer == "gru" else 0.1, 1.0) for c in trials}
    known = Plan((PARITY,), ("gru", "lru"), 2, (1e-3, 1e-2), budget=Budget(seconds=10, tokens=10**6), paces=paces)
    steps = {c.layer: c.experiment.train.steps for c in known.first()}
    assert steps == {"gru": 1000, "lru": 100}
    less = Plan((PARITY,), ("gru", "lru"), 2, budget=Budget(seconds=10, tokens=10**4), paces=paces)
    by_tokens = Budget(tokens=10**4).steps_for_tokens(PARITY)
    assert {c.layer: c.experiment.train.steps for c in less.first()} == {"gru": by_tokens, "lru": min(by_tokens, 100)}
    failed = {c.key: "out of memory: x" if c.layer == "gru" else (0.1, 1.0) for c in trials}
    hurt = Plan((PARITY,), ("gru", "lru"), 2, budget=Budget(seconds=10), paces=failed)
    assert {c.layer: c.fault for c in hurt.first()} == {"gru": "in a trial of 20 steps: out of memory: x", "lru": ""}
    assert len({c.key for c in hurt.first()}) == 4


def test_minutes_are_shared_out():
    plan = Plan((PARITY, RECALL), ("gru", "lru"), seeds=3, minutes=10, workers=2)
    paces = {c.key: (0.02 if c.board.startswith("mqar") else 0.005, 0.5) for c in plan.trials()}
    known = Plan((PARITY, RECALL), ("gru", "lru"), seeds=3, minutes=10, workers=2, paces=paces)
    steps = {c.board.split()[0]: c.experiment.train.steps for c in known.first()}
    assert steps["parity"] == pytest.approx(4 * steps["mqar"], rel=0.01)
    whole = sum(c.experiment.train.steps * (0.005 if c.board.startswith("p") else 0.02) for c in known.first()) / 2
    assert 0.6 * 600 < whole < 0.85 * 600


# ---- rows


@pytest.fixture
def folder(tmp_path) -> Path:
    """Rows of two tasks, two layers, two rates tried by the first seed."""
    with Log(tmp_path / "results.jsonl") as log:
        for board, up in (("parity", True), ("adding", False)):
            for layer, bias in (("gru", 0.0), ("lru", 0.25)):
                for seed, lr in ((0, 1e-3), (0, 1e-2), (1, 1e-2)):
                    score = 0.5 + bias + (lr if up else -lr) + seed / 16
                    log.write(
                        {
                            "key": f"{board}{layer}{seed}{lr}", "task": board, "board": board, "layer": layer,
                            "label": layer, "seed": seed, "lr": lr, "overrides": {"train.lr": lr},
                            "tried": {"train.lr": lr}, "budget": {}, "status": "done", "score": score,
                            "validation_score": score, "higher_is_better": up, "parameters": 100, "metric": "m",
                            "reason": None, "record": {"model": {"width": 8 if layer == "gru" else 16}},
                        }
                    )  # fmt: skip
        log.write({"key": "paritygru00.001", "latency": 0.5})
        log.write({"key": "nothing", "latency": 0.5})
    return tmp_path


def test_amendments_are_merged_and_the_best_is_chosen(folder):
    rows = read_results([folder])
    assert len(rows) == 12 and sum("latency" in row for row in rows) == 1
    assert all(row["chosen"] == (row["lr"] == 1e-2) for row in rows)


def test_rows_are_picked_grouped_and_sorted(folder):
    rows = read_results([folder])
    some = where(rows, {"task": ["parity"], "layer": ["gru", "lru"], "chosen": ["true"], "train.lr": ["0.01"]})
    assert len(some) == 4 and all(row["task"] == "parity" for row in some)
    assert where(rows, {"model.width": ["16"]}) == [row for row in rows if row["layer"] == "lru"]
    by = grouped(some, ["layer"])
    assert [(one["layer"], one["runs"], one["failed"]) for one in by] == [("gru", 2, 0), ("lru", 2, 0)]
    assert by[0]["score"] == pytest.approx(0.51 + 1 / 32) and by[0]["sd"] == pytest.approx(2**-4.5)
    assert (by[0]["min"], by[0]["max"], by[0]["parameters"]) == (0.51, 0.51 + 1 / 16, 100)
    up, down = (ordered(where(rows, {"task": [task]}), "score") for task in ("parity", "adding"))
    assert [r["score"] for r in up] == sorted((r["score"] for r in up), reverse=True)
    assert [r["score"] for r in down] == sorted(r["score"] for r in down)
    assert ordered(rows, "latency")[0]["latency"] == 0.5 and "latency" not in ordered(rows, "-latency")[-1]
    best = ordered(grouped(where(rows, {"task": ["adding"]}), ["layer"]), "score")
    assert len(best) == 2 and best[0]["score"] < best[1]["score"]  # an error: the lower the better
    mixed = grouped(rows, ["layer"])
    assert all(one["metric"] is None and one["score"] is None and one["runs"] for one in mixed)
    assert len(ordered(rows, "overrides")) == len(ordered(rows, "-curve")) == len(rows)  # nested: as texts


def test_results_are_asked_from_the_command_line(folder, tmp_path, capsys):
    base = ["results", str(folder), "--where", "task=parity", "chosen=true", "--sort", "score"]
    assert main(base) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[2].split()[:2] == ["parity", "lru"] and "4 rows" in said
    assert main([*base, "--format", "csv", "--columns", "layer,seed,score,model.width"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["layer"], r["seed"], r["model.width"]) for r in found] == [
        ("lru", "1", "16"), ("lru", "0", "16"), ("gru", "1", "8"), ("gru", "0", "8")
    ]  # fmt: skip
    assert float(found[0]["score"]) == 0.5 + 0.25 + 0.01 + 1 / 16
    assert main([*base, "--group", "layer", "--out", str(tmp_path / "x" / "a.json")]) == 0
    assert [one["layer"] for one in json.loads((tmp_path / "x" / "a.json").read_text())] == ["lru", "gru"]


def test_parquet_has_every_column_and_digit(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main(["results", str(folder), "--out", str(tmp_path / "a.parquet")]) == 0
    rows, found = read_results([folder]), parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [one["score"] for one in found] == [row["score"] for row in rows]
    assert [one["chosen"] for one in found] == [row["chosen"] for row in rows]
    assert [json.loads(one["overrides"]) for one in found] == [row["overrides"] for row in rows]
    assert [one["seed"] for one in found] == [row["seed"] for row in rows] and found[0]["latency"] == 0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "which folder"),
        (["nowhere"], "holds no results.jsonl"),
        (["FOLDER", "--where", "taks=parity"], "--where taks: no row has it; near: task"),
        (["FOLDER", "--where", "parity"], "--where 'parity'; expected COLUMN=VALUE"),
        (["FOLDER", "--columns", "model.widht"], "--columns model.widht: no row has it"),
        (["FOLDER", "--sort", "speed"], "--sort speed"),
        (["FOLDER", "--group", "layr"], "near: layer"),
        (["FOLDER", "--format", "parquet"], "name it with --out"),
        (["FOLDER", "--out", "a.txt"], "expected --format csv, json or parquet"),
        (["FOLDER", "--sorted", "x"], "unknown flag '--sorted'; near: --sort"),
    ],
)
def test_mistakes_in_questions_are_one_line(folder, flags, words, capsys):
    assert main(["results", *[flag.replace("FOLDER", str(folder)) for flag in flags]]) in (2, 3)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


# ---- successive halving


def search_plan(trials: int = 9, steps: int = 90) -> Plan:
    base = Experiment(PARITY.task, PARITY.model, Train(steps=steps, evaluate_every=10))
    return Plan((base,), ("gru",), seeds=2, search=Search({"train.lr": Range(1e-4, 1.0)}, trials))


def test_candidates_are_drawn_once_and_for_all():
    pytest.importorskip("optuna")
    space = {"train.lr": Range(1e-4, 1e-1), "model.width": (8, 16), "train.batch": Range(4, 8)}
    many, few = Search(space, 40).draw(), Search(space, 10).draw()
    assert many[:10] == few and len({tuple(one.items()) for one in many}) == 40  # more trials keep the first ones
    assert all(1e-4 <= one["train.lr"] <= 1e-1 and one["model.width"] in (8, 16) for one in many)
    assert {one["train.batch"] for one in many} == {4, 5, 6, 7, 8}
    assert 8 < sum(one["train.lr"] < 10**-2.5 for one in many) < 32  # evenly in their logarithms
    assert Search(space, 10, seed=1).draw() != few
    assert len(Search({"model.width": (8, 16)}, 10).draw()) == 2


def told(plan: Plan, path: Path, order: str, seed: int) -> dict[str, int | None]:
    """What halving decides where the scores of every candidate are known, told in one order or another."""
    from statewise.comparing.search import Halving

    cells, rng = list(plan.tries(plan.settings[0])), random.Random(seed)
    curves = {c.key: [(10 * i, random.Random(f"{n} {i}").random()) for i in range(1, 10)] for n, c in enumerate(cells)}
    halving = Halving({"a": cells}, plan.search, path)
    heard = dict.fromkeys(curves, 0)
    while open_ := [k for k in curves if halving.stopped(k) is None and heard[k] <= 9]:
        key = open_[0] if order == "one by one" else rng.choice(open_)
        if heard[key] == 9:
            halving.end(key, done=True)
        else:
            halving.hear(key, *curves[key][heard[key]])
        heard[key] += 1
    for key in curves:
        if halving.stopped(key) is not None:
            halving.end(key, done=False)
    assert all(halving.settled(key) for key in curves)
    return {key: halving.stopped(key) for key in curves}


def test_who_is_stopped_does_not_depend_on_who_is_faster(tmp_path):
    optuna = pytest.importorskip("optuna")
    plan = search_plan(trials=12)
    found = told(plan, tmp_path / "a", "one by one", 0)
    assert None in found.values() and {10, 30} <= set(found.values())  # at the rungs, a third of each goes on
    assert sum(step is None or step > 10 for step in found.values()) <= 6
    for seed in range(3):
        assert told(plan, tmp_path / f"b{seed}", "at random", seed) == found
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "b0")))
    study = optuna.load_study(study_name="a", storage=storage)
    states = {t.user_attrs["key"]: (t.state.name, t.last_step) for t in study.trials}
    assert states == {k: ("COMPLETE", 90) if step is None else ("PRUNED", step) for k, step in found.items()}
    assert [t.params for t in study.trials] == list(plan.settings[0].candidates)


# ---- running


def table(out: Path) -> dict[str, tuple]:
    """What must not depend on kills, to the last digit."""
    return {
        row["key"]: (
            row["status"], row["score"], row["validation_score"], row.get("steps"), row["chosen"], row.get("tokens"),
            [(point["step"], point["score"]) for point in row["curve"]],
        )
        for row in read_results([out])
    }  # fmt: skip


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def started(out: Path) -> int:
    """Runs that have trained a step or more."""
    logs = out.glob("runs/*/log.jsonl")
    return sum(any(r["event"] == "train" for r in read_log(path)[0]) for path in logs)


SEVERAL = [
    "compare", "parity,mqar", "--layers", "gru,min_gru", "--seeds", "2", "--steps", "40", "--depth", "1",
    "--set", "parity:task.longest=8", "parity:task.test_longest=10", "mqar:task.length=16", "mqar:task.pairs=2",
    "--grid", "mqar:model.width=8", "--width", "12", "--lr", "1e-3,1e-2",
]  # fmt: skip


@pytest.mark.slow
def test_killed_twice_the_table_is_the_same_to_the_last_digit(tmp_path):
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    assert main([*SEVERAL, "--out", str(calm)]) == 0
    expected = table(calm)
    assert len(expected) == 2 * 2 * (2 + 1) and {one[0] for one in expected.values()} == {"done"}
    assert len({one[1] for one in expected.values()}) > 4  # so that there is something to lose
    command, before = [sys.executable, "-m", "statewise", *SEVERAL, "--out", str(hurt)], 0
    for share in (3, 9):  # in the first phase, and after rates were chosen
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len(read_rows(hurt)) >= share)  # noqa: B023
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        with locked(hurt):  # held by the workers too: to get it means that they have ended
            done = len(read_rows(hurt))
        assert before < done < len(expected), "the kill came too late to test anything"
        before = done
    assert main([*SEVERAL, "--out", str(hurt)]) == 0
    assert table(hurt) == expected
    boards = [json.loads((place / "comparison.json").read_text())["boards"] for place in (calm, hurt)]
    lines = [[(b["name"], e["label"], e["lr"]) for b in found for e in b["layers"]] for found in boards]
    assert lines[0] == lines[1] and len(lines[0]) == 4


@pytest.mark.slow
def test_a_search_killed_twice_is_the_same_search(tmp_path):
    pytest.importorskip("optuna")
    args = [
        "compare", "parity", "--layers", "gru", "--seeds", "2", "--steps", "90", "--depth", "1", "--width", "8",
        "--set", "task.longest=8", "task.test_longest=10", "train.evaluate_every=10", "--tune", "optuna", "--trials",
        "7", "--grid", "train.lr=1e-4..1",
    ]  # fmt: skip
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    assert main([*args, "--out", str(calm), "--workers", "1"]) == 0
    expected = table(calm)
    states = [one[0] for one in expected.values()]
    assert len(states) == 8 and states.count("pruned") >= 2 and states.count("done") >= 2
    assert sum(one[4] for one in expected.values()) == 2  # both seeds of the best
    for share in (2, 5):
        command = [sys.executable, "-m", "statewise", *args, "--out", str(hurt), "--workers", "3"]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len(read_rows(hurt)) >= share)  # noqa: B023
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        with locked(hurt):
            assert len(read_rows(hurt)) < 8, "the kill came too late to test anything"
    assert main([*args, "--out", str(hurt), "--workers", "3"]) == 0
    assert table(hurt) == expected


def test_a_budget_of_seconds_is_kept_and_found_again(tmp_path):
    plan = Plan((PARITY,), ("gru",), seeds=1, budget=Budget(seconds=1.0))
    said: list[str] = []
    plans: list[Plan] = []

    def hear(event):
        said.append(event["event"])
        plans.extend([event["plan"]] if event["event"] == "plan" else [])

    found = compare(plan, tmp_path, on_event=hear)
    assert said[0] == "trial" and said[1] == "plan" and said[-1] == "streaming"
    ((pace, _),) = plans[0].paces.values()
    (row,) = read_results([tmp_path])
    assert row["budget"] == {"seconds": 1.0} and row["steps"] == max(1, int(1.0 / pace)) and row["seconds"] > 0
    assert row["tokens"] > 0 and row["steps"] == found["boards"][0]["train"]["steps"]
    said.clear()
    again = compare(plan, tmp_path, on_event=lambda event: said.append(event["event"]))
    assert said == ["trial", "plan", "kept", "streaming"]
    assert again["boards"] == found["boards"] and again["seconds"] == found["seconds"]


def test_a_silent_run_is_killed_and_the_rest_goes_on(tmp_path, monkeypatch):
    """Only what a run that was halted lets pass counts here: to start one takes seconds where the machine is busy."""
    long = Cell(Experiment(PARITY.task, PARITY.model, Train(steps=100_000, evaluate_every=1000)))
    short = Cell(PARITY)
    pids: dict[str, int] = {}
    halted: set[str] = set()
    follow = pool._Pool._follow
    monkeypatch.setattr(
        pool._Pool, "_follow", lambda self, run, passed: follow(self, run, passed * (run.cell.key in halted))
    )

    def on_event(event: dict) -> None:
        if event["event"] == "start":
            pids[event["cell"].key] = event["pid"]
        if event["event"] == "progress" and event["cell"].key == long.key:
            os.kill(pids[long.key], signal.SIGSTOP)
            halted.add(long.key)

    with locked(tmp_path) as lock:
        rows = run_cells([long, short], tmp_path, lock=lock, setup=Setup(), silence=1.0, on_event=on_event)
    assert rows[short.key]["status"] == "done"
    row = rows[long.key]
    assert row["failure"] == "silent" and row["reason"].startswith("gave no sign of life for 1 s at step ")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[long.key], 0)


def test_a_cell_that_cannot_be_trained_is_a_row(tmp_path):
    cells = [Cell(PARITY, fault="in a trial of 20 steps: out of memory: x"), Cell(RECALL)]
    with locked(tmp_path) as lock:
        rows = run_cells(cells, tmp_path, lock=lock, setup=Setup())
    assert [rows[c.key]["status"] for c in cells] == ["failed", "done"]
    assert rows[cells[0].key]["reason"] == cells[0].fault and not run_dir(tmp_path, cells[0]).exists()


@pytest.mark.slow
def test_ray_gives_the_same_rows(tmp_path):
    ray = pytest.importorskip("ray")
    plan = Plan((PARITY, RECALL), ("gru", "min_gru"), seeds=2)
    here = compare(plan, tmp_path / "here")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        events: list[str] = []
        there = compare(
            plan, tmp_path / "there", engine="ray", workers=2, on_event=lambda event: events.append(event["event"])
        )
        assert events.count("start") == events.count("done") == 8
        assert table(tmp_path / "there") == table(tmp_path / "here")
        assert {row["engine"] for row in read_results([tmp_path / "there"])} == {"ray"}
        for a, b in zip(here["boards"], there["boards"], strict=True):
            assert [e["label"] for e in a["layers"]] == [e["label"] for e in b["layers"]]
        # a run that takes too long, one that fails, one whose worker is killed again and again
        slow = Cell(Experiment(PARITY.task, PARITY.model, Train(steps=100_000)))
        bad = Cell(Experiment(Parity(shortest=1, longest=1, test_longest=1), PARITY.model, TRAIN))
        good = Cell(Experiment(PARITY.task, PARITY.model, Train(steps=21)))
        from statewise.comparing.on_ray import OnRay

        setup = Setup(workers=2)
        with locked(tmp_path / "x") as lock:
            rows = run_cells([slow, bad, good], tmp_path / "x", lock=lock, setup=setup, engine=OnRay(setup), timeout=10)
        assert [rows[c.key]["failure"] for c in (slow, bad, good)] == ["timeout", "error", None]
        assert "too few different examples" in rows[bad.key]["reason"]
        assert (run_dir(tmp_path / "x", slow) / "checkpoints").exists()  # it was asked to save
    finally:
        ray.shutdown()
