"""The gated loops: every backend equals the obvious loop, and both equal the rows taken one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError
from statewise.ops import Op, elman_loop, gru_loop, jordan_loop, lstm_loop, slstm_loop
from statewise.ops.gated_loop import (
    cells,
    elman_step,
    fresh_slstm,
    gru_step,
    in_numba,
    lstm_step,
    slstm_step,
)  # fmt: skip

OPS = {"elman": elman_loop, "gru": gru_loop, "jordan": jordan_loop, "lstm": lstm_loop, "slstm": slstm_loop}
COMPILED = {name: op for name, op in OPS.items() if "numba" in op.backends and name != "jordan"}
RUNS = [(name, backend) for name, op in OPS.items() for backend in op.backends if backend != "triton"]
FLOOR = 1e-6  # beside four times the loop's own error
MASKS = ("reset", "lengths")
STATE = ("h0", "s0", "c0", "n0", "m0")


def test_something_was_found() -> None:
    assert len(COMPILED) == 4 and len(RUNS) == 9


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


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_backend_equals_reference(name: str, backend: str) -> None:
    """In single precision closer than test_backends.py asks for; the other types are tried there."""
    op, tried = OPS[name], 0
    for number, call in enumerate(op.samples("cpu", torch.float32)):
        if op.explain(**call)[backend] != "ok":
            continue
        got, same = answers(op, call, backend), answers(op, call, "reference")
        exact = answers(op, {k: v.double() if _differentiable(v) else v for k, v in call.items()}, "reference")
        for k, (a, b, true) in enumerate(zip(got, same, exact, strict=True)):
            own = (b.double() - true).abs().max().item() if b.numel() else 0.0
            scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
            error = (a.double() - true).abs().max().item() if a.numel() else 0.0
            assert error <= 4 * own + FLOOR * scale, f"sample {number}, result {k}: error {error:.3g}"
        tried += 1
    assert tried >= 11


@pytest.mark.parametrize(("name", "backend"), [*RUNS, *((name, "reference") for name in OPS)])
def test_rows_and_resets_are_sequences_of_their_own(name: str, backend: str) -> None:
    op = OPS[name]
    call = sample(op, torch.float64, 0)
    batch, steps, width = 6, 20, call["x"].shape[-1]
    x = torch.randn(batch, steps, width, dtype=torch.float64)
    first = {k: torch.randn(batch, v.shape[-1], dtype=torch.float64) for k, v in call.items() if k in STATE}
    rest = {k: v for k, v in call.items() if k not in ("x", *first, *MASKS)}
    reset, lengths = torch.rand(batch, steps) < 0.25, torch.tensor([20, 0, 1, 7, 13, 20])
    h, *last = op(x=x, **first, **rest, reset=reset, lengths=lengths, backend=backend)
    for b in range(batch):
        end = int(lengths[b])
        cuts = [0, *(t for t in range(1, end) if reset[b, t]), end]
        state = {k: v[b : b + 1] for k, v in first.items()}
        for start, stop in itertools.pairwise(cuts):
            if stop > start and reset[b, start]:
                state = fresh_state(state)
            if stop > start:
                y, *new = op(x=x[b : b + 1, start:stop], **state, **rest, backend="reference")
                state = dict(zip(state, new, strict=True))
                torch.testing.assert_close(h[b, start:stop], y[0], atol=1e-12, rtol=1e-12)
        assert not h[b, end:].any()
        for got, want in zip(last, state.values(), strict=True):
            torch.testing.assert_close(got[b], want[0], atol=1e-12, rtol=1e-12)


def fresh_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "m0" in state:
        return dict(zip(state, fresh_slstm(*state["h0"].shape, like=state["h0"]), strict=True))
    return {k: torch.zeros_like(v) for k, v in state.items()}


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_gradcheck_with_resets_and_lengths(name: str, backend: str) -> None:
    op = OPS[name]
    call = next(c for c in op.samples("cpu", torch.float64) if "reset" in c and "lengths" in c)
    names = [k for k, v in call.items() if _differentiable(v)]
    rest = {k: v for k, v in call.items() if k not in names}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return op(**dict(zip(names, values, strict=True)), **rest, backend=backend)

    torch.autograd.gradcheck(run, [call[k].clone().requires_grad_() for k in names], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "backend", "masked"), [*((*run, True) for run in RUNS), ("lstm", "numba", False), ("lstm", "aten", False)]
)
def test_compiles_whole_with_gradients(name: str, backend: str, masked: bool) -> None:
    op = OPS[name]
    call = next(c for c in op.samples("cpu", torch.float64) if ("reset" in c and "lengths" in c) == masked)
    plain = answers(op, call, backend)
    names = [k for k, v in call.items() if _differentiable(v)]
    rest = {k: v for k, v in call.items() if k not in names}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return op(**dict(zip(names, values, strict=True)), **rest, backend=backend)

    values = [call[k].clone().requires_grad_() for k in names]
    torch._dynamo.reset()  # the same code was traced for other operations
    outs = torch.compile(run, fullgraph=True, backend="aot_eager")(*values)
    weight = torch.Generator().manual_seed(1)
    loss = sum((t * torch.rand(t.shape, generator=weight).double()).sum() for t in outs)
    for a, b in zip([*outs, *torch.autograd.grad(loss, values)], plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["gru", "lstm"])  # of one state and of two
def test_the_opaque_op_keeps_its_promises(name: str) -> None:
    op = OPS[name]
    call = next(c for c in op.samples("cpu", torch.float64) if "reset" in c and "lengths" in c)
    state = [call[k].requires_grad_() for k in ("h0", "c0") if k in call]
    weights = [call[k].requires_grad_() for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if k in call]
    x = call["x"].requires_grad_()
    for masks in ((None, None), (call["reset"], call["lengths"])):
        torch.library.opcheck(torch.ops.statewise.gated_loop, (name, x, state, weights, *masks))


@pytest.mark.parametrize("kind", {cell[1:5]: kind for kind, cell in in_numba.CELLS.items()}.values())  # by shapes
def test_the_compiled_op_keeps_its_promises(kind: str) -> None:
    gates, parts = in_numba.CELLS[kind].gates, in_numba.CELLS[kind].parts
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64).requires_grad_()
    x, w_ih, w_hh, b, first = (
        random(*s) for s in ((3, 5, 2), (gates * 4, 2), (2, gates * 2, 2), (gates * 4,), (parts, 3, 4))
    )
    bias = random(4) if kind == "gru" else None
    reset, ends = torch.rand(3, 5) < 0.3, torch.tensor([5, 5, 5])  # past an end, what is kept is whatever it was
    args = (x, w_ih, w_hh, b, bias, first, reset, ends, kind, 0.5)
    torch.library.opcheck(torch.ops.statewise.gated_loop_numba.default, args)


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
    assert gru_loop.explain(**call)["numba"] == gru_loop.explain(**call)["aten"] == "ok"
    few = {k: torch.zeros(16, 9, 8) if k == "x" else torch.zeros(16, 8) for k in ("x", "h0", "c0")}
    few |= {"w_ih": torch.zeros(32, 8), "w_hh": torch.zeros(32, 8)}
    assert lstm_loop.explain(**few)["numba"].startswith("9 steps of 16 rows of 8 units")
    assert lstm_loop.explain(**few, reset=torch.zeros(16, 9, dtype=torch.bool))["numba"] == "ok"
    assert lstm_loop.explain(**(few | {"w_hh": torch.zeros(2, 16, 4)}))["numba"] == "ok"
    call = next(c for c in jordan_loop.samples("cpu", torch.float32) if c.get("decay"))
    assert jordan_loop.explain(**call)["aten"] == "decay 0.5 (only 0)"


def test_another_device_has_its_reason() -> None:
    call = sample(gru_loop, torch.float32, 0)
    assert "meta" in gru_loop.explain(**{k: v.to("meta") for k, v in call.items()})["aten"]


def test_autocast_leaves_the_recurrence_alone() -> None:
    for name, backend in [*RUNS, *((name, "reference") for name in OPS)]:
        call = sample(OPS[name], torch.float32, 0)
        want = OPS[name](**call, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = OPS[name](**call, backend=backend)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), (name, backend)


@pytest.mark.parametrize("name", COMPILED)
def test_heads_are_a_block_diagonal_matrix(name: str) -> None:
    op = OPS[name]
    for call in op.samples("cpu", torch.float64):
        w = call["w_hh"]
        if w.ndim == 3:
            heads, rows, size = w.shape
            dense = torch.zeros(rows // size, heads, size, heads, size, dtype=w.dtype)
            for h in range(heads):
                dense[:, h, :, h] = w[h].view(-1, size, size)
            plain = call | {"w_hh": dense.view(rows * heads, heads * size)}
            for a, b in zip(op(**call, backend="numba"), op(**plain, backend="reference"), strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("plan", [(2, 1, 2), (3, 1, 2), (1, 2, 1), (2, 2, 1), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_threads_change_nothing(name: str, plan: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they share out rows, heads or units: groups, members of a team, teams."""
    op, torch_rng = OPS[name], torch.Generator().manual_seed(0)
    gates = {"elman": 1, "gru": 3}.get(name, 4)
    x = torch.randn(3, 9, gates * 48, generator=torch_rng, dtype=torch.float64)
    w = torch.randn(gates * 48, 48, generator=torch_rng, dtype=torch.float64) / 5
    reset, lengths = torch.rand(3, 9, generator=torch_rng) < 0.2, torch.tensor([9, 4, 0])
    h0 = torch.randn(3, 48, generator=torch_rng, dtype=torch.float64)
    states = {"slstm": fresh_slstm(3, 48, like=h0), "lstm": (h0, h0)}.get(name, (h0,))
    names = dict(zip(STATE[:1] + STATE[2:], states, strict=False))
    call = {"x": x, **names, "w_ih": None, "w_hh": w, "reset": reset, "lengths": lengths}
    alone = answers(op, call, "numba")
    monkeypatch.setattr(in_numba, "_plan", lambda *_: in_numba._Plan(*plan))
    for a, b in zip(answers(op, call, "numba"), alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("near", [1, 3000], ids=["step by step", "a few steps"])
@pytest.mark.parametrize("name", COMPILED)
def test_stretches_of_time_change_nothing(name: str, near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward, and forward without gradients, keep the gates of a stretch at a time: here of less than all."""
    op = OPS[name]
    calls = [c for c in op.samples("cpu", torch.float64) if ("lengths" in c or "reset" in c) and "w_hr" not in c]
    assert len(calls) >= 4
    for call in calls:
        want = answers(op, call, "numba")
        with monkeypatch.context() as patch:
            patch.setattr(in_numba, "NEAR", near)
            got, without = answers(op, call, "numba"), op(**call, backend="numba")
        for a, b in zip([*got, *without], [*want, *want[: len(without)]], strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("name", "backend"), [*RUNS, *((name, "reference") for name in OPS)])
def test_what_is_no_number_stays_in_its_row_and_future(name: str, backend: str) -> None:
    op = OPS[name]
    call = sample(op, torch.float64, 0)
    call["x"] = torch.cat([call["x"]] * 4)
    call |= {k: torch.cat([call[k]] * 4) for k in STATE if k in call}
    want = op(**call, backend=backend)
    for bad in (torch.nan, torch.inf):
        x = call["x"].clone()
        x[2, 3] = bad
        got = op(**(call | {"x": x}), backend=backend)
        keep = torch.arange(8) != 2
        assert torch.equal(got[0][keep], want[0][keep]) and torch.equal(got[0][2, :3], want[0][2, :3])
        assert all(torch.equal(a[keep], b[keep]) for a, b in zip(got[1:], want[1:], strict=True))
        if bad != bad:
            assert got[0][2, 3:].isnan().all()


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_slstm_is_its_unstabilised_form_in_any_scale(backend: str) -> None:
    """c_t = e^f c_{t-1} + e^i tanh(z), n_t alike, h_t = s(o) c_t / n_t; a state at another scale means the same."""
    torch.manual_seed(0)
    u, r = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
    h = c = n = torch.zeros(2, 4, dtype=torch.float64)
    hs = []
    for t in range(7):
        i, f, z, o = (u[:, t] + h @ r.T).chunk(4, -1)
        c, n = f.exp() * c + i.exp() * z.tanh(), f.exp() * n + i.exp()
        h = o.sigmoid() * c / n
        hs.append(h)
    fresh = fresh_slstm(2, 4, like=u)
    got = slstm_loop(u, *fresh, None, r, forget="exp", backend=backend)
    torch.testing.assert_close(got[0], torch.stack(hs, 1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got[2] * got[4].exp(), c, atol=1e-12, rtol=1e-12)
    _, h, c, n, m = slstm_loop(u[:, :3], *fresh, None, r, forget="exp", backend=backend)
    other = slstm_loop(u[:, 3:], h, c * 8, n * 8, m - math.log(8), None, r, forget="exp", backend=backend)
    torch.testing.assert_close(other[0], got[0][:, 3:], atol=1e-12, rtol=1e-12)
    assert slstm_step(u[:, 0], *fresh, None, r).n.min() >= 1


def test_a_row_that_ends_large_leaves_gradients_their_digits() -> None:
    """What stands before a row in memory is the end of another, whose size is none of its business."""
    call = sample(elman_loop, torch.float32, 0) | {"nonlinearity": "relu"}
    call |= {name: value.abs() for name, value in call.items() if _differentiable(value)}  # every unit is active
    call["x"][0, -1] = 1e30
    got, want = (answers(elman_loop, call, backend) for backend in ("numba", "reference"))
    assert want[0][0].max() > 1e29
    at = 2 + [name for name, value in call.items() if _differentiable(value)].index("w_hh")
    assert want[at].abs().max() < 1e3
    torch.testing.assert_close(got[at], want[at])


@pytest.mark.parametrize("name", COMPILED)
def test_lengths_may_be_a_view(name: str) -> None:
    call = sample(OPS[name], torch.float64, 0)
    for lengths in (torch.tensor([2, 5, 4, 5])[::2], torch.tensor([3]).expand(2)):
        got, want = (OPS[name](**call, lengths=lengths, backend=backend) for backend in ("numba", "reference"))
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_leak_keeps_a_part_of_the_old() -> None:
    call = sample(elman_loop, torch.float64, 0)
    call["x"], call["h0"] = torch.randn(2, 1, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    new, old = elman_loop(**call)[1], call["h0"]
    for backend in ("reference", "numba"):
        torch.testing.assert_close(elman_loop(**call, leak=0.25, backend=backend)[1], 0.75 * old + 0.25 * new)


@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
def test_native_steps_are_the_steps(name: str) -> None:
    native, plain = {
        "elman": (elman_step, cells.elman_step),
        "gru": (gru_step, cells.gru_step),
        "lstm": (lstm_step, cells.lstm_step),
    }[name]
    call = sample(OPS[name], torch.float64, 0)
    state = [call[k] for k in STATE if k in call]
    weights = [call[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    for given in (weights, [*weights[:3], None], [*weights[:2], None, weights[3]]):
        want, got = (step(call["x"][:, 0], *state, *given) for step in (plain, native))
        torch.testing.assert_close(got, want, atol=1e-14, rtol=1e-14)
    each = torch.func.vmap(lambda x: native(x[None], *(s[:1] for s in state), *weights))(call["x"][:, 0])
    want = plain(call["x"][:1, 0], *(s[:1] for s in state), *weights)
    torch.testing.assert_close(each[0][0] if name == "lstm" else each[0], want[0] if name == "lstm" else want)
