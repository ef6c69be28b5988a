"""Compile and export: one graph, the same numbers."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import Any

import torch

from ...core import Step, leaves
from ..check import Skipped, check
from ..sample import Layer, close, inputs, mask, warm

STEPS = 4


@check("compile")
def check_forward_compiles(layer: Layer) -> None:
    """torch.compile(fullgraph=True) of forward, resets included, gives outputs, state and gradients of eager."""
    x, first = inputs(layer, STEPS), warm(layer)
    given = {"reset": mask(STEPS, (0, 2), (1, 0))} if layer.traits.resets else {}
    if not layer.vocab:
        x.requires_grad_()
    (got, after), (want, last) = _compiled(layer)(x, first, **given), layer(x, first, **given)
    close(got, want, "compiled, forward gives another output")
    close(after, last, "compiled, forward leaves another state")
    if x.requires_grad and want.requires_grad:
        for g, w in zip(torch.autograd.grad(got.sin().sum(), x), torch.autograd.grad(want.sin().sum(), x)):
            close(g, w, "compiled, forward gives another gradient", 1e-9)


@check("compile")
def check_lengths_compile(layer: Layer) -> None:
    """torch.compile(fullgraph=True) of forward with lengths gives the outputs and the state of eager."""
    x, ends = inputs(layer, STEPS), torch.tensor([STEPS, 0, 2])
    with torch.no_grad():
        (got, after), (want, last) = _compiled(layer)(x, lengths=ends), layer(x, lengths=ends)
    close(got, want, "compiled with lengths, forward gives another output")
    close(after, last, "compiled with lengths, forward leaves another state")


@check("compile")
def check_step_compiles(layer: Layer) -> None:
    """torch.compile(fullgraph=True) of step gives the outputs and the state of eager."""
    x, first = inputs(layer, STEPS)[:, 0], warm(layer)
    with torch.no_grad():
        (got, after), (want, last) = _compiled(layer.step)(x, first), layer.step(x, first)
    close(got, want, "compiled, step gives another output")
    close(after, last, "compiled, step leaves another state")


@check("compile")
def check_step_exports(layer: Layer) -> None:
    """torch.export of step, states in and out, any batch: run at another batch it gives the numbers of eager."""
    first = warm(layer)
    batch = torch.export.Dim.AUTO
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                Step(layer).eval(),
                (inputs(layer)[:, 0], *leaves(first)),
                dynamic_shapes=({0: batch}, tuple({0: batch} for _ in leaves(first))),
            ).module()
    except Exception as error:
        raise AssertionError(f"step cannot be exported: {_short(error)}") from error
    x, state = inputs(layer, batch=5, seed=3)[:, 0], warm(layer, 5)
    y, *after = program(x, *leaves(state))
    want, last = layer.step(x, state)
    close(y, want, "exported, step gives another output")
    close(tuple(after), tuple(leaves(last)), "exported, step leaves another state")


@check("compile", slow=True)
def check_step_exports_to_onnx(layer: Layer) -> None:
    """step as an ONNX model, states in and out, gives the numbers of eager in float32 to 1e-4."""
    if missing := [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]:
        raise Skipped(f"{', '.join(missing)} not installed")
    layer = layer.float()
    first, x = warm(layer), inputs(layer)[:, 0]
    if any(s.is_complex() for s in leaves(first)):
        raise Skipped("ONNX has no complex numbers")
    import onnxruntime

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Step(layer).eval(), (x, *leaves(first)), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), (x, *leaves(first)), strict=False)}
    y, *after = (torch.from_numpy(a) for a in session.run(None, given))
    want, last = layer.step(x, first)
    close(y, want, "as ONNX, step gives another output", 1e-4)
    close(tuple(after), tuple(leaves(last)), "as ONNX, step leaves another state", 1e-4)


def _compiled(function: Any) -> Any:
    """function as one graph; a graph break or a crash of the tracer fails in words."""
    torch._dynamo.reset()
    run = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
            try:
                return run(*args, **kwargs)
            except Exception as error:
                raise AssertionError(f"torch.compile(fullgraph=True) fails: {_short(error)}") from error

    return call


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
