"""Rows of the bench of peers: rivals that compute the same, in one run with ours."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statewise.bench import peers
from statewise.cli import main
from statewise.core import Unknown, UsageError


@pytest.mark.parametrize("name", peers.CASES)
def test_rivals_compute_what_ours_does(name: str):
    said: list[str] = []
    ours, *rivals = peers.run([name], repeats=2, small=True, say=said.append)
    assert ours["way"] == "statewise" and len(rivals) >= 1 and len(said) == 1 + len(rivals)
    if "failed" in ours:
        assert importlib.util.find_spec("transformers") is None and name in ("mamba", "mamba2")
        return
    assert ours["ratio"] == 1 and ours["rounds"] == 2 and ours["off"] == 0
    for row in rivals:
        if "failed" in row:
            assert "not installed" in row["failed"], row
        else:
            assert row["time"] > 0 and row["first"] > 0
            assert row["ratio"] == row["time"] / ours["time"]
            assert row.get("off", 0) < 1e-4, row
            assert ("off" in row) == (row["way"] != "mambapy")


def test_a_missing_peer_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ours, *rivals = peers.run(["mlstm"], repeats=1, small=True)
    assert ours["time"] > 0
    assert [row["failed"] for row in rivals] == ["mlstm_kernels not installed (pip install 'statewise[peers]')"] * 2


def test_a_peer_that_is_very_slow_is_called_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "ONCE", 0.0)
    calls = []

    def make() -> peers.Work:
        return lambda: calls.append(1) or torch.ones(1)

    (row,) = peers._case(peers.Case("slow", "", lambda: [peers.Contender("slow", make)]), 5, lambda line: None)
    assert len(calls) == 1 and row["rounds"] == 1 and row["time"] == row["first"]


def test_products_are_those_of_the_chunked_algorithm():
    """Products with states are counted whole, those within a chunk by half."""
    c, d = peers.CHUNK, 5
    with FlopCounterMode(display=False) as counted:
        q, k, v, s = torch.ones(c, d), torch.ones(c, d), torch.ones(c, d), torch.ones(d, d)
        scores = q @ k.mT
        _ = scores @ v
        within = counted.get_total_flops()
        _ = q @ s, k.mT @ v
        through = counted.get_total_flops() - within
    assert peers.OUTER.operations(d, "forward") * c == within / 2 + through
    for work in (peers.OUTER, peers.DELTA, peers.DPLR):  # a product has two factors, so two products for its gradients
        assert work.operations(d, "training") == 3 * work.operations(d, "forward")


def test_fractions_of_the_speed_of_products():
    rows = peers.run(["gemm"], repeats=1, small=True)
    assert len(rows) == 10 and {row["way"] for row in rows} == {"forward", "training"}
    for row in rows:
        assert 0 < row["least"] < row["fraction"]
        assert row["fraction"] == pytest.approx(row["gflops"] / row["gemm"])
        assert row["of_batched"] == pytest.approx(row["gflops"] / row["batched"])


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(peers, "run", functools.partial(peers.run, small=True))
    monkeypatch.setattr(peers, "missing", lambda *packages: "mlstm_kernels not installed")
    argv = ["bench", "peers", "--layers", "mlstm,gemm", "--repeats", "2", "--json", str(tmp_path / "rows.json")]
    assert main(argv) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "mlstm: B 2, T 64, H 2, d 8, float32, forward and backward" in said
    assert "mlstm: statewise ..." in said and "of GEMM" in said and "dplr_scan" in said
    assert "mlstm_kernels not installed" in said and "(once)" not in said
    assert [row["case"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["mlstm"] * 3 + ["gemm"] * 10


def test_what_cannot_be_measured_is_one_line():
    with pytest.raises(Unknown, match=r"mamba3.*near"):
        peers.run(["mamba3"])
    with pytest.raises(UsageError, match="repeats 0"):
        peers.run(repeats=0)
