"""Comparisons that run: failures are marked, kills survived, nothing done twice, scores equal to the last bit."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import statewise.comparing as comparing
from statewise.cli import main
from statewise.cli.compare import default_out
from statewise.comparing import Cell, Plan, Setup, locked, measure_streaming, read_rows, run_cells
from statewise.comparing.collect import method
from statewise.comparing.compare import pace
from statewise.comparing.measure import percentile
from statewise.comparing.plan import TRIAL_STEPS
from statewise.comparing.pool import run_dir
from statewise.core import UsageError, layers, nbytes
from statewise.models import Stack
from statewise.tasks import Adding, Parity, tasks
from statewise.tasks.text_file import TextFile
from statewise.training import Experiment, Train, read_log

pytestmark = pytest.mark.timeout(400)  # starting a worker takes seconds, many where the machine is shared

TINY = ["--width", "8", "--depth", "1", "--set", "task.longest=8", "--set", "task.test_longest=10"]
ARGS = ["compare", "parity", "--layers", "gru,elman", "--seeds", "2", "--steps", "40", *TINY]


def experiment(layer: str = "gru", seed: int = 0, **train: object) -> Experiment:
    task = Parity(longest=8, test_longest=10)
    return Experiment(task, Stack(layer, width=8, depth=1), Train(**{"steps": 20, "evaluate_every": 10, **train}), seed)


def cell(layer: str = "gru", seed: int = 0, **train: object) -> Cell:
    return Cell(experiment(layer, seed, **train))


def scores(out: Path) -> dict[str, str]:
    with (out / "results.csv").open(newline="") as file:
        return {row["key"]: row["score"] for row in csv.DictReader(file) if row["key"]}


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """A comparison that nothing disturbed."""
    out = tmp_path_factory.mktemp("calm")
    assert main([*ARGS, "--out", str(out)]) == 0
    return out


def test_files_are_written(calm):
    for name in ("results.jsonl", "results.csv", "leaderboard.md", "comparison.json", "report.html"):
        assert (calm / name).stat().st_size > 0, name
    rows = read_rows(calm)
    assert len(rows) == 4 and all(row["status"] == "done" for row in rows.values())
    assert len(scores(calm)) == 4
    lines = [json.loads(line) for line in (calm / "results.jsonl").read_text().splitlines()]
    assert [("score" in line, "latency" in line) for line in lines] == [(True, False)] * 4 + [(False, True)] * 2
    assert all(line["score"] == rows[line["key"]]["score"] for line in lines if "score" in line)
    page = (calm / "report.html").read_text()
    assert not re.search(r"https?://", page)
    for row in rows.values():
        assert row["key"] in page and row["parameters"] > 0 and row["peak_memory"] > 2**20
    found = json.loads((calm / "comparison.json").read_text())
    (board,) = found["boards"]
    assert board["task"]["chance"] == 0.5 and len(board["task"]["examples"]) >= 2
    for entry in board["layers"]:
        assert 0 < entry["streaming"]["median"] <= entry["streaming"]["p95"] and entry["streaming"]["state_bytes"] == 32
        assert [p["step"] for p in entry["cells"][0]["curve"]] == [*range(4, 41, 4)]


def test_the_command_of_a_row_is_that_row(calm):
    from statewise.cli.parse import parse
    from statewise.cli.train import Options, described

    for entry in json.loads((calm / "comparison.json").read_text())["boards"][0]["layers"]:
        words = entry["command"].split()
        assert words[:2] == ["statewise", "train"]
        options = parse("train", Options, words[2:])
        assert options is not None and described(options).key == entry["cells"][0]["key"]
        assert (options.device, options.threads) == ("cpu", 1)  # as it was trained: scores equal to the last bit


def test_the_command_of_a_comparison_is_that_comparison(calm):
    found = json.loads((calm / "comparison.json").read_text())
    words = found["command"].split()
    assert words[0] == "statewise" and sorted(words[1:]) == sorted([*ARGS, "--out", str(calm)])


def test_the_leaderboard_has_chance_and_baseline(calm, capsys):
    from statewise.cli.board import print_leaderboards

    print_leaderboards(json.loads((calm / "comparison.json").read_text()))
    said = capsys.readouterr().out
    assert all(name in said for name in ("gru", "elman", "chance", "baseline", "±", "tokens/s", "state"))
    assert max(map(len, said.splitlines())) <= 100


def test_the_same_again_trains_nothing(calm, capsys):
    logs = {path: path.stat().st_mtime_ns for path in calm.glob("runs/*/log.jsonl")}
    before = scores(calm)
    assert len(logs) == 4 and main([*ARGS, "--out", str(calm)]) == 0
    assert "4 of 4 runs were finished before and kept" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in logs} == logs and scores(calm) == before
    assert len((calm / "results.jsonl").read_text().splitlines()) == 4 + 2  # and no streaming timed again


def test_what_the_report_says_of_its_runs(calm):
    found = json.loads((calm / "comparison.json").read_text())
    said = " ".join([*found["method"], *found["boards"][0]["method"]])
    assert "without the first 5 steps" in said and "another setup" not in said and "grows" not in said
    assert "the examples shown here and the inputs" in said and "GELU" not in said  # gru and elman have one linear map
    with (calm / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["key"]]
    assert [bool(row["latency_median_s"]) for row in rows] == [True, False, True, False]
    assert {(row["device"], row["threads"], row["data"]) for row in rows} == {("cpu", "1", "generated")}
    for cell in (c for entry in found["boards"][0]["layers"] for c in entry["cells"]):
        log = read_log(next(calm.glob(f"runs/*{cell['key']}/log.jsonl")))[0]
        assert [p["seconds"] for p in cell["curve"]] == [e["seconds"] for e in log if e["event"] == "evaluate"]
        assert cell["curve"][-1]["seconds"] == cell["seconds"]


def test_runs_of_another_setup_are_named(calm, tmp_path):
    shutil.copytree(calm, tmp_path / "again")
    assert main([*ARGS, "--out", str(tmp_path / "again"), "--workers", "7"]) == 0
    method = json.loads((tmp_path / "again" / "comparison.json").read_text())["method"]
    assert "4 of 4 runs were kept from an earlier call with another setup (cpu, 1 thread, " in method[-1]


def test_linear_layers_are_named():
    plan = Plan((experiment(),), ("gru", "lru", "short_conv"))
    said = " ".join(method(plan, {}, Setup()))
    assert "lru, short_conv: linear in their input, and so followed by GELU" in said


def test_changed_data_are_trained_anew(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc " * 100)
    train = Train(steps=3, batch=2, evaluate_every=0)
    one = Cell(Experiment(TextFile(path=str(path), length=8), Stack("gru", width=4, depth=1), train))

    def again() -> tuple[list[str], dict]:
        events: list[str] = []
        with locked(tmp_path / "out") as lock:
            rows = run_cells(
                [one], tmp_path / "out", lock=lock, setup=Setup(), on_event=lambda event: events.append(event["event"])
            )
        return events, rows[one.key]

    _, first = again()
    assert again() == (["kept"], first)
    path.write_text("xyz " * 100)
    events, second = again()
    assert events[:2] == ["changed", "start"] and events[-1] == "done"
    assert second["data"] != first["data"] and second["score"] != first["score"]
    assert again() == (["kept"], second)


def test_comparing_is_imported_without_file_locks():
    """As on Windows."""
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import statewise.comparing"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_files_are_two_comparisons():
    assert default_out(["parity"], None) == Path("runs/compare-parity")
    assert default_out(["series"], Path("some/where.csv")) == Path("runs/compare-series-where")


def test_the_pace_of_a_trial_leaves_out_its_first_steps():
    records = [{"event": "train", "step": s, "seconds": 7 + 0.5 * s} for s in range(6, 21, 2)]
    assert pace([{"event": "train", "step": 2, "seconds": 6.0}, *records]) == pytest.approx(0.5)


def test_killed_driver_leaves_no_orphan_and_goes_on(calm, tmp_path):
    command = [sys.executable, "-m", "statewise", *ARGS, "--out", str(tmp_path), "--workers", "1"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(read_rows(tmp_path)) >= 1 and len(list(tmp_path.glob("runs/*"))) >= 2)
    driver.kill()
    driver.wait()
    with locked(tmp_path):  # held by the workers too: to get it means that they have ended
        done = read_rows(tmp_path)
        assert 1 <= len(done) < 4, "the kill came too late to test anything"
        kept = {key: path.stat().st_mtime_ns for key in done for path in tmp_path.glob(f"runs/*{key}/result.json")}
    assert main([*ARGS, "--out", str(tmp_path), "--workers", "2"]) == 0
    assert len(kept) == len(done)
    for key, when in kept.items():
        assert [path.stat().st_mtime_ns for path in tmp_path.glob(f"runs/*{key}/result.json")] == [when]
    assert scores(tmp_path) == scores(calm)  # repr of floats: equal to the last bit


def test_failures_are_marked_and_the_rest_goes_on(tmp_path):
    small = Experiment(Parity(shortest=1, longest=1, test_longest=1), Stack("gru", width=8), Train(steps=5))
    cells = [Cell(small), cell("elman", steps=3)]
    events = []
    with locked(tmp_path) as lock:
        rows = run_cells(cells, tmp_path, lock=lock, setup=Setup(workers=2), on_event=events.append)
    bad, good = (rows[c.key] for c in cells)
    assert good["status"] == "done" and bad["status"] == "failed"
    assert "too few different examples" in bad["reason"] and "\n" not in bad["reason"]
    kinds = {c.layer: [e["event"] for e in events if e["cell"] is c] for c in cells}
    assert {layer: (told[0], told[-1]) for layer, told in kinds.items()} == {
        "gru": ("start", "failed"), "elman": ("start", "done")
    }  # fmt: skip


def test_a_run_that_takes_too_long_is_ended(tmp_path):
    slow = cell(steps=1_000_000)
    began = time.monotonic()
    with locked(tmp_path) as lock:
        rows = run_cells([slow], tmp_path, lock=lock, setup=Setup(), timeout=0.5)
    assert rows[slow.key]["reason"].startswith("timed out after 0 s") and time.monotonic() - began < 300


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    held = subprocess.Popen(
        [sys.executable, "-c", "import sys,fcntl,os; f=open(sys.argv[1],'w'); fcntl.flock(f,fcntl.LOCK_EX);"
         "f.write(f'{os.getpid()}\\n'); f.flush(); print('held',flush=True); sys.stdin.read()", str(tmp_path / "lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert held.stdout is not None and held.stdout.readline() == b"held\n"
    try:
        with pytest.raises(UsageError, match=f"process {held.pid} is at work there"), locked(tmp_path):
            pass
    finally:
        held.communicate()
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_damaged_rows_do_not_count(tmp_path, calm):
    text = (calm / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_bytes(
        text[0] + text[1].replace(b"done", b"DONE") + b"\x00\xff{}\n" + text[2][:-20]
    )
    assert list(read_rows(tmp_path)) == [json.loads(text[0])["key"]]


# ---- plans


def test_a_plan_crosses_layers_and_seeds():
    plan = Plan((experiment(),), ("gru", "lru"), seeds=3)
    keys = {c.key for c in plan.first()}
    assert len(keys) == 6 == plan.count() and plan.rest({}) == []
    assert {(c.layer, c.seed, c.lr) for c in plan.first()} == {(n, i, 3e-3) for n in ("gru", "lru") for i in range(3)}
    assert all(c.label == c.layer and c.overrides == {} for c in plan.first())


@pytest.mark.parametrize("higher", [True, False])
def test_rates_are_chosen_on_validation(higher):
    base = experiment() if higher else Experiment(Adding(length=5), Stack("gru", width=8), Train(steps=20))
    plan = Plan((base,), ("gru", "lru"), seeds=3, lrs=(1e-3, 1e-2))
    first = plan.first()
    assert len(first) == 4 and {c.seed for c in first} == {0}
    rows = {
        c.key: {"status": "done", "validation_score": c.lr * (1 if c.layer == "gru" else -1), "score": -c.lr}
        for c in first
    }
    best = {"gru": 1e-2, "lru": 1e-3} if higher else {"gru": 1e-3, "lru": 1e-2}
    assert {s.layer: plan.lrs[plan.chosen(s, rows)] for s in plan.settings} == best
    rest = plan.rest(rows)
    assert {(c.layer, c.lr, c.seed) for c in rest} == {(n, r, s) for n, r in best.items() for s in (1, 2)}
    assert all(c.tried == {"train.lr": c.lr} and c.label == c.layer for c in rest)
    assert len(first) + len(rest) == plan.count()
    rows[first[0].key]["status"] = rows[first[1].key]["status"] = "failed"
    assert [plan.chosen(s, rows) is None for s in plan.settings] == [True, False]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", "gru,gruu"], "unknown layer 'gruu'; near: gru"),
        (["--layers", "gru,gru"], "gru is named twice"),
        (["--layers", ","], "--layers is empty"),
        (["--lr", "1e-3,x"], "expected a number"),
        (["--lr", "-1"], "expected numbers above 0"),
        (["--lr", "nan"], "expected numbers above 0"),
        (["--seeds", "0"], "--seeds 0"),
        (["--seeds", "99999999"], "at most 100000"),
        (["--workers", "0"], "--workers 0"),
        (["--steps", "5", "--minutes", "1"], "give one of them"),
        (["--steps", "5", "--set", "train.steps=6"], "twice"),
        (["--set", "train.lrr=1"], "train.lrr; near: lr"),
        (["--data", "x.csv"], "reads no file of yours"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--budget", "tokens=x"], "--budget tokens=x; expected a number"),
        (["--budget", "token=1"], "near: tokens"),
        (["--budget", "tokens=1k", "--steps", "5"], "--steps and --budget tokens say the same thing twice"),
        (["--budget", "parameters=1k", "--width", "5"], "--width and --budget parameters"),
        (["--budget", "parameters=7"], "gru on parity comes no nearer than"),
        (["--grid", "model.widht=1,2"], "--grid: unknown field model.widht; near: width"),
        (["--grid", "model.width=1,x"], "--grid model.width=x: expected a finite number"),
        (["--grid", "model.width=8,8"], "--grid model.width: 8 is named twice"),
        (["--grid", "mqar:task.pairs=8"], "no task 'mqar' in this comparison"),
        (["--grid", "train.lr=1e-3,1e-2", "--lr", "1e-3"], "--lr and --grid train.lr"),
        (["--grid", "train.lr=1e-3..1e-2"], "a range is for --tune optuna"),
        (["--grid", "seed=1,2"], "seeds are --seeds"),
        (["--set", "mqar:task.pairs=8"], "no task 'mqar' in this comparison"),
        (["--trials", "3"], "--trials is for --tune optuna"),
        (["--tune", "hyperopt"], "('none', 'optuna')"),
        (["--engine", "dask"], "('local', 'ray')"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_made(flags, words, tmp_path, capsys):
    assert main(["compare", "parity", "--out", str(tmp_path / "new"), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error[2]: ") and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


# ---- measuring


def test_streaming_is_timed_step_by_step():
    model = Stack("gru", width=8, depth=2).build(x_width=3, y_width=2)
    found = measure_streaming(model, torch.randn(1, 7, 3), steps=50)
    assert found["steps"] == 50 and 1e-6 < found["median"] <= found["p95"] and found["median"] < 1  # seconds
    assert found["state_bytes"] == nbytes(model.initial_state(1)) == 2 * 8 * 4


def test_a_slow_step_does_not_hold_up_the_rest():
    class Slow(type(Stack("gru", width=4, depth=1).build(x_width=3, y_width=2))):
        def step(self, x, state):
            time.sleep(0.05)
            return super().step(x, state)

    model = Stack("gru", width=4, depth=1).build(x_width=3, y_width=2)
    model.__class__ = Slow
    began = time.monotonic()
    found = measure_streaming(model, torch.randn(1, 4, 3), steps=1000, seconds=0.5)
    assert time.monotonic() - began < 40 and found["steps"] >= 1 and found["median"] > 0.05


def test_percentiles_are_those_of_torch():
    values = torch.rand(37).tolist()
    for q in (0, 5, 50, 95, 100):
        assert percentile(values, q) == pytest.approx(float(torch.quantile(torch.tensor(values), q / 100)), abs=1e-6)


def test_every_task_with_settings_exists():
    for name, usual in comparing.SETTINGS.items():
        assert name in tasks
        made: object = Experiment(tasks[name].cls(), Stack())
        for path, value in usual.items():
            from statewise.core import put

            made = put(made, path, value)


def test_generated_tasks_are_described():
    for info in tasks:
        if info.cls.data == "generated":
            said = comparing.describe_task(info.cls())
            json.dumps(said)
            assert said["chance"] == info.cls().chance() and said["doc"] and 1 <= len(said["examples"]) <= 4


# ---- longer


@pytest.mark.slow
def test_killed_workers_go_on(calm, tmp_path):
    """kill -9 of a worker: it goes on from its checkpoint, and its score is that of a calm run."""
    long = cell(steps=400, evaluate_every=20)
    pids, killed = [], []

    def on_event(event):
        if event["event"] == "start":
            pids.append(event["pid"])
        if event["event"] == "progress" and event["record"]["step"] >= 60 and not killed:
            os.kill(pids[-1], signal.SIGKILL)
            killed.append(event["record"]["step"])
        seen.append(event["event"])

    seen: list[str] = []
    with locked(tmp_path / "a") as lock:
        hurt = run_cells([long], tmp_path / "a", lock=lock, setup=Setup(), on_event=on_event)[long.key]
    with locked(tmp_path / "b") as lock:
        whole = run_cells([long], tmp_path / "b", lock=lock, setup=Setup())[long.key]
    assert killed and "retry" in seen and hurt["status"] == "done"
    assert hurt["metrics"] == whole["metrics"] and hurt["score"] == whole["score"]
    begins = [r for r in read_log(run_dir(tmp_path / "a", long) / "log.jsonl")[0] if r["event"] == "start"]
    assert len(begins) == 2 and begins[1]["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_and_the_same_command_goes_on(calm, tmp_path, number, status):
    command = [sys.executable, "-m", "statewise", *ARGS, "--out", str(tmp_path), "--workers", "2"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/log.jsonl"))) >= 2)
    driver.send_signal(number)
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == status and "run the same command again" in said and said.count("\n") == 1
    with locked(tmp_path, patience=0):
        pass
    assert main([*ARGS, "--out", str(tmp_path)]) == 0
    assert scores(tmp_path) == scores(calm)


@pytest.mark.slow
def test_out_of_memory_is_said(tmp_path):
    task = Parity(longest=60, test_longest=60)
    greedy = Cell(Experiment(task, Stack("gru", width=256), Train(steps=2, batch=1 << 17)))
    with locked(tmp_path) as lock:
        row = run_cells([greedy], tmp_path, lock=lock, setup=Setup(memory=6 << 30))[greedy.key]
    assert row["status"] == "failed" and "out of memory" in row["reason"] and row["failure"] == "out of memory"


@pytest.mark.slow
def test_minutes_choose_the_steps(tmp_path, capsys):
    asked = ["compare", "parity", "--layers", "gru", "--seeds", "1", "--minutes", "0.3", "--out", str(tmp_path), *TINY]
    assert main(asked) == 0
    (row,) = read_rows(tmp_path).values()
    assert row["status"] == "done" and row["steps"] >= 10
    (trial,) = read_rows(tmp_path / "trial").values()
    assert trial["steps"] == TRIAL_STEPS
    assert main(asked) == 0  # the trial is kept, so that the steps are the same and nothing is trained again
    assert read_rows(tmp_path) == {row["key"]: row}


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_all_layers_can_be_compared():
    assert len(layers) >= 10  # `--layers all` is not empty
