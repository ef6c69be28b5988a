"""list, explain, check, bench and the speech detector: what they print is what is so."""

from __future__ import annotations

import json
import math
import struct
import wave
from functools import partial

import pytest
import torch

from statewise.bench.layers import run as bench_layers
from statewise.cli.explain import recorded
from statewise.core import layers, nbytes
from statewise.layers import LRU
from statewise.ops import ops, use_backend
from statewise.report import show_bytes
from statewise.tasks import tasks
from statewise.tasks.units import Units


def test_list_names_every_layer_with_its_state(call):
    said = call("list", "layers")
    lines = {line.split()[0]: line for line in said.out.splitlines() if line and not line.startswith(" ")}
    assert set(lines) - {"name"} == set(layers.names()) and len(layers) >= 12
    for info in layers:
        state = info.cls(**info.sized(64)).initial_state(1)
        assert show_bytes(nbytes(state)) in lines[info.name] and info.paper in lines[info.name]
    assert max(map(len, said.out.splitlines())) <= 80


def test_list_names_every_task_model_and_op(call):
    out = call("list", "tasks").out
    assert all(f"\n{info.name} " in out for info in tasks) and len(tasks) >= 12
    assert "your own" in out and "generated" in out and "statewise data get" in out
    out = call("list", "models").out
    assert all(name in out for name in ("Stack", "Classifier", "Forecaster", "TokenModel"))
    out = call("list", "ops").out
    assert all(name in out for name in ops) and "linear_scan" in ops


def test_list_has_no_colour_and_fits_80_columns(call, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    said = call("list", "ops")
    assert "\x1b" not in said.out and max(map(len, said.out.splitlines())) <= 80


def test_explain_names_the_backend_that_runs(call):
    said = call("explain", "linear_scan", "--shape", "2,9,3")
    x = torch.ones(2, 9, 3)
    first = ops["linear_scan"].choose(None, (x, x, x[:, 0]), {})
    taken = [line.split()[0] for line in said.out.splitlines() if "this one" in line]
    assert taken == [first.name]
    assert "(2, 9, 3)" in said.out and "float32 on cpu" in said.out


def test_explain_says_why_not(call):
    said = call("explain", "linear_scan", "--shape", "2,9,3", "--dtype", "complex128")
    told = {line.split()[0]: line for line in said.out.splitlines() if line.strip()}
    for name, reason in reasons(torch.complex128).items():
        assert ("no: " + reason)[:20] in told[name] if reason != "ok" else "no: " not in told[name]
    with use_backend("reference"):
        said = call("explain", "linear_scan", "--shape", "2,9,3")
    assert "reference" in [line.split()[0] for line in said.out.splitlines() if "this one" in line]


def reasons(dtype):
    x = torch.ones(2, 9, 3, dtype=dtype)
    return ops["linear_scan"].explain(a=x, x=x, h0=x[:, 0])


def test_explain_of_a_layer_counts_what_is_there(call):
    layer = LRU(width=6, hidden=7)
    said = call("explain", "lru", "--shape", "2,9,6", "--args", "hidden=7", "--args", "width=6")
    assert said.code == 0, said
    assert f"parameters  {sum(p.numel() for p in layer.parameters())}\n" in said.out
    assert f"state       {show_bytes(nbytes(layer.initial_state(1)))} per stream" in said.out
    assert "linear_scan" in said.out and "h_t = lam h_{t-1}" in said.out


def test_recording_sees_every_call_and_then_lets_go():
    layer, x = LRU(width=3, hidden=4), torch.ones(1, 5, 3)
    with recorded() as calls:
        layer(x)
        layer(x)
    (call,) = calls.values()
    assert (call.op, call.times) == ("linear_scan", 2)
    layer(x)
    assert call.times == 2


OWN = '''
import torch
from statewise.core import Cell

class Leaky(Cell):
    """h_t = h_{t-1} / 2 + x_t; y_t = h_t."""
    def __init__(self, width: int):
        super().__init__()
        if width < 1: raise ValueError(f"width {width}; expected at least 1")
        self.width = self.out_width = width
        self.gain = torch.nn.Parameter(torch.ones(width))
    def initial_state(self, batch):
        return self.gain.new_zeros(batch, self.width, dtype=torch.promote_types(self.gain.dtype, torch.float32))
    def transition(self, u, state):
        h = state / 2 + u * self.gain
        return h, h
    def decode(self, o, x):
        return o.to(x.dtype)

class Forgets(Leaky):
    """As Leaky, but forward forgets what it did every other step."""
    def scan(self, u, state, reset, lengths):
        y, last = super().scan(u, state, reset, lengths)
        return y, last * 0
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_layers_of_a_user.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.timeout(300)
def test_check_tells_a_good_layer_from_a_broken_one(own, call):
    good = call("check", "own_layers_of_a_user:Leaky", "--args", "width=3")
    bad = call("check", "own_layers_of_a_user:Forgets", "--args", "width=3")
    assert good.code == 0, good.out
    assert "conforms" in good.out and "FAILED" not in good.out
    assert bad.code == 1 and "does not conform" in bad.out and "FAILED" in bad.out and "the law:" in bad.out


def test_bench_layers_measures_every_way(call, tmp_path):
    words = ["--layers", "gru,lru", "--shape", "2,8,4", "--repeats", "2", "--json", tmp_path / "rows.json"]
    said = call("bench", "layers", *words)
    assert said.code == 0, said
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["layer"], r["way"]) for r in rows if r["way"] in ("ours", "loop", "torch.nn")] == [
        ("gru", "ours"), ("gru", "loop"), ("gru", "torch.nn"), ("lru", "ours"), ("lru", "loop"),
    ]  # fmt: skip
    for row in rows:
        assert row["forward"] > 0 and row["training"] > 0 and row["parameters"] > 0
        assert row["first"] is None if row["way"] == "loop" else row["first"] > 0
    assert rows[0]["step"] > 0 and rows[0]["state"] == 16
    assert "load average" in said.out and "torch.nn" in said.out


def test_bench_reports_a_contender_that_fails(monkeypatch):
    monkeypatch.setattr("statewise.bench.layers.TORCH", {"gru": lambda *a, **k: Fails()})
    rows = bench_layers(["gru"], shape=(1, 3, 2), repeats=1, loop=False, peers=False, first_call=False)
    assert [row.get("failed") for row in rows] == [None, "not today"] and "forward" not in rows[1]


def test_bench_reports_a_peer_that_cannot_be_made(monkeypatch):
    def broken(width):
        raise ImportError("no S5 in it")

    peers = {"gru": ("json", broken)}  # a package that is there
    monkeypatch.setattr("statewise.bench.layers.PEERS", peers)
    quick = partial(bench_layers, ["gru"], shape=(1, 3, 2), repeats=1, loop=False, first_call=False)
    rows = quick()
    assert [(row["way"], row.get("failed")) for row in rows][-1] == ("json", "no S5 in it")
    peers["gru"] = ("json", lambda width: torch.nn.GRU(width, width, batch_first=True))
    assert quick()[-1]["training"] > 0


class Fails(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("not today\nor ever")


def test_units_are_those_of_the_data():
    def encode(values, **fields):
        return Units("regression", len(values), None, 1, **fields).encode(values, None)[0].tolist()

    assert encode([1.5, 4.0], shift=(1.0, 2.0), scale=(10.0, 0.5)) == [5.0, 1.0]
    assert encode([128.0, 130.0], shift=(128.0,), scale=(0.5,)) == [0.0, 1.0]
    assert encode([3.0]) == [3.0]


@pytest.fixture
def tone(tmp_path):
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(16000)
        sound.writeframes(b"".join(struct.pack("<h", int(8000 * math.sin(t / 9))) for t in range(1700)))
    return path


def test_speech_from_a_file_is_speech_from_a_pipe(tone, call):
    said = call("stream", "silero_vad", tone)
    if said.code == 3 and "data get silero_vad" in said.err:
        pytest.skip("the weights of silero-vad are not on this machine: statewise data get silero_vad")
    assert said.code == 0, said
    assert [line.split()[0] for line in said.out.splitlines()] == ["0.000", "0.032", "0.064", "0.096"]
    assert all(0 <= float(line.split()[1]) <= 1 for line in said.out.splitlines())
    assert call("stream", "silero_vad", stdin=tone.read_bytes()[44:]).out == said.out


def test_wrong_audio_is_one_line(tmp_path, call):
    (tmp_path / "no.wav").write_bytes(b"RIFF but no more")
    said = call("stream", "silero_vad", tmp_path / "no.wav")
    assert said.code == 3 and said.err.count("\n") == 1
    said = call("stream", "some_run", tmp_path / "no.wav")
    assert said.code == 2 and "silero_vad" in said.err and said.err.count("\n") == 1
