"""Lengths through a whole comparison: scored by the workers, added to finished runs without training, in the report."""

from __future__ import annotations

import csv
import json

import pytest

from statewise.comparing import Plan, compare, pool, read_rows
from statewise.comparing.rows import RESULTS
from statewise.core import UsageError
from statewise.models import Stack
from statewise.report import write_all
from statewise.tasks import Digits, ListOps, Mqar, Parity, Pathfinder
from statewise.training import Experiment, Train
from statewise.training.log import Log


def base(task):
    return Experiment(task, Stack(width=4, depth=1), Train(steps=3, batch=4, evaluate_every=3))


def test_finished_runs_are_scored_at_what_they_lack(tmp_path):
    plan = Plan((base(Parity(longest=8, test_longest=8)),), ("gru",), seeds=1)
    compare(plan, tmp_path, workers=1, lengths=(16, 8))
    (first,) = read_rows(tmp_path).values()
    assert [entry["length"] for entry in first["scores_by_length"]] == [8, 16]
    assert first["scores_by_length"][0]["score"] == first["score"]  # that is the task itself
    seen = []
    found = compare(plan, tmp_path, workers=1, lengths=(8, 32), on_event=lambda event: seen.append(event["event"]))
    (second,) = read_rows(tmp_path).values()
    assert "kept" not in seen and [entry["length"] for entry in second["scores_by_length"]] == [8, 16, 32]
    assert second["scores_by_length"][:2] == first["scores_by_length"]
    assert second["seconds"] == first["seconds"] and second["score"] == first["score"]  # nothing was trained
    seen.clear()
    compare(plan, tmp_path, workers=1, lengths=(32, 16), on_event=lambda event: seen.append(event["event"]))
    assert "kept" in seen and "start" not in seen
    assert found["boards"][0]["task"]["train_length"] == 8
    write_all(found, tmp_path)
    with (tmp_path / "lengths.csv").open(newline="") as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["8", "16", "32"]
    assert "trained up to here" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_killed_while_lengths_are_scored_a_trained_run_is_done_and_goes_on(tmp_path, monkeypatch, new_workers):
    """The worker dies at each attempt once one of two lengths is scored; the next comparison scores the other alone."""
    plan = Plan((base(Parity(longest=8, test_longest=8)),), ("gru",), seeds=1)
    monkeypatch.setattr(pool, "RETRIES", 0)
    deadly = tmp_path / "deadly"
    deadly.mkdir()
    (deadly / "sitecustomize.py").write_text(DEADLY)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(deadly))
        found = compare(plan, tmp_path / "out", workers=1, lengths=(16, 8))
    (row,) = read_rows(tmp_path / "out").values()
    assert row["status"] == "done" and row["score"] is not None and "SIGKILL" in row["reason"]
    assert [entry["length"] for entry in row["scores_by_length"]] == [8]
    write_all(found, tmp_path / "out")
    assert "SIGKILL" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    compare(plan, tmp_path / "out", workers=1, lengths=(16, 8))
    (again,) = read_rows(tmp_path / "out").values()
    assert [entry["length"] for entry in again["scores_by_length"]] == [8, 16] and again["reason"] is None
    assert again["seconds"] == row["seconds"]  # nothing was trained


DEADLY = """
import json, os, pathlib, signal
replace = os.replace

def watched(old, new, **how):
    replace(old, new, **how)
    if os.path.basename(new) == "measured.json":
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = watched
"""


def test_a_length_that_failed_is_tried_again(tmp_path):
    plan = Plan((base(Parity(longest=8, test_longest=8)),), ("gru",), seeds=1)
    compare(plan, tmp_path, workers=1, lengths=(16, 8))
    (row,) = read_rows(tmp_path).values()
    want, failed = row["scores_by_length"], {"score": None, "metrics": {}, "failed": "out of memory: 8 TB"}
    hurt = [entry | failed if entry["length"] == 16 else entry for entry in want]
    (measured,) = tmp_path.glob("runs/*/measured.json")
    measured.write_text(json.dumps({"scores_by_length": hurt}))
    with Log(tmp_path / RESULTS) as log:
        log.write({name: value for name, value in row.items() if name != "crc"} | {"scores_by_length": hurt})
    compare(plan, tmp_path, workers=1, lengths=(16, 8))
    (again,) = read_rows(tmp_path).values()
    assert again["scores_by_length"] == want


def test_a_length_that_one_task_cannot_have_is_a_failed_point_of_that_task(tmp_path):
    small = Mqar(length=16, pairs=2, symbols=8)
    plan = Plan((base(Parity(longest=8, test_longest=8)), base(small)), ("gru",), seeds=1)
    found = compare(plan, tmp_path, workers=1, lengths=(11, 20))
    rows = {row["task"]: row for row in read_rows(tmp_path).values()}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert all(entry["failed"] is None for entry in rows["parity"]["scores_by_length"])
    refused, taken = rows["mqar"]["scores_by_length"]
    assert refused["length"] == 11 and refused["score"] is None and "expected an even" in refused["failed"]
    assert taken["failed"] is None and taken["score"] is not None
    seen = []
    compare(plan, tmp_path, workers=1, lengths=(11, 20), on_event=lambda event: seen.append(event["event"]))
    assert seen.count("kept") == 2 and "start" not in seen  # what a task cannot have is not tried again
    write_all(found, tmp_path)
    assert "expected an even" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("tasks", "lengths", "words"),
    [
        ((Pathfinder(),), (300,), "square"), ((Pathfinder(), ListOps()), (13,), "expected"),
        ((Digits(),), (8,), "reads its data"),
        ((Parity(),), (8, 8), "twice"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_had_are_named_before_anything_is_trained(tmp_path, tasks, lengths, words):
    with pytest.raises(UsageError, match=words):
        compare(Plan(tuple(map(base, tasks)), ("gru",), seeds=1), tmp_path / "out", lengths=lengths)
    assert not (tmp_path / "out").exists()
