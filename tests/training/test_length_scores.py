"""Scores by length: the same numbers as the test split where it has that length, bounded batches, honest failures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from statewise.core import UsageError, read_json, write_json
from statewise.models import Stack
from statewise.tasks import Copy, Digits, Generated, Parity, Pathfinder, tasks
from statewise.training import Experiment, Train, add_lengths, at_lengths, evaluate, fit, load, score_lengths


class Window(nn.Module):
    """Parity of the last `size` bits: perfect up to that length, a coin beyond."""

    def __init__(self, size: int, fails: int = 10**9, nan: int = 10**9):
        super().__init__()
        self.size, self.fails, self.nan, self.shapes = size, fails, nan, []

    def forward(self, x, state=None, *, reset=None, lengths=None):
        self.shapes.append(tuple(x.shape))
        if x.shape[1] > self.fails:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        ones = x.cumsum(1)
        ones[:, self.size :] = ones[:, self.size :] - ones[:, : -self.size].clone()
        out = nn.functional.one_hot(ones % 2, 2).float()
        return out.masked_fill(torch.tensor(x.shape[1] > self.nan), math.nan), ()


def test_the_curve_falls_where_the_memory_ends():
    scores = score_lengths(Window(40), Parity(), [160, 20, 40])
    assert [s.length for s in scores] == [20, 40, 160]
    assert [s.score for s in scores[:2]] == [1.0, 1.0]
    assert abs(scores[2].score - 0.5) < 4 * 0.5 / math.sqrt(scores[2].examples)
    assert all(s.examples == 1024 and s.chance == s.baseline == 0.5 and s.failed is None for s in scores)


def test_the_score_at_the_test_length_is_that_of_fit(tmp_path):
    task = Copy(length=12)
    made = Experiment(task, Stack("gru", width=8, depth=1), Train(steps=3, batch=4), seed=1)
    result = fit(made, tmp_path / "run")
    model, _ = load(tmp_path / "run")
    found = score_lengths(model, task, [12, 24])
    assert found[0].metrics == pytest.approx(result.metrics["test"], rel=1e-6) and found[0].score == result.score
    assert found[1].score != found[0].score and found[1].steps == found[0].steps + 12


@pytest.mark.parametrize(("length", "rows", "examples"), [(64, 128, 1024), (3000, 10, 387), (20_000, 1, 66)])
def test_batches_stay_small_however_long_the_rows(monkeypatch, length, rows, examples):
    if length == 20_000:
        monkeypatch.setattr(evaluate, "RUN", 20_000)
    model = Window(4)
    found = score_lengths(model, Parity(), [length])[0]
    assert max(shape[0] for shape in model.shapes) == rows
    assert sum(shape[0] for shape in model.shapes) == found.examples == examples and found.steps == length


def test_one_length_that_fails_leaves_the_others():
    found = score_lengths(Window(400, fails=100, nan=60), Parity(), [40, 80, 120])
    assert found[0].score == 1.0 and found[0].failed is None
    assert found[1].score is None and "not finite" in found[1].failed
    assert found[2].score is None and found[2].failed.startswith("out of memory")
    assert all(math.isfinite(v) for s in found for v in s.metrics.values())


def test_the_model_is_left_as_it_was():
    model = Window(40)
    for mode in (True, False):
        model.train(mode)
        score_lengths(model, Parity(), [8])
        assert model.training is mode


@pytest.mark.parametrize(
    ("task", "lengths", "words"),
    [
        (Digits(), [10], "reads its data"), (Parity(), [40, 40], "named twice"), (Parity(), [0], "above 0"),
        (Pathfinder(), [1000], "square"), (Parity(), [True], "whole numbers"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_had_are_refused_early(task, lengths, words):
    with pytest.raises(UsageError, match=words):
        at_lengths(task, lengths)


def test_what_was_found_is_not_computed_again(tmp_path, monkeypatch):
    run = tmp_path / "run"
    fit(Experiment(Parity(longest=8), Stack("gru", width=4, depth=1), Train(steps=1, batch=2)), run)
    write_json(run / evaluate.MEASURED, {"latency": 1.0})
    asked = []
    real = evaluate.score_lengths
    monkeypatch.setattr(evaluate, "score_lengths", lambda *a, **k: asked.append(a[2]) or real(*a, **k))
    first = add_lengths(run, [10, 20])
    assert add_lengths(run, [20, 10]) == first and asked == [[10], [20]]
    assert [s.length for s in add_lengths(run, [30, 10])] == [10, 30] and asked[2:] == [[30]]
    kept = read_json(run / evaluate.MEASURED)
    assert kept["latency"] == 1.0 and [e["length"] for e in kept["scores_by_length"]] == [10, 20, 30]
    fit(Experiment(Parity(longest=8), Stack("gru", width=4, depth=1), Train(steps=1, batch=2)), run, resume=False)
    assert not (run / evaluate.MEASURED).exists()  # they were of the weights that are gone


GENERATED = sorted(info.name for info in tasks if issubclass(info.cls, Generated))


def test_generated_tasks_were_found():
    assert len(GENERATED) >= 40


@pytest.mark.parametrize("name", GENERATED)
def test_every_generated_task_has_a_curve(monkeypatch, name):
    """A model that says nothing: finite scores at two lengths, rows that grow, no better than chance and baseline."""
    for constant, value in (("DRAWN", 1 << 13), ("TOKENS", 1 << 13), ("FEWEST", 16)):
        monkeypatch.setattr(evaluate, constant, value)
    task = tasks[name].cls()
    first = task.train_length
    assert first

    class Silent(nn.Module):
        def forward(self, x, state=None, *, reset=None, lengths=None):
            return torch.zeros(*x.shape[:2], task.y_width), ()

    short, long = score_lengths(Silent(), task, [first, 4 * first if name == "pathfinder" else 2 * first])
    assert short.failed is None and long.failed is None
    assert long.steps > 1.5 * short.steps and short.examples >= 16
    for found in (short, long):
        if task.higher_is_better:
            assert found.score <= max(found.chance, found.baseline) + 0.25
        else:
            assert found.score >= min(found.chance, found.baseline) * 0.75


def test_train_prints_the_curve(tmp_path, capsys):
    from statewise.cli import main

    words = [
        "train",
        "parity",
        "--layer",
        "lru",
        "--width",
        "4",
        "--depth",
        "1",
        "--set",
        "train.steps=2",
        "--device",
        "cpu",
    ]
    words += ["--set", "task.longest=10", "--run", str(tmp_path / "run")]
    assert main([*words, "--lengths", "20,40"]) == 0
    out = capsys.readouterr().out
    assert "trained up to 10" in out and "1024" in out
    assert main([*words, "--lengths", "80"]) == 0 and "finished run" in capsys.readouterr().out
    assert len(read_json(tmp_path / "run" / evaluate.MEASURED)["scores_by_length"]) == 3
    assert main([*words, "--lengths", "2x"]) == 2 and "--lengths '2x'" in capsys.readouterr().err
