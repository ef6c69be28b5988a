"""explain RUN --states: a run followed past its training length."""

import pytest

from statewise.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "word"
    sizes = ["--set", "task.length=8", "--set", "task.test_length=16", "--width", "8", "--depth", "1"]
    steps = ["--set", "train.steps=2", "--set", "train.batch=4"]
    assert main(["train", "word_problem", "--layer", "gla", "--run", str(place), *sizes, *steps]) == 0
    return str(place)


def test_states_are_followed(run, capsys):
    assert main(["explain", run, "--states", "--length", "64"]) == 0
    told = capsys.readouterr().out
    assert "8 (trained to here)" in told and "64" in told and "collapse" in told and "rise" in told
    assert "variance" in told and "norm at the end" in " ".join(told.split())


@pytest.mark.parametrize("length, word", [("8", "twice the training length"), ("-5", "expected at least 16")])
def test_lengths_that_say_nothing_are_refused(run, capsys, length, word):
    assert main(["explain", run, "--states", f"--length={length}"]) == 2
    assert word in capsys.readouterr().err


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "none"), "--states"]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
