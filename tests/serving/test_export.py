"""An exported step streams like the one it came from."""

from __future__ import annotations

import json

import pytest
import torch

import statewise.layers  # noqa: F401  registers them
from statewise.core import Step, UsageError, layers, leaves, stream
from statewise.models import LanguageModel
from statewise.serving import export_step, state_names

STREAMED = [
    "gru",
    "lstm",
    "lru",
    "min_gru",
    "mamba",
    "mamba2",
    "gla",
    "mlstm",
    "delta_net",
    "rwkv7",
    "window_attention",
]


def tiny(name: str):
    torch.manual_seed(0)
    return LanguageModel(name, width=16, depth=2, mlp=1.0).build(x_vocab=11, y_width=11).eval()


def run_onnx(path, model, ids):
    """ids (T, B) one by one through onnxruntime, its states fed back: y (T, B, V)."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options)
    meta = json.loads(session.get_modelmeta().custom_metadata_map["statewise"])
    assert [i.name for i in session.get_inputs()] == ["x", *state_names(model)]
    assert [o.name for o in session.get_outputs()] == ["y", *(f"next.{n}" for n in state_names(model))]
    state = {n: np.full((ids.shape[1], *s["shape"]), s["start"], s["dtype"]) for n, s in meta["state"].items()}
    outs = []
    for x in ids.numpy():
        y, *after = session.run(None, {"x": x, **state})
        state = dict(zip(state, after, strict=True))
        outs.append(torch.from_numpy(y))
    return torch.stack(outs)


def streams_alike(name: str, steps: int, path) -> None:
    if any(leaf.is_complex() for leaf in leaves(tiny(name).initial_state(1))):
        with pytest.raises(UsageError, match="complex"):
            export_step(tiny(name), path)
        return
    model = tiny(name)
    export_step(model, path)
    ids = torch.randint(
        11, (steps, 3), generator=torch.Generator().manual_seed(1)
    )  # another batch than it was made with
    got = run_onnx(path, model, ids)
    with torch.no_grad():
        want = torch.stack([y for y, _ in stream(model, ids.unbind())])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


onnx = pytest.mark.skipif(
    not all(__import__("importlib.util").util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)


@onnx
@pytest.mark.parametrize("name", ["gru", "mamba", "mamba2", "window_attention"])
def test_onnx_streams_alike(name, tmp_path):
    streams_alike(name, 300, tmp_path / "m.onnx")


@onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_onnx_streams_alike_for_ten_thousand_steps(name, tmp_path):
    streams_alike(name, 10_000, tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["gru", "mamba2"])
def test_torch_export_streams_alike(name, tmp_path):
    model, path = tiny(name), tmp_path / "m.pt2"
    export_step(model, path, format="torch")
    extra = {"statewise.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    described = json.loads(extra["statewise.json"])
    ids = torch.randint(11, (300, 3), generator=torch.Generator().manual_seed(1))
    state = [torch.full((3, *s["shape"]), s["start"]) for s in described["state"].values()]
    outs = []
    with torch.no_grad():
        for x in ids:
            y, *state = program(x, *state)
            outs.append(y)
        want = torch.stack([y for y, _ in stream(model, ids.unbind())])
    torch.testing.assert_close(torch.stack(outs), want, rtol=1e-4, atol=1e-5)


def test_the_mode_is_left_as_it_was_and_what_starts_unevenly_is_written_down(tmp_path):
    model = tiny("gru").train()
    described = export_step(model, tmp_path / "m.pt2", format="torch")
    assert model.training and set(described["state"]) == set(state_names(model))
    y, *after = Step(model)(torch.tensor([1]), *leaves(model.initial_state(1)))
    assert y.shape == (1, 11) and len(after) == len(described["state"])


def test_what_can_not_be_exported_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="format"):
        export_step(tiny("gru"), tmp_path / "m", format="tflite")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"statewise\[onnx\]"):
        export_step(tiny("gru"), tmp_path / "m")


def test_every_layer_was_thought_of():
    assert set(STREAMED) <= {info.name for info in layers}
