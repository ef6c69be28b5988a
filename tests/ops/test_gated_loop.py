"""The gated loops: every backend equals the obvious loop, and both equal the rows taken one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError
from statewise.ops import Op, elman_loop, gru_loop, jordan_loop, lstm_loop, use_backend

OPS = {"elman": elman_loop, "gru": gru_loop, "jordan": jordan_loop, "lstm": lstm_loop}
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # beside four times the loop's own error
CASES = [
    (op, backend, dtype, i)
    for op in OPS.values()
    for backend in op.backends
    for dtype in FLOOR
    for i, call in enumerate(op.samples("cpu", torch.float64))
    if op.explain(**call)[backend] == "ok"
]
MASKS = ("reset", "lengths")


def test_something_was_found() -> None:
    assert len(CASES) >= 120 and all("aten" in op.backends for op in OPS.values())


def answers(op: Op, call: dict[str, Any], backend: str) -> list[Tensor]:
    """Outputs and last states, and the gradients of a loss on all of them to every floating input."""
    call = {
        name: value.detach().clone().requires_grad_() if _differentiable(value) else value
        for name, value in call.items()
    }
    outs = op(**call, backend=backend)
    weight = torch.Generator().manual_seed(1)
    loss = sum((t.double() * torch.rand(t.shape, generator=weight).double()).sum() for t in outs)
    wanted = [value for value in call.values() if _differentiable(value)]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*outs, *(torch.zeros_like(v) if g is None else g for v, g in zip(wanted, grads, strict=True))]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def sample(op: Op, dtype: torch.dtype, index: int) -> dict[str, Any]:
    return list(op.samples("cpu", dtype))[index]


@pytest.mark.parametrize(("op", "backend", "dtype", "index"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_backend_equals_reference(op: Op, backend: str, dtype: torch.dtype, index: int) -> None:
    call = sample(op, dtype, index)
    got, same = answers(op, call, backend), answers(op, call, "reference")
    wide = {k: v.double() if _differentiable(v) else v for k, v in call.items()}
    exact = answers(op, wide, "reference")
    for a, b, true in zip(got, same, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        own = (b.double() - true).abs().max().item() if b.numel() else 0.0
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        torch.testing.assert_close(a.double(), true, rtol=0, atol=4 * own + FLOOR[dtype] * scale)


@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize("name", OPS)
def test_rows_and_resets_are_sequences_of_their_own(name: str, backend: str) -> None:
    op = OPS[name]
    call = sample(op, torch.float64, 0)
    batch, steps, width = 6, 20, call["x"].shape[-1]
    x = torch.randn(batch, steps, width, dtype=torch.float64)
    first = {
        k: torch.randn(batch, v.shape[-1], dtype=torch.float64) for k, v in call.items() if k in ("h0", "s0", "c0")
    }
    rest = {k: v for k, v in call.items() if k not in ("x", *first, *MASKS)}
    reset, lengths = torch.rand(batch, steps) < 0.25, torch.tensor([20, 0, 1, 7, 13, 20])
    h, *last = op(x=x, **first, **rest, reset=reset, lengths=lengths, backend=backend)
    for b in range(batch):
        end = int(lengths[b])
        cuts = [0, *(t for t in range(1, end) if reset[b, t]), end]
        state = {k: v[b : b + 1] for k, v in first.items()}
        for start, stop in itertools.pairwise(cuts):
            if stop > start and reset[b, start]:
                state = {k: torch.zeros_like(v) for k, v in state.items()}
            if stop > start:
                y, *new = op(x=x[b : b + 1, start:stop], **state, **rest, backend="reference")
                state = dict(zip(state, new, strict=True))
                torch.testing.assert_close(h[b, start:stop], y[0], atol=1e-12, rtol=1e-12)
        assert not h[b, end:].any()
        for got, want in zip(last, state.values(), strict=True):
            torch.testing.assert_close(got[b], want[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_with_resets_and_lengths(name: str) -> None:
    op = OPS[name]
    call = next(c for c in op.samples("cpu", torch.float64) if "reset" in c and "lengths" in c)
    names = [k for k, v in call.items() if _differentiable(v)]
    rest = {k: v for k, v in call.items() if k not in names}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return op(**dict(zip(names, values, strict=True)), **rest, backend="aten")

    torch.autograd.gradcheck(run, [call[k].clone().requires_grad_() for k in names], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", OPS)
def test_compiles_whole_with_gradients(name: str, masked: bool) -> None:
    op = OPS[name]
    call = next(c for c in op.samples("cpu", torch.float64) if ("reset" in c and "lengths" in c) == masked)
    with use_backend("aten"):
        plain = answers(op, call, "aten")
    names = [k for k, v in call.items() if _differentiable(v)]
    rest = {k: v for k, v in call.items() if k not in names}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return op(**dict(zip(names, values, strict=True)), **rest)

    values = [call[k].clone().requires_grad_() for k in names]
    outs = torch.compile(run, fullgraph=True, backend="aot_eager")(*values)
    weight = torch.Generator().manual_seed(1)
    loss = sum((t * torch.rand(t.shape, generator=weight).double()).sum() for t in outs)
    for a, b in zip([*outs, *torch.autograd.grad(loss, values)], plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
def test_the_opaque_op_keeps_its_promises(name: str) -> None:
    op = OPS[name]
    call = next(c for c in op.samples("cpu", torch.float64) if "reset" in c and "lengths" in c)
    state = [call[k].requires_grad_() for k in ("h0", "c0") if k in call]
    weights = [call[k].requires_grad_() for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if k in call]
    kernel = {"elman": "rnn_tanh", "gru": "gru", "lstm": "lstm"}[name]
    x = call["x"].requires_grad_()
    for masks in ((None, None), (call["reset"], call["lengths"])):
        torch.library.opcheck(torch.ops.statewise.gated_loop, (kernel, x, state, weights, *masks))


def test_compiled_length_is_not_unrolled() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    w = torch.randn(4, 4)
    run = torch.compile(lambda x: elman_loop(x, torch.zeros(1, 4), w, w), fullgraph=True, backend=count, dynamic=False)
    for steps in (2, 200):
        run(torch.randn(1, steps, 4))
    assert graphs[0] == graphs[1] < 30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 5)}, r"expected \(B, T, D\)"),
        ({"h0": torch.zeros(3, 4)}, r"expected \(B, T, D\)"),
        ({"h0": torch.zeros(2, 4, dtype=torch.bfloat16)}, "float32 or wider"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.float64)}, "float32 or wider"),
        ({"w_ih": torch.zeros(4, 2)}, r"w_ih is \(4, 2\); expected \(4, 3\)"),
        ({"w_hh": torch.zeros(4, 3)}, r"w_hh is \(4, 3\); expected \(4, 4\)"),
        ({"reset": torch.zeros(2, 5)}, "expected bool"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"expected \(2,\)"),
        ({"nonlinearity": "relux"}, "'tanh' or 'relu'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    call = {"x": torch.zeros(2, 5, 3), "h0": torch.zeros(2, 4), "w_ih": torch.zeros(4, 3), "w_hh": torch.zeros(4, 4)}
    elman_loop(**call)
    with pytest.raises(UsageError, match=words):
        elman_loop(**(call | change))


def test_explain_names_what_would_run() -> None:
    call = sample(gru_loop, torch.float32, 0)
    assert gru_loop.explain(**call)["aten"] == "ok"
    call = next(c for c in jordan_loop.samples("cpu", torch.float32) if c.get("decay"))
    assert jordan_loop.explain(**call)["aten"] == "decay 0.5 (only 0)"


def test_another_device_has_its_reason() -> None:
    call = sample(gru_loop, torch.float32, 0)
    assert "meta" in gru_loop.explain(**{k: v.to("meta") for k, v in call.items()})["aten"]


def test_autocast_leaves_the_recurrence_alone() -> None:
    for name, op in OPS.items():
        call = sample(op, torch.float32, 0)
        for backend in ("reference", "aten"):
            want = op(**call, backend=backend)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = op(**call, backend=backend)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), (name, backend)
