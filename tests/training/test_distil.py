"""Learning from a teacher: the losses by hand, fixed points, what is copied and kept, stopped and gone on with."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_resume import assert_same_bits, outcome, stop_at
from toys import Trail

from statewise.core import DataError, UsageError
from statewise.models import LanguageModel, Stack
from statewise.tasks import Batch, Parity, Recall
from statewise.training import Experiment, Stopped, Teacher, Train, fit, load, soft_loss
from statewise.training.distil import relative

NEAR = "attention(window=4,heads=2)"
ECHO = "attention(window=4,heads=2,echo=true)"
MADE = "mamba2(heads=2,groups=2,key=2,value=2)"
STILL = Train(steps=4, batch=3, lr=1e-2, weight_decay=0.0, evaluate_every=0, schedule="constant")


def stack(layer: str, depth: int = 3, **fields: Any) -> Stack:
    return Stack(layer, width=4, depth=depth, mlp=1.0, **fields)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load(run)[0].state_dict()


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    fit(Experiment(Trail(), stack(NEAR), replace(STILL, steps=10)), tmp_path / "teacher")
    return str(tmp_path / "teacher")


# ---- the losses


def asked(x: torch.Tensor, weight: torch.Tensor) -> Batch:
    return Batch(x, x, weight)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_loss_by_hand(tau: float) -> None:
    out, taught = torch.randn(2, 2, 5, 7).unbind(0)
    weight = (torch.rand(2, 5) < 0.7).float()
    p, q = (taught / tau).softmax(-1), (out / tau).softmax(-1)
    want = tau**2 * ((p * (p.log() - q.log())).sum(-1) * weight).sum() / weight.sum()
    torch.testing.assert_close(soft_loss(out, taught, asked(out, weight), "classification", tau), want)
    want = ((out - taught).pow(2).mean(-1) * weight).sum() / weight.sum()
    torch.testing.assert_close(soft_loss(out, taught, asked(out, weight), "regression"), want)


def test_soft_loss_is_cross_entropy_where_the_teacher_has_no_doubt() -> None:
    out, y = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    sure = torch.where(F.one_hot(y, 7) > 0, 0.0, -1e4)
    want = F.cross_entropy(out.flatten(0, 1), y.flatten())
    torch.testing.assert_close(soft_loss(out, sure, asked(out, torch.ones(2, 5)), "classification"), want)


def test_a_hot_teacher_is_a_squared_error() -> None:
    """tau^2 KL -> var(z_T - z_S) / 2 as tau grows: so gradients keep their size."""
    out, taught = torch.randn(2, 2, 5, 7).unbind(0)
    want = (taught - out).var(-1, unbiased=False).mean() / 2
    found = soft_loss(out, taught, asked(out, torch.ones(2, 5)), "classification", 300.0)
    torch.testing.assert_close(found, want, rtol=2e-2, atol=0)


def test_nothing_asked_and_nothing_finite_past_the_end() -> None:
    out = torch.randn(2, 5, 7)
    spoilt = out.clone()
    spoilt[:, 3:] = torch.nan
    weight = torch.ones(2, 5)
    weight[:, 3:] = 0
    assert float(soft_loss(spoilt, out, asked(out, weight), "classification")) == 0
    assert float(soft_loss(out, 2 * out, asked(out, 0 * weight), "classification")) == 0
    batch = asked(out, weight)._replace(lengths=torch.tensor([3, 3]))
    assert float(relative(out.where(weight[..., None] > 0, 7), out, out, batch)) == 0
    assert float(relative(0 * out, out, out, batch)) == pytest.approx(1)


# ---- what fit does with a teacher


@pytest.mark.parametrize("how", [{}, {"hidden": 1.0}, {"temperature": 4.0}, {"truth": 1.0, "logits": 0.0}])
def test_who_is_the_teacher_has_nothing_to_learn_of_it(teacher: str, tmp_path: Path, how: dict[str, Any]) -> None:
    """Same shape, all inherited: the loss of answers and depths is zero from the first step on. The data's is not."""
    fit(Experiment(Trail(), stack(NEAR), STILL, teacher=Teacher(teacher, **{"truth": 0, **how})), tmp_path / "student")
    before, after = weights(Path(teacher)), weights(tmp_path / "student")
    same = all(torch.equal(t, before[name]) for name, t in after.items())
    assert same == ("truth" not in how)


def test_a_student_comes_near_its_teacher(teacher: str, tmp_path: Path) -> None:
    """The data is poison to it: only the teacher's answers tell it what to say."""
    model, _ = load(teacher)
    batch = Trail().batch(0, 8, seed=5)
    far = {}
    for steps in (1, 120):
        train = replace(STILL, steps=steps)
        made = Experiment(Trail(), stack("gru", 2), train, teacher=Teacher(teacher, truth=0, inherit="none"))
        fit(made, tmp_path / f"{steps}")
        with torch.no_grad():
            answers = [m(batch.x, reset=batch.reset)[0] for m in (load(tmp_path / f"{steps}")[0], model)]
        far[steps] = float(F.mse_loss(*answers))
    assert far[120] < 0.3 * far[1]


@pytest.mark.parametrize("student", [f"{NEAR},{ECHO},{NEAR}", f"{NEAR},{MADE}*2"])
def test_only_what_is_new_learns(teacher: str, tmp_path: Path, student: str) -> None:
    how = Teacher(teacher, truth=0, layers=1, only_new=True)
    fit(Experiment(Trail(), stack(student), STILL, teacher=how), tmp_path / "student")
    before, after = weights(Path(teacher)), weights(tmp_path / "student")
    changed = {
        name.split(".")[1] for name, t in after.items() if name not in before or not torch.equal(t, before[name])
    }
    assert changed == ({"1"} if ECHO in student else {"1", "2"})
    kept = [name for name in after if name.startswith("blocks.1.") and ".layer." not in name]
    assert kept and all(torch.equal(after[name], before[name]) for name in kept)


def test_layer_by_layer_the_new_blocks_come_near(teacher: str, tmp_path: Path) -> None:
    """On what enters the teacher's block the student's adds what the teacher's does."""
    model, _ = load(teacher)
    x = Trail().batch(0, 16, seed=5).x
    far = {}
    for steps in (1, 150):
        how = Teacher(teacher, truth=0, logits=0, layers=1, only_new=True)
        fit(
            Experiment(Trail(), stack(f"{MADE},{NEAR},{ECHO}"), replace(STILL, steps=steps), teacher=how),
            tmp_path / f"{steps}",
        )
        student, _ = load(tmp_path / f"{steps}")
        with torch.no_grad():
            h = model.embed(x)  # type: ignore[union-attr, operator]
            ours, theirs = (m.blocks[0](h)[0] - h for m in (student, model))  # type: ignore[union-attr, index]
        far[steps] = float((ours - theirs).square().sum() / theirs.square().sum())
    assert far[150] < 0.5 * far[1]


def test_a_silent_teacher_is_a_start(teacher: str, tmp_path: Path) -> None:
    """As if training had gone on from its weights with a fresh optimiser: the first step has the teacher's loss."""
    events: list[dict[str, Any]] = []
    made = Experiment(Trail(), stack(NEAR), replace(STILL, steps=1), teacher=Teacher(teacher, logits=0))
    fit(made, tmp_path / "student", on_event=events.append)
    model, _ = load(teacher)
    batch = Trail().batch(0, 3, seed=0)
    with torch.no_grad():
        want = float(Trail().loss(model(batch.x, reset=batch.reset)[0], batch))
    assert [e["loss"] for e in events if e["event"] == "train"] == [pytest.approx(want)]


@pytest.mark.parametrize("task", [Recall(length=8, pairs=2, symbols=4), Parity(longest=6, test_longest=9)])
def test_classes_rows_of_several_lengths_and_running_means(task: Any, tmp_path: Path) -> None:
    """hidden and layers on a task that does not carry, on a Classifier where the task has one answer."""
    fields = {"pool": "mean"} if isinstance(task, Parity) else {}
    train = replace(STILL, steps=3)
    fit(Experiment(task, stack(NEAR, **fields), train), tmp_path / "teacher")
    how = Teacher(str(tmp_path / "teacher"), hidden=1, layers=1, temperature=2)
    result = fit(Experiment(task, stack(f"{NEAR},{ECHO},{MADE}", **fields), train, teacher=how), tmp_path / "student")
    assert result.steps == 3


@pytest.mark.parametrize("again", [False, True])
def test_stopped_and_gone_on_with(teacher: str, tmp_path: Path, again: bool) -> None:
    """The states of teacher, student and of the blocks run on what enters the teacher's are carried over too."""
    how = Teacher(teacher, truth=0.5, hidden=1, layers=1, temperature=2)
    train = replace(STILL, steps=9, accumulate=2, ema=0.9, recompute_blocks=again)
    made = Experiment(Trail(), stack(f"{NEAR},{ECHO},{MADE}", dropout=0.2), train, teacher=how)
    fit(made, tmp_path / "calm")
    calm = outcome(tmp_path / "calm")
    carried = {"student.0.k", "teacher.2.v", "forced.1", "forced.2.memory"}
    assert {f"carried.{name}" for name in carried} <= calm["optim"].keys()
    for step in (0, 1, 5, 8):
        with pytest.raises(Stopped):
            fit(made, tmp_path / f"{step}", signals=True, on_event=stop_at(step, signal.SIGTERM))
        fit(made, tmp_path / f"{step}")
        assert_same_bits(outcome(tmp_path / f"{step}"), calm)


def test_the_teachers_own_state_is_carried(teacher: str, tmp_path: Path) -> None:
    """Batches of one long stream are those of short ones: a teacher that forgot between them would teach otherwise."""
    losses = []
    for stream in (True, False):
        how, events = Teacher(teacher, truth=0, inherit="none"), []
        made = Experiment(Trail(stream=stream), stack("gru", 2), replace(STILL, steps=2), teacher=how)
        fit(made, tmp_path / f"{stream}", on_event=events.append)
        losses.append([e["loss"] for e in events if e["event"] == "train"])
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


# ---- the record


def test_a_teacher_is_written_down_and_changes_the_key(teacher: str) -> None:
    alone = Experiment(Trail(), stack(NEAR), STILL)
    taught = replace(alone, teacher=Teacher(teacher, temperature=2, only_new=True))
    assert "teacher" not in alone.record() and alone.key != taught.key
    assert Experiment.from_record(json.loads(json.dumps(taught.record()))) == taught
    assert taught.record()["teacher"]["run"] == teacher


@pytest.mark.parametrize(
    "values, words",
    [
        ({"temperature": 0}, "teacher.temperature is 0; expected a finite number above 0"),
        ({"hidden": -1}, "teacher.hidden is -1"),
        ({"inherit": "some"}, "teacher.inherit is 'some'"),
        ({"only_new": 1}, "only_new 1; expected"),
        ({"truth": 0, "logits": 0}, "all 0"),
        ({"run": "", "temperature": 2}, "teacher.run is empty"),
    ],
)
def test_what_is_out_of_range_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Teacher(**{"run": "somewhere", **values})


def test_what_does_not_fit_is_named(teacher: str, tmp_path: Path) -> None:
    made = Experiment(Trail(), stack(NEAR), STILL)
    for model, how, train, words in (
        (stack(NEAR), {"layers": 1}, STILL, "no block of the student is new"),
        (stack("gru", 2), {"hidden": 1, "inherit": "none"}, STILL, "depth and width"),
        (stack("gru", 2), {}, STILL, "depth and width"),
        (stack(NEAR), {"hidden": 1}, replace(STILL, compile=True), "train.compile"),
    ):
        with pytest.raises(UsageError, match=words):
            fit(
                replace(made, model=model, train=train, teacher=Teacher(teacher, **how)), tmp_path / "bad", resume=False
            )
    with pytest.raises(DataError, match="is not a run"):
        fit(replace(made, teacher=Teacher(str(tmp_path / "nowhere"))), tmp_path / "bad", resume=False)


def test_it_is_a_field_of_the_command_line(teacher: str, tmp_path: Path) -> None:
    from statewise.cli.build import experiment

    made = experiment(
        "text", "min_gru", width=4, depth=1, seed=0, settings=[f"teacher.run={teacher}", "teacher.logits=0.5"]
    )
    assert made.teacher == Teacher(teacher, logits=0.5) and isinstance(made.model, LanguageModel)
    with pytest.raises(UsageError, match=r"teacher\.run is empty"):
        experiment("text", "min_gru", width=4, depth=1, seed=0, settings=["teacher.logits=0.5"])
