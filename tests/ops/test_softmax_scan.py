"""Laws of the running softmax average and the running log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError
from statewise.ops import log_sum_exp_scan, softmax_scan
from statewise.ops.softmax_scan import SoftmaxState, nothing_seen
from statewise.ops.teams import in_numba as teams

ON_CPU = [name for name in softmax_scan.backends if name != "triton"]  # test_softmax_triton.py
BACKENDS = [*ON_CPU, "reference"]
LOG_BACKENDS = [*(name for name in log_sum_exp_scan.backends if name != "triton"), "reference"]


def _inputs(batch: int, steps: int, heads: int, value: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """score, v, m, u, w"""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    score, v = normal(batch, steps, heads), normal(batch, steps, heads, value)
    return [score, v, normal(batch, heads), normal(batch, heads).abs() + 1, normal(batch, heads, value)]


def _fresh(v: Tensor) -> SoftmaxState:
    return nothing_seen(len(v), *v.shape[2:], like=v.new_zeros((), dtype=torch.promote_types(v.dtype, torch.float32)))


def _by_matrix(score: Tensor, v: Tensor) -> Tensor:
    """Softmax over all earlier scores, all at once."""
    steps = score.shape[1]
    hidden = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    weight = score.mT[:, :, None].expand(-1, -1, steps, -1).masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weight, v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_equals_the_softmax_matrix(backend, scale):
    score, v, *_ = _inputs(2, 60, 3, 4, torch.float64)
    o, _ = softmax_scan(scale * score, v, _fresh(v), backend=backend)
    torch.testing.assert_close(o, _by_matrix(scale * score, v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", LOG_BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equals_torch_logcumsumexp(backend, scale):
    x, low = scale * torch.randn(2, 60, 3, dtype=torch.float64), torch.finfo(torch.float64).min
    z, last = log_sum_exp_scan(x, x.new_full((2, 3), low), backend=backend)
    torch.testing.assert_close(z, x.logcumsumexp(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(last, z[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", [None, [0, 5]])
def test_first_derivatives(backend, ends):
    inputs = [t.requires_grad_() for t in _inputs(2, 7, 2, 3, torch.float64)]
    reset, lengths = torch.rand(2, 7) < 0.3, None if ends is None else torch.tensor(ends)

    def run(score, v, *state):
        o, last = softmax_scan(score, v, SoftmaxState(*state), reset=reset, lengths=lengths, backend=backend)
        # in units of a fixed maximum, since the last m is a constant
        scale = (last.m - 3).exp()
        return o, scale * last.u, scale[..., None] * last.w

    base = softmax_scan(*inputs[:2], SoftmaxState(*inputs[2:]), reset=reset, lengths=lengths)[1]
    assert not base.m.requires_grad or ends is not None
    _, u, w = run(*inputs)
    assert torch.autograd.gradcheck(lambda *k: run(*k)[0], inputs, atol=1e-8, rtol=1e-6)
    if ends is None:  # an empty row hands m on as it was given
        # the numbers m, u, w mean u exp(m): perturbed scores move m too, so compare with the sums written out
        score, v, m, u0, w0 = inputs
        want_u, want_w = m.exp() * u0, m.exp()[..., None] * w0
        for t in range(7):
            cut = reset[:, t, None]
            want_u = torch.where(cut, 0, want_u) + score[:, t].exp()
            want_w = torch.where(cut[..., None], 0, want_w) + score[:, t].exp()[..., None] * v[:, t]
        weight_u, weight_w = torch.randn_like(u), torch.randn_like(w)
        got = torch.autograd.grad((u * weight_u).sum() + (w * weight_w).sum(), inputs)
        loss = ((want_u * weight_u).sum() + (want_w * weight_w).sum()) * torch.e**-3
        for g, wanted in zip(got, torch.autograd.grad(loss, inputs)):
            torch.testing.assert_close(g, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", LOG_BACKENDS)
def test_derivatives_of_log_sum_exp(backend):
    x, z0 = torch.randn(2, 6, 3, dtype=torch.float64).requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    reset, lengths = torch.rand(2, 6) < 0.3, torch.tensor([6, 4])
    for options in ({}, dict(reset=reset), dict(reset=reset, lengths=lengths)):
        run = lambda *k: log_sum_exp_scan(*k, backend=backend, **options)  # noqa: B023
        assert torch.autograd.gradcheck(run, (x, z0), atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradgradcheck(lambda *k: log_sum_exp_scan(*k, backend=backend), (x, z0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_in_two_pieces_it_is_the_whole(backend, cut):
    score, v, *state = _inputs(2, 40, 2, 3, torch.float64)
    whole, last = softmax_scan(9 * score, v, SoftmaxState(*state), backend=backend)
    first, middle = softmax_scan(9 * score[:, :cut], v[:, :cut], SoftmaxState(*state), backend=backend)
    second, end = softmax_scan(9 * score[:, cut:], v[:, cut:], middle, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-11, atol=1e-12)
    for p, q in zip(end, last):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("drift", [0.0, 1e-6, 1e-4, 1e-2, 0.7])
def test_float32_stays_near_float64_over_long_time(backend, drift):
    """A score that rises by `drift` a step forgets by exp(-drift)."""
    steps = 65536
    score = drift * torch.arange(steps).view(1, steps, 1) + torch.randn(1, steps, 1)
    v = torch.randn(1, steps, 1, 2)
    o, _ = softmax_scan(score, v, _fresh(v), backend=backend)
    exact, _ = softmax_scan(score.double(), v.double(), _fresh(v.double()), backend=backend)
    error = (o.double() - exact).abs()
    assert (error.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) <= 2e-5 and error.max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_scores_have_no_weight_and_no_gradient(backend):
    score, v, *_ = _inputs(2, 12, 2, 3)
    score[0, :5], score[1, 3], score[1, 7, 1] = -torch.inf, -torch.inf, -torch.inf
    score.requires_grad_(), v.requires_grad_()
    o, last = softmax_scan(score, v, _fresh(v), backend=backend)
    assert not o[0, :5].any() and o.isfinite().all() and all(t.isfinite().all() for t in last)
    torch.testing.assert_close(o[0, 5:], _by_matrix(score[:1, 5:], v[:1, 5:])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o[1], _by_matrix(score[1:], v[1:])[0], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(o.sin().sum() + last.u.sum() + last.w.sum(), (score, v))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][score.isinf()].any() and not grads[1][score.isinf()].any()


@pytest.mark.parametrize("backend", LOG_BACKENDS)
def test_minus_infinity_adds_nothing_to_log_sum_exp(backend):
    x = torch.randn(1, 8, 2)
    x[0, :3], x[0, 5, 0] = -torch.inf, -torch.inf
    low = torch.finfo(torch.float32).min
    x, z0 = x.requires_grad_(), torch.full((1, 2), low).requires_grad_()
    z, last = log_sum_exp_scan(x, z0, backend=backend)
    assert (z[0, :3] <= low).all()
    torch.testing.assert_close(z[0, 3:], x[0, 3:].logcumsumexp(0))
    grads = torch.autograd.grad(z[:, 3:].sin().sum() + last.sum(), (x, z0))
    assert all(g.isfinite().all() for g in grads) and not grads[0][x.isinf()].any() and not grads[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_clears_whatever_was_there(backend):
    score, v, *state = _inputs(2, 9, 2, 3)
    state[0][0], state[1][0], state[2][0] = 1e30, float("nan"), float("inf")  # m far above what comes after
    v[1, 2] = float("nan")
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 0], reset[1, 4] = True, True
    score.requires_grad_(), v.requires_grad_()
    state = [t.requires_grad_() for t in state]
    o, last = softmax_scan(score, v, SoftmaxState(*state), reset=reset, backend=backend)
    torch.testing.assert_close(o[0], _by_matrix(score[:1], v[:1])[0])
    torch.testing.assert_close(o[1, 4:], _by_matrix(score[1:, 4:], v[1:, 4:])[0])
    grads = torch.autograd.grad(o[0].sum() + o[1, 4:].sum() + last.w.sum() + last.u.sum(), (score, v, *state))
    assert all(g[0].isfinite().all() for g in grads[:2]) and all(g[1, 4:].isfinite().all() for g in grads[:2])
    assert all(not g[0].any() for g in grads[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    score, v, *state = _inputs(3, 6, 2, 3)
    lengths, state = torch.tensor([0, 4, 6]), SoftmaxState(*state)
    clean, end = softmax_scan(score, v, state, lengths=lengths, backend=backend)
    alone, last = softmax_scan(score[1:2, :4], v[1:2, :4], SoftmaxState(*(t[1:2] for t in state)), backend=backend)
    score[0], score[1, 4:], v[0], v[1, 4:] = torch.inf, torch.nan, torch.nan, torch.inf
    leaves = score.requires_grad_(), v.requires_grad_()
    dirty, again = softmax_scan(*leaves, state, lengths=lengths, backend=backend)
    assert torch.equal(clean, dirty) and all(torch.equal(p, q) for p, q in zip(end, again))
    assert all(torch.equal(p[0], q[0]) for p, q in zip(end, state)) and not clean[1, 4:].any()
    torch.testing.assert_close(clean[1, :4], alone[0])
    torch.testing.assert_close([t[1] for t in end], [t[0] for t in last])
    grads = torch.autograd.grad(dirty.sum() + again.w.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_head_and_future(backend):
    score, v, *state = _inputs(2, 8, 2, 3)
    clean, _ = softmax_scan(score, v, SoftmaxState(*state), backend=backend)
    score[0, 3, 1] = float("nan")
    o, _ = softmax_scan(score, v, SoftmaxState(*state), backend=backend)
    touched = torch.zeros(2, 8, 2, dtype=torch.bool)
    touched[0, 3:, 1] = True
    assert torch.equal(o.isnan().all(-1), touched) and torch.equal(o[~touched], clean[~touched])


def test_compiles_to_one_graph():
    def run(score, v, m, u, w, reset, lengths):
        o, last = softmax_scan(score, v, SoftmaxState(m, u, w), reset=reset, lengths=lengths)
        z, _ = log_sum_exp_scan(score, m, reset=reset)
        return o, last.u, last.w, z

    torch._dynamo.reset()
    inputs = [t.requires_grad_() for t in _inputs(2, 6, 2, 3)]
    more = (torch.rand(2, 6) < 0.3, torch.tensor([4, 6]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs, *more), run(*inputs, *more)
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(sum(t.sin().sum() for t in outs), inputs) for outs in (got, want)]
    torch.testing.assert_close(*slopes)


def test_what_does_not_fit_is_refused():
    score, v, *state = _inputs(2, 5, 2, 3)
    state = SoftmaxState(*state)
    for wrong in (
        dict(score=score[..., :1]), dict(v=v[..., 0]), dict(state=state._replace(w=state.w[..., :1])),
        dict(state=state._replace(m=state.m.double())), dict(v=v.double()), dict(score=score.double()),
        dict(lengths=torch.tensor([1, 6])), dict(lengths=torch.tensor([1])), dict(reset=torch.zeros(2, 4).bool()),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"softmax_scan: .*expected"):
            softmax_scan(**dict(score=score, v=v, state=state) | wrong)
    with pytest.raises(UsageError, match=r"log_sum_exp_scan: .*expected"):
        log_sum_exp_scan(score, score)


def test_threads_change_nothing(monkeypatch):
    score, v, *state = (t.requires_grad_() for t in _inputs(3, 50, 4, 5))

    def outcome() -> list[Tensor]:
        o, last = softmax_scan(score, v, SoftmaxState(*state), backend="numba")
        loss = o.sin().sum() + last.w.sum() + last.u.sum()
        return [o, *last, *torch.autograd.grad(loss, (score, v, *state))]

    one = outcome()
    monkeypatch.setattr(teams, "SMALL", 0)
    torch.set_num_threads(2)
    try:
        two = outcome()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(p, q) for p, q in zip(one, two))


def test_a_second_derivative_is_refused_where_there_is_none():
    score, v, *state = (t.requires_grad_() for t in _inputs(1, 4, 1, 2))
    o, _ = softmax_scan(score, v, SoftmaxState(*state), backend="numba")
    (slope,) = torch.autograd.grad(o.pow(2).sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        slope.sum().backward()
