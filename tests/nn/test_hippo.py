"""HiPPO by what it is for: polynomials of the past, normal parts, steps that are exact where they must be."""

from __future__ import annotations

import math

import pytest
import torch

from statewise.core import Unknown, UsageError
from statewise.nn import bilinear, diagonal, hippo, legendre_memory, legs_dplr, zero_order_hold

ONE = torch.ones((), dtype=torch.float64)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("states", [1, 2, 7, 64])
def test_normal_after_a_rank_one_part(states: int):
    """The skew laws: LegS + p p^T + I/2, and LagT + 1 1^T / 2, are skew; LegT has rank 2 beside a skew part."""
    n = torch.arange(states, dtype=torch.float64)
    legs, r = hippo("legs", states)
    p = (n + 0.5).sqrt()
    normal = legs + p[:, None] * p
    torch.testing.assert_close(normal + normal.mT, -eye(states), atol=1e-9, rtol=0)
    torch.testing.assert_close(r, 2**0.5 * p)
    lagt, one = hippo("lagt", states)
    assert torch.equal(lagt + lagt.mT, -one[:, None] * one)
    legt, _ = hippo("legt", states)
    assert torch.linalg.matrix_rank(legt + legt.mT, atol=1e-6) == min(states, 2)


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_a_constant_is_held_by_the_first_polynomial(measure):
    a, b = hippo(measure, 6)
    torch.testing.assert_close(a[:, 0] + b, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_legs_is_a_matrix_of_polynomials():
    """Under x' = (A x + B u) / t LegS holds the coefficients of u's past: for u(t) = t they are those of t's past."""
    states = 5
    a, b = hippo("legs", states)
    # f(s) = s on [0, t] is t (1/2 + P_1 / (2 sqrt 3)) in the orthonormal polynomials sqrt(2n+1) P_n
    x = torch.tensor([0.5, 0.5 / 3**0.5, 0, 0, 0], dtype=torch.float64)
    # x(t) = t x, so x' = x, and u(t) = t: x = A x + B must hold
    torch.testing.assert_close(a @ x + b, x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("states", [2, 8, 64])
def test_legs_dplr_rebuilds_legs(states: int):
    lam, p, b = legs_dplr(states)
    _, r = hippo("legs", states)
    assert (lam.real == -0.5).all() and (lam.imag > 0).all()
    # the response C (s I - A)^-1 B is the same in any basis; C is B's dual, taken as B itself
    a, _ = hippo("legs", states)
    for s in (0.3 + 0.2j, 2.0, 1j):
        want = r.to(lam.dtype) @ torch.linalg.solve(s * eye(states).to(lam.dtype) - a, r.to(lam.dtype))
        full_lam, full_p, full_b = (torch.cat([t, t.conj()]) for t in (lam, p, b))
        dplr = torch.diag(full_lam) - full_p[:, None] * full_p.conj()
        got = full_b.conj() @ torch.linalg.solve(s * eye(states).to(lam.dtype) - dplr, full_b)
        assert abs(got - want) <= 1e-9 * abs(want) * states


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("states", [1, 4, 64])
def test_stable(measure, states: int):
    a, b = hippo(measure, states)
    assert (torch.linalg.eigvals(a).real < 0).all() and (b != 0).all()
    for rule in (bilinear, zero_order_hold):
        step, _ = rule(a, b, torch.tensor([1e-3, 0.1], dtype=torch.float64))
        assert (torch.linalg.eigvals(step).abs() < 1).all()


def test_rules_agree_with_their_definitions():
    a, b = hippo("legt", 6)
    dt = torch.tensor([0.01, 0.3], dtype=torch.float64)
    for alpha in (0.0, 0.5, 1.0):
        step, inp = bilinear(a, b, dt, alpha=alpha)
        for k in range(2):
            left = eye(6) - alpha * dt[k] * a
            torch.testing.assert_close(left @ step[k], eye(6) + (1 - alpha) * dt[k] * a)
            torch.testing.assert_close(left @ inp[k], dt[k] * b)
    step, inp = zero_order_hold(a, b, dt)
    torch.testing.assert_close(step[1], torch.linalg.matrix_exp(0.3 * a))
    torch.testing.assert_close(inp[1], torch.linalg.solve(a, (step[1] - eye(6)) @ b))


def test_orders_of_the_rules():
    """Halving dt divides the error of one step by 2^(order + 1): 2 for Tustin's rule, 1 for Euler's."""
    a, b = hippo("legs", 4)
    for alpha, order in ((0.5, 2), (0.0, 1), (1.0, 1)):
        errors = [
            float((bilinear(a, b, dt * ONE, alpha=alpha)[0] - torch.linalg.matrix_exp(dt * a)).norm())
            for dt in (2e-3, 1e-3)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.1)


def test_zero_order_hold_takes_a_singular_matrix():
    step, inp = zero_order_hold(torch.zeros(2, 2), torch.ones(2), torch.tensor(0.5))
    torch.testing.assert_close(step, eye(2))
    torch.testing.assert_close(inp, torch.full((2,), 0.5, dtype=torch.float64))


def test_rules_are_differentiable():
    a, b = (t.requires_grad_() for t in hippo("legs", 3))
    dt = torch.tensor([0.1, 0.2], dtype=torch.float64).requires_grad_()
    for rule in (bilinear, zero_order_hold):
        assert torch.autograd.gradcheck(rule, (a, b, dt), atol=1e-8, rtol=1e-6)


def test_legendre_memory_is_legt_of_another_scale():
    """Row by row 2 (2i+1)-scaled and signed: the two forms of the sliding window have one spectrum."""
    a, _ = legendre_memory(8, 2.0)
    b, _ = hippo("legt", 8)
    spectra = [torch.linalg.eigvals(m) for m in (2 * a, 2 * b)]
    by_size = [s[torch.argsort(s.real * 1e3 + s.imag)] for s in spectra]
    torch.testing.assert_close(by_size[0], by_size[1], atol=1e-8, rtol=0)


@pytest.mark.parametrize("states", [2, 8, 64])
def test_diagonal_starts(states: int):
    n = torch.arange(states // 2, dtype=torch.float64)
    for start in ("lin", "inv", "legs", "real"):
        lam, b = diagonal(start, states)
        assert lam.shape == b.shape == (states // 2,) and (lam.real < 0).all() and (lam.imag >= 0).all()
    assert torch.equal(diagonal("lin", states)[0].imag, math.pi * n)
    assert torch.equal(diagonal("real", states)[0].real, -(n + 1))
    inv = diagonal("inv", states)[0].imag
    torch.testing.assert_close(inv * math.pi * (2 * n + 1), states * (states - 2 * n - 1))
    torch.testing.assert_close(diagonal("legs", states)[0], legs_dplr(states)[0])


def test_inv_approaches_the_spectrum_of_legs():
    """S4D-Inv is the asymptotic form of LegS's frequencies: the largest agree to a few percent."""
    legs, inv = (diagonal(start, 256)[0].imag.sort(descending=True).values[:10] for start in ("legs", "inv"))
    assert ((legs - inv).abs() / legs).max() < 0.1


def test_refuses():
    for call in (lambda: hippo("legz", 3), lambda: diagonal("linn", 4), lambda: diagonal("lin", 5)):
        with pytest.raises((UsageError, Unknown)):
            call()
