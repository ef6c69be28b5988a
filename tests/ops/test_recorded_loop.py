"""The recorded loop: of any cell it gives what the loop gives, values and gradients, or says why it is not run."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref

import little_cells
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_cells import CELLS, Dense, Gates, Swing, Two
from torch import Tensor, nn

from statewise.core import Cell, clear_past_end, leaves, tree_map
from statewise.layers import LTC, CfC, Jordan
from statewise.layers.parallelized import parallelize
from statewise.ops import recorded_loop as module
from statewise.ops.recorded import Program, Watch
from statewise.ops.recorded.translation import TRANSLATIONS
from statewise.ops.recorded_loop import recorded_loop, why_not

aten = torch.ops.aten
CLOSE = 1e-5  # of the largest number


def outcome(run, cell, x, reset=None, lengths=None, scale=0.1):
    """Outputs, the last state, and the gradients of x, the first state and the parameters."""
    x = x.clone().requires_grad_()
    rng = torch.Generator().manual_seed(7)
    noise = lambda t: scale * torch.randn(t.shape, generator=rng).to(t.dtype)
    start = tree_map(lambda s: (s + noise(s)).detach().requires_grad_(), cell.initial_state(len(x)))
    o, last = run(cell, cell.encode(x), start, reset, lengths)
    o = o if lengths is None else tree_map(lambda t: clear_past_end(t, lengths), o)
    outs = [*leaves(o), *leaves(last)]
    total = sum((t * torch.randn(t.shape, generator=rng).to(t.dtype)).sum() for t in outs)
    wrt = [x, *leaves(start), *cell.parameters()]
    return outs, torch.autograd.grad(total, wrt, allow_unused=True, materialize_grads=True)


def assert_same(cell, x, reset=None, lengths=None):
    """To CLOSE, or where the cell multiplies rounding to a few times what that does to the loop."""
    assert why_not(cell, cell.encode(x), cell.initial_state(len(x))) is None
    got, want = (outcome(run, cell, x, reset, lengths) for run in (recorded_loop, Cell.scan))
    exact = outcome(Cell.scan, copy.deepcopy(cell).double(), x.double(), reset, lengths)
    for a, b, c in zip((*got[0], *got[1]), (*want[0], *want[1]), (*exact[0], *exact[1]), strict=True):
        assert a.shape == b.shape
        own = float((b - c).detach().abs().max())
        assert (a - b).detach().abs().max() <= 8 * own + CLOSE * max(1e-2, float(b.detach().abs().max()))


HOUSE = [
    lambda: CfC(width=3, hidden=4, units=5, dt="input"),
    lambda: CfC(width=2, hidden=3, units=4, backbone=2, form="ungated"),
    lambda: CfC(width=2, hidden=3, backbone=0, form="solution", dt="input"),
    lambda: LTC(width=3, hidden=4, unfolds=3, dt="input"),
    lambda: Jordan(width=3, hidden=4, out=2, decay=0.5),
]


def test_there_are_cells():
    assert len(CELLS) >= 12 and len({cell.__name__ for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("make", [*CELLS, *HOUSE])
@pytest.mark.parametrize("batch", [1, 3, 19])
def test_equals_the_loop(make, batch):
    torch.manual_seed(0)
    cell = make()
    x = torch.randn(batch, 23, cell.width)
    reset, lengths = torch.rand(batch, 23) < 0.15, torch.randint(0, 24, (batch,))
    lengths[0] = 17
    for masks in ((None, None), (reset, None), (None, lengths), (reset, lengths)):
        assert_same(cell, x, *masks)
    with torch.no_grad():
        u, start = cell.encode(x), cell.initial_state(batch)
        for a, b in zip(leaves(recorded_loop(cell, u, start)), leaves(Cell.scan(cell, u, start, None, None))):
            assert (a - b).abs().max() <= CLOSE * max(1e-2, float(b.abs().max()))


def by_step(cell, x):
    assert why_not(cell, cell.encode(x), cell.initial_state(len(x))) is None
    return [record.step.by_step for record in module._of_cells[cell].found.values()]


def test_gradients_of_parameters_come_with_the_steps():
    cells = [make() for make in (*CELLS, *HOUSE)]
    assert [by_step(cell, torch.randn(3, 9, cell.width)) for cell in cells] == [[True]] * len(cells)


class Picks(little_cells._Little):
    """h_t = tanh(b_i h_{t-1} + R u_t), i a permutation: the gradient of b is put together as the loop has it."""

    def transition(self, u, h):
        h = torch.tanh(self.b[torch.arange(7, -1, -1)] * h + u @ self.r)
        return h, h


class PicksRows(little_cells._Little):
    """h_t = tanh(R_i h_{t-1} + u_t + b), i a permutation: the sum over time is put together, into zeros of its own."""

    def transition(self, u, h):
        h = torch.tanh(h @ self.r[torch.arange(7, -1, -1)] + u + self.b)
        return h, h


@pytest.mark.parametrize(("make", "whole"), [(Picks, False), (PicksRows, True)])
@pytest.mark.parametrize("batch", [3, 19])
def test_a_gradient_that_has_no_translation(make, whole, batch):
    cell, x = make(), torch.randn(batch, 23, 3)
    assert by_step(cell, x) == [whole]
    for _ in range(2):
        assert_same(cell, x, torch.rand(batch, 23) < 0.15, torch.randint(0, 24, (batch,)))


class Pair(little_cells._Little):
    """h_t = tanh((R + Q) h_{t-1} + u_t): R and Q have one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(0.1 * torch.randn(8, 8))

    def transition(self, u, h):
        h = torch.tanh(h @ (self.r + self.q) + u)
        return h, h


def test_gradients_of_two_parameters_are_two_tensors():
    cell = Pair()
    assert by_step(cell, torch.randn(3, 9, 3)) == [True]
    recorded_loop(cell, cell.encode(torch.randn(3, 9, 3)), cell.initial_state(3))[0].sum().backward()
    assert torch.equal(cell.r.grad, cell.q.grad) and cell.r.grad.data_ptr() != cell.q.grad.data_ptr()


def test_a_parameter_that_is_frozen_later():
    cell, x = Gates(), torch.randn(3, 9, 3)
    assert_same(cell, x)
    cell.gates.weight.requires_grad_(False)
    grads = []
    for run in (recorded_loop, Cell.scan):
        o, _ = run(cell, cell.encode(x), cell.initial_state(3), None, None)
        grads.append(torch.autograd.grad(o.sum(), [cell.gates.bias, cell.inp.weight]))
    assert all((a - b).abs().max() <= CLOSE * b.abs().max() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("make", [Dense, Gates])
def test_sizes_that_fill_no_vector_and_no_panel(make):
    for hidden in (1, 15, 17, 33, 130):
        torch.manual_seed(0)
        assert_same(make(3, hidden), torch.randn(7, 9, 3))


def test_any_batch_of_one_cell():
    cell = Swing(3, 8)
    for batch in (1, 2, 5, 40, 3, 64, 1):
        assert_same(cell, torch.randn(batch, 6, 3))


def test_an_optimisers_step_is_seen():
    for make in (little_cells.Twice, Dense, little_cells.Normed):
        cell = make()
        x, optimiser = torch.randn(4, 12, 3), torch.optim.SGD(cell.parameters(), 0.3)
        for _ in range(3):
            assert_same(cell, x)
            cell(x)[0].pow(2).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    cell.load_state_dict(make().state_dict())
    assert_same(cell, x)
    cell.r.data = torch.randn(8, 8) / 4
    cell.norm = nn.LayerNorm(8, eps=0.1)
    assert_same(cell, x)


class Scaled(little_cells._Little):
    """h_t = tanh(by h_{t-1} + u_t), by a plain number."""

    by = 0.5

    def transition(self, u, h):
        h = torch.tanh(self.by * h + u)
        return h, h


def test_a_plain_number_that_changes_is_seen():
    cell, x = Scaled(), torch.randn(2, 9, 3)
    assert_same(cell, x)
    cell.by = -2.0
    assert_same(cell, x)


def test_many_threads_at_once():
    cell, x = Gates(), torch.randn(5, 30, 3)
    want = outcome(Cell.scan, cell, x)
    found: list[bool] = []

    def work():
        for _ in range(10):
            got = outcome(recorded_loop, cell, x)
            pairs = zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True)
            found.append(all(bool(((a - b).abs() <= CLOSE * b.abs().max()).all()) for a, b in pairs))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 40 and all(found)


def test_threads_of_torch_share_rows():
    cell, x = Dense(3, 40), torch.randn(9, 30, 3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outcome(recorded_loop, cell, x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip((*found[0][0], *found[0][1]), (*other[0], *other[1]), strict=True):
            assert (a - b).abs().max() <= CLOSE * b.abs().max()


def test_nan_stays_in_its_row_and_a_reset_clears_it():
    cell, x = Gates(), torch.randn(4, 12, 3)
    with torch.no_grad():
        want = cell(x)[0]
        bad = x.clone()
        bad[1, 3], bad[2, 5] = math.nan, math.inf
        reset = torch.zeros(4, 12, dtype=torch.bool)
        reset[1, 8] = True
        u, start = cell.encode(bad), cell.initial_state(4)
        o, last = recorded_loop(cell, u, start, reset, None)
    assert (o[[0, 3]] - want[[0, 3]]).abs().max() < 1e-5
    assert o[1, 3:8].isnan().all() and o[1, 8:].isfinite().all() and o[2, 5:].isnan().any()
    assert last.h[1].isfinite().all()
    bad = x.clone().requires_grad_()
    hurt = torch.where(reset.roll(-3, 1)[..., None], math.nan, bad)
    o, _ = recorded_loop(cell, cell.encode(hurt), start, reset, None)
    (g,) = torch.autograd.grad(o[:, 8:].sum(), bad)
    assert g[1, 8:].isfinite().all() and g[[0, 2, 3]].isfinite().all()


def test_what_is_changed_before_the_way_back_is_found_out():
    cell = Dense()
    o, _ = recorded_loop(cell, cell.encode(torch.randn(2, 8, 3)), cell.initial_state(2))
    with torch.no_grad():
        cell.r.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_a_second_derivative_is_refused():
    cell = Dense()
    x = torch.randn(2, 8, 3, requires_grad=True)
    o, _ = recorded_loop(cell, cell.encode(x), cell.initial_state(2))
    (g,) = torch.autograd.grad(o.sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        g.pow(2).sum().backward()


class Shifted(little_cells._Little):
    """A shift that the softmax takes out again: its gradient is rounding alone."""

    def transition(self, u, h):
        h = torch.softmax(h + u + self.b.mean(), -1)
        return h, h


def test_a_gradient_that_is_zero_but_for_rounding():
    torch.manual_seed(0)
    assert_same(Shifted(), torch.randn(4, 9, 3))


class Drops(little_cells._Little):
    def transition(self, u, h):
        h = nn.functional.dropout(torch.tanh(h + u), 0.5, self.training)
        return h, h


class Branches(little_cells._Little):
    def transition(self, u, h):
        h = torch.tanh(h + u) if h.sum() > 0 else torch.sigmoid(h + u)
        return h, h


class Mixes(little_cells._Little):
    def transition(self, u, h):
        h = torch.tanh(h - h.mean(0) + u)
        return h, h


class Counts(little_cells._Little):
    def initial_state(self, batch):
        return Two(super().initial_state(batch), torch.zeros(batch, dtype=torch.int64))

    def transition(self, u, state):
        h = torch.tanh(state.h / (1 + state.c[:, None]) + u)
        return h, Two(h, state.c + 1)


OUTSIDE = torch.randn(8)


class Outside(little_cells._Little):
    def transition(self, u, h):
        h = torch.tanh(OUTSIDE * h + u)
        return h, h


class Bends(little_cells._Little):
    def transition(self, u, h):
        h = torch.special.bessel_j0(h) + u
        return h, h


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Drops, "random"), (Branches, "asks for a number"), (Mixes, "by itself"), (Counts, "int64"),
        (Outside, "outside"), (Bends, "bessel_j0"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(make, reason):
    cell, x = make(), torch.randn(3, 8, 3)
    assert reason in why_not(cell, cell.encode(x), cell.initial_state(3))
    torch.manual_seed(1)
    got = recorded_loop(cell, cell.encode(x), cell.initial_state(3))
    torch.manual_seed(1)
    want = Cell.scan(cell, cell.encode(x), cell.initial_state(3), None, None)
    assert all(map(torch.equal, leaves(got), leaves(want)))


def test_calls_that_it_does_not_take():
    cell, x = Dense(), torch.randn(3, 8, 3)
    ask = lambda cell, x: why_not(cell, cell.encode(x), cell.initial_state(len(x)))
    assert ask(cell, x) is None
    assert "float64" in ask(copy.deepcopy(cell).double(), x.double())
    assert "3 rows of 1 steps" in ask(cell, x[:, :1]) and "0 rows" in ask(cell, x[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not(cell, torch.randn(3, 8, 8), cell.initial_state(3)) == "autocast"
    with torch.inference_mode():
        assert "watches" in ask(cell, x)


def test_a_wrong_translation_is_found_by_its_gradient(monkeypatch):
    wrong = TRANSLATIONS[aten.sigmoid_backward.default]
    monkeypatch.setitem(TRANSLATIONS, aten.tanh_backward.default, wrong)
    cell, x = Dense(), torch.randn(3, 8, 3)
    assert "other numbers" in why_not(cell, cell.encode(x), cell.initial_state(3))
    with torch.no_grad():
        assert why_not(cell, cell.encode(x), cell.initial_state(3)) is None


def test_a_record_goes_with_its_cell():
    cell = Dense()
    cell_again = copy.deepcopy(cell)
    assert_same(cell, torch.randn(2, 8, 3))
    assert_same(cell_again, torch.randn(2, 8, 3))
    records = [weakref.ref(module._of_cells[c]) for c in (cell, cell_again)]
    del cell
    gc.collect()
    assert [record() is None for record in records] == [True, False]


ONE = [
    torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.nn.functional.softplus, torch.nn.functional.silu,
    lambda h: torch.log1p(h * h), lambda h: torch.exp(-h.abs()), lambda h: h / (1 + h * h), torch.nn.functional.elu,
    lambda h: torch.softmax(h, -1), lambda h: nn.functional.layer_norm(h, h.shape[-1:]), lambda h: h.clamp(-0.7, 0.9),
    lambda h: torch.rsqrt(1 + h * h), lambda h: h.flip(-1), lambda h: torch.relu(h) - 0.5, lambda h: h.roll(1, -1),
    lambda h: torch.where(h > 0.1, h, 0.2 * h), lambda h: h - h.mean(-1, keepdim=True), lambda h: h**3 / 4,
]  # fmt: skip
TWO = [
    lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a - 0.5 * b, torch.maximum, torch.minimum,
    lambda a, b: torch.sigmoid(a) * b, lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: torch.cat([a[:, ::2], b[:, 1::2]], -1), lambda a, b: a / (1 + b.abs()), torch.logaddexp,
]  # fmt: skip


class Random(little_cells._Little):
    """What numbers from 0 on choose: a chain of operations of one and two operands, held within -1 to 1."""

    def __init__(self, choices: list[int], hidden: int):
        super().__init__(3, hidden)
        self.choices = tuple(choices)

    def transition(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        known = [u, h, h @ self.r + self.b]
        for i, choice in enumerate(self.choices):
            a, b = known[choice % len(known)], known[(choice // 7 + i) % len(known)]
            known.append(ONE[choice % len(ONE)](a) if i % 2 else TWO[choice % len(TWO)](a, b))
        h = torch.tanh(sum(known[2:]) / 2)
        return known[-1], h


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 10**4), min_size=1, max_size=8), st.sampled_from([2, 6, 16]), st.integers(1, 5),
    st.integers(0, 99),
)  # fmt: skip
def test_random_cells(choices, hidden, batch, seed):
    torch.manual_seed(seed)
    cell = Random(choices, hidden)
    x = torch.randn(batch, 6, 3)
    reason = why_not(cell, cell.encode(x), cell.initial_state(batch))
    if reason is not None:
        assert "no translation" in reason, reason
        return
    assert_same(cell, x, torch.rand(batch, 6) < 0.2, torch.randint(0, 7, (batch,)))


@pytest.mark.parametrize("f", [torch.sin, torch.cos, torch.log, torch.log1p, torch.sgn])
def test_functions_to_rounding(f):
    nasty = torch.tensor([0.0, -0.0, 1e-40, 1e-30, -1e-30, 1.0, -1.0, 3e38, -3e38, 1e10, 1e16, math.inf, -math.inf])
    near = torch.cat([torch.randn(400), 100 * torch.randn(400), torch.logspace(-30, 30, 187)])
    x = torch.cat([nasty, near])
    inputs = [x.clone()]
    with torch.no_grad(), Watch() as watched:
        out = f(inputs[0])
    (got,) = Program(nn.Module(), watched, inputs, [out])(inputs)
    want = f(x.double())
    fine = want.isfinite()
    assert torch.equal(got.isfinite(), fine) and torch.equal(got.isnan(), want.isnan())
    error = (got.double() - want)[fine].abs() / (want[fine].abs() + 2.0**-24)
    assert error.max() < 4e-7


def test_parallelize_takes_it():
    layer = parallelize(Dense(), "recorded")
    x = torch.randn(3, 40, 3)
    y, last = layer(x, lengths=torch.tensor([40, 0, 13]))
    want, want_last = layer.cell(x, lengths=torch.tensor([40, 0, 13]))
    assert (y - want).abs().max() < 1e-5 and (last - want_last).abs().max() < 1e-5
    assert "recorded the loop, recorded" in layer.explain() and "recorded differs" in layer.plan.checked
    assert "recorded no: aten.bernoulli_.float draws random numbers" in parallelize(Drops()).explain()
