"""A run that is stopped, killed or crashed and goes on is the run that was never stopped, to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Trail, in_child, litter, toy

from statewise.core import DataError, UsageError, read_tensors
from statewise.training import Experiment, OtherData, Stopped, fit, load, read_log
from statewise.training.checkpoint import newest
from statewise.training.optimise import Optimizer

# accumulation, dropout, averaged weights, carried state, warm-up and clipping at once; evaluations in the middle
HARD = dict(steps=60, accumulate=2, ema=0.9, warmup=10, clip=0.5, evaluate_every=19, dropout=0.3)


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on how often it was stopped."""
    found, skipped = newest(run)
    assert found and not skipped
    clocks = ("seconds", "paced_tokens", "paced_seconds")
    result = json.loads((run / "result.json").read_text())
    return {
        "model": found.model,
        "optim": found.optim,
        "state": {k: v for k, v in found.state.items() if k not in clocks},
        "result": {k: result[k] for k in ("metrics", "score", "steps", "stopped", "key")},
    }


def losses(run: Path) -> dict[int, tuple[float, float, float]]:
    return {
        e["step"]: (e["loss"], e["gradient"], e["lr"]) for e in read_log(run / "log.jsonl")[0] if e["event"] == "train"
    }


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["state"] == b["state"]
    assert a["result"] == b["result"]
    for part in ("model", "optim"):
        assert a[part].keys() == b[part].keys()
        for name, t in a[part].items():
            assert t.dtype == b[part][name].dtype and torch.equal(t, b[part][name]), name


def stop_at(step: int, number: int = signal.SIGTERM) -> Any:
    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == ("train" if step else "start") and event["step"] == step:
            os.kill(os.getpid(), number)

    return on_event


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk: these tests stop processes, not machines."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def test_stopped_at_every_step(tmp_path: Path, unsynced: None) -> None:
    steps = 22
    experiment = toy(**{**HARD, "steps": steps, "evaluate_every": 8})
    fit(experiment, tmp_path / "calm")
    calm, curve = outcome(tmp_path / "calm"), losses(tmp_path / "calm")
    assert len(curve) == steps and {"carried.state", "rng.cpu", "average.decay"} <= calm["optim"].keys()
    for step in range(steps + 1):
        run = tmp_path / f"stop-{step}"
        with pytest.raises(Stopped) as stopped:
            fit(experiment, run, signals=True, on_event=stop_at(step))
        assert stopped.value.code == 143 and f"step {step}" in str(stopped.value)
        fit(experiment, run)
        assert_same_bits(outcome(run), calm)
        assert losses(run) == curve


@pytest.mark.parametrize(
    "train", [dict(optimizer="sgd"), dict(optimizer="adam", precision="bfloat16"), dict(patience=2)]
)
def test_other_settings_resume_too(tmp_path: Path, train: dict[str, Any]) -> None:
    experiment = toy(dropout=0.2, evaluate_every=4, stream=False, **train)
    fit(experiment, tmp_path / "calm")
    with pytest.raises(Stopped):
        fit(experiment, tmp_path / "cut", signals=True, on_event=stop_at(7))
    fit(experiment, tmp_path / "cut")
    assert_same_bits(outcome(tmp_path / "cut"), outcome(tmp_path / "calm"))


def test_a_crash_costs_the_steps_since_the_last_checkpoint_and_no_bit(tmp_path: Path, unsynced: None) -> None:
    experiment = toy(**HARD, checkpoint_every=7)
    fit(experiment, tmp_path / "calm")
    for step in (3, 7, 20, 58):

        def crash(event: dict[str, Any], step: int = step) -> None:
            if event["event"] == "train" and event["step"] == step:
                raise RuntimeError("crash")

        with pytest.raises(RuntimeError, match="crash"):
            fit(experiment, tmp_path / f"{step}", on_event=crash)
        fit(experiment, tmp_path / f"{step}")
        starts = [e["step"] for e in read_log(tmp_path / f"{step}" / "log.jsonl")[0] if e["event"] == "start"][1:]
        assert starts == [max((s for s in (*range(0, 60, 7), 19, 38, 57) if s <= step - 1), default=0)]
        assert_same_bits(outcome(tmp_path / f"{step}"), outcome(tmp_path / "calm"))


def test_a_resume_that_forgets_the_generator_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = toy(**HARD)
    fit(experiment, tmp_path / "calm")
    with pytest.raises(Stopped):
        fit(experiment, tmp_path / "cut", signals=True, on_event=stop_at(30))
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    fit(experiment, tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same_bits(outcome(tmp_path / "cut"), outcome(tmp_path / "calm"))


@pytest.mark.parametrize("moments", [16, pytest.param(50, marks=pytest.mark.slow)])
def test_signals_at_random_moments(tmp_path: Path, unsynced: None, moments: int) -> None:
    """Wherever the signal lands, in a step, an evaluation or a save, the run ends well and goes on."""
    experiment = toy(**{**HARD, "steps": 300, "evaluate_every": 9})
    fit(experiment, tmp_path / "calm")
    rng, codes = random.Random(1), set()
    for _ in range(moments):
        number, wait = rng.choice([signal.SIGINT, signal.SIGTERM]), rng.random() * 0.03
        codes.add(in_child(lambda: interrupted(experiment, tmp_path / "cut", number, wait)))  # noqa: B023
    assert codes == {130, 143} or codes == {0, 130, 143}
    fit(experiment, tmp_path / "cut")
    assert_same_bits(outcome(tmp_path / "cut"), outcome(tmp_path / "calm"))


def interrupted(experiment: Experiment, run: Path, number: int, wait: float) -> int:
    """Exit code of a run that gets a signal some time after its start."""
    begun = threading.Event()

    def kill() -> None:
        begun.wait()
        threading.Event().wait(wait)
        os.kill(os.getpid(), number)

    signal.signal(number, signal.SIG_IGN)  # after the run the signal may still come
    threading.Thread(target=kill, daemon=True).start()
    try:
        fit(experiment, run, signals=True, on_event=lambda event: begun.set())
    except Stopped as error:
        return error.code
    return 0


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    experiment = toy(steps=50, checkpoint_every=5)

    def twice(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == 15:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    def work() -> int:
        fit(experiment, tmp_path, signals=True, on_event=twice)
        return 0

    assert in_child(work) == 143
    found, skipped = newest(tmp_path)
    assert found and found.state["step"] == 10 and not skipped
    assert fit(experiment, tmp_path).steps == 50


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    fit(toy(), signals=True)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_one_writer(tmp_path: Path) -> None:
    def second(event: dict[str, Any]) -> None:
        if event["step"] == 3:
            with pytest.raises(UsageError, match=f"process {os.getpid()}") as refused:
                fit(toy(), tmp_path)
            assert refused.value.code == 2

    fit(toy(), tmp_path, on_event=second)
    assert [e["event"] for e in read_log(tmp_path / "log.jsonl")[0]].count("start") == 1


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = fit(toy(), tmp_path)
    events: list[dict[str, Any]] = []
    assert fit(toy(), tmp_path, on_event=events.append) == first
    assert events == []
    assert fit(toy(), tmp_path, resume=False, on_event=events.append).score == first.score
    assert events[0]["step"] == 0


def test_changed_data_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 58: the file that a task reads may change between two runs, though the configuration does not."""
    with pytest.raises(Stopped):
        fit(toy(), tmp_path, signals=True, on_event=stop_at(8))
    batch = Trail.batch
    monkeypatch.setattr(Trail, "batch", lambda self, *a, **k: batch(self, *a, **k)._replace(y=torch.zeros(3, 5, 1)))
    with pytest.raises(UsageError, match="the data of task 'trail' are not those that this run began with"):
        fit(toy(), tmp_path)
    assert fit(toy(), tmp_path, force=True).steps == 20


def test_data_that_changed_after_the_end_are_noticed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever split: here only the test split is another."""
    first = fit(toy(), tmp_path)
    batches = Trail.batches

    def other(self: Trail, split: Any) -> Any:
        return (b._replace(y=b.y + (split == "test")) for b in batches(self, split))

    monkeypatch.setattr(Trail, "batches", other)
    with pytest.raises(OtherData, match=r"are not those that this run began with \(hash \w{16} -> \w{16}\)"):
        fit(toy(), tmp_path)
    assert fit(toy(), tmp_path, resume=False).score > first.score
    monkeypatch.setattr(Trail, "batches", batches)
    with pytest.raises(OtherData):
        fit(toy(), tmp_path)


def test_other_threads_are_said(tmp_path: Path) -> None:
    """The bits depend on them: the run goes on, with a warning in its log."""
    with pytest.raises(Stopped):
        fit(toy(), tmp_path, signals=True, on_event=stop_at(8))
    before, events = torch.get_num_threads(), []
    torch.set_num_threads(before + 1)
    try:
        fit(toy(), tmp_path, on_event=events.append)
    finally:
        torch.set_num_threads(before)
    said = [e["message"] for e in events if e["event"] == "warning"]
    assert len(said) == 1 and f"with {before + 1} threads, began with {before}" in said[0]
    with pytest.raises(Stopped):
        fit(toy(), tmp_path / "same", signals=True, on_event=stop_at(8))
    fit(toy(), tmp_path / "same")
    assert all(e["event"] != "warning" for e in read_log(tmp_path / "same" / "log.jsonl")[0])


def test_a_checkpoint_holds_nothing_that_is_never_read(tmp_path: Path) -> None:
    fit(toy(), tmp_path)
    found, _ = newest(tmp_path)
    assert found and not {"batches", "lr", "key"} & found.state.keys() and {"threads", "data"} <= found.state.keys()


def test_what_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").write_text("work of a year")
    (tmp_path / ".tmp-notes").write_text("mine too")
    with pytest.raises(UsageError, match="something that is not a run"):
        fit(toy(), tmp_path, resume=False)
    fit(toy(), tmp_path)
    fit(toy(), tmp_path)
    assert (tmp_path / "checkpoints" / "mine").exists() and (tmp_path / ".tmp-notes").exists()


def test_litter_of_a_kill_is_removed_at_the_next_start(tmp_path: Path) -> None:
    fit(toy(), tmp_path)
    (tmp_path / "result.json").unlink()
    for name in ("checkpoints/step-5.tmp-77", "checkpoints/step-1.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".tmp-77-0123abcd").write_text("half")
    assert len(litter(tmp_path)) == 3
    fit(toy(), tmp_path)
    assert not litter(tmp_path)


def test_a_changed_configuration_is_shown(tmp_path: Path) -> None:
    fit(toy(), tmp_path)
    with pytest.raises(UsageError, match=r"train\.steps: 20 -> 30; train\.lr: 0\.003 -> 0\.01") as refused:
        fit(toy(lr=0.01, steps=30), tmp_path)
    assert refused.value.code == 2
    assert fit(toy(lr=0.01, steps=30), tmp_path, force=True).steps == 30


def test_the_loaded_model_is_the_one_that_was_tested(tmp_path: Path) -> None:
    experiment = toy(steps=40, evaluate_every=5, lr=0.1, ema=0.5)
    result = fit(experiment, tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, again = load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert again == experiment and Experiment.from_record(experiment.record()) == experiment
    assert not model.training
    total, state = 0.0, None
    with torch.no_grad():
        for batch in experiment.task.batches("test"):
            out, state = model(batch.x, state, reset=batch.reset)
            total += float(experiment.task.loss(out, batch))
    assert total / 3 == pytest.approx(result.score, rel=1e-6)


def test_no_litter_and_few_checkpoints(tmp_path: Path) -> None:
    fit(toy(checkpoint_every=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-18", "step-20"]
    assert not litter(tmp_path)
    assert (tmp_path.stat().st_mode & 0o777) in (0o700, 0o755)
    part = tmp_path / "checkpoints" / "step-20" / "model.safetensors"
    mask = os.umask(0)
    os.umask(mask)
    assert part.stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_state_of_another_model_is_named(tmp_path: Path) -> None:
    fit(toy(steps=5), tmp_path)
    experiment = toy(steps=9)
    other = Experiment(experiment.task, type(experiment.model)(hidden=7), experiment.train, 1)
    with pytest.raises(DataError, match=r"another model: .*inp\.weight is .*\[4, 2\], the model has .*\[7, 2\]"):
        fit(other, tmp_path, force=True)


def test_optimiser_state_of_another_model_is_named(tmp_path: Path) -> None:
    model, train = toy().model.build(x_width=2, y_width=1), toy().train
    optimizer = Optimizer(model, train)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step(0.1)
    good = optimizer.tensors()
    assert len(good) == 3 * 5
    optimizer.restore(good, "here")
    assert optimizer.tensors().keys() == good.keys()
    for name, shape in (("nobody.exp_avg", (3,)), ("decay.exp_avg", (3,)), ("decay.exp_avg", ())):
        with pytest.raises(DataError, match=r"optimiser state .*load\(run\) takes the weights alone"):
            optimizer.restore({name: torch.zeros(shape)}, "here")


def test_weights_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    fit(toy(), tmp_path)
    path = tmp_path / "checkpoints" / "step-20" / "model.safetensors"
    ours, theirs = read_tensors(path)[0], load_file(path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
