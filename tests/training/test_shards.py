"""Training with the weights in parts is training by one: the same losses, checkpoints that any number of ranks take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import HARD, assert_same_losses, events, here
from torch import nn
from toys import litter, toy

from several import free_port, in_ranks
from statewise.core import UsageError, read_tensors
from statewise.models import LanguageModel, Stack
from statewise.tasks import Adding, Reber
from statewise.training import Experiment, RankLost, Ranks, Stopped, Teacher, Train, fit, load
from statewise.training.shards import Shards, whole_blocks

# rows and channels that do not divide evenly; blocks that are computed again; a block at two depths, with the root then
DEEP = Experiment(
    Adding(length=12),
    Stack("lru,gru", width=5, depth=3, dropout=0.0),
    Train(steps=12, batch=6, evaluate_every=4, clip=0.1, optimizer="adam", ema=0.9, recompute_blocks=True),
)
SHARED = replace(
    DEEP, model=Stack("min_gru@one", width=5, depth=2), train=replace(DEEP.train, optimizer="sgd", ema=0.0)
)
ECHOED = replace(
    SHARED, model=Stack("attention(window=5,heads=1),attention(window=5,heads=1,echo=true)", width=5, depth=4)
)


def sharded() -> Ranks:
    return replace(here(), shard=True)


def until_step_20(run: Path, ranks: Ranks) -> None:
    """The signal reaches one rank alone, when an evaluation is due."""

    def on_event(event: dict[str, Any]) -> None:
        if ranks.rank == ranks.size - 1 and event["event"] == "train" and event["step"] >= 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        fit(toy(**HARD), run, ranks=ranks, signals=True, on_event=on_event)


def train_in_parts(place: Path) -> None:
    ranks = sharded()
    fit(toy(**HARD), place / "toy", ranks=ranks)
    for name, experiment in (("deep", DEEP), ("shared", SHARED), ("echoed", ECHOED)):
        fit(experiment, place / name, ranks=ranks)
    until_step_20(place / "stopped", ranks)
    parts_are_parts(ranks)


def parts_are_parts(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = LanguageModel("mamba2", width=6, depth=2).build(x_vocab=11, y_width=11)
    whole = {name: t.clone() for name, t in model.state_dict().items()}
    kept = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    shards = Shards(model, ranks)
    parts = dict(shards.named_parameters())
    here = torch.tensor(sum(part.numel() for part in parts.values()))
    assert sum(map(int, ranks.all_of(here))) == sum(t.numel() for name, t in whole.items() if name in parts)
    assert int(here) < 0.6 * sum(t.numel() for t in whole.values())
    assert {name for name, part in parts.items() if getattr(part, "_no_weight_decay", False)} == kept
    again, own = shards.whole(shards.state_dict()), shards.own(whole)
    assert again.keys() == (whole.keys() if ranks.writes else set())
    assert all(torch.equal(again[name], whole[name]) for name in again)
    assert all(torch.equal(own[name], t) for name, t in shards.state_dict().items())


def go_on_in_parts(run: Path) -> None:
    fit(toy(**HARD), run, ranks=sharded())


def lose_a_rank(run: Path) -> None:
    ranks = sharded()

    def on_event(event: dict[str, Any]) -> None:
        if ranks.rank == 1 and event["event"] == "train" and event["step"] >= 13:
            os._exit(0)

    with pytest.raises(RankLost, match="rank 0: another rank has ended"):
        fit(toy(**HARD), run, ranks=ranks, on_event=on_event)


def assert_same_files(a: Path, b: Path) -> None:
    """The newest checkpoints hold the same tensors, up to rounding and the generators of other ranks."""
    newest = [max((run / "checkpoints").iterdir(), key=lambda p: int(p.name[5:])) for run in (a, b)]
    assert newest[0].name == newest[1].name
    for part in ("model.safetensors", "optim.safetensors"):
        left, right = (read_tensors(path / part)[0] for path in newest)
        for name in left.keys() | right.keys():
            if not name.startswith("rng."):
                torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_losses_and_checkpoints_are_those_of_one_process(tmp_path):
    in_ranks(2, train_in_parts, tmp_path / "two")
    for name, experiment in (("toy", toy(**HARD)), ("deep", DEEP), ("shared", SHARED), ("echoed", ECHOED)):
        result = fit(experiment, tmp_path / name)
        assert_same_losses(tmp_path / name, tmp_path / "two" / name, 8 if name == "toy" else 1)
        assert_same_files(tmp_path / name, tmp_path / "two" / name)
        assert fit(experiment, tmp_path / "two" / name).score == pytest.approx(result.score, rel=1e-5)
        assert load(tmp_path / "two" / name)[0] is not None
    fit(toy(**HARD), tmp_path / "two" / "stopped")  # by one process
    assert max(events(tmp_path / "two" / "stopped", "start")) >= 20
    assert_same_losses(tmp_path / "toy", tmp_path / "two" / "stopped")
    assert not litter(tmp_path / "two")


SEES = "attention(window=5,heads=1)"
PUPILS: dict[str, dict[str, Any]] = {
    "logits": dict(temperature=2.0, truth=0.5),
    "inside": dict(hidden=1.0, layers=1.0, inherit="same"),
    "new": dict(only_new=True),
}


def pupil(name: str, place: Path) -> Experiment:
    """A student, of which two blocks are not the teacher's."""
    model = Stack(f"{SEES},attention(window=5,heads=1,echo=true),min_gru", width=5, depth=3)
    return replace(SHARED, model=model, teacher=Teacher(str(place / "teacher"), **PUPILS[name]))


def learn(place: Path) -> None:
    """With shards, and with whole weights: of the rows of a rank the losses of inner depths are means of their own."""
    for name in PUPILS:
        fit(pupil(name, place), place / f"parts-{name}", ranks=sharded())
        fit(pupil(name, place), place / f"whole-{name}", ranks=here())


def test_a_teacher_teaches_what_is_in_parts(tmp_path):
    fit(replace(DEEP, model=Stack(SEES, width=5, depth=3)), tmp_path / "teacher")
    in_ranks(2, learn, tmp_path)
    for name in PUPILS:
        assert_same_losses(tmp_path / f"parts-{name}", tmp_path / f"whole-{name}", 1)
        assert_same_files(tmp_path / f"parts-{name}", tmp_path / f"whole-{name}")
    fit(pupil("logits", tmp_path), tmp_path / "one")
    assert_same_losses(tmp_path / "one", tmp_path / "parts-logits", 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_one_process_began_goes_on_in_parts(tmp_path, ranks):
    until_step_20(tmp_path / "run", Ranks())
    in_ranks(ranks, go_on_in_parts, tmp_path / "run")
    assert max(events(tmp_path / "run", "start")) >= 20
    fit(toy(**HARD), tmp_path / "one")
    assert_same_losses(tmp_path / "one", tmp_path / "run")
    assert_same_files(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_in_one_line(tmp_path):
    in_ranks(2, lose_a_rank, tmp_path / "run")
    assert "another rank has ended" in next(iter(events(tmp_path / "run", "failed").values()))["message"]


def language(run: Path, *, one: bool = False) -> None:
    """A hybrid with attention and a tied embedding, as a checkpoint in bfloat16 arithmetic is trained."""
    model = LanguageModel("mamba2,gated_delta_net,window_attention(window=8,heads=2)", width=8, depth=3)
    train = Train(steps=10, batch=4, evaluate_every=5, precision="bfloat16")
    fit(Experiment(Reber(), model, train), run, ranks=Ranks() if one else sharded())


@pytest.mark.slow
def test_a_hybrid_language_model_in_bfloat16(tmp_path):
    in_ranks(2, language, tmp_path / "two")
    language(tmp_path / "one", one=True)
    for kind, entry in (("train", "loss"), ("evaluate", "score")):
        left, right = events(tmp_path / "one", kind), events(tmp_path / "two", kind)
        assert len(left.keys() & right.keys()) >= 2
        for step in left.keys() & right.keys():
            assert left[step][entry] == pytest.approx(right[step][entry], rel=0.02, abs=0.02)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command of the documentation, and the same by one process."""
    sets = ["train.steps=30", "train.batch=6", "train.evaluate_every=10", "train.warmup=5", "task.length=12"]
    args = ["train", "adding", "--layer", "lru", "--width", "8", "--depth", "1", "--device", "cpu"]
    args += [word for s in sets for word in ("--set", s)]
    two, one = tmp_path / "two", tmp_path / "one"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = [sys.executable, *launch, "-m", "--", "statewise", *args, "--shard", "--run", str(two)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kept in") == 1
    words = [sys.executable, "-m", "statewise", *args, "--run", str(one)]
    again = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_losses(one, two)
    alone = subprocess.run([*words, "--shard"], capture_output=True, text=True, timeout=250)
    assert alone.returncode == 2 and alone.stderr.count("\n") == 1 and "torchrun --nproc-per-node 2" in alone.stderr


def test_what_cannot_be_sharded_is_one_line():
    with pytest.raises(UsageError, match="the only one; start several with torchrun"):
        fit(toy(), ranks=Ranks(shard=True))
    with pytest.raises(UsageError, match="compile together with --shard"):
        fit(toy(batch=2, compile=True), ranks=Ranks(0, 2, shard=True))
    whole_blocks(Stack("gru", width=4, depth=2).build(x_width=1, y_width=1))
    with pytest.raises(UsageError, match="several depths is not built with --shard"):
        whole_blocks(Stack("gru@one", width=4, depth=2).build(x_width=1, y_width=1))
    for made, words in ((torch.zeros(()), "has no rows"), (torch.zeros(2, dtype=torch.complex64), "is complex")):
        with pytest.raises(UsageError, match=f"parameter decay {words}.*leave out --shard"):
            Shards(nn.ParameterDict({"decay": nn.Parameter(made)}), Ranks(0, 2, shard=True))
