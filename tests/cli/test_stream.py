"""stream answers line by line, like the model's forward, and goes on from a saved state as if it had never stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from numba.core import event

from statewise.cli.compiling import WORDS, telling
from statewise.cli.stream import Streamer
from statewise.ops.recorded import Program
from statewise.tasks import Series
from statewise.training import load

NUMBERS = torch.rand(7, 2, generator=torch.Generator().manual_seed(0))
LINES = b"".join(f"{a:.6f},{b:.6f}\n".encode() for a, b in NUMBERS.tolist())


def values(out: str) -> torch.Tensor:
    return torch.tensor([[float(v) for v in line.split(",")] for line in out.splitlines()])


def test_the_answers_are_those_of_forward(runs, call):
    model, _ = load(runs["adding"])
    said = call("stream", runs["adding"], stdin=LINES)
    assert said.code == 0
    torch.testing.assert_close(values(said.out), model(NUMBERS[None])[0][0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("run", "lines"),
    [("adding", LINES), ("copy", b"1 2 3\n4\n"), ("text", b"the quick\nbrown "), ("classes", b"0.1,100\n0.2,105\n")],
)
def test_fast_steps_are_recorded_and_give_the_same_answers(runs, call, run, lines, monkeypatch):
    kept, record = [], Streamer.record
    monkeypatch.setattr(Streamer, "record", lambda self, x: (kept.append(self), record(self, x)))
    fast, plain = (call("stream", runs[run], *more, stdin=lines).out for more in (["--fast"], []))
    assert all(isinstance(program, Program) for program in kept[0].step.programs.values())
    found, want = (re.split(r"[\s,]+", out.replace("- ", "nan ").strip()) for out in (fast, plain))
    assert len(found) == len(want)
    for one, other in zip(found, want, strict=True):
        try:
            assert float(one) == pytest.approx(float(other), rel=1e-4, abs=2e-4, nan_ok=True)
        except ValueError:
            assert one == other


@pytest.mark.parametrize("written", [b"1, 0.5\n", b"1 0.5\n", b"1;0.5\r\n", b"  1\t0.5  \n", b"1,0.5"])
def test_ways_to_write_numbers(runs, call, written):
    assert call("stream", runs["adding"], stdin=written).out == call("stream", runs["adding"], stdin=b"1,0.5\n").out


def test_json_lines(runs, call):
    plain = call("stream", runs["adding"], stdin=b"1,0.5\n0,2\n")
    said = call("stream", runs["adding"], "--format", "json", stdin=b'[1, 0.5]\n{"x": [0, 2]}\n')
    found = [json.loads(line)["y"] for line in said.out.splitlines()]
    torch.testing.assert_close(torch.tensor(found), values(plain.out))


@pytest.mark.parametrize(
    ("run", "first", "rest"),
    [
        ("adding", b"0.3,1\n0.2,0\n", b"0.9,1\n0.1,1\n"),
        ("copy", b"1 2 3\n4\n", b"5 6\n"),
        ("text", b"the quick\nbrown ", b"fox\njumps\n"),
        ("classes", b"0.1,100\n", b"0.2,105\n"),
    ],
)
def test_a_saved_state_goes_on(runs, call, tmp_path, run, first, rest):
    whole = call("stream", runs[run], stdin=first + (b"" if run != "text" else b"\n") + rest)
    one = call("stream", runs[run], "--save-state", tmp_path / "s", stdin=first + (b"" if run != "text" else b"\n"))
    two = call("stream", runs[run], "--load-state", tmp_path / "s", stdin=rest)
    assert (whole.code, one.code, two.code) == (0, 0, 0)
    assert one.out + two.out == whole.out


def test_an_empty_line_starts_anew(runs, call):
    said = call("stream", runs["adding"], stdin=b"1,0.5\n0,2\n\n1,0.5\n")
    lines = said.out.split("\n")
    assert lines[2] == "" and lines[0] == lines[3] != lines[1]


def test_classes_have_their_names_and_inputs_their_units(runs, call):
    model, experiment = load(runs["classes"])
    assert isinstance(experiment.task, Series)
    rows = experiment.task.rows("train")
    x = (torch.tensor([[0.1, 100.0]]) - rows.shift) * rows.scale
    p = model.step(x, model.initial_state(1))[0].softmax(-1)[0]
    said = call("stream", runs["classes"], stdin=b"0.1,100\n")
    name, probability = said.out.split()
    assert name == experiment.task.classes[int(p.argmax())]
    assert abs(float(probability) - float(p.max())) < 1e-4


def test_bytes_cost_what_the_model_says(runs, call):
    model, _ = load(runs["text"])
    line = b"a lazy dog\n"
    logits = model(torch.tensor([list(line)]))[0][0]
    bits = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(list(line[1:]))) / torch.log(torch.tensor(2.0))
    said = call("stream", runs["text"], stdin=line)
    _, probability, cost = said.out.rsplit(maxsplit=2)
    assert abs(float(cost) - float(bits)) < 1e-3
    assert abs(float(probability) - float(logits[-1].softmax(-1).max())) < 1e-3


def test_bad_lines_can_be_skipped(runs, call):
    said = call("stream", runs["adding"], "--skip-bad", stdin=b"1,0.5\nnan,1\nx\n0,2\n")
    good = call("stream", runs["adding"], stdin=b"1,0.5\n0,2\n")
    assert said.code == 0 and said.out == good.out
    assert [line.split(":")[0] for line in said.err.splitlines()] == [f"skipped line {n} of the input" for n in (2, 3)]


def test_a_bad_line_keeps_what_came_before(runs, call, tmp_path):
    assert call("stream", runs["adding"], "--save-state", tmp_path / "s", stdin=b"1,0.5\nbad\n").code == 3
    rest = call("stream", runs["adding"], "--load-state", tmp_path / "s", stdin=b"0,2\n")
    assert rest.out == call("stream", runs["adding"], stdin=b"1,0.5\n0,2\n").out.splitlines(keepends=True)[1]


def test_fast_reads_a_line_before_it_gets_ready(runs, call, monkeypatch):
    monkeypatch.setattr(Streamer, "record", lambda *_: pytest.fail("made ready for a line that is refused"))
    assert call("stream", runs["adding"], "--fast", stdin=b"x,1\n").code == 3
    assert call("stream", runs["copy"], "--fast", "--skip-bad", stdin=b"\n-1\n").code == 0


def test_compiling_is_said_once(capsys):
    with telling(sys.stderr):
        for _ in range(2):
            event.broadcast(event.Event("numba:compile", event.EventStatus.START))
    event.broadcast(event.Event("numba:compile", event.EventStatus.START))
    assert capsys.readouterr() == ("", f"{WORDS}\n")


def test_where_a_state_goes_is_looked_at_before_a_line_is_read(runs, call, tmp_path):
    for place, why in ((tmp_path, "Is a directory"), (tmp_path / "none" / "s", "No such file")):
        said = call("stream", runs["adding"], "--save-state", place, stdin=b"1,0.5\n")
        assert (said.code, said.out) == (3, "") and f"cannot write {place}: {why}" in said.err


def test_a_line_of_names_is_known(runs, call):
    assert "no line of names (tail -n +2" in call("stream", runs["adding"], stdin=b"value,mark\n").err
    assert "names" not in call("stream", runs["adding"], stdin=b"1,mark\n").err


def test_every_line_is_answered_at_once_and_sigterm_saves(runs, tmp_path):
    words = [sys.executable, "-m", "statewise", "stream", str(runs["adding"]), "--save-state", str(tmp_path / "s")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        for line in (b"1,0.5\n", b"0,2\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline()  # would block for ever if answers were held back
        process.send_signal(signal.SIGTERM)
        assert process.wait(250) == 143
        assert process.stderr.read().count(b"\n") == 1
    assert (tmp_path / "s").is_file()


def test_a_signal_while_a_line_is_answered_waits_for_the_answer(runs, call, tmp_path, monkeypatch):
    """The state saved is that after the last line answered: neither one more nor one less."""
    answer = Streamer.answer

    def interrupted(self, line):
        said = answer(self, line)
        os.kill(os.getpid(), signal.SIGTERM)
        return said

    monkeypatch.setattr(Streamer, "answer", interrupted)
    one = call("stream", runs["adding"], "--save-state", tmp_path / "s", stdin=b"1,0.5\n0,2\n")
    assert one.code == 143 and one.out.count("\n") == 1
    monkeypatch.setattr(Streamer, "answer", answer)
    two = call("stream", runs["adding"], "--load-state", tmp_path / "s", stdin=b"0,2\n")
    assert one.out + two.out == call("stream", runs["adding"], stdin=b"1,0.5\n0,2\n").out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("run", ["ahead", "targets"])
def test_raw_lines_give_forwards_answers_in_the_units_of_the_file(runs, call, run, tmp_path):
    """The test part of a CSV line by line, after the lines before it, is what the task's own batch gives."""
    model, experiment = load(runs[run])
    task = experiment.task
    rows, lines = task.rows("test"), (runs["files"] / f"{run}.csv").read_text().splitlines()[1:]
    given = lines if run == "ahead" else [line.partition(",")[0] for line in lines]
    said = call("stream", runs[run], stdin="\n".join(given).encode())
    assert said.code == 0 and said.out.count("\n") == len(lines)
    x = ((rows.values - rows.shift) * rows.scale)[None]
    y = model(x)[0][0].detach().double() * rows.y_scale + rows.y_shift
    if run == "ahead":  # changes from now, two leads
        now = torch.tensor([[float(v) for v in line.split(",")] for line in lines], dtype=torch.float64)
        y = now.repeat_interleave(2, 1) + y
    torch.testing.assert_close(values(said.out), y.float(), rtol=1e-4, atol=1e-3)
    half = len(given) // 2
    one, two = ("\n".join(part).encode() + b"\n" for part in (given[:half], given[half:]))
    before = call("stream", runs[run], "--save-state", tmp_path / "s", stdin=one)
    assert before.out + call("stream", runs[run], "--load-state", tmp_path / "s", stdin=two).out == said.out


def test_a_missing_value_of_a_forecast_is_the_last_one(runs, call):
    filled = call("stream", runs["ahead"], stdin=b"1,2\n1,3\n")
    assert call("stream", runs["ahead"], stdin=b"1,2\nnan,3\n").out == filled.out
    first = call("stream", runs["ahead"], stdin=b"nan,2\n")
    assert first.code == 3 and "place 1 is missing" in first.err


@pytest.mark.parametrize("run", ["ahead", "classes"])
def test_a_run_needs_its_data_no_more(runs, run, tmp_path):
    """On another machine: the run copied, the file not."""
    shutil.copytree(runs[run], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "experiment.json").read_text())
    assert os.path.isabs(record["task"]["path"])
    record["task"]["path"] = str(tmp_path / "gone.csv")
    (tmp_path / "run" / "experiment.json").write_text(json.dumps(record))
    words = [sys.executable, "-m", "statewise", "stream"]
    found = [
        subprocess.run([*words, str(path)], input=b"0.1,100\n", capture_output=True, check=True)
        for path in (tmp_path / "run", runs[run])
    ]
    assert found[0].stdout == found[1].stdout != b""
