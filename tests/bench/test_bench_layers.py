"""Rows of the layers' bench: beside the byte floor, and the first call in a process of its own."""

from __future__ import annotations

import itertools
import os

import pytest

from statewise.bench import layers


def test_every_time_stands_beside_the_floor(monkeypatch):
    monkeypatch.delattr(os, "getloadavg", raising=False)
    planted = itertools.cycle((6.0, 2.0, 12.0, 3.0))  # forward, its floor, training, its floor
    monkeypatch.setattr(layers, "seconds", lambda work, device: (work(), next(planted))[1])
    rows = layers.run(["gru"], shape=(2, 16, 4), repeats=3, first_call=False)
    assert [row["way"] for row in rows[:3]] == ["ours", "loop", "torch.nn"]
    for row in rows[:3]:
        assert (row["forward"], row["training"], row["forward_floor"], row["training_floor"]) == (6, 12, 3, 4)
        assert row["first"] is None and row["load"] is None and row["noisy"] is False


@pytest.mark.parametrize("name", ["lru"])
def test_the_first_call_is_made_in_a_fresh_process(name):
    ours, loop = layers.run([name], shape=(2, 16, 4), repeats=1, peers=False)
    assert ours["first"] > 0.02, "what is imported at the first call counts"
    assert loop["first"] is None
