"""Laws of the outer-product scan: closed forms, limits, derivatives, accuracy, non-finite numbers, memory."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError
from statewise.ops import linear_scan, normalised_outer_scan, outer_scan, outer_step

BACKENDS = [name for name in outer_scan.backends if name != "triton"]
KINDS = {"none": None, "scalar": (1, 1), "key": (3, 1), "value": (1, 4), "full": (3, 4)}
edges, in_torch, in_numba = (  # the op hides the package of its name
    importlib.import_module(f"statewise.ops.outer_scan.{name}") for name in ("edges", "in_torch", "in_numba")
)


def _inputs(
    kind: str, batch: int = 2, steps: int = 7, groups: int = 1, heads: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    sizes = KINDS[kind]
    found = {
        "q": torch.randn(batch, steps, groups, 3, dtype=dtype),
        "k": torch.randn(batch, steps, groups, 3, dtype=dtype),
        "v": torch.randn(batch, steps, heads, 4, dtype=dtype),
        "state": torch.randn(batch, heads, 3, 4, dtype=dtype),
    }
    if sizes is not None:
        found["log_decay"] = torch.rand(batch, steps, heads, *sizes, dtype=dtype).log() / 4
    return found


def _outcome(inputs: dict[str, Tensor], **options) -> list[Tensor]:
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    o, last = outer_scan(**inputs, **options)
    grads = torch.autograd.grad((o * o).sum() + (last * last).sum(), list(inputs.values()))
    return [o.detach(), last.detach(), *grads]


def _close(got, want, **options):
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, **options)


@pytest.fixture(autouse=True)
def what_the_backend_takes(request):
    params = getattr(request.node, "callspec", None)
    asked = {} if params is None else params.params
    if asked.get("backend") == "numba" and asked.get("kind") in ("value", "full"):
        pytest.skip("numba takes one decay per head or per key")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few steps and little scratch, so that small inputs take every path."""
    monkeypatch.setattr(in_torch, "CHUNK", {"scalar": 32, "key": 8, "value": 8})
    monkeypatch.setattr(in_torch, "SCRATCH", 2 * 32 * 32)
    monkeypatch.setattr(in_torch, "FULL", 200)
    monkeypatch.setattr(in_numba, "CHUNK", 32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_length_and_the_gradients_of_some(small_chunks, backend, kind, groups):
    inputs = _inputs(kind, steps=100, groups=groups)
    want, _ = outer_scan.reference(**inputs)
    for steps in [*range(1, 18), 31, 32, 33, 64, 65, 90, 96, 100]:
        part = {name: t if name == "state" else t[:, :steps] for name, t in inputs.items()}
        _close([outer_scan(**part, backend=backend)[0]], [want[:, :steps]], rtol=1e-11, atol=1e-11)
        if steps in (1, 17, 65, 96):
            _close(_outcome(part, backend=backend), _outcome(part, backend="reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 7])
def test_derivatives(backend, kind, steps):
    inputs = {name: t.requires_grad_() for name, t in _inputs(kind, 1, steps, 1, 2).items()}
    reset = torch.zeros(1, steps, dtype=torch.bool)
    reset[:, 4:5] = True

    def run(*tensors):
        return outer_scan(**dict(zip(inputs, tensors)), reset=reset, backend=backend)

    assert torch.autograd.gradcheck(run, list(inputs.values()), atol=1e-8, rtol=1e-6, nondet_tol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_arrive_in_any_layout_and_through_one_result_alone(backend):
    inputs = {name: t.requires_grad_() for name, t in _inputs("key").items()}
    leaves = list(inputs.values())
    for g in (torch.ones(()).double().expand(2, 7, 2, 4), torch.randn(2, 4, 2, 7).double().transpose(1, 3)):
        _close(
            torch.autograd.grad(outer_scan(**inputs, backend=backend)[0], leaves, g),
            torch.autograd.grad(outer_scan.reference(**inputs)[0], leaves, g),
        )
    got = torch.autograd.grad(outer_scan(**inputs, backend=backend)[1].square().sum(), leaves)
    want = torch.autograd.grad(outer_scan.reference(**inputs)[1].square().sum(), leaves, allow_unused=True)
    _close(got, [torch.zeros_like(t) if g is None else g for g, t in zip(want, leaves)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    inputs = {name: t.requires_grad_() for name, t in _inputs("scalar").items()}
    o, _ = outer_scan(**inputs, backend=backend)
    (grad,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_transforms_of_functions_are_refused(backend, transform):
    inputs = _inputs("scalar")
    with pytest.raises(RuntimeError, match=r"functorch transforms|vmap"):
        transform(lambda q: outer_scan(**inputs | {"q": q}, backend=backend)[0].square().sum())(inputs["q"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_parts_are_the_whole(backend, kind):
    inputs = _inputs(kind, steps=150)
    whole, end = outer_scan(**inputs, backend=backend)
    state, parts = inputs.pop("state"), []
    for part in (slice(0, 70), slice(70, 70), slice(70, 71), slice(71, 150)):
        o, state = outer_scan(**{n: t[:, part] for n, t in inputs.items()}, state=state, backend=backend)
        parts.append(o)
    _close([torch.cat(parts, 1), state], [whole, end], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_decay_is_a_cumulative_sum(backend):
    inputs = _inputs("none", steps=200, groups=2)
    q, k, v, state = inputs.values()
    sums = state[:, None] + (k[..., None] * v[..., None, :]).cumsum(1)
    o, last = outer_scan(**inputs, backend=backend)
    _close([o, last], [(q[..., None] * sums).sum(-2), sums[:, -1]], rtol=1e-10, atol=1e-10)
    zero = torch.zeros(1, 1, 1, dtype=o.dtype)
    _close(outer_scan(**inputs, log_decay=zero, backend=backend), [o, last], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_and_one_value_is_the_linear_scan(backend):
    q, k, v = torch.randn(3, 2, 150, 3, 1, dtype=torch.float64).unbind()
    g, state = torch.rand(2, 150, 3, 1, 1, dtype=torch.float64).log(), torch.randn(2, 3, 1, 1, dtype=torch.float64)
    o, last = outer_scan(q, k, v, state, log_decay=g, backend=backend)
    h, end = linear_scan(g.exp(), (k * v)[..., None], state)
    _close([o, last], [q * h[..., 0], end])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_decay_agrees_where_they_mean_the_same(backend):
    inputs = _inputs("scalar", steps=100)
    want = _outcome(inputs, backend=backend)
    for kind in ((3, 1),) if backend == "numba" else ((3, 1), (1, 4), (3, 4)):
        decay = inputs["log_decay"].expand(2, 100, 2, *kind).contiguous()
        got = _outcome(inputs | {"log_decay": decay}, backend=backend)
        got[-1] = got[-1].sum((-2, -1), keepdim=True)
        _close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["scalar", "key", "value"])
def test_the_normalised_form(backend, kind):
    inputs = _inputs(kind, steps=40)
    norm = torch.randn(2, 2, 3, dtype=torch.float64)
    if kind == "value":
        with pytest.raises(UsageError, match="last size of 1"):
            normalised_outer_scan(**inputs, norm=norm)
        return
    o, z, last, n = normalised_outer_scan(**inputs, norm=norm)
    want = outer_scan(**inputs, backend=backend)
    for t in range(40):
        norm = inputs["log_decay"][:, t].exp().squeeze(-1) * norm + inputs["k"][:, t]
        torch.testing.assert_close(z[:, t], (inputs["q"][:, t] * norm).sum(-1))
    _close([o, last, n], [*want, norm])


DECAYS = [0.0, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6, 1.0]


def _accuracy(kind: str, backend: str, steps: int) -> dict[float, float]:
    """Decay to the error relative to the float64 recurrence, root mean square; rows of a batch have the decays."""
    sizes = {"scalar": (1, 1), "key": (4, 1), "value": (1, 4), "full": (4, 4)}[kind]
    q, k, v = torch.randn(3, len(DECAYS), steps, 1, 4).unbind()
    g = torch.tensor(DECAYS, dtype=torch.float64).log().float().view(-1, 1, 1, 1, 1).expand(-1, 1, 1, *sizes)
    state = torch.randn(len(DECAYS), 1, 4, 4)
    o, last = outer_scan(q, k, v, state, log_decay=g, backend=backend)
    a = g.exp().double() if kind == "full" else g.double().exp()  # elementwise, the rounded decay is the decay
    a = a.expand(-1, steps, 1, 4, 4)
    h, end = linear_scan(a, (k[..., None] * v[..., None, :]).double(), state.double(), backend="torch")
    want = (q[..., None].double() * h).sum(-2)
    assert (o - want).abs().max() <= 2e-5 * max(1, steps / 16384) * want.abs().max()
    assert (last - end).abs().max() <= 2e-5 * max(1, steps / 16384) * end.abs().max()
    errors = (o - want).square().mean((1, 2, 3)).sqrt() / want.square().mean((1, 2, 3)).sqrt()
    return dict(zip(DECAYS, errors.tolist()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["scalar", "key", "value", "full"])
def test_accuracy(backend, kind):
    errors = _accuracy(kind, backend, 4096)
    assert max(errors.values()) <= 5e-6, errors


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["scalar", "key", "value"])
def test_accuracy_over_sixty_five_thousand_steps(backend, kind):
    errors = _accuracy(kind, backend, 65536)
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["scalar", "key", "value", "full"])
def test_a_strong_decay_does_not_blur_the_weak_ones_after_it(backend, kind):
    inputs = {n: t.float() for n, t in _inputs(kind, steps=128).items()}
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -1e-3)
    for strong in (-1e4, -300.0, torch.finfo(torch.float32).min, -float("inf")):
        inputs["log_decay"][:, 3::31] = strong
        got = _outcome(inputs, backend=backend)
        want = _outcome({n: t.double() for n, t in inputs.items()}, backend="reference")
        for p, q in zip(got, want):
            assert (p - q).abs().max() <= 3e-6 * q.abs().max()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", ["q", "k", "v", "state"])
def test_what_is_not_finite_stays_in_its_head_and_future(backend, kind, value, target):
    inputs = _inputs(kind, steps=40, groups=2, dtype=torch.float32)
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 30] = True
    clean, end = outer_scan(**inputs, reset=reset, backend=backend)
    dirty = inputs[target].clone()
    if target == "state":
        dirty[1, 1, 0, 2] = value
    else:
        dirty[1, 9, 1, 0] = value
    o, last = outer_scan(**inputs | {target: dirty}, reset=reset, backend=backend)
    touched = torch.zeros_like(o, dtype=torch.bool)
    touched[1, 0 if target == "state" else 9 : 30, 1] = True
    torch.testing.assert_close(o[~touched], clean[~touched], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)
    assert not o[1, 9, 1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_query_that_is_not_finite_reaches_no_gradient_of_later_steps(backend, kind):
    inputs = {n: t.requires_grad_() for n, t in _inputs(kind, steps=40, dtype=torch.float32).items()}
    dirty = inputs["q"].detach().clone()
    dirty[1, 9] = float("nan")
    o, _ = outer_scan(**inputs | {"q": dirty.requires_grad_()}, backend=backend)
    assert o[0].isfinite().all() and o[1, 10:].isfinite().all() and not o[1, 9].isfinite().any()
    grads = torch.autograd.grad(o.square().sum(), (inputs["k"], inputs["v"]))
    assert all(g[0].isfinite().all() and g[1, 10:].isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_reset_clears_infinity_in_values_and_gradients(backend, kind):
    inputs = _inputs(kind, steps=20, dtype=torch.float32)
    inputs["state"][0, 0, 0, 0] = float("inf")
    inputs["v"][1, 4, 1, 2] = float("nan")
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 0] = reset[1, 9] = True
    o, last = outer_scan(**inputs, reset=reset, backend=backend)
    assert o[0].isfinite().all() and o[1, 9:].isfinite().all() and last.isfinite().all()
    grads = torch.autograd.grad(o[0].sum() + o[1, 9:].sum() + last.sum(), list(inputs.values()))
    assert all(g[0].isfinite().all() for g in grads) and grads[3].isfinite().all()
    assert all(g[1, 9:].isfinite().all() for n, g in zip(inputs, grads) if n != "state")  # before it, 0 NaN is NaN


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything(backend, kind):
    inputs = _inputs(kind, 3, 9)
    lengths = torch.tensor([0, 4, 9])
    want = _outcome(inputs, lengths=lengths, backend=backend)
    for name in inputs.keys() - {"state"}:
        inputs[name][0], inputs[name][1, 4:] = float("nan"), float("inf")
    got = _outcome(inputs, lengths=lengths, backend=backend)
    assert all(map(torch.equal, got, want))
    assert torch.equal(got[1][0], inputs["state"][0]) and not got[0][1, 4:].any()
    alone, end = outer_scan(**{n: t[1:2] if n == "state" else t[1:2, :4] for n, t in inputs.items()}, backend=backend)
    _close([got[0][1:2, :4], got[1][1:2]], [alone, end])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_stay_and_layout_changes_nothing(backend):
    inputs = _inputs("key", steps=70)
    want = _outcome(inputs, backend=backend)
    odd = {n: t.movedim(0, -1).contiguous().movedim(-1, 0) for n, t in inputs.items()}
    before = {n: (t._version, t.clone()) for n, t in odd.items()}
    _close(_outcome(odd, backend=backend), want, rtol=1e-12, atol=1e-12)
    assert all(t._version == before[n][0] and torch.equal(t, before[n][1]) for n, t in odd.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["scalar", "key", "value"])
def test_memory_is_a_few_times_the_inputs(backend, kind):
    """No array of the size (T, K, V): with K = V = 32 it would be 16 times the inputs."""
    from torch.profiler import profile

    q, k, v = (torch.randn(1, 2048, 2, 32).requires_grad_() for _ in range(3))
    g = -torch.rand(1, 2048, 2, *{"scalar": (1, 1), "key": (32, 1), "value": (1, 32)}[kind])
    leaves = (q, k, v, g.requires_grad_())
    with profile(profile_memory=True) as watched:
        o, last = outer_scan(q, k, v, torch.zeros(1, 2, 32, 32), log_decay=g, backend=backend)
        torch.autograd.grad(o.sum() + last.sum(), leaves)
    held = peak = 0
    for event in sorted(watched.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= 8 * sum(t.nbytes for t in leaves) + 8 * 4 * in_torch.SCRATCH


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("kind", ["none", "key"])
def test_compiles_to_one_graph(backend, kind):
    torch._dynamo.reset()

    def run(inputs, reset, lengths):
        o, last = outer_scan(**inputs, reset=reset, lengths=lengths, backend=backend)
        return outer_scan(inputs["q"].sin(), inputs["k"], o, last, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = {n: t.requires_grad_() for n, t in _inputs(kind, 2, 6).items()}
    more = (torch.rand(2, 6) < 0.3, torch.tensor([4, 6]))
    for got, want in zip(compiled(inputs, *more), run(inputs, *more)):
        torch.testing.assert_close(got, want)
        _close(
            *(
                torch.autograd.grad(t.sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
                for t in (got, want)
            )
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(backend, kind):
    inputs = _inputs(kind, 2, 5)
    args = edges.normal(*(inputs.get(n) for n in ("q", "k", "v", "log_decay", "state")), None, None)
    args = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in args]
    torch.library.opcheck(getattr(torch.ops.statewise, f"outer_scan_{backend}"), args)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.ones(2, 7, 1, 2)), "expected q and k"),
        (dict(v=torch.ones(2, 6, 2, 4)), "H a multiple of G"),
        (dict(q=torch.ones(2, 7, 3, 3), k=torch.ones(2, 7, 3, 3)), "H a multiple of G"),
        (dict(state=torch.ones(2, 2, 4, 3)), r"\(2, 2, 3, 4\)"),
        (dict(state=torch.ones(2, 2, 3, 4).bfloat16()), "float32"),
        (dict(state=torch.ones(2, 2, 3, 4)), "no narrower"),
        (dict(log_decay=torch.ones(2, 7, 2)), "log_decay is"),
        (dict(reset=torch.ones(2, 7)), "bool"),
        (dict(lengths=torch.tensor([1])), "lengths has shape"),
        (dict(lengths=torch.tensor([1, 8])), r"lengths\[1\] is 8"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        outer_scan(**_inputs("none") | change)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_scan_of_one(kind):
    inputs = _inputs(kind, steps=1)
    first = [inputs[n][:, 0] for n in ("q", "k", "v")]
    g = inputs["log_decay"][:, 0] if kind != "none" else None
    o, state = outer_step(*first, g, inputs["state"])
    _close([o[:, None], state], outer_scan(**inputs))
