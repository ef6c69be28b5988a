"""step, out of Python: ONNX for any runtime, or torch.export for torch without this package."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import RecurrentLayer, Step, UsageError, leaves, names
from ..core.files import replace_file
from ..core.layer import weight_of

Format = Literal["onnx", "torch"]


def inputs(layer: RecurrentLayer[Any], batch: int) -> tuple[Tensor, ...]:
    """(x, *state) of a first step: zeros, or ids zero, and the initial state."""
    weight = weight_of(layer)
    device = "cpu" if weight is None else weight.device
    if layer.vocab:
        x = torch.zeros(batch, dtype=torch.int64, device=device)
    else:
        x = torch.zeros(batch, layer.width, dtype=torch.float32 if weight is None else weight.dtype, device=device)
    return (x, *leaves(layer.initial_state(batch)))


def state_names(layer: RecurrentLayer[Any]) -> list[str]:
    """A name for every leaf of the state, as in a saved state: "0.conv", "0.h", "1.conv" ..."""
    return names(layer.initial_state(0))


def export_step(layer: RecurrentLayer[Any], path: str | Path, *, format: Format = "onnx") -> dict[str, Any]:
    """Write one step of a layer, or model, to a file, in evaluation mode, with any batch.

    Inputs: x (B,) ids or (B, D), then the leaves of the state, each under its name. Outputs: y (B, E), then the state
    after it, the same names with "next." in front. Returns what is also written into the file as metadata:
    {"state": {name: {"shape": shape of one row, "dtype": ..., "start": a number, where all of it starts so}}}.
    format "onnx": one file, weights inside (below 2 GB); needs onnx and onnxscript. "torch": a torch.export program,
    for `torch.export.load(path).module()`.

    Raises UsageError where a package is missing, a state is complex (ONNX has no complex numbers), or a layer's step
    cannot be traced; DataError or ResourceError where the file cannot be written.
    """
    if format not in ("onnx", "torch"):
        raise UsageError(f"export: format {format!r}; expected 'onnx' or 'torch'")
    if not isinstance(layer, RecurrentLayer):
        raise UsageError(f"export: a {type(layer).__name__}; expected a layer, as statewise.GRU(...).layer() is")
    example, described = inputs(layer, 2), _describe(layer)
    if format == "onnx":
        missing = [p for p in ("onnx", "onnxscript") if importlib.util.find_spec(p) is None]
        if missing:
            raise UsageError(f"export: {' and '.join(missing)} not installed; pip install 'statewise[onnx]'")
        if any(leaf.is_complex() for leaf in example):
            raise UsageError(f"export: {type(layer).__name__} has a complex state, and ONNX no complex numbers")
    training = layer.training
    try:
        write = _onnx if format == "onnx" else _torch
        replace_file(path, [write(Step(layer).eval(), example, described, state_names(layer))])
    finally:
        layer.train(training)
    return described


def _describe(layer: RecurrentLayer[Any]) -> dict[str, Any]:
    """What a runtime must know to start: the shape and the dtype of each leaf for one row, and what it starts with."""
    found = {}
    for name, leaf in zip(state_names(layer), leaves(layer.initial_state(1)), strict=True):
        row: dict[str, Any] = {"shape": list(leaf.shape[1:]), "dtype": str(leaf.dtype).removeprefix("torch.")}
        first = leaf.flatten()[0].item() if leaf.numel() else 0
        if leaf.isfinite().all() and bool((leaf == first).all()) and not leaf.is_complex():
            row["start"] = first
        else:
            row["start"] = [str(v) for v in leaf.flatten().tolist()]
        found[name] = row
    return {"layer": type(layer).__name__, "vocab": layer.vocab, "width": layer.width, "state": found}


def _program(step: Step, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(
                step, example, dynamic_shapes=({0: batch}, tuple({0: batch} for _ in example[1:])), strict=False
            )
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            raise UsageError(f"export: the step of {type(step.layer).__name__} cannot be traced: {words}") from error


def _torch(step: Step, example: tuple[Tensor, ...], described: dict[str, Any], state: list[str]) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.export.save(_program(step, example), buffer, extra_files={"statewise.json": json.dumps(described)})
    return buffer.getvalue()


def _onnx(step: Step, example: tuple[Tensor, ...], described: dict[str, Any], state: list[str]) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages that are not needed
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(
                step,
                example,
                dynamo=True,
                verbose=False,
                input_names=["x", *state],
                output_names=["y", *(f"next.{name}" for name in state)],
                dynamic_shapes=({0: batch}, tuple({0: batch} for _ in state)),
            )
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            raise UsageError(f"export: the step of {type(step.layer).__name__} as ONNX: {words}") from error
    assert made is not None
    model = made.model_proto
    model.metadata_props.add(key="statewise", value=json.dumps(described))
    data: bytes = model.SerializeToString()
    return data
