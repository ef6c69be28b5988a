"""Every execution is as exact as its limit, and one that is not shows."""

from __future__ import annotations

import math

import pytest

import statewise.layers  # noqa: F401  registers them
from statewise.cli.check import as_markdown
from statewise.core import layers
from statewise.layers import MinGRU
from statewise.ops import ops
from statewise.testing import build
from statewise.testing.parity import CALLS, DECAYS, Row, of_layer, of_ops


@pytest.mark.parametrize("name", CALLS)
def test_every_op_at_every_decay(name):
    rows = list(of_ops(700, only=[name]))
    assert {row.decay for row in rows} in ({None}, {*DECAYS})
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4096, 65_536])
@pytest.mark.parametrize("name", CALLS)
def test_every_op_at_length(name, steps):
    rows = list(of_ops(steps, only=[name]))
    assert rows and all(row.ok for row in rows), [row for row in rows if not row.ok]


def test_every_op_with_a_linear_state_is_tried():
    assert {name.split(" ")[0] for name in CALLS} >= {name for name in ops if name.endswith("_scan")}


@pytest.mark.slow
@pytest.mark.parametrize("info", layers, ids=lambda info: info.name)
def test_every_layer_at_length(info):
    rows = list(of_layer(info.name, build(info.cls, info.examples[0]), 4096))
    assert {"forward", "chunks", "step"} <= {row.execution for row in rows}
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


class Coarse(MinGRU):
    """Its forward rounds its inputs, its step does not."""

    def scan(self, u, state, reset, lengths):
        return super().scan(type(u)(*(leaf.bfloat16().to(leaf.dtype) for leaf in u)), state, reset, lengths)


def test_a_coarse_execution_is_past_its_limit():
    found = {row.execution: row.ok for row in of_layer("coarse", Coarse(3, 4), 50)}
    assert not found["forward"] and not found["chunks"] and found["step"]


def test_no_number_is_not_within_a_limit():
    assert not Row("op", 1.0, "torch", 10, math.nan, math.nan).ok


def test_the_table_shows_what_is_past_its_limit():
    rows = [Row("op", 0.5, "torch", 10, 1e-7, 1e-7), Row("op", 1.0, "torch", 10, 1e-3, 1e-3)]
    text = as_markdown([*rows, *of_layer("min_gru", MinGRU(3, 4), 5)])
    assert "| op, torch | 1e-07 | **1e-03** |" in text and "| min_gru |" in text
