"""A user's cell in parallel: the right structure, the right numbers, and a clear word where it cannot be."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import statewise
from statewise.core import Cell, UsageError, chunked, layers, leaves, unroll
from statewise.layers import GRULayer, LSTMLayer, ParaGRU, ParaLSTM
from statewise.layers.parallelized import Cost, Parallelized, parallelize
from statewise.ops.newton import Layout, by_tangents
from statewise.testing import build, checks_for
from statewise.testing.check import Skipped


class Base(Cell[Tensor]):
    """h_t = f(h_{t-1}, W x_t)."""

    def __init__(self, width: int = 3, hidden: int = 4):
        super().__init__()
        self.width, self.out_width = width, hidden
        self.inp = nn.Linear(width, hidden)
        self.w = nn.Parameter(torch.linspace(-1, 1, hidden))
        self.r = nn.Parameter(0.6 * nn.init.orthogonal_(torch.empty(hidden, hidden)))

    def initial_state(self, batch: int) -> Tensor:
        return self.w.new_zeros(batch, self.out_width, dtype=torch.promote_types(self.w.dtype, torch.float32))

    def encode(self, x: Tensor) -> Tensor:
        return self.inp(x).to(torch.promote_types(self.w.dtype, torch.float32))

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)


class Leak(Base):
    """h_t = s(u_t) h_{t-1} + w u_t."""

    def transition(self, u, state):
        h = torch.sigmoid(u) * state + self.w * u
        return h, h


class Constant(Base):
    """h_t = R h_{t-1} + u_t."""

    def transition(self, u, state):
        h = state @ self.r.to(state.dtype).T + u
        return h, h


class Ripple(Base):
    """h_t = g sin(w h_{t-1}) + (1 - g) u_t, g = s(u_t + h_{t-1}^2)."""

    def transition(self, u, state):
        g = torch.sigmoid(u + state * state)
        h = g * torch.sin(self.w.to(state.dtype) * state) + (1 - g) * u
        return h, h


class Pairs(Base):
    """(a, b)_t = rotated (a, b)_{t-1} / (1 + |a|) + u_t."""

    def transition(self, u, state):
        a, b = state.chunk(2, -1)
        h = torch.cat([a.cos() * 0.5 - 0.5 * b, 0.4 * (a + b).tanh()], -1) + u
        return h, h


class Tanh(Base):
    """h_t = tanh(R h_{t-1} + u_t)."""

    def transition(self, u, state):
        h = torch.tanh(state @ self.r.to(state.dtype).T + u)
        return h, h


class Peak(Base):
    """h_t = max(s(w) h_{t-1}, u_t): affine in pieces only."""

    def transition(self, u, state):
        h = torch.maximum(torch.sigmoid(self.w.to(state.dtype)) * state, u)
        return h, h


KINDS = {
    Leak: (True, "diagonal", True), Constant: (True, "dense", False), Ripple: (False, "diagonal", True),
    Pairs: (False, "blocks of 2", False), Tanh: (False, "dense", True), Peak: (False, "diagonal", True),
}  # fmt: skip


@pytest.mark.parametrize("cls", KINDS)
def test_the_structure_is_found(cls):
    affine, kind, driven = KINDS[cls]
    found = parallelize(cls()).plan.probed
    assert (found.affine, found.structure.kind, found.driven) == (affine, kind, driven)
    assert ("scan" in parallelize(cls()).plan.methods) == affine


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("method", ["scan", "newton", "quasi", "loop", "auto"])
def test_equals_the_loop(cls, method):
    cell = cls().double()
    if method == "scan" and not KINDS[cls][0]:
        with pytest.raises(UsageError, match="affine"):
            parallelize(cell, method)
        return
    layer = parallelize(cell, method)
    x = torch.randn(3, 90, 3, dtype=torch.float64)
    reset, lengths = torch.rand(3, 90) < 0.1, torch.tensor([90, 0, 31])
    for given in ({}, {"reset": reset}, {"reset": reset, "lengths": lengths}):
        got, want = layer(x, **given), unroll(cell, x, **given)
        for a, b in zip(leaves(got), leaves(want), strict=True):
            assert (a - b).abs().max() <= 1e-9
        grads = [
            torch.autograd.grad(run[0].sin().sum(), [*cell.parameters()], allow_unused=True) for run in (got, want)
        ]
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None) and (a is None or (a - b).abs().max() <= 1e-7)


def test_it_is_the_same_layer():
    cell = Ripple()
    layer = statewise.parallelize(cell, "newton")
    assert isinstance(layer, Cell) and (layer.width, layer.out_width) == (3, 4)
    assert list(layer.state_dict()) == list(cell.state_dict())
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in cell.named_parameters()]
    assert all(a is b for a, b in zip(layer.parameters(), cell.parameters(), strict=True))
    x, state = torch.randn(2, 3), cell.initial_state(2)
    assert torch.equal(layer.step(x, state)[0], cell.step(x, state)[0])
    layer.double()
    assert cell.w.dtype == torch.float64
    layer.eval()
    assert not cell.training and not cell.inp.training
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.w.zero_()
    assert twin.cell.w is twin.w and not cell.w.eq(0).all()
    long = torch.randn(2, 40, 3, dtype=torch.float64)
    (y, _), (want, _) = chunked(layer, long, [0, 13, 27]), cell(long)
    assert (y - want).abs().max() < 1e-9


def test_it_trains():
    layer = parallelize(Tanh(), "newton")
    optimiser = torch.optim.Adam(layer.parameters(), 0.01)
    x = torch.randn(4, 50, 3)
    target = x.cumsum(1).tanh()[..., :1].expand(-1, -1, 4)
    losses = []
    for _ in range(15):
        loss = (layer(x)[0] - target).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert layer.diagnose(x)[0].residual < 1e-5


def test_the_dearer_method_is_not_taken():
    layer = parallelize(Ripple())
    for train in (False, True):
        layer.plan.costs["loop", train], layer.plan.costs["newton", train] = Cost(0, 1e-4, 0), Cost(1e-2, 0, 1e-6)
        layer.plan.costs["recorded", train] = Cost(10, 0, 0)
    assert layer.choose(1, 50) == "loop" and layer.choose(1, 5000) == "newton" and layer.choose(1000, 5000) == "loop"
    told = layer.explain(1, 5000)
    assert "newton" in told and "<- this one" in told.splitlines()[1] and "nonlinear" in told


def test_costs_are_measured():
    layer = parallelize(Leak())
    with torch.no_grad():
        seconds = layer.predict(4, 1000)
        assert set(seconds) == {"scan", "recorded", "loop"} and all(0 < s < 60 for s in seconds.values())
        for batch, steps in ((4, 1000), (4, 100000), (1, 1)):
            seconds = layer.predict(batch, steps)
            assert layer.choose(batch, steps) == min(seconds, key=seconds.get)
    assert "scan" in layer.explain()


def test_a_cell_of_the_library_brings_its_own_scan():
    layer = parallelize(GRULayer(width=3, hidden=4), "auto")
    assert {"own", "newton", "loop"} <= set(layer.plan.methods)
    x = torch.randn(2, 30, 3)
    for method in ("own", "newton"):
        y, _ = parallelize(layer.cell, method)(x)
        assert (y - unroll(layer.cell, x)[0]).abs().max() < 1e-5
    assert parallelize(LSTMLayer(width=3, hidden=2)).plan.probed.structure.kind == "dense"


class Draws(Base):
    """h_t = dropout(h_{t-1}) + u_t."""

    def transition(self, u, state):
        h = torch.nn.functional.dropout(state, 0.5, self.training) + u
        return h, h


class Mixes(Base):
    """h_t = tanh(h_{t-1} - mean over the batch)."""

    def transition(self, u, state):
        h = torch.tanh(0.5 * state + u - u.mean(0))
        return h, h


class Counting(NamedTuple):
    h: Tensor
    count: Tensor


class Counts(Base):
    """h_t = h_{t-1} / n_t, n_t = n_{t-1} + 1."""

    def initial_state(self, batch):
        return Counting(super().initial_state(batch), torch.zeros(batch, dtype=torch.int64))

    def transition(self, u, state):
        h = state.h / (1 + state.count[:, None]) + u
        return h, Counting(h, state.count + 1)


def test_what_cannot_be_parallel_says_why():
    assert "random" in parallelize(Draws()).explain()
    assert parallelize(Counts()).choose(1, 10**6) == "loop" and "whole" in parallelize(Counts()).explain()
    with pytest.raises(UsageError, match="random"):
        parallelize(Draws(), "newton")
    with pytest.raises(UsageError, match="by itself"):
        parallelize(Mixes())
    with pytest.raises(UsageError, match="differs from its loop by"):
        parallelize(Mixes(), "newton")
    with pytest.raises(UsageError, match="expected a Cell"):
        parallelize(nn.LSTM(3, 4))
    with pytest.raises(UsageError, match="method"):
        parallelize(Tanh(), "fast")


class Known(Tanh):
    """h_t = tanh(R h_{t-1} + u_t), with its Jacobian."""

    wrong = 1.0

    def jacobian(self, u, state):
        h = self.transition(u, state)[1]
        return self.wrong * ((1 - h * h)[..., None] * self.r.to(state.dtype))[:, None]


def test_a_jacobian_of_the_users_own():
    layer = parallelize(Known().double(), "newton")
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    y, _ = layer(x)
    assert (y - unroll(layer.cell, x)[0]).abs().max() < 1e-10
    assert not any(layer.diagnose(x)[0].sequential)
    bad = Known().double()
    bad.wrong = 0.5
    with pytest.raises(UsageError, match="jacobian"):
        parallelize(bad, "newton")


@pytest.mark.parametrize("layer", [ParaGRU(3, 4), ParaLSTM(3, 4)], ids=["gru", "lstm"])
def test_the_analytic_jacobians(layer):
    layer = layer.double()
    probed = parallelize(layer).plan.probed
    assert probed.structure.kind == {4: "diagonal", 8: "blocks of 2"}[probed.numbers]
    rng = torch.Generator().manual_seed(1)
    u = layer.encode(torch.randn(7, 3, generator=rng, dtype=torch.float64))
    state = layer.initial_state(7)
    h = torch.randn(7, probed.numbers, generator=rng, dtype=torch.float64)
    f, j = layer.linearise(u, h)
    want_f, want = by_tangents(layer.transition, Layout.of(state), probed.structure)(u, h)
    assert (f - want_f).abs().max() < 1e-14 and (j - want).abs().max() < 1e-13


@pytest.mark.parametrize("cls", [ParaGRU, ParaLSTM])
def test_para_layers_converge_in_a_few_iterations(cls):
    layer = cls(8, 32)
    from statewise.ops.newton import watched

    with watched() as found:
        layer(torch.randn(2, 1024, 8))
    assert not any(found[0].sequential) and max(found[0].iterations) <= 6


class User(Parallelized):
    """h_t = f(h_{t-1}, u_t), a user's cell by a method that is named."""

    def __init__(self, width: int, hidden: int, *, kind: str, method: str):
        cls = {c.__name__: c for c in KINDS}[kind]
        statewise.core.check_sizes("User", width=width, hidden=hidden)
        super().__init__(cls(width, hidden), method=method, verify=False)  # type: ignore[arg-type]


class UserRipple(User):
    """h_t = g sin(w h_{t-1}) + (1 - g) u_t."""

    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden, kind="Ripple", method="newton")


class UserPairs(User):
    """(a, b)_t = f((a, b)_{t-1}) + u_t."""

    def __init__(self, width: int, hidden: int):
        statewise.core.check_sizes("UserPairs", hidden=hidden)
        super().__init__(width, 2 * hidden, kind="Pairs", method="newton")


class UserTanh(User):
    """h_t = tanh(R h_{t-1} + u_t)."""

    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden, kind="Tanh", method="newton")


class UserLeak(User):
    """h_t = s(u_t) h_{t-1} + w u_t."""

    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden, kind="Leak", method="scan")


CASES = [
    pytest.param(
        cls,
        check,
        id=f"{cls.__name__}-{check.name}",
        marks=[pytest.mark.slow] * (check.slow or cls is not UserRipple),  # test_equals_the_loop has them all
    )
    for cls in (UserRipple, UserPairs, UserTanh, UserLeak)
    for check in checks_for(build(cls, dict(width=3, hidden=3)))
]
UNUSED = {"every_parameter_learns"}  # the cells share a constructor that makes more than each of them needs


@pytest.mark.parametrize("cls, check", [c for c in CASES if c.values[1].name not in UNUSED])
def test_para_conforms(cls, check):
    try:
        check(build(cls, dict(width=3, hidden=3)))
    except Skipped as skip:
        pytest.skip(str(skip))


def test_checks_were_found():
    assert len(CASES) > 4 * 110


CELLS = [info for info in layers if issubclass(info.cls, Cell)]


@pytest.mark.slow
@pytest.mark.parametrize("info", CELLS, ids=lambda info: info.name)
def test_every_cell_of_the_library_is_solved(info):
    """transition alone, solved for all times, gives what the layer's own scan gives."""
    cell = build(info.cls, info.examples[0])
    layer = parallelize(cell, verify=False)
    if layer.plan.probed is None:
        pytest.skip("the state counts in whole numbers")
    x = torch.randn(2, 60, cell.width, dtype=torch.float64)
    want, end = cell(x)
    got, last = parallelize(cell, "newton", verify=False)(x)
    assert (got - want).abs().max() <= 1e-8
    assert all((a - b).abs().max() <= 1e-8 for a, b in zip(leaves(last), leaves(end), strict=True))


def test_cells_were_found():
    assert len(CELLS) > 20
