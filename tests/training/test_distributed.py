"""Training by several processes is training by one: the same losses, one log, one checkpoint, one end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from toys import Leaky, Trail, litter, toy

from several import free_port, in_ranks
from statewise import models
from statewise.core import UsageError
from statewise.tasks.base import Batch, TaskInfo, tasks
from statewise.training import Experiment, RankLost, Ranks, Stopped, Train, fit, read_log
from statewise.training.log import TensorBoard

# rows that do not divide evenly, a carried state, resets, accumulation, averaged weights and a norm that clips
HARD = dict(steps=40, batch=5, accumulate=2, ema=0.9, clip=0.05, evaluate_every=10, checkpoint_every=5)


def here() -> Ranks:
    """What torchrun's processes get from `joined`; and the toys' names, as conftest.py gives them to tests."""
    tasks._entries["trail"] = TaskInfo("trail", Trail)
    models.descriptions["leaky"] = Leaky
    TensorBoard.write = lambda self, record: None  # type: ignore[method-assign]
    return Ranks(dist.get_rank(), dist.get_world_size())


def train(run: Path) -> None:
    fit(toy(**HARD), run, ranks=here())


def train_until_asked(run: Path) -> None:
    """The last rank alone gets the signal; all save and stop at the same step."""
    ranks = here()

    def on_event(event: dict[str, Any]) -> None:
        if ranks.rank == ranks.size - 1 and event["event"] == "train" and event["step"] >= 13:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as stopped:
        fit(toy(**HARD), run, ranks=ranks, signals=True, on_event=on_event)
    assert stopped.value.code == 143


def lose_a_rank(run: Path) -> None:
    ranks = here()

    def on_event(event: dict[str, Any]) -> None:
        if ranks.rank == 1 and event["event"] == "train" and event["step"] >= 13:
            os._exit(0)

    with pytest.raises(RankLost, match="rank 0: another rank has ended"):
        fit(toy(**HARD), run, ranks=ranks, on_event=on_event)


def events(run: Path, kind: str) -> dict[int, dict[str, Any]]:
    return {e["step"]: e for e in read_log(run / "log.jsonl")[0] if e["event"] == kind}


def assert_same_losses(a: Path, b: Path, rows: int = 8) -> None:
    for kind, entries in (("train", ("loss", "gradient")), ("evaluate", ("score",))):
        left, right = events(a, kind), events(b, kind)
        both = left.keys() & right.keys()
        assert len(both) >= (rows if kind == "train" else 3), (left.keys(), right.keys())
        for step in both:
            for name in entries:
                assert left[step][name] == pytest.approx(right[step][name], rel=1e-6 if name != "gradient" else 1e-5)


def test_losses_are_those_of_one_process(tmp_path):
    in_ranks(2, train, tmp_path / "two")
    result = fit(toy(**HARD), tmp_path / "one")
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["score"] == pytest.approx(result.score, rel=1e-6) and two["tokens"] == result.tokens
    assert not litter(tmp_path / "two")


def pays() -> Experiment:
    """Rows whose lengths differ, so that a rank's share of the costs is not its share of what is asked."""
    model = models.Stack("min_gru@one", width=8, depth=3, ponder=0.3, experts=3, active=1, balance=0.2)
    return Experiment(tasks["reverse"].cls(length=6), model, Train(steps=12, batch=5, evaluate_every=4))


def pay(run: Path) -> None:
    fit(pays(), run, ranks=here())


def test_costs_are_those_of_one_process(tmp_path):
    in_ranks(2, pay, tmp_path / "two")
    fit(pays(), tmp_path / "one")
    assert_same_losses(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_stopped_on_one_rank_and_continued_by_another_number(tmp_path, before, after):
    in_ranks(before, train_until_asked, tmp_path / "several")
    stopped = events(tmp_path / "several", "stopped")
    assert len(stopped) == 1
    in_ranks(after, train, tmp_path / "several")
    assert max(events(tmp_path / "several", "start")) == min(stopped) > 0
    fit(toy(**HARD), tmp_path / "one")
    assert_same_losses(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_in_one_line_and_all_go_on(tmp_path):
    in_ranks(2, lose_a_rank, tmp_path / "run")
    assert "another rank has ended" in next(iter(events(tmp_path / "run", "failed").values()))["message"]
    in_ranks(2, train, tmp_path / "run")
    assert max(events(tmp_path / "run", "start")) >= 10
    fit(toy(**HARD), tmp_path / "one")
    assert_same_losses(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command of the documentation, and the same by one process."""
    sets = ["steps=30", "batch=6", "evaluate_every=10", "warmup=5"]
    args = ["-m", "statewise", "train", "adding", "--layer", "lru", "--width", "8", "--depth", "1", "--device", "cpu"]
    args += [word for s in [*(f"train.{s}" for s in sets), "task.length=12"] for word in ("--set", s)]
    two, one = tmp_path / "two", tmp_path / "one"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "--", *args[1:], "--run", str(two)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kept in") == 1
    again = subprocess.run([sys.executable, *args, "--run", str(one)], capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_losses(one, two)


def test_a_share_is_that_of_what_is_asked():
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    batch = Batch(torch.arange(6.0).view(3, 2, 1), torch.zeros(3, 2, 1), weight)
    parts = [Ranks(r, 2).rows(batch) for r in range(2)]
    assert [share for _, share in parts] == [0.75, 0.25]
    assert parts[0][0].x[:, 0, 0].tolist() == [0, 4] and parts[1][0].x[:, 0, 0].tolist() == [2]


def test_fewer_rows_than_ranks_are_refused():
    with pytest.raises(UsageError, match="each needs one row"):
        fit(toy(batch=2), ranks=Ranks(0, 3))
