"""Laws of the scan: layouts, limits, derivatives, non-finite numbers, threads, compilation."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops import linear_scan

BACKENDS = ["numba", "torch"]
in_numba = importlib.import_module("statewise.ops.linear_scan.in_numba")  # the op hides the package of its name


@pytest.fixture(params=[2, 3], ids=["thirds", "tiles"])
def shared_time(request, monkeypatch):
    """Threads enough, and tiles of a few steps, so that small inputs take every path of the numba kernel."""
    monkeypatch.setattr(in_numba.teams, "SMALL", 0)
    monkeypatch.setattr(in_numba, "TALL", 0)
    monkeypatch.setattr(in_numba, "FAR", 0)
    monkeypatch.setattr(in_numba, "TILE", 0)
    monkeypatch.setattr(in_numba, "SHORTEST", 8)
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def ways(monkeypatch):
    """The ways in which the numba kernel has run since, by name."""
    taken, run = [], in_numba._run
    monkeypatch.setattr(in_numba, "_run", lambda work, *rest: taken.append(work.__name__) or run(work, *rest))
    return taken


def _inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.rand(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        torch.randn(shape[0], *shape[2:], dtype=dtype),
    )


def _outcome(inputs: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    h, last = linear_scan(*leaves, **options)
    loss = (
        (h * h).real.sum() + (last * last.conj()).real.sum() + h.imag.sum()
        if h.is_complex()
        else (h * h).sum() + last.sum()
    )
    return h.detach(), last.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_length(backend):
    a, x, h0 = _inputs(2, 130, 5, dtype=torch.float64)
    h = linear_scan.reference(a, x, h0)[0]
    for steps in (*range(1, 40), 63, 64, 65, 127, 128, 129, 130):
        got, last = linear_scan(a[:, :steps], x[:, :steps], h0, backend=backend)
        torch.testing.assert_close(got, h[:, :steps], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last, h[:, steps - 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(1, 100, 3), (1, 97, 40), (1, 7, 5)])
@pytest.mark.parametrize("decay", ["full", "channels", "one", "expanded"])
@pytest.mark.parametrize("with_reset", [False, True])
def test_sharing_out_time_changes_nothing(shared_time, ways, dtype, shape, decay, with_reset):
    a, x, h0 = _inputs(*shape, dtype=dtype)
    a = {"full": a, "channels": a[0, 0], "one": a[:, :1, :1], "expanded": a[:, :1].expand_as(x)}[decay]
    reset = torch.rand(shape[:2]) < 0.1 if with_reset else None
    for got, want in zip(
        _outcome((a, x, h0), reset=reset, backend="numba"), _outcome((a, x, h0), reset=reset, backend="reference")
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    expected = "_thirds" if torch.get_num_threads() == 2 else "_tiles"
    assert ways == [expected, expected] or shape[1] == 7


def test_a_thread_that_begins_late_finds_its_third_done(monkeypatch, shared_time):
    """Rows are whole however late a thread begins, or if it never does."""
    inputs = _inputs(1, 90, 3)
    want = _outcome(inputs, backend="numba")

    def alone(work, like, q, workers, *rest):  # one after the other
        for thread in range(workers):
            work(like, q, (thread, workers, 0))

    monkeypatch.setattr(in_numba.teams, "call", alone)
    for got, expected in zip(_outcome(inputs, backend="numba"), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_sharing_out_time_survives_products_out_of_range(shared_time):
    a, x, h0 = torch.full((1, 64, 2), 1e30), torch.zeros(1, 64, 2), torch.zeros(1, 2)
    assert torch.equal(linear_scan(a, x, h0, backend="numba")[0], x)
    x[0, 3, 1], a[0, 4:] = float("inf"), 1e-30
    assert torch.equal(linear_scan(a, x, h0, backend="numba")[0], linear_scan.reference(a, x, h0)[0])


def test_sharing_out_time_is_the_same_every_time(shared_time):
    inputs = _inputs(1, 500, 7)
    first = _outcome(inputs, backend="numba")
    assert all(torch.equal(p, q) for _ in range(20) for p, q in zip(first, _outcome(inputs, backend="numba")))


@pytest.mark.parametrize("width", [16, 48, 64, 128, 20, 8])  # whole cache lines a row, and not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("batch", [1, 3])
def test_results_past_the_caches_are_the_same_bits(monkeypatch, dtype, width, batch):
    inputs = _inputs(batch, 300, width, dtype=dtype)
    usual = _outcome(inputs, backend="numba")
    monkeypatch.setattr(in_numba.vectors, "STREAM", 0)
    called = []
    streams = in_numba._streams
    monkeypatch.setattr(in_numba, "_streams", lambda *args: called.append(streams(*args)) or called[-1])
    for got, want in zip(_outcome(inputs, backend="numba"), usual):
        assert torch.equal(got, want)
    assert len(called) == 2 and any(called) == (width * inputs[1].element_size() % 64 == 0)


@pytest.mark.parametrize("shape", [(5, 30, 3), (1, 40, 1500)])
def test_sharing_out_rows_gives_the_same_bits(monkeypatch, shape):
    inputs = _inputs(*shape)
    alone = _outcome(inputs, backend="numba")
    monkeypatch.setattr(in_numba.teams, "SMALL", 0)
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(p, q) for p, q in zip(alone, _outcome(inputs, backend="numba")))
    finally:
        torch.set_num_threads(1)


LAYOUTS = {
    "time first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other step": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every other channel": lambda t: t.repeat_interleave(2, 2)[..., ::2],
    "part of wider rows": lambda t: torch.cat([t, t], 2)[..., t.shape[2] :],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "flipped back": lambda t: t.flip(1).flip(1),
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing_and_inputs_stay(backend, layout):
    inputs = _inputs(3, 20, 18)
    want = _outcome(inputs, backend=backend)
    odd = (LAYOUTS[layout](inputs[0]), LAYOUTS[layout](inputs[1]), inputs[2])
    versions = [t._version for t in odd]
    for p, q in zip(_outcome(odd, backend=backend), want):
        assert torch.equal(p, q)
    assert [t._version for t in odd] == versions
    assert all(torch.equal(p, q) for p, q in zip(odd, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["channels first", "expanded"])
def test_gradients_arrive_in_any_layout(backend, layout):
    a, x, h0 = (t.requires_grad_() for t in _inputs(2, 9, 5))
    g = torch.randn(2, 5, 9).transpose(1, 2) if layout == "channels first" else torch.ones(()).expand(2, 9, 5)
    got = torch.autograd.grad(linear_scan(a, x, h0, backend=backend)[0], (a, x, h0), g)
    want = torch.autograd.grad(linear_scan.reference(a, x, h0)[0], (a, x, h0), g.contiguous())
    for p, q in zip(got, want):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conjugated_views(backend):
    a, x, h0 = _inputs(2, 6, 3, dtype=torch.complex64)
    got, want = linear_scan(a.conj(), x.conj(), h0.conj(), backend=backend), linear_scan.reference(a, x, h0)
    for p, q in zip(got, want):
        torch.testing.assert_close(p, q.conj())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [0.0, 1.0, 1e-30, 1e-42, 1 - 1e-6, 0.999])
def test_extreme_decays(backend, decay):
    _, x, h0 = _inputs(2, 1000, 3)
    a = torch.full((3,), decay)
    h, last = linear_scan(a, x, h0, backend=backend)
    if decay == 0:
        assert torch.equal(h, x) and torch.equal(last, x[:, -1])
    exact = linear_scan.reference(a.double(), x.double(), h0.double())[0]
    assert (h - exact).square().mean().sqrt() <= 1e-5 * max(1, exact.square().mean().sqrt())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixty_five_thousand_steps(backend):
    for decay in (torch.rand(1, 65536, 2), torch.full((2,), 1 - 1e-4), torch.ones(2)):
        x, h0 = torch.randn(1, 65536, 2) / 16, torch.randn(1, 2)
        h, _ = linear_scan(decay, x, h0, backend=backend)
        exact, _ = linear_scan(decay.double(), x.double(), h0.double(), backend="torch")
        assert (h - exact).square().mean().sqrt() <= 5e-5 * max(1, float(exact.square().mean().sqrt()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_steps_gives_the_same_bits_of_state(backend):
    for last in (torch.tensor([[-0.0, float("nan"), 1e-45]]),):
        h, state = linear_scan(torch.rand(3), torch.zeros(1, 0, 3), last, backend=backend)
        assert h.shape == (1, 0, 3) and torch.equal(state.view(torch.int32), last.view(torch.int32))


EXTREMES = st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, -0.0, 0.0, 1.0, -0.5, 2.0])


@settings(max_examples=150)
@given(
    where=st.tuples(st.integers(0, 2), st.integers(0, 8), st.integers(0, 3)),
    value=EXTREMES,
    target=st.sampled_from(["a", "x", "h0"]),
    backend=st.sampled_from(BACKENDS),
    reset_at=st.integers(0, 12),
)
def test_whatever_one_number_is_stays_in_its_row_channel_and_future(where, value, target, backend, reset_at):
    assume(target != "a" or backend == "numba" or not abs(value) > 1e30)  # there products of decays overflow
    torch.manual_seed(0)
    b, t, n = where
    inputs = dict(zip(("a", "x", "h0"), _inputs(3, 9, 4)))
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[:, reset_at:][:, :1] = True
    clean, _ = linear_scan(**inputs, reset=reset, backend=backend)
    if target == "h0":
        inputs[target][b, n], t = value, 0
    else:
        inputs[target][b, t, n] = value
    h, last = linear_scan(**inputs, reset=reset, backend=backend)
    want, want_last = linear_scan.reference(**inputs, reset=reset)
    touched = torch.zeros(3, 9, 4, dtype=torch.bool)
    touched[b, t:, n] = True
    if t < reset_at <= 8:
        touched[b, reset_at:, n] = False
    elif t == reset_at and target != "x":
        touched[:] = False
    assert torch.equal(h[~touched], clean[~touched])
    assert torch.equal(h.isfinite(), want.isfinite()) and torch.equal(last.isfinite(), want_last.isfinite())
    torch.testing.assert_close(h, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_reset_clears_infinity_in_values_and_gradients(backend):
    a, x, h0 = (t.requires_grad_() for t in _inputs(2, 5, 3))
    with torch.no_grad():
        x[0, 1], a[1, 3], h0[1, 0] = float("inf"), float("nan"), float("nan")
    reset = torch.tensor([[False, False, False, True, False], [True, False, False, True, False]])
    h, last = linear_scan(a, x, h0, reset=reset, backend=backend)
    assert h[0, 3:].isfinite().all() and h[1].isfinite().all() and last.isfinite().all()
    assert torch.equal(h[0, 3], x[0, 3])
    grads = torch.autograd.grad(h[:, 3:].sum() + h[1].sum() + last.sum(), (a, x, h0))
    assert grads[1].isfinite().all() and grads[2].isfinite().all()
    assert grads[0][0, 3:].isfinite().all() and grads[0][1].isfinite().all()  # before it, 0 inf is NaN by right
    assert not grads[0][:, 3].any()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_padding_may_hold_anything(backend):
    inputs = [t.requires_grad_() for t in _inputs(3, 6, 2)]
    lengths = torch.tensor([0, 4, 6])
    clean = linear_scan(*inputs, lengths=lengths, backend=backend)
    grads = torch.autograd.grad(clean[0].sum() + clean[1].sum(), inputs)
    with torch.no_grad():
        for t in inputs[:2]:
            t[0], t[1, 4:] = float("nan"), float("inf")
    dirty = linear_scan(*inputs, lengths=lengths, backend=backend)
    assert all(torch.equal(p, q) for p, q in zip(clean, dirty))
    assert all(map(torch.equal, grads, torch.autograd.grad(dirty[0].sum() + dirty[1].sum(), inputs)))
    assert torch.equal(clean[1][0], inputs[2][0]) and not clean[0][1, 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_are_each_row_alone(backend):
    a, x, h0 = _inputs(4, 9, 3)
    lengths = torch.tensor([9, 0, 5, 1])
    h, last = linear_scan(a, x, h0, lengths=lengths, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        alone, end = linear_scan(a[b : b + 1, :n], x[b : b + 1, :n], h0[b : b + 1], backend=backend)
        torch.testing.assert_close(h[b : b + 1, :n], alone)
        torch.testing.assert_close(last[b : b + 1], end)


@pytest.mark.parametrize(  # torch differentiates its own: what it makes of complex numbers is its business
    ("backend", "dtype"), [("numba", torch.float64), ("numba", torch.complex128), ("torch", torch.float64)]
)
@pytest.mark.parametrize(("decay", "steps"), [("full", 1), ("full", 2), ("full", 7), ("channels", 5), ("one", 5)])
def test_first_and_second_derivatives(backend, dtype, decay, steps):
    a, x, h0 = (t.requires_grad_() for t in _inputs(2, steps, 3, dtype=dtype))
    a = {"full": a, "channels": a[0, 0], "one": a[:, :1, :1]}[decay].detach().requires_grad_()
    reset = torch.rand(2, steps) < 0.3

    def run(a, x, h0):
        return linear_scan(a, x, h0, reset=reset, backend=backend)

    assert torch.autograd.gradcheck(run, (a, x, h0), atol=1e-8, rtol=1e-6, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, (a, x, h0), atol=1e-6, rtol=1e-5, gen_non_contig_grad_outputs=True)


def test_third_derivatives():
    a, x, h0 = (t.requires_grad_() for t in _inputs(1, 4, 2, dtype=torch.float64))

    def gradient(a, x, h0):
        return torch.autograd.grad(
            linear_scan(a, x, h0, backend="numba")[0].pow(3).sum(), (a, x, h0), create_graph=True
        )

    assert torch.autograd.gradgradcheck(gradient, (a, x, h0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("through", ["h", "last"])
def test_gradients_through_one_result_alone(through):
    inputs = [t.requires_grad_() for t in _inputs(2, 5, 3)]

    def grads(run):
        h, last = run(*inputs)
        return torch.autograd.grad((h if through == "h" else last).square().sum(), inputs)

    for p, q in zip(grads(lambda *k: linear_scan(*k, backend="numba")), grads(linear_scan.reference)):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("with_reset", [False, True])
def test_opcheck(with_reset):
    a, x, h0 = (t.requires_grad_() for t in _inputs(2, 5, 3))
    reset = torch.rand(2, 5) < 0.5 if with_reset else None
    linear_scan(a, x, h0, backend="numba")
    torch.library.opcheck(torch.ops.statewise.linear_scan_numba, (a, x, h0, reset))
    inputs = (torch.randn(2, 5, 3).requires_grad_(), h0, a, x, h0, reset)
    torch.library.opcheck(torch.ops.statewise.linear_scan_numba_backward, inputs)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_compiles_to_one_graph(backend):
    torch._dynamo.reset()

    def run(a, x, h0, reset, lengths):
        h, last = linear_scan(a, x, h0, reset=reset, lengths=lengths, backend=backend)
        return linear_scan(a, h.sin(), last, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = [t.requires_grad_() for t in _inputs(2, 6, 3)]
    more = (torch.rand(2, 6) < 0.3, torch.tensor([4, 6]))
    for got, want in zip(compiled(*inputs, *more), run(*inputs, *more)):
        torch.testing.assert_close(got, want)
        for p, q in zip(*(torch.autograd.grad(t.sum(), inputs, retain_graph=True) for t in (got, want))):
            torch.testing.assert_close(p, q)


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled = torch.compile(lambda a, x, h0: linear_scan(a.sigmoid(), x * 2, h0)[0] + 1, fullgraph=True)
    inputs = [t.requires_grad_() for t in _inputs(2, 6, 3)]
    got, want = compiled(*inputs), linear_scan(inputs[0].sigmoid(), inputs[1] * 2, inputs[2])[0] + 1
    torch.testing.assert_close(got, want)
    for p, q in zip(*(torch.autograd.grad(t.sum(), inputs) for t in (got, want))):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("batch", [1, 3])
def test_many_python_threads_at_once(shared_time, batch):
    inputs = [_inputs(batch, 200 + 10 * i, 5) for i in range(4)]
    want = [_outcome(k, backend="numba") for k in inputs]

    def work(i: int) -> bool:
        return all(torch.equal(p, q) for _ in range(25) for p, q in zip(_outcome(inputs[i], backend="numba"), want[i]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_from_the_allocator_may_hold_anything(monkeypatch, shared_time, backend):
    def poisoned(make):
        def run(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() or t.is_complex() else t.fill_(85)

        return run

    inputs = [*_inputs(1, 40, 3), torch.rand(1, 40) < 0.1]
    runs = [(inputs[0], {}), (inputs[0][0, 0], {}), (inputs[0], {"reset": inputs[3]})]
    want = [_outcome((a, *inputs[1:3]), backend=backend, **k) for a, k in runs]
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    got = [_outcome((a, *inputs[1:3]), backend=backend, **k) for a, k in runs]
    assert all(torch.equal(p, q) for one, other in zip(got, want) for p, q in zip(one, other))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_works_in_a_forked_child(shared_time):
    import multiprocessing

    inputs = _inputs(1, 200, 3)
    want = linear_scan(*inputs, backend="numba")[0]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        got = pool.apply_async(_forked, [*(t.tolist() for t in inputs)]).get(250)
    torch.testing.assert_close(torch.tensor(got), want)


def _forked(*inputs: list) -> list:
    torch.set_num_threads(1)
    return linear_scan(*map(torch.tensor, inputs), backend="numba")[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("batch,shared_time", [(1, 2), (2, 5)], indirect=["shared_time"])
def test_guessed_tiles_are_the_same_bits(monkeypatch, shared_time, ways, dtype, with_reset, batch):
    """Where states are soon forgotten, tiles begin from a guess, which is looked at when all are done."""
    monkeypatch.setattr(in_numba, "SHORTEST", 200)
    a, x, h0 = _inputs(batch, 4000, 5, dtype=dtype)
    a[-1, 1500:2600] = 1  # here nothing is forgotten, and guesses are wrong to the end
    reset = torch.rand(batch, 4000) < 0.01 if with_reset else None
    shared = _outcome((a, x, h0), reset=reset, backend="numba")
    monkeypatch.setattr(in_numba.teams, "SMALL", 1 << 60)  # one thread
    for got, want in zip(shared, _outcome((a, x, h0), reset=reset, backend="numba"), strict=True):
        assert torch.equal(got, want)
    assert ways == ["_guesses", "_guesses", "_units", "_units"]


def test_what_is_not_watched_is_the_same(shared_time):
    """Without gradients the kernel is called as it is; tangents are refused and not lost."""
    inputs = _inputs(2, 9, 3)
    want = _outcome(inputs, backend="numba")[0]
    with torch.no_grad():
        assert torch.equal(linear_scan(*inputs, backend="numba")[0], want)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
            dual = torch.autograd.forward_ad.make_dual(inputs[1], inputs[1])
            linear_scan(inputs[0], dual, inputs[2], backend="numba")
