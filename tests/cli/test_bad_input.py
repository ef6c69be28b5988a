# ruff: noqa: E501  a table: one row, one line
"""One row per mistake: its exit status, one line that says what to do, nothing written, and the process goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from statewise.core import save_state
from statewise.core.machine import locked
from statewise.layers import GRULayer

TRAIN = ["train", "adding", "--run", "{new}", "--device", "cpu"]
EXPLAIN = ["explain", "linear_scan"]


def text(name, content):
    return lambda place: (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def record(**changes):
    """experiment.json of the adding run with entries changed."""

    def make(place):
        found = json.loads((place / "adding" / "experiment.json").read_text())
        for path, value in changes.items():
            *inside, last = path.split("__")
            part = found
            for name in inside:
                part = part[name]
            part[last] = value
        (place / "r.json").write_text(json.dumps(found))

    return make


def damaged(run, change):
    """Change the bytes of the newest weights of a run."""

    def make(place):
        for path in (place / run / "checkpoints").glob("step-*/model.safetensors"):
            path.write_bytes(change(path.read_bytes()))

    return make


def flip(raw):
    return raw[:-3] + bytes([raw[-3] ^ 16]) + raw[-2:]


def other_state(place):
    layer = GRULayer(3, 5)
    save_state(place / "s.state", layer, layer.initial_state(1))


def fifo(place):
    os.mkfifo(place / "pipe")


def own_layers(place):
    (place / "mine.py").write_text(
        "from statewise.core import Cell\n"
        "class Good(Cell):\n"
        '    """y = x."""\n'
        "    def __init__(self, width): super().__init__(); self.width = self.out_width = width\n"
        "class Plain: pass\n"
    )
    (place / "broken_module.py").write_text("import no_such_thing_at_all\n")


# what is wrong (with its number in the list of bad input), words, exit status, parts of the message, and where needed
# what to make first and standard input
ROWS = [
    ("verb misspelt", ["trian"], 2, ["'trian'", "near: train"]),
    ("flag misspelt", ["train", "adding", "--lyer", "gru"], 2, ["--lyer", "near: --layer"]),
    ("a setting as a flag", ["train", "adding", "--lr", "1"], 2, ["--lr", "--set train.lr="]),
    ("value of a flag", ["train", "adding", "--width", "wide"], 2, ["--width", "whole number, got 'wide'"]),
    ("flag without value", ["train", "adding", "--width"], 2, ["width"]),
    ("words too many", ["train", "adding", "copy"], 2, ["copy"]),
    ("choice", ["list", "layer"], 2, ["layer", "layers"]),
    ("no run", ["stream"], 2, ["stream: PATH is missing: A run of `statewise train`", "speech; see"]),
    ("no benchmark", ["bench"], 2, ["scaling} is missing; see"]),
    ("no task", ["train"], 2, ["which task"]),
    ("task misspelt", ["train", "ading"], 2, ["'ading'", "near: adding"]),
    ("layer misspelt", [*TRAIN, "--layer", "grru"], 2, ["'grru'", "near: gru"]),
    ("1 rank", [*EXPLAIN, "--shape", "2,3"], 2, ["'2,3'", "batch, time, width"]),
    ("1 rank too high", [*EXPLAIN, "--shape", "2,3,4,5"], 2, ["(2, 3, 4, 5)"]),
    ("1 shape of words", [*EXPLAIN, "--shape", "two,3,4"], 2, ["two", "whole numbers"]),
    ("2 too few numbers", ["stream", "adding"], 3, ["line 2", "1 numbers; expected 2"], None, b"1,2\n3\n"),
    ("3 negative shape", [*EXPLAIN, "--shape", "-1,3,4"], 2, ["-1"]),
    ("4 state of another model", ["stream", "adding", "--load-state", "s.state"], 3, ["GRULayer", "Residual"], other_state),
    ("5 text for a number", ["stream", "adding"], 3, ["line 1", "'x'", "number"], None, b"1,x\n"),
    ("5 boolean for a number", ["stream", "adding", "--format", "json"], 3, ["True", "number"], None, b"[1, true]\n"),
    ("6 id too large", ["stream", "copy"], 3, ["id 10", "0 to 9"], None, b"3\n10\n"),
    ("6 id negative", ["stream", "copy"], 3, ["id -1", "0 to 9"], None, b"-1\n"),
    ("7 id with a fraction", ["stream", "copy"], 3, ["1.5", "whole"], None, b"1.5\n"),
    ("7 format of another model", ["stream", "adding", "--format", "text"], 2, ["text", "numbers, json"]),
    ("8 no such device", [*TRAIN[:-1], "cuda:99"], 2, ["cuda:99", "cpu"]),
    ("9 meta", [*EXPLAIN, "--device", "meta"], 2, ["meta", "cpu"]),
    ("11 complex", ["explain", "gru", "--dtype", "complex64", "--shape", "2,3,4"], 2, ["complex64"]),
    ("12 NaN", ["stream", "adding"], 3, ["line 1", "1 not finite", "nan at place 2"], None, b"1,nan\n"),
    ("12 infinity", ["stream", "adding", "--format", "json"], 3, ["not finite"], None, b"[Infinity, 1e999]\n"),
    ("16 batch 0", [*TRAIN, "--set", "train.batch=0"], 2, ["train.batch", "0", "from 1"]),
    ("16 batch 2.5", [*TRAIN, "--set", "train.batch=2.5"], 2, ["2.5", "whole number"]),
    ("16 batch 2^40", [*TRAIN, "--set", "train.batch=1099511627776"], 2, ["1099511627776"]),
    ("16 length -1", [*TRAIN, "--set", "task.length=-1"], 2, ["length", "-1"]),
    ("17 width 0", [*TRAIN, "--width", "0"], 2, ["--width 0", "1 to"]),
    ("17 width -8", [*TRAIN, "--width", "-8"], 2, ["-8", "1 to"]),
    ("17 width 10^9", [*TRAIN, "--width", "1000000000"], 4, ["memory", "smaller width"]),
    ("17 width 10^6", [*TRAIN, "--width", "1000000"], 4, ["GiB", "smaller width"]),
    ("17 shape beyond memory", [*EXPLAIN, "--shape", "1000,100000,1000"], 4, ["free"]),
    ("17 depth 0", [*TRAIN, "--depth", "0"], 2, ["--depth 0"]),
    ("18 heads", [*TRAIN, "--layer", "attention", "--set", "model.args.heads=5"], 2, ["heads", "5"]),
    ("19 unknown key", [*TRAIN, "--set", "train.learning_rte=1"], 2, ["learning_rte", "lr"]),
    ("19 unknown task key", [*TRAIN, "--set", "task.lenght=1"], 2, ["lenght", "near: length"]),
    ("19 unknown argument", [*TRAIN, "--set", "model.args.hiden=1"], 2, ["hiden", "near: hidden"]),
    ("19 unknown group", [*TRAIN, "--set", "trian.lr=1"], 2, ["trian", "near: train"]),
    ("19 unknown key in a file", ["train", "--replay", "r.json"], 2, ["learning_rte"], record(train__learning_rte=1)),
    ("20 key twice", [*TRAIN, "--set", "train.lr=1", "--set", "train.lr=2"], 2, ["train.lr", "twice"]),
    ("20 key twice in a file", ["train", "--replay", "r.json"], 2, ["line 2", "twice"], text("r.json", '{"a": 1,\n"a": 2}')),
    ("21 nested deep", ["train", "--replay", "r.json"], 2, ["32"], text("r.json", '{"a":' * 99 + "1" + "}" * 99)),
    ("21 more than 1 MB", ["train", "--replay", "r.json"], 2, ["1,000,000"], text("r.json", " " * 1_100_000 + "{}")),
    ("22 a layer that names code", [*TRAIN, "--layer", "os:system"], 2, ["os:system", "unknown layer"]),
    ("22 a model that names code", ["train", "--replay", "r.json"], 2, ["os.system"], record(model__type="os.system")),
    ("22 a task that names code", ["train", "--replay", "r.json"], 2, ["os.system"], record(task__name="os.system")),
    ("23 lr nan", [*TRAIN, "--set", "train.lr=nan"], 2, ["train.lr", "finite"]),
    ("23 lr inf", [*TRAIN, "--set", "train.lr=inf"], 2, ["train.lr", "finite"]),
    ("23 lr negative", [*TRAIN, "--set", "train.lr=-1"], 2, ["train.lr", "above 0"]),
    ("23 only what was given is repeated", [*TRAIN, "--set", "train.steps=0"], 2, ["[2]: --set train.steps=0: train.steps is 0"]),
    ("23 lr with a space", [*TRAIN, "--set", "train.lr=1e-3 "], 2, ["train.lr", "finite number"]),
    ("23 threads below 0", [*TRAIN, "--threads", "-1"], 2, ["--threads -1", "0 to 1024"]),
    ("23 threads beyond any machine", ["compare", "adding", "--threads", "100000000"], 2, ["100000000", "1 to 1024"]),
    ("24 optimiser", [*TRAIN, "--set", "train.optimizer=lion"], 2, ["lion", "adamw"]),
    ("24 dtype", [*EXPLAIN, "--dtype", "float33"], 2, ["float33", "float32"]),
    ("25 half precision", [*TRAIN, "--set", "train.precision=float16"], 2, ["float16", "bfloat16"]),
    ("26 state of 0 bytes", ["stream", "adding", "--load-state", "s"], 3, ["empty", "0 bytes"], text("s", "")),
    ("26 weights of 7 bytes", ["stream", "adding"], 3, ["model.safetensors"], damaged("adding", lambda raw: raw[:7])),
    ("27 weights cut off", ["stream", "adding"], 3, ["model.safetensors"], damaged("adding", lambda raw: raw[:-1])),
    ("28 header of 2^63", ["stream", "adding", "--load-state", "s"], 3, ["header"], text("s", b"\0" * 7 + b"\x80" + b"{}")),
    ("29 header not JSON", ["stream", "adding", "--load-state", "s"], 3, ["header"], text("s", b"\4" + b"\0" * 7 + b"{{{{")),
    ("33 weights with a bit flipped", ["stream", "adding"], 3, ["model.safetensors"], damaged("adding", flip)),
    ("37 a zip", ["stream", "adding", "--load-state", "s"], 3, ["zip", "never loaded"], text("s", b"PK\3\4" + b"x" * 99)),
    ("38 newer format", ["train", "--replay", "r.json"], 2, ["99", "upgrade"], record(format=99)),
    ("40 state of other weights", ["stream", "copy", "--load-state", "{files}/adding.state"], 3, ["state"]),
    ("41 state is a folder", ["stream", "adding", "--load-state", "copy"], 3, ["directory"]),
    ("41 text is a pipe", ["train", "text_file", "--data", "pipe", "--run", "{new}"], 3, ["pipe"], fifo),
    ("41 record is a device", ["train", "--replay", "/dev/zero"], 3, ["device"]),
    ("42 no such run", ["stream", "gone"], 3, ["gone"]),
    ("42 no such record", ["train", "--replay", "gone.json"], 3, ["gone.json", "directory"]),
    ("42 no such data", ["train", "series", "--data", "gone.csv", "--run", "{new}"], 3, ["gone.csv"]),
    ("47 a path that is no UTF-8", ["stream", "\udcff\udcfe"], 3, ["dcff"]),
    ("50 ragged table", ["train", "series", "--data", "t.csv", "--run", "{new}"], 3, ["t.csv:3"], text("t.csv", "a,b\n1,2\n3\n")),
    ("50 binary text", ["train", "text_file", "--data", "t", "--run", "{new}"], 3, ["NUL"], text("t", b"ab\0" * 9000)),
    ("50 a line too long", ["stream", "adding"], 3, ["line 1", "longer than"], None, b"1" * 2_000_000 + b"\n"),
    ("53 empty table", ["train", "series", "--data", "t.csv", "--run", "{new}"], 3, ["empty"], text("t.csv", "")),
    ("53 text shorter than a window", ["train", "text_file", "--data", "t", "--run", "{new}"], 3, ["bytes"], text("t", "ab")),
    ("own data without a file", ["train", "series"], 2, ["--data FILE"]),
    ("a file for a task without", ["train", "adding", "--data", "t"], 2, ["adding", "series"], text("t", "x")),
    ("58 another configuration", ["train", "copy", "--run", "adding"], 2, ["another configuration", "task.name", "--fresh"]),
    ("fresh over something else", [*TRAIN[:2], "--run", "{files}", "--fresh"], 2, ["not a run"]),
    ("a setting without a value", [*TRAIN, "--set", "train.lr"], 2, ["FIELD=VALUE"]),
    ("a group for a field", [*TRAIN, "--set", "train=1"], 2, ["train"]),
    ("replay and a task", ["train", "adding", "--replay", "r.json"], 2, ["--replay", "task"], text("r.json", "{}")),
    ("not JSON", ["stream", "adding", "--format", "json"], 3, ["line 1", "not JSON"], None, b"[1,\n"),
    ("check: no such module", ["check", "no_such_module:Layer"], 2, ["no_such_module"]),
    ("check: no such class", ["check", "mine:Goood"], 2, ["near: Good"], own_layers),
    ("check: not a layer", ["check", "mine:Plain"], 2, ["Plain", "RecurrentLayer"], own_layers),
    ("check: a module that fails", ["check", "broken_module:A"], 2, ["no_such_thing_at_all"], own_layers),
    ("check: an argument", ["check", "mine:Good", "--args", "wdth=3"], 2, ["wdth", "near: width"], own_layers),
    ("check: a file", ["check", "./own/mine.py:Good"], 2, ["as Python imports it from here: own.mine:Good"]),
    ("check: half an argument", ["check", "mine:Good", "--args", "width"], 2, ["--args 'width'; expected NAME=VALUE"], own_layers),
    ("check: no such layer", ["check", "lruu"], 2, ["near: lru"]),
    ("explain: no such op", ["explain", "linear_scna"], 2, ["near: linear_scan"]),
    ("explain: an argument", ["explain", "gru", "--args", "hiden=3"], 2, ["hiden", "near: hidden"]),
    ("bench: no such layer", ["bench", "layers", "--layers", "gruu"], 2, ["near: gru"]),
    ("list: a folder to write to", ["list", "layers", "--out", "adding"], 3, ["adding", "directory"]),
    ("bench: a folder to write to", ["bench", "layers", "--json", "adding"], 3, ["adding", "directory"]),
    ("bench: nothing to repeat", ["bench", "layers", "--repeats", "-1"], 2, ["repeats"]),
]  # fmt: skip


FULL = [(*row, None, b"")[:6] if len(row) == 4 else (*row, b"")[:6] for row in ROWS]


def test_there_are_enough_rows():
    numbered = {row[0].split()[0] for row in ROWS if row[0][0].isdigit()}
    assert len(ROWS) > 85 and len(numbered) >= 25
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("what", "words", "code", "parts", "make", "stdin"), FULL, ids=[row[0] for row in ROWS])
def test_a_mistake_gets_one_line(what, words, code, parts, make, stdin, runs, tmp_path, monkeypatch, call):
    shutil.copytree(runs["files"], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if make is not None:
        make(tmp_path)
    before = snapshot(tmp_path)
    said = call(*(word.format(new=tmp_path / "new", files=tmp_path) for word in words), stdin=stdin)
    assert said.code == code, said
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error[{code}]: "), said.err
    for part in parts:
        assert part in lines[0]
    assert len(lines[0]) <= 320 + len(str(tmp_path)) * lines[0].count(str(tmp_path))
    assert snapshot(tmp_path) == before, "something was written"
    good = call("stream", str(runs["adding"]), stdin=b"0.5,1\n")  # and the process goes on
    assert (good.code, len(good.out.splitlines()), good.err) == (0, 1, "")


def test_two_processes_on_one_run(runs, tmp_path, call):
    shutil.copytree(runs["adding"], tmp_path / "run")
    with locked(tmp_path / "run"):
        said = call("train", "--replay", str(tmp_path / "run" / "experiment.json"), "--run", str(tmp_path / "run"))
    assert said.code == 2 and str(os.getpid()) in said.err and len(said.err.splitlines()) == 1


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(place)): (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in place.rglob("*")
        if "__pycache__" not in p.parts and p.name != "lock" and not p.is_dir()
    }
