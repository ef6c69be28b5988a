"""train: from words to a run; resumed, replayed, stopped, started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from statewise.cli.build import experiment
from statewise.comparing import SETTINGS
from statewise.models import LanguageModel, Stack, descriptions
from statewise.tasks import tasks
from statewise.training import read_log, read_result

WORDS = ["train", "adding", "--layer", "min_gru", "--width", "4", "--depth", "1", "--device", "cpu"]
SHORT = [*WORDS, "--set", "task.length=6", "--set", "train.steps=4"]


def test_the_words_become_the_experiment(runs, call, tmp_path):
    words = ["--set", "train.lr=1e-4", "model.mlp=0", "--set", "model.args.hidden=3", "--seed", "5"]
    said = call(*SHORT, *words, "--run", tmp_path / "run")
    assert said.code == 0, said
    record = json.loads((tmp_path / "run" / "experiment.json").read_text())
    assert record["task"]["name"] == "adding" and record["task"]["length"] == 6
    assert record["train"]["lr"] == 1e-4 and record["train"]["steps"] == 4 and record["seed"] == 5
    assert record["model"]["layer"] == "min_gru" and record["model"]["width"] == 4
    assert record["model"]["args"] == {"hidden": 3} and record["model"]["mlp"] == 0
    for part in ("chance", "baseline", "0.3333", "0.1667", "min_gru", "parameters", "statewise stream"):
        assert part in said.out
    assert "\x1b" not in said.out and "\r" not in said.out  # plain lines where there is no terminal


def test_the_default_place_names_the_configuration(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*SHORT).code == 0
    assert call(*SHORT, "--seed", "1").code == 0
    assert len(list(Path("runs").glob("adding-min_gru-*"))) == 2


def test_a_finished_run_is_not_trained_again(call, tmp_path):
    assert call(*SHORT, "--run", tmp_path / "run").code == 0
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    said = call(*SHORT, "--run", tmp_path / "run")
    assert said.code == 0 and "finished" in said.out and (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_fresh_moves_the_earlier_run_aside(call, tmp_path):
    place = tmp_path / "run"
    assert call(*SHORT, "--run", place).code == 0
    before = (place / "result.json").read_bytes()
    assert call(*SHORT, "--set", "train.lr=0.1", "--run", place, "--fresh").code == 0
    assert (tmp_path / "run.old1" / "result.json").read_bytes() == before
    assert json.loads((place / "experiment.json").read_text())["train"]["lr"] == 0.1


def test_replay_gives_the_same_numbers(runs, call, tmp_path):
    words = ["--replay", runs["adding"] / "experiment.json", "--run", tmp_path / "again", "--device", "cpu"]
    assert call("train", *words).code == 0
    assert read_result(tmp_path / "again").metrics == read_result(runs["adding"]).metrics


def test_out_of_numbers_is_exit_5(call, tmp_path):
    words = [
        "--set",
        "train.lr=1000",
        "--set",
        "train.clip=0",
        "--set",
        "train.optimizer=sgd",
        "--set",
        "train.steps=90",
    ]
    said = call(*WORDS, "--set", "task.length=6", *words, "--run", tmp_path / "run")
    assert said.code == 5 and said.err.startswith("error[5]: ") and said.err.count("\n") == 1, said


@pytest.mark.parametrize(("fault", "code"), [(BrokenPipeError(32, "Broken pipe"), 141), (OSError(28, "full"), 4)])
def test_a_run_that_nobody_hears_any_more_is_saved(call, tmp_path, monkeypatch, fault, code):
    def tell(self, event):
        raise fault

    monkeypatch.setattr("statewise.cli.train.Lines.__call__", tell)
    said = call(*WORDS, "--set", "task.length=6", "--set", "train.steps=50", "--run", tmp_path / "run")
    assert said.code == code
    kept = [int(p.name.removeprefix("step-")) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(kept) == 1 and kept[0] < 50


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_words_go_on(call, tmp_path, sent, code):
    words = [*WORDS, "--layer", "elman", "--set", "train.steps=100000", "--run", str(tmp_path / "run")]
    reached = 0
    for again in (False, True):
        with subprocess.Popen(
            [sys.executable, "-m", "statewise", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=alone()
        ) as process:
            wait_for(partial(beyond, tmp_path / "run", reached))
            process.send_signal(sent)
            out, err = process.communicate(timeout=250)
        assert process.returncode == code, (out, err)
        assert err.count(b"\n") == 1 and f"error[{code}]: stopped by".encode() in err
        assert (f"goes on from step {reached}".encode() in out) == again
        reached = steps(tmp_path / "run")
        assert (tmp_path / "run" / "checkpoints" / f"step-{reached}" / "MANIFEST.json").is_file()


def beyond(run: Path, step: int) -> bool:
    return (run / "log.jsonl").exists() and steps(run) > step


def steps(run: Path) -> int:
    return max((event["step"] for event in read_log(run / "log.jsonl")[0]), default=0)


def wait_for(true, seconds: float = 250) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alone() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_task_names_the_model_that_suits_it(tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("some words\n" * 10)
    made = experiment("text_file", "gru", width=8, depth=1, seed=0, data=text, settings=["model.tied=false"])
    assert made.model == LanguageModel("gru", width=8, depth=1, tied=False)
    assert experiment("adding", "gru", width=8, depth=1, seed=0, settings=["model.pool=mean"]).model.pool == "mean"
    assert type(experiment("spoken_digits", "gru", width=8, depth=1, seed=0).model) is Stack
    assert all(info.cls.model in descriptions for info in tasks)


def test_the_path_of_the_data_is_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("some words\n" * 10)
    made = experiment("text_file", "gru", width=8, depth=1, seed=0, data=Path("some.txt"))
    assert made.task.path == str(tmp_path / "some.txt")


def test_every_shipped_task_of_few_steps_has_settings_of_its_own():
    """They set the training alone: a task's own fields are the user's to choose."""
    own = {"series", "text_file", "mnist_pixels", "fashion_mnist_pixels", "pathfinder", "gene_families"}
    assert set(SETTINGS) == {info.name for info in tasks} - own
    assert all(path.startswith("train.") for found in SETTINGS.values() for path in found)
    made = experiment("forecast", "gru", width=8, depth=1, seed=0, settings=["train.lr=0.5"])
    assert (made.train.steps, made.train.lr) == (SETTINGS["forecast"]["train.steps"], 0.5)
