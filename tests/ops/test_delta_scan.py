"""Laws of the delta rule, and what its chunked form must stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from statewise.core import UsageError
from statewise.ops import delta_scan, dplr_scan, observe

DECAYS = (0.0, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6, 1.0)


def _inputs(
    batch: int, steps: int, heads: int, keys: int, values: int, *several: int, seed: int = 0, dtype=torch.float64
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    rows = (batch, steps, *several, heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    drawn = {
        "q": normal(batch, steps, heads, keys),
        "k": normalize(normal(*rows, keys), dim=-1),
        "v": normal(*rows, values),
        "beta": 2 * torch.rand(*rows, generator=rng, dtype=torch.float64),
        "state": normal(batch, heads, keys, values),
    }
    return {name: t.to(dtype) for name, t in drawn.items()}


def _dplr_inputs(
    batch: int, steps: int, heads: int, keys: int, values: int, seed: int = 0, dtype=torch.float64
) -> dict[str, Tensor]:
    x = _inputs(batch, steps, heads, keys, values, seed=seed, dtype=dtype)
    a = x["k"]
    return {
        "q": x["q"],
        "k": x["q"].flip(1),
        "v": x["v"],
        "a": -a,
        "b": a * x["beta"][..., None] / 2,
        "state": x["state"],
    }


def _log_decay(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()


def _reset(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < 0.2


def _leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
@pytest.mark.parametrize("width", [1, 3], ids=["per_head", "per_key"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_gradcheck(op, width: int, steps: int):
    inputs = (_inputs if op is delta_scan else _dplr_inputs)(1, steps, 1, 3, 2) | {
        "log_decay": _log_decay(1, steps, 1, width, 1)
    }
    reset = _reset(1, steps)
    names, tensors = list(inputs), [t.requires_grad_() for t in inputs.values()]
    run = lambda *tensors: op(**dict(zip(names, tensors, strict=True)), reset=reset)
    assert torch.autograd.gradcheck(run, tensors, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("several", [2, 3])
def test_gradcheck_of_several_corrections(several: int):
    inputs = _inputs(1, 6, 1, 3, 2, several) | {"log_decay": _log_decay(1, 1, 1)}
    names, tensors = list(inputs), [t.requires_grad_() for t in inputs.values()]
    lengths = torch.tensor([5])
    run = lambda *tensors: delta_scan(**dict(zip(names, tensors, strict=True)), lengths=lengths)
    assert torch.autograd.gradcheck(run, tensors, atol=1e-8, rtol=1e-6)


def test_a_second_derivative_is_refused():
    inputs = _leaves(_inputs(1, 4, 1, 2, 2))
    (grad,) = torch.autograd.grad(delta_scan(**inputs)[0].square().sum(), inputs["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("steps, cut", [(1, 0), (5, 2), (130, 64), (150, 77), (200, 199)])
@pytest.mark.parametrize("width", [1, 8], ids=["per_head", "per_key"])
@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
def test_two_parts_are_the_whole(op, width: int, steps: int, cut: int):
    inputs = (_inputs if op is delta_scan else _dplr_inputs)(2, steps, 2, 8, 4)
    inputs |= {"log_decay": _log_decay(2, steps, 2, width, 1), "reset": _reset(2, steps)}
    whole, parts = _leaves(inputs), _leaves(inputs)
    o, last = op(**whole)
    first = {n: t if n == "state" else t[:, :cut] for n, t in parts.items()}
    o1, state = op(**first)
    o2, last2 = op(**{n: t[:, cut:] for n, t in parts.items() if n != "state"}, state=state)
    joined = torch.cat([o1, o2], 1)
    assert_close(joined, o, atol=1e-10, rtol=0)
    assert_close(last2, last, atol=1e-10, rtol=0)
    (o.square().sum() + last.sum()).backward()
    (joined.square().sum() + last2.sum()).backward()
    for name, t in whole.items():
        if t.is_floating_point():
            assert_close(parts[name].grad, t.grad, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("width", [1, 4], ids=["per_head", "per_key"])
def test_delta_is_dplr(width: int):
    x = _inputs(2, 100, 2, 4, 3)
    log_decay, k, beta = _log_decay(2, 100, 2, width, 1), x["k"], x["beta"][..., None]
    o, last = delta_scan(**x, log_decay=log_decay)
    decay = log_decay.exp()[..., 0]
    if width == 1:
        a, b = k, -beta * decay * k
    else:
        a, b = decay * k, -beta * k
    o2, last2 = dplr_scan(x["q"], beta * k, x["v"], a, b, x["state"], log_decay=log_decay)
    assert_close(o2, o, atol=1e-10, rtol=0)
    assert_close(last2, last, atol=1e-10, rtol=0)


@pytest.mark.parametrize("several", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("width", [1, 4], ids=["per_head", "per_key"])
def test_several_corrections_are_as_many_steps(several: int, width: int):
    x = _inputs(2, 45, 1, 4, 3, several)
    log_decay, reset = _log_decay(2, 45, 1, width, 1), _reset(2, 45)
    o, last = delta_scan(**x, log_decay=log_decay, reset=reset)

    def at(j: int, t: Tensor) -> Tensor:  # t at correction j of each step, zero at the others
        return torch.stack([t if i == j else torch.zeros_like(t) for i in range(several)], 2).flatten(1, 2)

    flat = {n: x[n].flatten(1, 2) for n in ("k", "v", "beta")} | {"q": at(several - 1, x["q"]), "state": x["state"]}
    o2, last2 = delta_scan(**flat, log_decay=at(0, log_decay), reset=at(0, reset))
    assert_close(o2[:, several - 1 :: several], o, atol=1e-10, rtol=0)
    assert_close(last2, last, atol=1e-10, rtol=0)


def test_without_corrections_the_state_decays():
    x = _inputs(2, 70, 2, 4, 3) | {"beta": torch.zeros(2, 70, 2, dtype=torch.float64)}
    log_decay = -0.1 * torch.rand(2, 70, 2, 1, 1, dtype=torch.float64)
    o, last = delta_scan(**x, log_decay=log_decay)
    states = log_decay.cumsum(1).exp() * x["state"][:, None]
    assert_close(o, (x["q"][..., None] * states).sum(-2))
    assert_close(last, states[:, -1])


def test_orthonormal_keys_are_recalled_exactly():
    keys = 96  # more than a chunk
    k = torch.linalg.qr(torch.randn(keys, keys, dtype=torch.float64))[0][None, :, None]
    v = torch.randn(1, keys, 1, 5, dtype=torch.float64)
    one = torch.ones(1, keys, 1, dtype=torch.float64)
    _, memory = delta_scan(k, k, v, one, torch.zeros(1, 1, keys, 5, dtype=torch.float64))
    assert_close(k[:, :, 0] @ memory[:, 0], v[:, :, 0])
    rewritten = v.roll(7, 1)  # a second value for a key replaces the first
    _, memory = delta_scan(k, k, rewritten, one, memory)
    assert_close(k[:, :, 0] @ memory[:, 0], rewritten[:, :, 0])


def test_two_reflections_rotate():
    steps, angle = 300, torch.tensor(0.03, dtype=torch.float64)
    mirrors = torch.stack([torch.tensor([1.0, 0.0]).double(), torch.stack([(angle / 2).cos(), (angle / 2).sin()])])
    k = mirrors.expand(1, steps, 2, 2)[:, :, :, None]
    q = torch.eye(2, dtype=torch.float64)
    zero, two = torch.zeros(1, steps, 2, 1, 1, dtype=torch.float64), torch.full((1, steps, 2, 1), 2.0).double()
    start = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)
    turned = [delta_scan(e.expand(1, steps, 1, 2), k, zero, two, start)[0].flatten() for e in q]
    turns = angle * torch.arange(1, steps + 1)
    assert_close(turned[0], turns.cos(), atol=1e-11, rtol=0)
    assert_close(turned[1], turns.sin(), atol=1e-11, rtol=0)


def _against_float64(op, steps: int, decay: float, limit: float):
    x = _inputs(1, steps, 1, 16, 4, seed=3)
    if op is dplr_scan:
        key = x.pop("k")
        beta = x.pop("beta")[..., None] / 2
        x |= {"a": key, "b": -beta * decay * key, "k": beta * key}
    else:
        x["beta"] = x["beta"] / 2
    log_decay = torch.full((1, 1), decay, dtype=torch.float64).log()
    with torch.no_grad():
        o, last = op.reference(**x, log_decay=log_decay)
        o32, last32 = op(**{n: t.float() for n, t in x.items()}, log_decay=log_decay.float())
    for mine, truth in ((o32, o), (last32, last)):
        error = (mine - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        assert error <= limit, f"{error:.2g}"


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_error(op, decay: float):
    _against_float64(op, 4096, decay, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_error_of_long_runs(op, decay: float):
    _against_float64(op, 65_536, decay, 2e-5)


@pytest.mark.parametrize("width", [1, 4], ids=["per_head", "per_key"])
def test_a_cut_costs_its_neighbours_no_precision(width: int):
    """Sums of logs over a chunk with cuts in it are large; what lies between two cuts is not."""
    x = _inputs(1, 64, 1, 4, 3)
    log_decay = torch.full((1, 64, 1, width, 1), -1e-3, dtype=torch.float64)
    log_decay[:, ::9] = -1e4
    log_decay[:, 5] = -90.0
    truth = delta_scan.reference(**x, log_decay=log_decay)[0]
    mine = delta_scan(**{n: t.float() for n, t in x.items()}, log_decay=log_decay.float())[0]
    assert (mine - truth).abs().max() < 3e-6 * truth.abs().max()


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
@pytest.mark.parametrize("width", [1, 4], ids=["per_head", "per_key"])
@pytest.mark.parametrize("low", [-torch.inf, -1e4, torch.finfo(torch.float32).min])
def test_total_forgetting_is_finite(op, width: int, low: float):
    make = _inputs if op is delta_scan else _dplr_inputs
    x = {n: t.float().requires_grad_() for n, t in make(1, 70, 1, 4, 3).items()}
    log_decay = torch.full((1, 70, 1, width, 1), -0.1)
    log_decay[:, [0, 3, 4, 31, 64, 69]] = low
    log_decay.requires_grad_()
    o, last = op(**x, log_decay=log_decay)
    (o.square().sum() + last.sum()).backward()
    for t in (o, last, log_decay.grad, *(t.grad for t in x.values())):
        assert t.isfinite().all()
    assert not log_decay.grad[:, [0, 3, 4, 31, 64, 69]].any()


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_head_and_future(op, bad: float):
    x = (_inputs if op is delta_scan else _dplr_inputs)(2, 40, 2, 3, 2)
    clean, clean_last = op(**x)
    x["v"][0, 20, 1] = bad
    leaves = _leaves(x)
    o, last = op(**leaves)
    assert torch.equal(o[1], clean[1]) and torch.equal(o[0, :20], clean[0, :20])
    assert_close(o[0, :, 0], clean[0, :, 0])
    assert torch.equal(last[1], clean_last[1])
    assert not o[0, 20:, 1].isfinite().any() and not last[0, 1].isfinite().any()
    grads = torch.autograd.grad(o[1].sum() + last[1].sum(), list(leaves.values()))
    alone = _leaves({n: t[1:] for n, t in x.items()})
    o, last = op(**alone)
    for mine, expected in zip(grads, torch.autograd.grad(o.sum() + last.sum(), list(alone.values()))):
        assert_close(mine[1:], expected)


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
@pytest.mark.parametrize("width", [1, 3], ids=["per_head", "per_key"])
def test_no_gradient_crosses_a_reset(op, width: int):
    x = (_inputs if op is delta_scan else _dplr_inputs)(2, 90, 2, 3, 2) | {"log_decay": _log_decay(2, 90, 2, width, 1)}
    reset = torch.zeros(2, 90, dtype=torch.bool)
    reset[:, 70] = True
    leaves = _leaves(x)
    o, last = op(**leaves, reset=reset)
    (o[:, 70:].sin().sum() + last.square().sum()).backward()
    for name, t in leaves.items():
        assert not (t.grad if name == "state" else t.grad[:, :70]).any(), name
        assert name == "state" or t.grad[:, 71:].any(), name


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
def test_autocast_changes_nothing(op):
    x = (_inputs if op is delta_scan else _dplr_inputs)(1, 40, 1, 3, 2, dtype=torch.float32)
    plain, under = _leaves(x), _leaves(x)
    expected = op(**plain)
    with torch.autocast("cpu", torch.bfloat16):
        got = op(**under)
        got[0].sum().backward()
    expected[0].sum().backward()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert all(torch.equal(under[n].grad, t.grad) for n, t in plain.items())


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
def test_a_reset_clears_what_is_not_finite(op):
    x = (_inputs if op is delta_scan else _dplr_inputs)(1, 30, 1, 3, 2)
    reset = torch.zeros(1, 30, dtype=torch.bool)
    reset[:, 9] = True
    expected = op(**{n: t if n == "state" else t[:, 9:] for n, t in x.items()} | {"state": 0 * x["state"]})
    for bad in (torch.nan, torch.inf):
        o, last = op(**x | {"state": torch.full_like(x["state"], bad)}, reset=reset)
        assert_close(o[:, 9:], expected[0])
        assert_close(last, expected[1])


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
def test_inputs_are_left_alone(op):
    """One row, one head and whole chunks are where a copy in chunks could be no copy."""
    x = (_inputs if op is delta_scan else _dplr_inputs)(1, 128, 1, 4, 4) | {"log_decay": _log_decay(1, 128, 1, 1, 1)}
    leaves = _leaves(x)
    op(**leaves)[0].square().sum().backward()
    for name, t in x.items():
        assert torch.equal(leaves[name], t), name


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
def test_without_gradients_less_is_kept_and_all_is_the_same(op):
    x = (_inputs if op is delta_scan else _dplr_inputs)(8, 200, 8, 4, 3)  # as many heads as one span takes
    with torch.no_grad():
        plain = op(**x)
    assert_close(op(**_leaves(x)), plain)
    assert_close(op.reference(**x), plain)


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
def test_padding_reaches_nothing(op):
    x = (_inputs if op is delta_scan else _dplr_inputs)(2, 70, 1, 3, 2)
    lengths = torch.tensor([66, 3])
    clean = op(**x, lengths=lengths)
    for b, end in enumerate(lengths.tolist()):
        for name in x.keys() - {"state"}:
            x[name][b, end:] = torch.nan
    leaves = _leaves(x)
    o, last = op(**leaves, lengths=lengths)
    assert_close((o, last), clean)
    (o.sum() + last.sum()).backward()
    assert all(t.grad.isfinite().all() for t in leaves.values())


@pytest.mark.parametrize("op", [delta_scan, dplr_scan], ids=["delta", "dplr"])
@pytest.mark.slow
def test_compiles_whole(op):
    x = _leaves(
        (_inputs if op is delta_scan else _dplr_inputs)(1, 20, 1, 4, 3) | {"log_decay": _log_decay(1, 20, 1, 1, 1)}
    )
    wanted = [x["k"], x["log_decay"], x["state"]]

    def run(**x: Tensor) -> tuple[Tensor, Tensor]:
        return op(**x)

    plain, compiled = run(**x), torch.compile(run, fullgraph=True)(**x)
    assert_close(compiled, plain)
    grads = [torch.autograd.grad(o.square().sum() + last.sum(), wanted) for o, last in (plain, compiled)]
    assert_close(grads[0], grads[1])


def test_the_chunks_run_by_themselves():
    seen = []
    with observe(lambda op, name, *_: seen.append(name)):
        delta_scan(**_inputs(1, 4, 1, 2, 2))
        delta_scan(**_inputs(1, 4, 1, 2, 2), log_decay=_log_decay(2, 1))
        dplr_scan(**_dplr_inputs(1, 4, 1, 2, 2))
    assert seen == ["numba", "numba", "numba"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"q": torch.ones(2, 3)}, "expected (B, T, H, K)"),
        ({"k": torch.ones(1, 4, 1, 3).double()}, "expected k to be (1, 4, 1, 2)"),
        ({"k": torch.ones(1, 4, 0, 1, 2).double()}, "n >= 1"),
        ({"v": torch.ones(1, 4, 2, 1, 2).double()}, "expected v to be"),
        ({"beta": torch.ones(1, 4).double()}, "expected beta to be (1, 4, 1)"),
        ({"state": torch.ones(1, 1, 2, 3).double()}, "expected (B, H, K, V)"),
        ({"state": torch.ones(1, 1, 2, 2)}, "nothing wider"),
        ({"log_decay": torch.ones(5, 1, 2, 1).double()}, "log_decay"),
        ({"log_decay": torch.ones(1, 2, 2).double()}, "broadcasts to (B, T, H, K, 1)"),
        ({"reset": torch.ones(1, 4)}, "expected bool (1, 4)"),
        ({"lengths": torch.tensor([5])}, "lengths[0] is 5; expected 0 to T = 4"),
        ({"lengths": torch.tensor([1, 2])}, "expected (1,)"),
    ],
)
def test_mistakes_are_named(change: dict[str, Tensor], says: str):
    with pytest.raises(UsageError) as caught:
        delta_scan(**_inputs(1, 4, 1, 2, 2) | change)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    if not {"k", "v", "beta"} & change.keys():
        with pytest.raises(UsageError):
            dplr_scan(**_dplr_inputs(1, 4, 1, 2, 2) | change)
