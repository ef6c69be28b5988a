"""explain RUN --states: a run followed past its training length."""

import re
from xml.etree import ElementTree

import pytest
import torch

from statewise.cli import main
from statewise.cli.states import draw
from statewise.interpret import Followed


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


@pytest.mark.parametrize("kind", ["svg", "html"])
def test_the_picture_has_every_state_and_where_training_ended(run, tmp_path, capsys, kind):
    place = tmp_path / "new" / f"states.{kind}"
    assert main(["explain", run, "--states", "--length", "64", "--out", str(place)]) == 0
    assert str(place) in capsys.readouterr().out
    text = place.read_text()
    page = ElementTree.fromstring(text.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', ""))
    drawn = [chart.get("aria-label", "") for chart in page.iter("{http://www.w3.org/2000/svg}svg")]
    for kind in ("norm", "mean", "variance"):
        assert sum(f": {kind} against steps" in label for label in drawn) == 1
    assert sum(label.startswith("loss.") for label in drawn) == 1
    assert text.count("trained to here") == 4
    assert 'data-layer="state"' in text
    assert not re.search(r"(src|href)=|url\(|@import", text)


def test_nothing_is_drawn_of_what_is_not_finite(tmp_path):
    steps = torch.tensor([4, 8, 12, 16])
    loss = torch.tensor([[1.0, 1.2], [1.0, 1.1], [float("nan"), 3.0], [4.0, 5.0]])
    norm = torch.tensor([[1.0, 1.0], [2.0, float("inf")], [3.0, float("nan")], [4.0, float("nan")]])
    lost = torch.full_like(norm, float("nan"))
    followed = Followed(steps, loss, {"0.m": norm}, {"0.m": norm}, {"0.m": lost})
    draw(followed, 8, tmp_path / "a.svg", "made up")
    text = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(text)
    assert 'data-layer="head 0"' in text and ">collapse: " in text
    lines = re.findall(r'class="line" points="([^"]*)"', text)
    assert [len(line.split()) for line in lines] == [3, 4, 1, 4, 1]
    assert not re.search("nan|inf", " ".join(lines))


def test_pictures_of_other_kinds_and_of_nothing_are_refused(run, tmp_path, capsys):
    assert main(["explain", run, "--states", "--out", str(tmp_path / "a.png")]) == 2
    assert "ends in .svg or .html" in capsys.readouterr().err
    assert main(["explain", "gla", "--out", str(tmp_path / "a.svg")]) == 2
    assert "--states" in capsys.readouterr().err
