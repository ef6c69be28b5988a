"""reproduce and papers on the command line: tables, a stop by a signal, mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from statewise.cli import main
from statewise.recipes import SEEDS, names, read_results


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_reproduce_prints_and_keeps_what_it_measured(call, place):
    said = call("reproduce", "deltaproduct", "--scale", "smoke")
    assert said.code == 0, said
    assert "Siems et al. 2025" in said.out
    assert "baseline" in said.out
    assert "chance" in said.out
    assert "DOES NOT HOLD" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    found = json.loads((place / "results/siems2025_deltaproduct-smoke.json").read_text())
    assert found["key"] == read_results(place / "results", "siems2025_deltaproduct", "smoke").key
    said = call("reproduce", "deltaproduct", "--scale", "smoke")
    assert "11 of 11 runs were finished before and kept" in said.out


def test_papers_lists_every_claim(call, place):
    said = call("papers")
    assert said.code == 0
    assert all(name in said.out for name in names())
    assert "0 holds, 0 does not hold" in said.out
    assert "nothing in results" in said.out
    assert call("reproduce", "deltaproduct", "--scale", "smoke").code == 0
    said = call("papers", "--write", "page.md")
    assert said.code == 0
    text = (place / "page.md").read_text()
    assert "| parity | accuracy |" in text
    assert "https://arxiv.org/abs/2502.10297" in text
    path = place / "results/siems2025_deltaproduct-smoke.json"
    found = json.loads(path.read_text())
    found["runs"]["parity"]["key"] = "0" * 12
    path.write_text(json.dumps(found))
    assert "1 stale" in call("papers").out


@pytest.mark.parametrize(
    "words, message",
    [
        (["reproduce"], "which paper"),
        (["reproduce", "lsl"], "unknown recipe 'lsl'; near: lssl"),
        (["reproduce", "s4", "--threads", "0"], "--threads 0; expected 1"),
        (["reproduce", "s4", "--scale", "large"], "scale"),
    ],
)
def test_mistakes_are_one_line(call, place, words, message):
    said = call(*words)
    assert said.code == 2
    assert message in said.err
    assert len(said.err.splitlines()) == 1


def test_a_broken_file_is_one_line(call, place):
    (place / "results").mkdir()
    (place / "results/gu2022_s4-small.json").write_text("{")
    said = call("papers")
    assert said.code == 2
    assert "gu2022_s4-small.json" in said.err
    assert len(said.err.splitlines()) == 1


INTERRUPTED = """
import os, signal, sys
from statewise.cli import main
from statewise.cli.reproduce import Lines

tell = Lines.__call__

def tell_and_interrupt(self, event):
    tell(self, event)
    if self.ended == 1 and event["event"] == "train" and event["step"] == 1:
        os.kill(os.getpid(), signal.SIGINT)

Lines.__call__ = tell_and_interrupt
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_stops_and_the_same_command_goes_on(place):
    """Interrupted in its second training run; the next call finishes and keeps what the first one had."""
    command = [sys.executable, "-c", INTERRUPTED, "reproduce", "deltaproduct", "--scale", "smoke"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=250)
    errors = process.stderr
    assert process.returncode == 130, errors
    assert len(errors.splitlines()) <= 1
    before = read_results(place / "results", "siems2025_deltaproduct", "smoke")
    done = {run for run in before.runs if before.rows(run)}
    assert len(done) == 1 < len(before.runs)
    assert main(["reproduce", "deltaproduct", "--scale", "smoke"]) == 0
    after = read_results(place / "results", "siems2025_deltaproduct", "smoke")
    assert all(after.runs[run]["seeds"] == before.runs[run]["seeds"] for run in done)
    assert all(len(after.rows(run)) == SEEDS["smoke"] for run in after.runs)
