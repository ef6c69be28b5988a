"""Recomputed blocks and compiled training: what they may change and what not."""

from __future__ import annotations

import pytest
import torch

from statewise.core import UsageError
from statewise.models import Stack
from statewise.tasks import Adding
from statewise.training import Experiment, Train, fit


def losses(dropout: float = 0.2, **train: object) -> tuple[list[float], float]:
    seen: list[float] = []
    made = Experiment(
        Adding(length=6), Stack("min_gru", width=4, depth=2, dropout=dropout), Train(steps=4, batch=4, **train)
    )

    def note(event):
        if event["event"] == "train":
            seen.append(event["loss"])

    return seen, fit(made, on_event=note).score


def test_recomputing_blocks_changes_no_bit():
    assert losses(recompute_blocks=True) == losses()


@pytest.mark.slow
def test_compiled_training_is_the_same_training():
    torch.set_num_threads(1)
    one, score = losses(0.0, compile=True)
    two, wanted = losses(0.0)
    assert one == pytest.approx(two, rel=1e-4) and score == pytest.approx(wanted, rel=1e-4)


def test_options_keep_the_keys_of_old_records():
    made = Experiment(Adding(), Stack("gru"))
    assert "compile" not in made.record()["train"] and "residual_scale" not in made.record()["model"]
    other = Experiment(Adding(), Stack("gru", residual_scale=0.5), Train(recompute_blocks=True))
    assert other.key != made.key and Experiment.from_record(other.record()) == other


def test_an_option_is_true_or_false():
    with pytest.raises(UsageError, match=r"train.compile is 1; expected true or false"):
        Train(compile=1)
