"""Every op x backend x dtype x sample: values and gradients, through every output.

A backend may be as wrong as a small multiple of the reference in the same dtype, both measured against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.core import leaves, tree_map, wide
from statewise.ops import Op, ops

CASES = [
    pytest.param(
        op,
        name,
        dtype,
        id=f"{op.name}-{name}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.slow] * (dtype == torch.float16),  # cast at the borders as bfloat16 is
    )
    for op in ops.values()
    for name, backend in op.backends.items()
    if "cpu" in backend.devices and "triton" not in backend.requires  # test_triton.py
    for dtype in backend.dtypes
]


def test_cases_were_found():
    assert len([case for case in CASES if case.values[0].name == "linear_scan"]) == 12


# (op, result) that is the difference of numbers as large as the other results: the gradient to softmax_scan's m.
CANCELLING = {("softmax_scan", 6)}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tree_map(lambda leaf: _cast(leaf, dtype), value)
    return value.to(dtype) if _numeric(value) else value


def _numeric(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _trainable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tree_map(_trainable, value)
    return value.detach().requires_grad_() if _numeric(value) else value


def _outcome(run: Any, sample: dict[str, Any]) -> list[Tensor]:
    """The outputs and the gradients of every floating input, each output weighted by fixed random numbers."""
    inputs = {k: _trainable(v) for k, v in sample.items()}
    wanted = [t for v in inputs.values() if isinstance(v, Tensor | tuple) for t in leaves(v) if t.requires_grad]
    outs = leaves(run(**inputs))
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=rng, dtype=torch.float64) for out in outs]
    loss = sum((out * w).abs().sum() + (out * w).real.sum() for out, w in zip(outs, weights, strict=True))
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*(o.detach() for o in outs), *(torch.zeros_like(v) if g is None else g for v, g in zip(wanted, grads))]


@pytest.mark.parametrize("op, backend, dtype", CASES)
def test_equals_the_reference(op: Op, backend: str, dtype: torch.dtype):
    assert check(op, backend, dtype) >= 5


def check(op: Op, backend: str, dtype: torch.dtype, keep: Callable[[dict[str, Any]], bool] = bool) -> int:
    """Try every sample that is kept and return how many there were."""
    exact_dtype = torch.complex128 if dtype.is_complex else torch.float64
    found = 0
    for number, sample in enumerate(filter(keep, op.samples("cpu", dtype))):
        if op.backends[backend].why_not((), sample) is not None:
            continue
        exact = _outcome(op.reference, {k: _cast(v, exact_dtype) for k, v in sample.items()})
        usual = _outcome(op.reference, sample)
        got = _outcome(lambda **inputs: op(**inputs, backend=backend), sample)
        for k, (mine, reference, truth) in enumerate(zip(got, usual, exact, strict=True)):
            assert mine.dtype == reference.dtype and mine.shape == reference.shape, (number, k)
            if not mine.numel():
                continue
            scale = float(truth.abs().max()) + 1e-30
            if (op.name, k) in CANCELLING:
                scale = max(float(t.abs().max()) for t in exact if t.numel())
            allowed = 4 * float((reference - truth).abs().max()) + 128 * torch.finfo(wide(dtype)).eps * scale
            error = float((mine - truth).abs().max())
            assert error <= allowed, f"sample {number}, result {k}: error {error:.3g}, allowed {allowed:.3g}"
        found += 1
    return found


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in ops.values()])
def test_no_result_is_an_input(op: Op):
    """What is done to one in place would change the other. Where there are no steps the state is a copy."""
    empty = 0
    for number, call in enumerate(op.samples("cpu", torch.float32)):
        given = {t.untyped_storage().data_ptr() for v in call.values() if v is not None for t in _tensors(v)}
        given.discard(0)
        empty += any(0 in t.shape[:2] for v in call.values() if v is not None for t in _tensors(v))
        for name in ("reference", *op.backends):
            if name == "reference" or op.backends[name].why_not((), call) is None:
                for k, out in enumerate(leaves(op(**call, backend=name))):
                    shared = out.numel() and out.untyped_storage().data_ptr() in given
                    assert not shared, f"sample {number}, {name}, result {k}"
    assert empty >= 2


def _tensors(value: Any) -> list[Tensor]:
    return leaves(value) if isinstance(value, Tensor | tuple) else []


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in ops.values()])
def test_doctest(op: Op):
    import doctest
    import sys

    module = sys.modules[op.reference.__module__]
    tests = doctest.DocTestFinder(recurse=False).find(op.reference, op.name, globs=vars(module) | {op.name: op})
    runner = doctest.DocTestRunner()
    results = [runner.run(test) for test in tests]
    assert sum(r.attempted for r in results) > 0 and sum(r.failed for r in results) == 0
