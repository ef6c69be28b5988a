"""Newton's method in time equals the loop, or takes the loop: where it converges, where it cannot, and when broken."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from statewise.core import NumericError, UsageError, leaves, tree_map, where
from statewise.ops import block_scan, use_backend
from statewise.ops import newton as package
from statewise.ops.newton import Structure, by_tangents, newton, watched
from statewise.ops.newton.probe import probe
from statewise.ops.newton.structure import Layout

FLOATS = [torch.float32, torch.float64]
NEAR = {torch.float32: 1e-6, torch.float64: 1e-10}


def loop(step, u, state, fresh=None, reset=None, lengths=None):
    """The definition."""
    outs = []
    for t in range(leaves(u)[0].shape[1]):
        before = state if reset is None else where(reset[:, t], fresh, state)
        o, new = step(tree_map(lambda leaf: leaf[:, t], u), before)  # noqa: B023
        state = new if lengths is None else where(t < lengths, new, state)
        outs.append(o)
    return tree_map(lambda *leaf: torch.stack(leaf, 1), *outs), state


def dense(size: int, radius: float, dtype: torch.dtype, seed: int = 0):
    """h_t = tanh(R h_{t-1} + u_t), R of the given spectral radius."""
    rng = torch.Generator().manual_seed(seed)
    r = torch.randn(size, size, generator=rng, dtype=torch.float64)
    r = (r * radius / torch.linalg.eigvals(r).abs().max()).to(dtype)

    def step(u: Tensor, h: Tensor):
        new = torch.tanh(h @ r.T + u)
        return new, new

    return step


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got, want, tolerance: float) -> None:
    for g, w in zip(leaves(got), leaves(want), strict=True):
        error = ((g - w).abs() / (1 + w.abs())).max() if g.numel() else torch.zeros(())
        assert error <= tolerance, f"off by {error:.2g}, allowed {tolerance:.2g}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("radius", [0.5, 0.9, 1.5, 3.0])
@pytest.mark.parametrize("size, scale", [(5, 1.0), (12, 0.1)])
def test_dense_tanh_equals_the_loop(dtype, radius, size, scale):
    step, u, first = (
        dense(size, radius, dtype),
        scale * noise(2, 256, size, dtype=dtype),
        torch.zeros(2, size, dtype=dtype),
    )
    o, last, told = newton(step, u, first, structure=Structure(size, size))
    assert_near((o, last), loop(step, u, first), NEAR[dtype])
    assert told.residual <= 4 * NEAR[dtype]
    assert radius > 1 or not any(told.sequential) or dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("radius", [1.5, 3.0])
@pytest.mark.parametrize("size, scale", [(5, 1.0), (16, 0.01), (16, 1.0)])
def test_dense_tanh_equals_the_loop_over_long_time(dtype, radius, size, scale):
    step, u = dense(size, radius, dtype), scale * noise(2, 4096, size, dtype=dtype)
    first = noise(2, size, dtype=dtype, seed=2)
    o, last, _ = newton(step, u, first, structure=Structure(size, size))
    assert_near((o, last), loop(step, u, first), NEAR[dtype])


def random_cell(seed: int, dtype: torch.dtype):
    """A cell of random structure, slope and nonlinearity: (step, structure, u, state)."""
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    groups, size = pick(1, 2, 3), pick(1, 2, 4)
    batch, steps = pick(1, 2, 3), pick(2, 7, 60, 129)
    n = groups * size
    r = normal(groups, size, size) * pick(0.1, 0.5, 1.0, 3.0)
    squash = pick(torch.tanh, torch.sin, torch.relu, lambda v: v / (1 + v * v), torch.sigmoid)
    leak = pick(0.0, 0.5, 0.99, 1.0)
    gate = normal(n)

    def step(u: Tensor, h: Tensor):
        mixed = torch.einsum("gij,mgj->mgi", r, h.unflatten(-1, (groups, size))).flatten(-2)
        keep = leak * torch.sigmoid(u + gate)
        new = keep * h + (1 - keep) * squash(mixed + u)
        return 2 * h - new, new

    return step, Structure(n, size), normal(batch, steps, n) * pick(0.1, 1.0, 10.0), normal(batch, n)


@pytest.mark.parametrize("part", range(10))
def test_random_cells_equal_the_loop(part):
    """200 cells: contractive, expanding, chaotic, integrating; what Newton cannot do must have been looped."""
    solved = 0
    for seed in range(20 * part, 20 * part + 20):
        dtype = FLOATS[seed % 2]
        step, structure, u, first = random_cell(seed, dtype)
        want_o, want = loop(step, u, first)
        if not want.isfinite().all():
            continue
        o, last, told = newton(step, u, first, structure=structure, segment=[None, 16][seed % 3 == 0])
        tolerance = 4 * NEAR[dtype]  # o doubles a state's error
        assert_near((o, last), (want_o, want), tolerance)
        solved += not any(told.sequential)
    assert solved >= 4, "Newton's method should solve many of them"


# what is broken must be caught: the answer stays that of the loop, and the diagnostics say what it took


def case(dtype: torch.dtype = torch.float64, steps: int = 100):
    step = dense(6, 0.9, dtype)
    return step, noise(2, steps, 6, dtype=dtype), noise(2, 6, dtype=dtype, seed=3)


def test_too_few_iterations_are_finished_by_the_loop():
    step, u, first = case()
    for limit in (1, 2, 3):
        o, last, told = newton(step, u, first, structure=Structure(6, 6), max_iterations=limit)
        assert_near((o, last), loop(step, u, first), 1e-10)
        assert max(told.sequential) > 50 and told.stalled == 2
        assert "stopped converging" in str(told)


@pytest.mark.parametrize(
    "wrong",
    [lambda j: -j, lambda j: 0.5 * j, lambda j: 0 * j, lambda j: j.mT, lambda j: 1e30 * j, lambda j: j * math.nan],
    ids=["sign", "half", "none", "transposed", "huge", "nan"],
)
def test_a_wrong_jacobian_costs_time_alone(wrong):
    step, u, first = case()
    right = by_tangents(step, Layout.of(first), Structure(6, 6))

    def linearise(u_t, h):
        f, j = right(u_t, h)
        return f, wrong(j)

    o, last, told = newton(step, u, first, structure=Structure(6, 6), linearise=linearise)
    assert_near((o, last), loop(step, u, first), 1e-9)
    _, _, best = newton(step, u, first, structure=Structure(6, 6))
    assert sum(told.iterations) > sum(best.iterations), "the wrong Jacobian should have been noticed"


def test_a_step_called_affine_that_is_not_is_caught_by_the_residual():
    step, u, first = case()
    o, last, told = newton(step, u, first, structure=Structure(6, 6), affine=True)
    assert_near((o, last), loop(step, u, first), 1e-10)
    assert max(told.sequential) > 90


def test_a_dropped_carry_would_be_caught(monkeypatch):
    """Segments that begin from zero: the residual at their first step is not small."""
    right = package._Run.newton
    monkeypatch.setattr(
        package._Run, "newton", lambda run, low, high, carry, lost: right(run, low, high, 0 * carry, lost)
    )
    step, u, first = case()
    o, last, told = newton(step, u, first, structure=Structure(6, 6), segment=25)
    assert_near((o, last), loop(step, u, first), 1e-10)
    assert min(told.sequential) == 100


def test_a_missing_block_costs_time_alone():
    """Quasi-Newton by mistake: blocks declared where the Jacobian is dense."""
    step, u, first = case()
    o, last, _ = newton(step, u, first, structure=Structure(6, 2))
    assert_near((o, last), loop(step, u, first), 1e-8)


def test_quasi_newton_equals_the_loop():
    step = dense(6, 0.3, torch.float64)
    u, first = noise(2, 200, 6), noise(2, 6, seed=3)
    o, last, told = newton(step, u, first, structure=Structure(6, 1, exact=False))
    assert_near((o, last), loop(step, u, first), 1e-10)
    assert not any(told.sequential) and sum(told.iterations) > 6


def test_damping_equals_the_loop():
    step, u, first = case()
    for damping in (0.1, 1.0):
        o, last, _ = newton(step, u, first, structure=Structure(6, 6), damping=damping)
        assert_near((o, last), loop(step, u, first), 1e-10)


def test_rounding_that_grows_is_looped():
    """A chaotic map: in float32 no two ways to compute it agree, so all of it comes from the loop, to the bit."""

    def step(u: Tensor, h: Tensor):
        new = 3.9 * h * (1 - h) + 0 * u
        return new, new

    first = torch.full((1, 1), 0.3)
    o, last, told = newton(step, torch.zeros(1, 300, 1), first, structure=Structure(1, 1))
    want, end = loop(step, torch.zeros(1, 300, 1), first)
    assert torch.equal(o, want) and torch.equal(last, end)
    assert told.sequential == (300,)


def test_integrators_need_no_loop():
    """h_t = h_{t-1} + u_t grows to 1e4: tolerance is relative there."""

    def step(u: Tensor, h: Tensor):
        return h, h + u.abs()

    u, first = 10 * noise(2, 3000, 2, dtype=torch.float32), torch.zeros(2, 2)
    o, last, told = newton(step, u, first, structure=Structure(2, 1), tolerance=1e-5)
    assert_near((o, last), loop(step, u, first), 1e-5)
    assert not any(told.sequential)


# the protocol


def tree_step(w: Tensor):
    """Two leaves, of which one is complex and has two axes; o is neither."""

    def step(u, state):
        h, (z,) = state
        new = torch.tanh(w[0] * h + u[0] + z.real.mean(-1))
        turned = z * torch.polar(torch.sigmoid(w[1]), w[2])[..., None] + new[..., None] * u[1]
        return (new * h, turned.imag.sum(-1)), (new, (turned / (1 + turned.abs()),))

    return step


def tree_case(batch: int = 3, steps: int = 40):
    u = noise(batch, steps, 2), noise(batch, steps, 2, 3, seed=2)
    z = torch.complex(noise(batch, 2, 3, seed=3), noise(batch, 2, 3, seed=4))
    state = noise(batch, 2, seed=5), (z,)
    return tree_step(noise(3, 2, seed=6)), u, state


def test_state_trees_resets_and_lengths():
    step, u, state = tree_case()
    fresh = tree_map(lambda s: 0.5 + 0 * s, state)
    found = probe(
        step, tree_map(lambda leaf: leaf[:, 0], u), [state, fresh, tree_map(lambda s: s[:1].expand_as(s), state)]
    )
    assert found.numbers == 14 and found.structure.size == 7 and not found.affine
    reset = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.1
    lengths = torch.tensor([40, 0, 13])
    for given in ({}, {"reset": reset}, {"lengths": lengths}, {"reset": reset, "lengths": lengths}):
        o, last, told = newton(step, u, state, structure=found.structure, fresh=fresh, segment=17, **given)
        want_o, want = loop(step, u, state, fresh, **given)
        assert not any(told.sequential)
        assert_near(last, want, 1e-10)
        for row, end in enumerate(lengths.tolist() if "lengths" in given else [40] * 3):
            assert_near(tree_map(lambda s: s[row, :end], o), tree_map(lambda s: s[row, :end], want_o), 1e-10)  # noqa: B023


def test_no_steps_and_no_rows():
    step, u, first = case()
    for b, t in ((2, 0), (0, 5), (0, 0), (2, 1)):
        o, last, told = newton(step, u[:b, :t], first[:b], structure=Structure(6, 6))
        assert o.shape == (b, t, 6) and last.shape == (b, 6) and not any(told.sequential)


def test_a_nan_stays_in_its_row_and_future():
    step, u, first = case(steps=60)
    bad = u.clone()
    bad[0, 30] = torch.nan
    (o, _, _), (want, _, _) = (newton(step, v, first, structure=Structure(6, 6)) for v in (bad, u))
    assert torch.equal(o[1], want[1]) and torch.equal(o[0, :30], want[0, :30]) and o[0, 30:].isnan().all()
    reset = torch.zeros(2, 60, dtype=torch.bool)
    reset[0, 40] = True
    o, _, _ = newton(step, bad, first, structure=Structure(6, 6), fresh=first, reset=reset)
    assert o[0, 40:].isfinite().all()


@pytest.mark.parametrize("method", ["dense", "quasi", "affine", "tree"])
def test_gradcheck(method):
    w = noise(3, 2, seed=6).requires_grad_()
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 3] = True
    lengths = torch.tensor([6, 4])
    if method == "tree":
        _, u, state = tree_case(2, 6)
        structure, make = Structure.of([[0, *range(2, 8)], [1, *range(8, 14)]]), tree_step
    else:
        u, state, structure = (noise(2, 6, 2),), noise(2, 2, seed=3), Structure(2, 2)
        if method == "quasi":
            structure = Structure(2, 1, exact=False)

        def make(w):
            def step(u, h):
                if method == "affine":
                    new = h @ w[:2].T * torch.sigmoid(u[0]) + w[2] * u[0]
                else:
                    new = torch.tanh(0.3 * h @ w[:2].T + w[2] * u[0])
                return new * h, new

            return step

    fresh = tree_map(lambda s: (0.1 + 0 * s).detach().requires_grad_(), state)
    u, state = (tree_map(lambda s: s.detach().requires_grad_(), tree) for tree in (u, state))
    inputs = [w, *leaves(u), *leaves(state), *leaves(fresh)]

    def run(*_: Tensor):
        o, last, _ = newton(
            make(w), u, state, structure=structure, fresh=fresh, reset=reset, lengths=lengths, tolerance=1e-13,
            segment=4, affine=method == "affine",
        )  # fmt: skip
        o = tree_map(lambda leaf: leaf * (torch.arange(6) < lengths[:, None])[..., None], o)
        return tuple(torch.view_as_real(t) if t.is_complex() else t for t in (*leaves(o), *leaves(last)))

    assert gradcheck(run, inputs, atol=1e-8, rtol=1e-6, fast_mode=method == "tree")


def test_gradients_of_looped_rows():
    """A row that was finished step by step has the gradient of the loop."""
    step = dense(5, 1.5, torch.float64)
    for u in (noise(2, 50, 5), noise(2, 60, 5, seed=9)):
        first, wrt = noise(2, 5, seed=3), u.requires_grad_()
        o, _, told = newton(step, u, first, structure=Structure(5, 5), max_iterations=3)
        assert any(told.sequential)
        (got,), (want,) = (torch.autograd.grad(y.sin().sum(), wrt) for y in (o, loop(step, u, first)[0]))
        assert_near(got, want, 1e-9)


@pytest.mark.parametrize("structure", [Structure(6, 2), Structure(6, 1), Structure(6, 6)])
def test_a_wrong_jacobian_makes_no_gradient(structure):
    """Forward finds its way without the right Jacobian; backward has nothing else to go by, and says so."""
    step, u, first = case(steps=20)
    u.requires_grad_()
    right = by_tangents(step, Layout.of(first), structure)

    def linearise(u_t, h):
        f, j = right(u_t, h)
        return f, j if structure.size < 6 else 0.7 * j

    o, _, _ = newton(step, u, first, structure=structure, linearise=linearise)
    with pytest.raises(NumericError, match="Jacobian"):
        o.sum().backward()
    o, _, _ = newton(step, u, first, structure=Structure(6, 6))
    o.sum().backward()


def test_nothing_outlives_its_outputs(monkeypatch):
    """The graph keeps what backward needs, and goes when the outputs go."""
    seen, begin = [], package._Run.__post_init__
    monkeypatch.setattr(package._Run, "__post_init__", lambda run: (begin(run), seen.append(weakref.ref(run)))[0])
    step, u, first = case(steps=10)
    o, last, _ = newton(step, u.requires_grad_(), first, structure=Structure(6, 6))
    assert seen[0]() is not None
    o.sum().backward()
    del o, last
    gc.collect()
    assert seen[0]() is None


def test_a_second_derivative_raises():
    step, u, first = case(steps=5)
    u.requires_grad_()
    o, _, _ = newton(step, u, first, structure=Structure(6, 6))
    (g,) = torch.autograd.grad(o.pow(2).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(g.sum(), u)


def test_backends_of_the_inner_scan_agree():
    step, u, first = case(steps=40)
    want, _ = loop(step, u, first)
    for name in ("reference", "torch", "numba"):
        with use_backend(name):
            assert_near(newton(step, u, first, structure=Structure(6, 6))[0], want, 1e-10)


def test_large_blocks_without_a_kernel():
    """Blocks past the size that is reduced pairwise."""
    a, x, h0 = 0.1 * noise(2, 9, 1, 12, 12), noise(2, 9, 1, 12, seed=2), noise(2, 1, 12, seed=3)
    assert_near(block_scan(a, x, h0, backend="torch"), block_scan(a, x, h0, backend="reference"), 1e-12)


def test_watched():
    step, u, first = case(steps=20)
    with watched() as found:
        newton(step, u, first, structure=Structure(6, 6))
        newton(step, u, first, structure=Structure(6, 6))
    newton(step, u, first, structure=Structure(6, 6))
    assert len(found) == 2 and "iterations" in str(found[0])


def test_refusals():
    step, u, first = case(steps=5)
    for given, word in (
        ({"structure": Structure(5, 5)}, "structure"),
        ({"structure": Structure(6, 6), "tolerance": 1e-17}, "tolerance"),
        ({"structure": Structure(6, 6), "damping": 2.0}, "damping"),
    ):
        with pytest.raises(UsageError, match=word):
            newton(step, u, first, **given)
    with pytest.raises(UsageError, match="floating"):
        newton(step, u, first.long(), structure=Structure(6, 6))
    with pytest.raises(UsageError, match="blocks"):
        Structure(6, 4)


def test_doctest():
    import doctest
    import sys

    for name in ("statewise.ops.newton", "statewise.ops.newton.structure"):
        results = doctest.testmod(sys.modules[name])
        assert results.attempted > 0 and results.failed == 0
