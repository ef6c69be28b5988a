"""Laws of the selective scan: derivatives, pieces, accuracy over long time, limits, threads, memory, compilation."""

from __future__ import annotations

import gc
import importlib
import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statewise.core import UsageError
from statewise.ops import selective_scan

BACKENDS = ["numba", "torch"]
in_numba = importlib.import_module("statewise.ops.selective_scan.in_numba")  # the op hides the package of its name
in_torch = importlib.import_module("statewise.ops.selective_scan.in_torch")
NAMES = ("x", "dt", "a", "b", "c", "state")


def _inputs(batch: int, steps: int, width: int, states: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    shape = (batch, steps, width)
    b, c = normal(batch, steps, states), normal(batch, steps, states)
    return [normal(*shape), normal(*shape).abs(), -normal(width, states).exp(), b, c, normal(batch, width, states)]


def _outcome(inputs: list[Tensor], **options) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    y, last = selective_scan(*inputs, **options)
    return [y.detach(), last.detach(), *torch.autograd.grad((y * y).sum() + last.sin().sum(), inputs)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", [None, [0, 5]])
def test_first_derivatives(backend, ends):
    inputs = [t.requires_grad_() for t in _inputs(2, 7, 3, 2, torch.float64)]
    lengths = None if ends is None else torch.tensor(ends)
    reset = torch.rand(2, 7) < 0.3

    def run(*inputs):
        return selective_scan(*inputs, reset=reset, lengths=lengths, backend=backend)

    assert torch.autograd.gradcheck(run, inputs, atol=1e-8, rtol=1e-6, nondet_tol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_derivatives_over_several_pieces_of_time_and_channels(backend, monkeypatch):
    monkeypatch.setattr(in_torch, "CHUNK", 0)
    inputs = [t.requires_grad_() for t in _inputs(1, 70, 35, 2, torch.float64)]
    check = dict(atol=1e-8, rtol=1e-6, nondet_tol=0.0, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *k: selective_scan(*k, backend=backend), inputs, **check)


def test_second_derivatives_are_right_or_refused():
    inputs = [t.requires_grad_() for t in _inputs(1, 4, 2, 2, torch.float64)]
    run = lambda backend: lambda *k: selective_scan(*k, backend=backend)
    assert torch.autograd.gradgradcheck(run("torch"), inputs, atol=1e-6, rtol=1e-5)
    (slope,) = torch.autograd.grad(run("numba")(*inputs)[0].pow(2).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        slope.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 1, 31, 32, 33, 64, 69, 70])
def test_in_two_pieces_it_is_the_whole(backend, cut):
    inputs = _inputs(2, 70, 5, 3, torch.float64)
    whole = selective_scan(*inputs, backend=backend)
    x, dt, a, b, c, state = inputs
    first, state = selective_scan(x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], state, backend=backend)
    second, state = selective_scan(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], state, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, whole[1], rtol=1e-11, atol=1e-11)


DECAYS = (0.0, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_stays_near_the_float64_loop_over_long_time(backend):
    steps, width = 65536, len(DECAYS)
    a = torch.tensor([max(math.log(d), -1e4) if d else -1e4 for d in DECAYS])[:, None]
    x, one, h0 = torch.randn(1, steps, width), torch.ones(1, steps, 1), torch.randn(1, width, 1)
    y, _ = selective_scan(x, torch.ones_like(x), a, one, one, h0, backend=backend)
    decay, h, u = np.exp(a[:, 0].double().numpy()), h0[0, :, 0].double().numpy(), x[0].double().numpy()
    exact = np.empty((steps, width))
    for t in range(steps):
        h = exact[t] = decay * h + u[t]
    error, exact = y[0].double().numpy() - exact, exact
    for until, allowed in ((4096, 5e-6), (steps, 2e-5)):
        rms = np.sqrt((error[:until] ** 2).mean(0) / (exact[:until] ** 2).mean(0))
        assert (rms <= allowed).all(), (until, rms)
        assert (abs(error[:until]).max(0) <= 2e-5 * abs(exact[:until]).max(0)).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rate", [-1e4, -1e30, torch.finfo(torch.float32).min])
def test_where_the_decay_is_zero_everything_is_finite_and_right(backend, rate):
    inputs = _inputs(2, 40, 3, 2)
    inputs[1].clamp_(min=0.1)
    inputs[2] = torch.full_like(inputs[2], rate)
    x, dt, _, b, c, _ = inputs
    y, last, *grads = _outcome(inputs, backend=backend)
    torch.testing.assert_close(y, dt * x * (b * c).sum(-1, keepdim=True))
    torch.testing.assert_close(last, (dt * x)[:, -1, :, None] * b[:, -1, None])
    assert all(g.isfinite().all() for g in grads)
    assert not grads[NAMES.index("a")].any() and not grads[NAMES.index("state")].any()


def test_the_exponential_is_right_everywhere():
    for dtype, tol in ((torch.float32, 2.5e-7), (torch.float64, 6e-16)):
        z = torch.cat([-torch.logspace(-12, 2.7, 4000, dtype=dtype), torch.linspace(-90, 80, 4000, dtype=dtype)])
        one, zero = torch.ones(1, 1, len(z), dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
        state = one.view(1, -1, 1)
        decay = selective_scan(0 * one, one, z[:, None], zero, zero, state, backend="numba")[1].flatten()
        want = z.double().exp()
        # a rounded z log2(e) is wrong by as many units in the last place as z is large
        error = (decay.double() - want).abs() / want.clamp(min=torch.finfo(dtype).tiny) / (1 + z.abs().double())
        normal = want >= 2 * torch.finfo(dtype).tiny
        assert error[normal].max() <= tol
        assert (decay[~normal].double() <= 2 * torch.finfo(dtype).tiny).all()
        assert decay[z < -800].eq(0).all()
    big = torch.tensor([[200.0], [float("nan")], [1e6], [0.0], [float("-inf")]])
    decay = selective_scan(0 * one[..., :5].float(), one[..., :5].float(), big, zero.float(), zero.float(),
                           torch.ones(1, 5, 1), backend="numba")[1].flatten()  # fmt: skip
    torch.testing.assert_close(decay, big[:, 0].exp(), equal_nan=True)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_reset_clears_infinity_in_values_and_gradients(backend):
    inputs = _inputs(2, 40, 3, 2)
    inputs[0][0, 1], inputs[5][1] = float("inf"), float("nan")
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[0, 34], reset[1, 0] = True, True
    leaves = [t.requires_grad_() for t in inputs]
    y, last = selective_scan(*leaves, reset=reset, backend=backend)
    assert y[0, 34:].isfinite().all() and y[1].isfinite().all() and last.isfinite().all()
    assert not y[0, 1:34].isfinite().any()
    grads = dict(zip(NAMES, torch.autograd.grad(y[0, 34:].sum() + y[1].sum() + last.sum(), leaves)))
    assert all(grads[k][1].isfinite().all() for k in ("x", "dt", "b", "c", "state"))
    assert all(grads[k][0, 34:].isfinite().all() for k in ("x", "dt", "b", "c"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "dt", "b", "c"])
def test_nan_stays_in_its_row_and_future(backend, name):
    inputs = _inputs(3, 40, 5, 2)
    clean, _ = selective_scan(*inputs, backend=backend)
    inputs[NAMES.index(name)][1, 35, 0] = float("nan")
    y, last = selective_scan(*inputs, backend=backend)
    touched = torch.zeros(3, 40, 5, dtype=torch.bool)
    touched[1, 35:, (slice(None) if name in "bc" else 0)] = True
    if name == "c":
        touched[1, 36:] = False
    assert torch.equal(y.isnan(), touched) and torch.equal(y[~touched], clean[~touched])
    assert last[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    inputs, lengths = _inputs(3, 40, 3, 2), torch.tensor([0, 33, 40])
    clean = _outcome(inputs, lengths=lengths, backend=backend)
    for t in inputs[:2] + inputs[3:5]:
        t[0], t[1, 33:] = float("nan"), float("inf")
    dirty = _outcome(inputs, lengths=lengths, backend=backend)
    assert all(torch.equal(p, q) for p, q in zip(clean, dirty))
    assert torch.equal(clean[1][0], inputs[5][0]) and not clean[0][1, 33:].any()
    alone = selective_scan(*(t[1:2, :33] for t in inputs[:2]), inputs[2], *(t[1:2, :33] for t in inputs[3:5]),
                           inputs[5][1:2], backend=backend)  # fmt: skip
    torch.testing.assert_close(clean[0][1:2, :33], alone[0])
    torch.testing.assert_close(clean[1][1:2], alone[1])


def test_threads_change_nothing(monkeypatch):
    inputs, reset = _inputs(3, 100, 150, 5), torch.rand(3, 100) < 0.05
    one = _outcome(inputs, reset=reset, backend="numba")
    monkeypatch.setattr(in_numba.teams, "SMALL", 0)
    torch.set_num_threads(2)
    try:
        two = _outcome(inputs, reset=reset, backend="numba")
        again = _outcome(inputs, reset=reset, backend="numba")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(one, two, again))


def _memory(what: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no way here to see the peak of memory")
def test_the_states_are_never_all_in_memory():
    inputs = [t.requires_grad_() for t in _inputs(2, 4096, 256, 16)]
    _outcome(_inputs(1, 2, 2, 5), backend="numba")  # what is compiled and set up once
    gc.collect()  # what other tests left is not to go meanwhile
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far is forgotten
    before = _memory("VmRSS")
    y, last = selective_scan(*inputs, backend="numba")
    torch.autograd.grad(y.sum() + last.sum(), inputs)
    peak = _memory("VmHWM") - before
    assert peak <= 8 * inputs[0].nbytes  # the states are 16 times as many as the inputs
    states = torch.ones(16 * inputs[0].numel(), dtype=inputs[0].dtype)
    assert _memory("VmHWM") - before > 8 * inputs[0].nbytes, f"the peak does not show {states.nbytes} bytes"


def test_in_torch_nothing_is_larger_than_the_inputs():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.untyped_storage().nbytes()) if isinstance(t, Tensor) else largest
            return out

    inputs = [t.requires_grad_() for t in _inputs(2, 512, 256, 16)]
    with Watch():
        y, last = selective_scan(*inputs, backend="torch")
        torch.autograd.grad(y.sum() + last.sum(), inputs)
    assert 0 < largest <= 2 * inputs[0].nbytes


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_compiles_to_one_graph(backend):
    torch._dynamo.reset()

    def run(*inputs):
        *inputs, reset, lengths = inputs
        y, last = selective_scan(*inputs, reset=reset, lengths=lengths, backend=backend)
        return selective_scan(y.sin(), *inputs[1:5], last, backend=backend)

    inputs = [t.requires_grad_() for t in _inputs(2, 6, 3, 2)]
    more = (torch.rand(2, 6) < 0.3, torch.tensor([4, 6]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs, *more), run(*inputs, *more)):
        torch.testing.assert_close(got, want)
        for p, q in zip(*(torch.autograd.grad(t.sum(), inputs, retain_graph=True) for t in (got, want))):
            torch.testing.assert_close(p, q)


def test_opcheck():
    inputs = [t.requires_grad_() for t in _inputs(2, 5, 3, 2)]
    arguments = (*inputs, torch.rand(2, 5) < 0.5, torch.tensor([5, 3]))
    torch.library.opcheck(torch.ops.statewise.selective_scan_numba, arguments)


def test_memory_from_the_allocator_may_hold_anything(monkeypatch):
    inputs, reset = _inputs(2, 40, 20, 3), torch.rand(2, 40) < 0.1
    lengths = torch.tensor([33, 40])
    want = _outcome(inputs, reset=reset, lengths=lengths, backend="numba")
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *k, **o: new_empty(self, *k, **o).fill_(float("nan")))
    got = _outcome(inputs, reset=reset, lengths=lengths, backend="numba")
    assert all(torch.equal(p, q) for p, q in zip(got, want))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(name):
    inputs = dict(zip(NAMES, _inputs(2, 5, 3, 2)))
    with pytest.raises(UsageError, match=r"selective_scan: .* is .*; expected"):
        selective_scan(**inputs | {name: inputs[name][..., :1]})
    with pytest.raises(UsageError, match="float32 or float64" if name == "state" else f"{name} is .*wider"):
        selective_scan(**inputs | {name: inputs[name].to(torch.complex128 if name == "state" else torch.float64)})


def test_masks_and_lengths_that_do_not_fit_are_refused():
    inputs = _inputs(2, 5, 3, 2)
    for lengths in ([2, 6], [-1, 2], [1, 2, 3]):
        with pytest.raises(UsageError, match="lengths"):
            selective_scan(*inputs, lengths=torch.tensor(lengths))
    with pytest.raises(UsageError, match="reset"):
        selective_scan(*inputs, reset=torch.zeros(2, 4, dtype=torch.bool))
