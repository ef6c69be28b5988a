"""fit: it learns, and each of its parts does what its definition says."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import Leaky, Trail, in_child, toy

from statewise.core import NumericError, ResourceError, UsageError
from statewise.models import Stack
from statewise.tasks.base import tasks
from statewise.training import Experiment, Train, choose_device, fit, load, read_log, read_result
from statewise.training.checkpoint import newest
from statewise.training.fit import WARM_UP, Training
from statewise.training.optimise import Average, Optimizer, decays, learning_rate


def trained(experiment: Experiment, tmp_path: Path) -> dict[str, torch.Tensor]:
    fit(experiment, tmp_path)
    found, _ = newest(tmp_path)
    assert found is not None
    return {k.removeprefix("parameter."): t for k, t in found.optim.items() if k.startswith("parameter.")}


# ---- it learns


def test_it_learns_what_can_be_learned() -> None:
    before = fit(toy(steps=1, lr=1e-9))
    after = fit(toy(steps=300, lr=0.02, batch=16))
    assert after.score < 0.5 * before.score
    assert after.steps == 300 and after.stopped == "done" and after.tokens_per_second > 0 and after.peak_memory > 1e7
    assert after.score == after.metrics["test"]["loss"] and after.parameters == 21


def test_a_real_stack_on_a_real_task(tmp_path: Path) -> None:
    task = tasks["adding"].cls(length=10)
    result = fit(
        Experiment(task, Stack("gru", width=16, depth=1), Train(steps=200, lr=1e-2, evaluate_every=100)), tmp_path
    )
    assert result.score < 0.5 * task.baseline()
    assert read_result(tmp_path) == result
    model, _ = load(tmp_path)
    assert model.width == task.x_width


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    first, again, other = (fit(toy(dropout=0.5, seed=seed)) for seed in (1, 1, 2))
    assert first.metrics == again.metrics and first.score != other.score


def test_the_callers_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    fit(toy(dropout=0.5))
    assert torch.equal(before, torch.get_rng_state())


# ---- gradients


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_one_step_is_the_step_of_torch(tmp_path: Path, optimizer: str) -> None:
    experiment = toy(steps=1, optimizer=optimizer, lr=0.01, weight_decay=0.1, clip=0.05, schedule="constant")
    got = trained(experiment, tmp_path)
    torch.manual_seed(experiment.seed)
    model = experiment.model.build(x_width=2, y_width=1)
    batch = experiment.task.batch(0, 3, seed=1)
    experiment.task.loss(model(batch.x, None, reset=batch.reset)[0], batch).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
    matrices, vectors = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    OF_TORCH[optimizer](groups, lr=0.01, weight_decay=0.1).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.detach(), rtol=1e-6, atol=1e-7)


def test_accumulating_equals_one_large_batch(tmp_path: Path) -> None:
    """With equal weights the mean over two batches of 3 is the mean over their 6 rows."""

    class Joined(Trail):
        def batch(self, index: int, size: int, *, seed: int, split: Any = "train") -> Any:
            if split != "train":
                return super().batch(index, size, seed=seed, split=split)
            parts = [Trail.batch(self, 2 * index + i, size // 2, seed=seed) for i in range(2)]
            return type(parts[0])(*(None if a[0] is None else torch.cat(a) for a in zip(*parts, strict=True)))

    apart = toy(steps=7, accumulate=2, stream=False, clip=0, optimizer="sgd")
    joined = Experiment(Joined(stream=False), apart.model, Train(steps=7, batch=6, clip=0, optimizer="sgd"), apart.seed)
    a, b = trained(apart, tmp_path / "a"), trained(joined, tmp_path / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_streams_are_carried_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch after batch the state goes on from where it was; its past does not; without `carries` it starts anew."""
    seen: list[tuple[Any, Any]] = []
    run = Training._run

    def spy(self: Training, batch: Any, state: Any) -> Any:
        out, after = run(self, batch, state)
        seen.append((state, after))
        return out, after

    monkeypatch.setattr(Training, "_run", spy)
    fit(toy(steps=5, evaluate_every=0))
    training = seen[:5]
    assert training[0][0] is None
    for (_, before), (after, _) in itertools.pairwise(training):
        assert torch.equal(before, after) and after.grad_fn is None and before.grad_fn is not None
    evaluation = seen[5:8]
    assert evaluation[0][0] is None and evaluation[1][0] is not None
    seen.clear()
    fit(toy(steps=5, stream=False))
    assert all(state is None for state, _ in seen)


def test_lengths_reach_the_model(tmp_path: Path) -> None:
    """What stands past the end of a row changes nothing, and counts as no token."""

    class Ragged(Trail):
        fill = 0.0

        def batch(self, index: int, size: int, *, seed: int, split: Any = "train") -> Any:
            batch, lengths = super().batch(index, size, seed=seed, split=split), torch.arange(1, size + 1)
            ended = torch.arange(self.length) >= lengths[:, None]
            x = batch.x.masked_fill(ended[..., None], self.fill)
            return batch._replace(x=x, weight=(~ended).float(), lengths=lengths)

    class Noisy(Ragged):
        fill = 1e3

    found = []
    for kind in (Ragged, Noisy):
        events: list[dict[str, Any]] = []
        experiment = Experiment(kind(), Leaky(), Train(steps=5, batch=3), 1)
        result = fit(experiment, on_event=events.append)
        found.append([e["loss"] for e in events if e["event"] == "train"])
        assert result.tokens_per_second * result.seconds == pytest.approx(5 * (1 + 2 + 3))
    assert found[0] == found[1]


def test_the_pace_leaves_out_the_first_steps_of_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What loads or compiles in the first steps is in `seconds` and not in tokens/s, also after going on."""
    backward, calls = Training._backward, itertools.count()
    now = 0.0

    def slow_at_first(self: Training, index: int) -> Any:
        nonlocal now
        now += 100.0 if next(calls) < WARM_UP else 2.0
        return backward(self, index)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == 20:
            raise RuntimeError("stop")

    monkeypatch.setattr(Training, "_backward", slow_at_first)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    experiment, events = toy(steps=40, checkpoint_every=19, evaluate_every=0), []
    with pytest.raises(RuntimeError, match="stop"):
        fit(experiment, tmp_path, on_event=stop)
    calls = itertools.count()
    result = fit(experiment, tmp_path, on_event=events.append)
    assert result.seconds == 2 * WARM_UP * 100 + (40 - 2 * WARM_UP) * 2  # both starts
    assert result.tokens_per_second == 15 / 2
    found, _ = newest(tmp_path)
    assert found and found.state["paced_tokens"] == 15 * (40 - 2 * WARM_UP) < found.state["tokens"] == 15 * 40
    # a report tells of the steps since the last one: the slow ones are over at the end
    assert [e for e in events if e["event"] == "train"][-1]["tokens_per_second"] == 15 / 2
    times = [e["seconds"] for e in read_log(tmp_path / "log.jsonl")[0] if e["event"] in ("train", "evaluate")]
    assert times[-1] == result.seconds


# ---- optimiser, schedule, averages


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(4, 3))
    model[2].weight._no_weight_decay = True  # type: ignore[union-attr]
    assert [name for name, p in model.named_parameters() if decays(p)] == ["0.weight"]
    groups = Optimizer(model, Train(weight_decay=0.3)).groups
    assert [(decay, len(group)) for decay, group in groups] == [(0.3, 1), (0.0, 4)]


OF_TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda groups, lr, weight_decay: torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay),
}


@pytest.mark.parametrize("kind", OF_TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_many_steps_are_those_of_torch(kind: Any, dtype: torch.dtype) -> None:
    ours, theirs = (nn.ParameterDict({"w": nn.Parameter(torch.ones(3, 2, dtype=dtype))}) for _ in range(2))
    optimizer = Optimizer(ours, Train(optimizer=kind, weight_decay=0.1))
    reference = OF_TORCH[kind](theirs.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(50):
        target = torch.full((3, 2), math.sin(step), dtype=dtype)
        for model in (ours, theirs):
            model.zero_grad()
            (model["w"] - target).abs().pow(2).sum().backward()
        optimizer.step(0.01)
        reference.step()
    torch.testing.assert_close(ours["w"], theirs["w"], rtol=1e-5, atol=1e-6)


def test_training_does_not_import_the_compiler() -> None:
    code = (
        "import sys; from statewise.models import Stack; from statewise.tasks.base import tasks;"
        "import statewise.training as t;"
        "t.fit(t.Experiment(tasks['adding'].cls(length=4), Stack('gru', width=4), t.Train(steps=2)));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule: Any) -> None:
    train = Train(steps=100, warmup=10, lr=2.0, schedule=schedule)
    rates = [learning_rate(train, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(2.0 if schedule == "constant" else 1.0)
    assert rates[100] == pytest.approx(2.0 if schedule == "constant" else 0.0)
    assert all(learning_rate(Train(steps=3, warmup=10, lr=2.0), step) < 1 for step in range(3))


def test_the_average_is_the_recursion() -> None:
    model = nn.Linear(1, 1, bias=False)
    average, expected = Average(model, 0.9), model.weight.item()
    for count in range(200):
        with torch.no_grad():
            model.weight.fill_(math.sin(count))
        average.update(model, count)
        keep = min(0.9, (1 + count) / (10 + count))
        expected = keep * expected + (1 - keep) * math.sin(count)
    assert average.tensors["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_are_the_ones_evaluated_and_saved(tmp_path: Path) -> None:
    """And beside them the weights that are trained."""
    experiment = toy(steps=3, lr=1.0, ema=0.9, evaluate_every=0)
    raw = trained(experiment, tmp_path)
    found, _ = newest(tmp_path)
    assert found is not None
    for name, t in found.model.items():
        assert torch.equal(t, found.optim[f"average.{name}"]) and not torch.equal(t, raw[name])
    assert torch.equal(load(tmp_path)[0].state_dict()["decay"], found.model["decay"])


# ---- evaluation


def test_the_best_weights_are_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    """A rate that ruins the weights: the score is that of the best evaluation, not of the last."""
    events: list[dict[str, Any]] = []
    experiment = toy(steps=200, lr=1.0, schedule="constant", clip=0, evaluate_every=5, patience=3)
    result = fit(experiment, tmp_path, on_event=events.append)
    scores = {e["step"]: e["score"] for e in events if e["event"] == "evaluate"}
    best = min(scores, key=lambda step: scores[step])
    assert result.stopped == "early" and result.steps == best + 15 == max(scores)
    assert result.metrics["validation"]["loss"] == scores[best]
    assert fit(experiment, tmp_path) == result


def test_evaluation_does_not_touch_the_training() -> None:
    """The weights after 20 steps do not depend on how often they were looked at."""
    often, once = fit(toy(dropout=0.3, evaluate_every=1)), fit(toy(dropout=0.3, evaluate_every=20))
    events: list[dict[str, Any]] = []
    fit(toy(dropout=0.3, evaluate_every=1), on_event=events.append)
    last = [e["score"] for e in events if e["event"] == "evaluate"][-1]
    assert last == once.metrics["validation"]["loss"]
    assert often.metrics["validation"]["loss"] <= last


# ---- numbers, devices, memory


@pytest.mark.parametrize("poison", [0, 13])
def test_the_first_number_that_is_not_finite_ends_training(tmp_path: Path, poison: int) -> None:
    """N8, exit 5."""
    with pytest.raises(NumericError, match=rf"step {poison}: the loss is nan.*largest in \w+") as stopped:
        fit(toy(poison=poison, checkpoint_every=5), tmp_path)
    assert stopped.value.code == 5 and "\n" not in str(stopped.value)
    assert ("step-10 is kept" if poison else "no checkpoint yet") in str(stopped.value)
    last = read_log(tmp_path / "log.jsonl")[0][-1]
    assert last["event"] == "failed" and last["code"] == 5 and last["step"] == poison
    if poison:
        assert all(p.isfinite().all() for p in load(tmp_path)[0].parameters())


def test_a_gradient_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Leaky.build

    def poisoned(self: Leaky, **widths: Any) -> Any:
        model = build(self, **widths)
        model.decay.register_hook(lambda g: g * math.inf)
        return model

    monkeypatch.setattr(Leaky, "build", poisoned)
    with pytest.raises(NumericError, match=r"step 0: the loss is [\d.]+, .*largest in decay \((inf|nan)\)"):
        fit(toy())


def test_bfloat16_trains_like_float32() -> None:
    half, full = fit(toy(steps=200, lr=0.02, precision="bfloat16")), fit(toy(steps=200, lr=0.02))
    assert half.score == pytest.approx(full.score, rel=0.1) and half.score != full.score


def test_devices() -> None:
    """Row 56."""
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cpu:1", "cuda:x", "", None):
        with pytest.raises(UsageError, match="takes auto, cpu, cuda"):
            choose_device(name)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"{torch.cuda.device_count()} CUDA devices found; use --device cpu or auto"):
        fit(toy(), device="cuda:99")


def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 46."""

    def grow(self: Trail, index: int, size: int, **_: Any) -> Any:
        return torch.empty(1 << 60)

    monkeypatch.setattr(Trail, "batch", grow)
    with pytest.raises(ResourceError, match=r"step 0: out of memory: .*train\.batch \(3\)") as refused:
        fit(toy())
    assert refused.value.code == 4


# ---- what it says


def test_events_and_log_agree(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    fit(toy(evaluate_every=5, checkpoint_every=2), tmp_path, on_event=events.append)
    logged, _ = read_log(tmp_path / "log.jsonl")
    assert [(e["event"], e["step"]) for e in logged] == [(e["event"], e["step"]) for e in events]
    kinds = [e["event"] for e in events]
    assert kinds[0] == "start" and kinds[-1] == "done"
    assert kinds.count("train") == 20 and kinds.count("evaluate") == 4 and kinds.count("checkpoint") == 12
    train = [e for e in events if e["event"] == "train"]
    assert {"loss", "lr", "gradient", "tokens_per_second", "eta", "steps", "time"} <= train[0].keys()
    assert train[-1]["eta"] == 0 and all(e["eta"] >= 0 and e["tokens_per_second"] > 0 for e in train)


def test_tensorboard_where_it_is_installed(tmp_path: Path, board: Callable[[], None]) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board()
    fit(toy(evaluate_every=5), tmp_path)
    found = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "validation/score", "validation/loss"} <= set(found.Tags()["scalars"])
    assert len(found.Scalars("train/loss")) == 20


def test_no_tensorboard_no_folder(tmp_path: Path, board: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    board()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fit(toy(), tmp_path)
    assert not (tmp_path / "tensorboard").exists()


# ---- leaks and overhead


def cycles(run: Path, count: int) -> tuple[float, int]:
    """Growth of memory per cycle of training, stopping and going on, in bytes, and files of the second half still open.

    What other tests left may be closed meanwhile: only what was opened counts.
    """
    sizes, files = [], []
    for i in range(count):
        with pytest.raises(RuntimeError):
            fit(toy(checkpoint_every=2, steps=6), run / str(i % 3), resume=False, on_event=_crash)
        fit(toy(checkpoint_every=2, steps=6), run / str(i % 3))
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        files.append(open_files())
    half = count // 2
    slope = statistics.linear_regression(range(half), sizes[-half:]).slope
    return slope, (files[-1] - files[half]).total()


def open_files() -> Counter[str]:
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder itself, which was open while it was listed
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


def _crash(event: dict[str, Any]) -> None:
    if event["event"] == "train" and event["step"] == 5:
        raise RuntimeError("crash")


def test_no_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    assert cycles(tmp_path, 20)[1] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_cycles_leak_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F12, in a process of its own: less than 1 KiB a cycle."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def work() -> int:
        slope, files = cycles(tmp_path, 1000)
        print(f"{slope:.0f} bytes a cycle, {files} files")
        return int(slope >= 1024 or files != 0)

    assert in_child(work) == 0


@pytest.mark.slow
def test_the_loop_adds_little() -> None:
    """Against the same steps written out by hand."""
    task, model = tasks["adding"].cls(length=50), Stack("gru", width=32, depth=1)
    experiment = Experiment(task, model, Train(steps=150, evaluate_every=0))
    ratios = []
    for _ in range(3):
        ours = fit(experiment).seconds
        net = model.build(x_width=task.x_width, y_width=task.y_width)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        began = time.perf_counter()
        for index in range(150):
            batch = task.batch(index, 32, seed=0)
            optimizer.zero_grad()
            task.loss(net(batch.x)[0], batch).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        ratios.append(ours / (time.perf_counter() - began))
    assert min(ratios) < 1.1, ratios
