"""LSSL, S4, S4D and LMU: convolution = loop however time is cut, kernels = closed forms, memories that remember."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from statewise.core import Cell, StatewiseError, UsageError, chunked, unroll
from statewise.layers import LMU, LSSL, S4, S4D, S5, Mamba
from statewise.nn import LTI, Frozen, bilinear, hippo, legs_dplr, lti

LAYERS: list[tuple[type[LTI], dict[str, Any]]] = [
    *[
        (LSSL, dict(width=2, states=8, measure=measure, rule=rule, learn=learn))
        for measure in ("legs", "legt", "lagt")
        for rule in ("bilinear", "zoh")
        for learn in ("fixed", "structured")
    ],
    (LSSL, dict(width=2, states=5, learn="step", channels=3)),
    (LSSL, dict(width=2, states=5, learn="dense", dt_max=0.5)),
    (S4, dict(width=4, states=16)),
    (S4, dict(width=4, states=6, copies=2, dt_min=0.1, dt_max=1.0)),
    *[
        (S4D, dict(width=3, states=16, start=start, rule=rule))
        for start in ("lin", "inv", "legs", "real")
        for rule in ("zoh", "bilinear")
    ],
    (LMU, dict(width=3, hidden=4, order=16, window=40.0)),
    (LMU, dict(width=3, hidden=4, order=7, window=12.0, memories=3)),
]


def name(case: Any) -> str:
    return case.__name__.lower() if isinstance(case, type) else "-".join(str(v) for v in case.values())


each = pytest.mark.parametrize("cls, arguments", LAYERS, ids=name)


def made(cls: type[LTI], arguments: dict[str, Any], dtype: torch.dtype = torch.float64) -> LTI:
    torch.manual_seed(0)
    return cls(**arguments).to(dtype)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(layer: LTI, batch: int) -> Tensor:
    return layer(normal(batch, 20, layer.width, seed=9).to(layer.initial_state(0).dtype.to_real()))[1].detach()


def near(got: Tensor, want: Tensor, tol: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got - want).abs().max() if got.numel() else 0
    assert error <= tol * (1 + want.abs().max()), float(error)


@each
def test_convolution_is_the_loop(cls: type[LTI], arguments: dict[str, Any]):
    """Over several blocks and a rest, from a state that is not zero."""
    steps = 2 * lti.BLOCK + 77
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        layer = made(cls, arguments, dtype)
        x, first = normal(1, steps, layer.width).to(dtype), state_of(layer, 1)
        with torch.no_grad():
            (y, last), (want, after) = layer(x, first), unroll(layer, x, first)
        near(y, want, tol)
        near(last, after, tol)


@each
def test_blocks_hand_over(cls: type[LTI], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Resets and ends in every place of blocks of 8 steps; gradients too."""
    monkeypatch.setattr(lti, "BLOCK", 8)
    layer, steps = made(cls, arguments), 37
    reset = (
        torch.rand(8, steps, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.0, 0.05, 0.2, 1.0] * 2]).mT
    )
    lengths = torch.tensor([37, 36, 8, 9, 0, 1, 32, 24])
    for cut in (None, reset):
        for ends in (None, lengths):
            results = []
            for run in (layer, partial(_looped, layer)):
                x, first = normal(8, steps, layer.width).requires_grad_(), state_of(layer, 8).requires_grad_()
                y, last = run(x, first, reset=cut, lengths=ends)
                loss = y.sin().sum() + last.abs().pow(2).sum()
                grads = torch.autograd.grad(loss, [x, first, *_trained(layer)], allow_unused=True)
                results.append([y, last, *grads])
            for got, want in zip(*results, strict=True):
                assert (got is None) == (want is None)
                if got is not None:
                    near(got, want, 1e-9)


def _trained(layer: LTI) -> list[Tensor]:
    return [p for p in layer.parameters() if p.requires_grad]


def _looped(layer: LTI, x: Tensor, state: Tensor, *, reset: Tensor | None, lengths: Tensor | None) -> Any:
    """forward by the loop of transitions that the template Cell has."""
    loop = type("Looped", (type(layer),), {"scan": Cell.scan})
    other = loop.__new__(loop)
    other.__dict__ = layer.__dict__
    return other(x, state, reset=reset, lengths=lengths)


@each
def test_chunks_hand_over(cls: type[LTI], arguments: dict[str, Any]):
    layer = made(cls, arguments)
    x = normal(2, 400, layer.width)
    with torch.no_grad():
        want, after = layer(x)
        for sizes in ([400], [1, 0, 299, 100], [256, 144], [40] * 10):
            y, last = chunked(layer, x, sizes)
            near(y, want, 1e-10)
            near(last, after, 1e-10)


@pytest.mark.slow
@each
def test_float32_stays_near_float64_over_65536_steps(cls: type[LTI], arguments: dict[str, Any]):
    low = made(cls, arguments, torch.float32)
    high, x = copy.deepcopy(low).double(), normal(1, 65536, low.width).float()
    with torch.no_grad():
        got, want = low(x)[0], high(x.double())[0]
    assert (got - want).pow(2).mean().sqrt() <= 2e-5 * want.pow(2).mean().sqrt()


def test_lssl_over_a_thousand_steps_in_float32():
    """Convolution against loop at N = 64, L = 1024: within 1e-4."""
    for measure in ("legs", "legt", "lagt"):
        layer = made(LSSL, dict(width=2, states=64, measure=measure, learn="fixed"), torch.float32)
        x = normal(1, 1024, 2).float()
        with torch.no_grad():
            y, want = layer(x)[0], unroll(layer, x)[0]
        assert (y - want).abs().max() <= 1e-4 * want.abs().max()


def _kernel(layer: LTI, steps: int) -> Tensor:
    system = layer.system()
    return layer.kernel(system, lti._squares(system.a, steps), steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 257, 1024])
@pytest.mark.parametrize("states", [2, 8, 64])
def test_s4_kernel_is_the_dense_expansion(states: int, steps: int):
    """diag(lam) - p p^* written out, discretised, and its powers applied one by one."""
    layer = made(S4, dict(width=3, states=states, dt_max=0.3))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        lam, p, b, c, dt = layer._parts()
        lam, p, b, c = (torch.cat([t, t.conj()], -1) for t in (lam, p, b, c))
        a = torch.diag_embed(lam) - p[..., None] * p.conj()[..., None, :]
        half = dt[..., None] / 2 * a
        eye = torch.eye(states, dtype=a.dtype)
        step, x = torch.linalg.solve(eye - half, eye + half), torch.linalg.solve(eye - half, dt * b)
        want = []
        for _ in range(steps):
            want.append((c * x).sum(-1))
            x = (step @ x[..., None])[..., 0]
        want = torch.stack(want, -1)
        assert want.imag.abs().max() <= 1e-10 * want.abs().max()
        near(_kernel(layer, steps)[:, 0], want.real, 1e-10)


def test_s4_kernels_of_all_lengths_agree():
    """The kernel of L steps is the beginning of that of more: nothing of C (I - A^L) is left over."""
    layer = made(S4, dict(width=2, states=16))
    with torch.no_grad():
        longest = _kernel(layer, 300)
        for steps in (1, 2, 5, 100, 255, 256, 299):
            near(_kernel(layer, steps), longest[..., :steps].contiguous(), 1e-11)


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_s4_kernels_of_few_steps_keep_their_digits(steps: int):
    """In steps far shorter than its memory A^L is near I, and C (I - A^L) alone would be lost in rounding."""
    low = made(S4, dict(width=4, states=64, dt_min=1e-5, dt_max=1e-5), torch.float32)
    high = copy.deepcopy(low).double()
    with torch.no_grad():
        got, want = _kernel(low, steps).double(), _kernel(high, steps)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_s4_is_born_as_legs():
    """The step's matrix is similar to that of HiPPO-LegS: the traces of its powers are the same."""
    layer = made(S4, dict(width=1, states=8, dt_min=0.1, dt_max=0.1))
    want, _ = bilinear(*hippo("legs", 8), torch.tensor(0.1))
    got = layer.system().a[0].detach()
    for power in range(1, 9):
        traces = [torch.linalg.matrix_power(a, power).trace() for a in (got, want)]
        torch.testing.assert_close(*traces, atol=1e-4, rtol=0)  # the parameters were made in float32


@pytest.mark.parametrize("start", ["lin", "inv", "legs", "real"])
def test_s4d_kernel_is_its_closed_form(start: Any):
    layer = made(S4D, dict(width=3, states=16, start=start))
    lam = -np.exp(layer.log_decay.detach().numpy()) + 1j * layer.frequency.detach().numpy()
    b, c = (p.detach().numpy() @ np.array([1, 1j]) for p in (layer.b, layer.c))
    dt = np.exp(layer.log_dt.detach().numpy())[:, None]
    powers = np.exp((lam * dt)[..., None] * np.arange(500))
    want = 2 * np.einsum("dn,dnl->dl", c * b * (np.exp(lam * dt) - 1) / lam, powers).real
    with torch.no_grad():
        near(_kernel(layer, 500)[:, 0], torch.from_numpy(want), 1e-11)


@pytest.mark.parametrize("start", ["lin", "legs"])
def test_s4d_by_the_bilinear_rule_is_the_rule_of_matrices(start: Any):
    """Real matrices of 2 x 2 blocks, one for each pair."""
    layer = made(S4D, dict(width=1, states=4, start=start, rule="bilinear", dt_min=0.2, dt_max=0.2))
    with torch.no_grad():
        lam = torch.complex(-layer.log_decay.exp(), layer.frequency)[0]
        b = torch.view_as_complex(layer.b)[0]
        for n in range(2):
            block = torch.tensor([[lam[n].real, -lam[n].imag], [lam[n].imag, lam[n].real]])
            a, enter = bilinear(block, torch.view_as_real(b[n]), layer.log_dt.exp()[0])
            system = layer.system()
            torch.testing.assert_close(torch.view_as_real(system.a[0, n]), a[:, 0])
            torch.testing.assert_close(torch.view_as_real(system.b[0, n]), enter)


def test_s4d_without_a_step_keeps_its_digits():
    """(exp(lam dt) - 1) / lam tends to dt: expm1 keeps what the difference would lose."""
    layer = made(S4D, dict(width=2, states=8, dt_min=1e-7, dt_max=1e-7), torch.float32)
    _, b, _ = layer.system()
    torch.testing.assert_close(b.abs(), torch.full_like(b.abs(), 1e-7), rtol=1e-4, atol=0)


@pytest.mark.parametrize("measure", ["legs", "lagt", "legt"])
def test_lssl_structure_is_hippo(measure: Any):
    torch.manual_seed(0)
    layer = LSSL(2, 64, measure=measure).double()
    if measure == "legt":  # its diagonal begins with noise
        with torch.no_grad():
            layer.middle.copy_(layer.middle.new_zeros(64))
            layer.middle[[0, -1]] = 0.5
    a, b = layer.continuous()
    for got, want in zip((a, b), hippo(measure, 64), strict=True):
        torch.testing.assert_close(got.detach(), want, atol=1e-4, rtol=1e-5)  # the parameters were made in float32


@pytest.mark.parametrize("learn, count", [("fixed", 2), ("step", 3), ("dense", 5), ("structured", 10)])
def test_lssl_learns_what_it_says(learn: Any, count: int):
    layer = LSSL(2, 4, learn=learn)
    assert len(list(layer.parameters())) == count


@pytest.mark.parametrize("rule", ["bilinear", "zoh"])
@pytest.mark.parametrize("cls, more", [(LSSL, dict(learn="structured", channels=2)), (LMU, dict(hidden=3))])
def test_a_frozen_layer_streams_as_the_layer_did(cls: type[LTI], more: dict[str, Any], rule: str):
    size = dict(order=8, window=9.0) if cls is LMU else dict(states=8, rule=rule)
    layer = made(cls, dict(width=3, **size, **more))
    frozen, x, first = Frozen(layer), normal(2, 300, 3), state_of(layer, 2)
    with torch.no_grad():
        (y, last), (got, after) = layer(x, first), unroll(frozen, x, first)
        near(got, y, 1e-11)
        near(after, last, 1e-11)
        near(frozen(x, first)[0], y, 1e-11)
        if cls is LSSL:
            layer.shift += 1  # what is learned later
            near(frozen(x, first)[0], y, 1e-11)
            assert not torch.allclose(layer(x, first)[0], y, rtol=1e-3)


def test_a_step_of_lssl_does_not_discretise_a(monkeypatch: pytest.MonkeyPatch):
    """Of the bilinear rule it solves for one vector; a frozen layer solves nothing."""
    layer, solved = made(LSSL, dict(width=2, states=8)), []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: (solved.append(b.shape[-1]), solve(a, b))[1])
    frozen = Frozen(layer)
    assert solved == [9]
    for one in (layer, frozen):
        one.step(normal(3, 2), one.initial_state(3))
    assert solved == [9, 3]  # one right-hand side for each row


def _legendre(order: int, at: float) -> Tensor:
    """Shifted Legendre polynomials P_0 .. P_(order-1) at a share of the window."""
    return torch.from_numpy(np.polynomial.legendre.legvander(np.array([2 * at - 1]), order - 1)).mT


@pytest.mark.parametrize("delay", [0, 16, 32, 63])
def test_lmu_memory_holds_the_window(delay: int):
    """u(t - delay) = sum_i m_i P_i((delay + 1/2) / window), a held input standing for the middle of its step."""
    layer, window, order = made(LMU, dict(width=1, hidden=1, order=32, window=64.0)), 64, 32
    spectrum = torch.fft.rfft(normal(4, 1024))
    spectrum[:, 40:] = 0  # 8 % of the band: 2.5 periods in the window at most
    u = torch.fft.irfft(spectrum, 1024)
    with torch.no_grad():
        m, _ = layer.scan(u[..., None], layer.initial_state(4), None, None)
    read = m[:, 200:, 0, :] @ _legendre(order, (delay + 0.5) / window)

    def error(steps: int) -> float:
        want = u[:, 200 - steps : 1024 - steps]
        return float((read[..., 0] - want).norm() / want.norm())

    assert error(delay) < 0.05 and error(delay + 32) > 0.5


def test_lmu_is_its_equations():
    layer, x = made(LMU, dict(width=3, hidden=4, order=5, window=6.0, memories=2)), 2 * normal(1, 9, 3)
    m, got = torch.zeros(2, 5, dtype=torch.float64), layer(x)[0][0]
    assert (layer.write(x) < 0).any() and (got == 0).any() and (got > 0).any()
    for t, x_t in enumerate(x[0]):
        u = (layer.write.weight @ x_t + layer.write.bias).clamp(min=0)
        m = m @ layer.a.mT + u[:, None] * layer.b
        y = layer.read.weight @ torch.cat([m.flatten(), x_t]) + layer.read.bias
        torch.testing.assert_close(got[t], y.clamp(min=0), atol=1e-12, rtol=1e-10)


def test_lmu_memory_of_a_constant_is_the_constant():
    layer = made(LMU, dict(width=1, hidden=1, order=8, window=10.0))
    u = torch.full((1, 400, 1), 3.0, dtype=torch.float64)
    with torch.no_grad():
        m, _ = layer.scan(u, layer.initial_state(1), None, None)
    torch.testing.assert_close(m[0, -1, 0], torch.tensor([3.0] + [0.0] * 7, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cls", [S4, S4D])
def test_stable_whatever_is_learned(cls: type[LTI]):
    layer = made(cls, dict(width=6, states=16))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(3 * torch.randn_like(p))
        a = layer.system().a
        size = a.abs() if a.ndim == 2 else torch.linalg.eigvals(a).abs()
    assert (size <= 1 + 1e-9).all()


def test_legs_remembers_where_a_random_matrix_does_not():
    """Least squares on frozen states: u(t - 150) of a slow signal, from 32 numbers."""
    torch.manual_seed(0)
    spectrum = torch.fft.rfft(normal(6, 400))
    spectrum[:, 10:] = 0
    u = torch.fft.irfft(spectrum, 400)[..., None]
    errors = []
    for a, b in (
        hippo("legs", 32),
        (torch.randn(32, 32).double() / 32**0.5 - 1.2 * torch.eye(32).double(), torch.ones(32).double()),
    ):
        layer = LSSL(1, 32, learn="fixed", dt_min=0.01, dt_max=0.01).double()
        layer.a.copy_(a), layer.b.copy_(b)
        layer.c = torch.nn.Parameter(torch.eye(32).double()[None])  # show the state
        with torch.no_grad():
            x = layer.scan(u, layer.initial_state(6), None, None)[0][:, 150:, 0]
        want = u[:, :-150]
        fit = torch.linalg.lstsq(x[:4].flatten(0, 1), want[:4].flatten(0, 1)).solution
        errors.append(float((x[4:] @ fit - want[4:]).norm() / want[4:].norm()))
    assert errors[0] < 0.3 and errors[1] > 3 * errors[0], errors


@pytest.mark.parametrize("cls", [LSSL, S4, S4D])
def test_births(cls: Any):
    """C and D of variance one, dt log-uniform between its bounds, one for each feature."""
    layer = made(cls, dict(width=400, states=8, dt_min=0.01, dt_max=1.0))
    with torch.no_grad():
        c = torch.view_as_complex(layer.c) if cls is not LSSL else layer.c
        assert float(c.abs().pow(2).mean()) == pytest.approx(1, abs=0.15)
        assert float(layer.d.pow(2).mean()) == pytest.approx(1, abs=0.3)
        dt = layer.log_dt.exp()
        assert dt.shape == (400,) and 0.0099 < dt.min() < 0.011 and 0.9 < dt.max() < 1.001
        assert float((dt < 0.1).double().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("cls", [LSSL, S4, S4D])
def test_what_passes_by_the_state_is_d_x(cls: Any):
    layer, x = made(cls, dict(width=3, states=4)), normal(2, 5, 3)
    with torch.no_grad():
        layer.c.zero_()
        torch.testing.assert_close(layer(x)[0], layer.d.view(3) * x)


def test_features_of_s4_share_its_copies_in_turn():
    layer = made(S4, dict(width=6, states=4, copies=3))
    with torch.no_grad():
        layer.log_decay.copy_(torch.arange(3.0)[:, None])
        lam = layer._parts()[0]
    torch.testing.assert_close(lam.real[:, 0], -torch.arange(3.0, dtype=torch.float64).exp().repeat(2))


def test_s4_is_born_with_b_within_two():
    layer, (_, _, b) = made(S4, dict(width=1, states=64)), legs_dplr(64)
    assert b.imag.abs().max() > 2.1
    got = torch.view_as_complex(layer.b.detach())[0]
    inside = b.imag.abs() <= 2
    assert 0 < inside.sum() < len(b)
    torch.testing.assert_close(got.real, b.real, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.imag[inside], b.imag[inside], atol=1e-5, rtol=1e-5)
    assert (got.imag[~inside].abs() == 2).all()


@pytest.mark.parametrize("cls", [LSSL, S4, S4D, S5, Mamba])
@pytest.mark.parametrize("wrong", [dict(dt_min=0.0), dict(dt_min=0.2), dict(dt_max=float("inf")), dict(dt_max=-1.0)])
def test_step_sizes_that_cannot_be_are_refused_by_their_names(cls: Any, wrong: dict[str, float]):
    with pytest.raises(UsageError, match=f"^{cls.__name__}: .*{next(iter(wrong))} {next(iter(wrong.values()))}"):
        cls(4, states=8, **wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: S4(3, 7),
        lambda: S4(3, 8, copies=2),
        lambda: S4D(3, 7),
        lambda: S4D(3, 8, start="other"),
        lambda: S4D(3, 8, rule="other"),
        lambda: LSSL(3, 8, measure="other"),
        lambda: LSSL(3, 8, rule="other"),
        lambda: LSSL(3, 8, learn="other"),
        lambda: LMU(3, 8, order=0, window=3.0),
        lambda: LMU(3, 8, order=4, window=0.0),
        lambda: LMU(3, 8, order=4, window=float("inf")),
        lambda: Frozen(S4(3, 8)),
    ],
)
def test_refuses(make: Any):
    with pytest.raises(StatewiseError) as error:
        make()
    assert "\n" not in str(error.value)
