"""Echo state networks: scaling, the echo, NARMA-10 and memory capacity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError
from statewise.layers import Reservoir


def narma10(steps: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """y_{t+1} = 0.3 y_t + 0.05 y_t sum_{i<10} y_{t-i} + 1.5 u_{t-9} u_t + 0.1, u uniform in [0, 0.5]."""
    u = (0.5 * torch.rand(steps, generator=rng, dtype=torch.float64)).tolist()
    y = [0.0] * 10
    for t in range(9, steps - 1):
        y.append(0.3 * y[t] + 0.05 * y[t] * sum(y[t - 9 : t + 1]) + 1.5 * u[t - 9] * u[t] + 0.1)
    return torch.tensor(u)[None, :-1, None].double(), torch.tensor(y)[None, 1:, None].double()


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_the_spectral_radius_is_as_asked(density: float):
    layer = Reservoir(2, 30, 1, spectral_radius=1.2, density=density, seed=0).double()
    assert torch.linalg.eigvals(layer.w).abs().max().item() == pytest.approx(1.2, rel=1e-5)
    assert (layer.w != 0).double().mean().item() == pytest.approx(density + (1 - density) / 30, abs=0.05)


def test_a_seed_makes_the_reservoir_and_nothing_else_does():
    one, two, other = (Reservoir(2, 20, 1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.w, two.w) and torch.equal(one.w_in, two.w_in)
    assert not torch.equal(one.w, other.w)
    assert [name for name, _ in one.named_parameters()] == ["readout.weight", "readout.bias"]
    assert not torch.equal(Reservoir(2, 20, 1).w, Reservoir(2, 20, 1).w)


def test_echoes_die_out_below_radius_one():
    layer = Reservoir(1, 50, 1, spectral_radius=0.8, leak=0.5, seed=0).double()
    x = torch.randn(2, 400, 1, dtype=torch.float64)[:1].expand(2, -1, -1)
    _, h = layer(x, torch.stack([torch.ones(50), -torch.ones(50)]).double())
    torch.testing.assert_close(h[0], h[1])


def test_the_readout_is_the_ridge_solution():
    layer = Reservoir(2, 10, 3, seed=0).double()
    x, y = torch.randn(2, 60, 2, dtype=torch.float64), torch.randn(2, 60, 3, dtype=torch.float64)
    lengths = torch.tensor([60, 40])
    layer.fit_readout(x, y, washout=5, ridge=0.1, lengths=lengths)
    out, _ = layer(x)
    h, _ = layer.scan(layer.encode(x), layer.initial_state(2), None, None)
    z = torch.cat([torch.ones_like(x[..., :1]), x, h], -1)
    asked = torch.zeros(2, 60, dtype=torch.bool)
    asked[0, 5:], asked[1, 5:40] = True, True
    slope = z[asked].mT @ (y - out)[asked] - 0.1 * torch.cat([layer.readout.bias[None], layer.readout.weight.mT])
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)  # stationary point of the ridge loss


def test_it_learns_narma10():
    errors = []
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        (x, y), (new, want) = narma10(3000, rng), narma10(1200, rng)
        layer = Reservoir(1, 200, 1, spectral_radius=0.9, input_scale=0.1, seed=seed).double()
        layer.fit_readout(x, y, washout=100, ridge=1e-6)
        miss = (layer(new)[0] - want)[:, 100:]
        errors.append((miss.pow(2).mean() / want[:, 100:].var()).sqrt().item())
    assert max(errors) < 0.35, errors


def test_memory_capacity_is_positive_and_at_most_the_number_of_units():
    units, delays, steps = 12, 30, 6000
    rng = torch.Generator().manual_seed(0)
    x = (2 * torch.rand(1, steps, 1, generator=rng, dtype=torch.float64) - 1) * 0.1
    past = torch.cat([torch.roll(x, k, 1) for k in range(1, delays + 1)], -1)
    layer = Reservoir(1, units, delays, spectral_radius=0.95, density=0.5, seed=0).double()
    layer.fit_readout(x, past, washout=100, ridge=1e-12)
    miss = (layer(x)[0] - past)[0, 100:]
    capacity = (1 - miss.pow(2).mean(0) / past[0, 100:].var(0)).sum().item()
    slack = delays * units / steps  # R^2 of noise on so many steps
    assert units / 3 < capacity <= units + slack


def test_what_can_not_be_fitted_is_refused():
    layer, x = Reservoir(2, 5, 1, seed=0), torch.randn(1, 20, 2)
    for y, more in ((x, {}), (x[..., :1], {"washout": 20}), (x[..., :1], {"washout": 5, "ridge": 0.0})):
        with pytest.raises(UsageError, match="expected"):
            layer.fit_readout(x, y, **more)
    with pytest.raises(UsageError, match="no step"):
        layer.fit_readout(x, x[..., :1], washout=10, lengths=torch.tensor([4]))
    for bad in ({"leak": 0.0}, {"density": 2.0}, {"spectral_radius": -1.0}):
        with pytest.raises(UsageError, match="expected"):
            Reservoir(2, 5, 1, **bad)
