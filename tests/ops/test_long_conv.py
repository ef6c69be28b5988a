"""The long convolution beyond its samples: long times, NaN, resets, derivatives, compilation, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from statewise.core import UsageError
from statewise.ops import long_conv
from statewise.ops.long_conv.in_torch import SHORT


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps, length", [(1, 1), (SHORT, SHORT), (65, 65), (200, 33), (65, 300), (257, 256)])
def test_equals_numpy(steps: int, length: int):
    u, kernel = normal(2, steps, 3), normal(3, length, seed=1)
    y = long_conv(u, kernel)
    for b in range(2):
        for d in range(3):
            want = np.convolve(u[b, :, d].numpy(), kernel[d].numpy())[:steps]
            np.testing.assert_allclose(y[b, :, d].numpy(), want, atol=1e-12)


def test_outputs_share_an_input():
    u, kernel = normal(2, 50, 3), normal(3, 4, 50, seed=1)
    y = long_conv(u[..., None], kernel)
    assert y.shape == (2, 50, 3, 4)
    for m in range(4):
        torch.testing.assert_close(y[..., m], long_conv(u, kernel[:, m]))


def _scan_error(steps: int, decay: float) -> tuple[float, float]:
    """rms and largest error in float32, over the rms and the largest of the truth, for kernels decay^j."""
    u = normal(2, steps, 3).float()
    kernel = (decay ** torch.arange(steps, dtype=torch.float64)).float().expand(3, steps)
    truth = long_conv(u.double(), kernel.double())
    exact, h = [], torch.zeros(2, 3, dtype=torch.float64)
    for t in range(min(steps, 300)):  # the loop, in float64
        h = decay * h + u[:, t].double()
        exact.append(h)
    want = torch.stack(exact, 1)
    assert (truth[:, :300] - want).abs().max() <= 1e-6 * want.abs().max()  # the kernel itself is rounded
    error = (long_conv(u, kernel) - truth).abs()
    return float(error.pow(2).mean().sqrt() / truth.pow(2).mean().sqrt()), float(error.max() / truth.abs().max())


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("steps", [1024, 65536])
def test_float32_stays_near_float64(steps: int, decay: float):
    rms, largest = _scan_error(steps, decay)
    assert rms <= 2e-6 and largest <= 5e-6, (rms, largest)


def _pieces(u: Tensor, kernel: Tensor, reset: Tensor) -> Tensor:
    """Each row cut at its resets, each piece alone."""
    rows = []
    for row, cuts in zip(u, reset, strict=True):
        edges = [0, *cuts.nonzero()[:, 0].tolist(), len(row)]
        rows.append(torch.cat([long_conv(row[None, a:b], kernel)[0] for a, b in itertools.pairwise(edges)]))
    return torch.stack(rows)


@pytest.mark.parametrize("often", [0.0, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("steps, length", [(20, 20), (SHORT + 1, SHORT + 1), (128, 128), (300, 300), (300, 70)])
def test_a_reset_is_a_cut(steps: int, length: int, often: float):
    u, kernel = normal(3, steps, 2), normal(2, length, seed=1)
    reset = torch.rand(3, steps, generator=torch.Generator().manual_seed(2)) < often
    torch.testing.assert_close(long_conv(u, kernel, reset=reset), _pieces(u, kernel, reset), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("length", [10, 50, 100])
@pytest.mark.parametrize("cut", [None, 70])
def test_nan_stays_in_its_row_channel_and_reach(bad: float, length: int, cut: int | None):
    u, kernel = normal(2, 100, 3), normal(3, length, seed=1)
    reset = None if cut is None else (torch.arange(100) == cut).expand(2, -1)
    want = long_conv(u, kernel, reset=reset)
    u[0, 40, 1] = bad
    y = long_conv(u, kernel, reset=reset)
    reached = torch.zeros(2, 100, 3, dtype=torch.bool)
    reached[0, 40 : min(40 + length, cut or 100), 1] = True
    assert torch.equal(~y.isfinite(), reached)
    torch.testing.assert_close(y[~reached], want[~reached], atol=1e-12, rtol=0)


def test_padding_reaches_nothing():
    u, kernel = normal(2, 60, 3), normal(3, 60, seed=1)
    want = long_conv(u[:, :35], kernel)
    u[:, 35:] = torch.nan
    u.requires_grad_()
    y = long_conv(u, kernel, lengths=torch.tensor([35, 0]))
    torch.testing.assert_close(y[0, :35], want[0])
    assert (y[0, 35:] == 0).all() and (y[1] == 0).all()
    (g,) = torch.autograd.grad(y.sum(), u)
    assert g.isfinite().all() and (g[0, 35:] == 0).all() and (g[1] == 0).all()


def test_no_gradient_crosses_a_reset():
    u, kernel = normal(1, 100, 2).requires_grad_(), normal(2, 100, seed=1)
    reset = (torch.arange(100) == 50)[None]
    y = long_conv(u, kernel, reset=reset)
    (g,) = torch.autograd.grad(y[:, 50:].sum(), u)
    assert (g[:, :50] == 0).all() and (g[:, 50:] != 0).all()


@pytest.mark.parametrize("steps, length, cut", [(5, 5, False), (40, 40, False), (40, 40, True), (45, 35, True)])
def test_gradcheck(steps: int, length: int, cut: bool):
    u, kernel = normal(2, steps, 1).requires_grad_(), normal(1, length, seed=1).requires_grad_()
    reset = (torch.rand(2, steps, generator=torch.Generator().manual_seed(3)) < 0.1) if cut else None
    lengths = torch.tensor([steps, steps - 2])

    def run(u: Tensor, kernel: Tensor) -> Tensor:
        return long_conv(u, kernel, reset=reset, lengths=lengths)

    assert torch.autograd.gradcheck(run, (u, kernel), atol=1e-8, rtol=1e-6)


def test_second_derivatives():
    u, kernel = normal(1, 34, 1).requires_grad_(), normal(1, 34, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(long_conv, (u, kernel), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, {"reset": (torch.arange(80) % 30 == 7).expand(2, -1)}, {"lengths": [80, 33]}])
def test_compiles_as_one_graph(more: dict[str, Any]):
    more = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in more.items()}
    u, kernel = normal(2, 80, 3), normal(3, 80, seed=1)
    torch._dynamo.reset()
    got = torch.compile(long_conv, fullgraph=True, backend="aot_eager")(u, kernel, **more)
    torch.testing.assert_close(got, long_conv(u, kernel, **more))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kernel": normal(3, 8)}, "expected (B, T, N...) and (N..., L)"),
        ({"kernel": normal(8)}, "expected (B, T, N...) and (N..., L)"),
        ({"kernel": normal(2, 8).float()}, "expected real numbers"),
        ({"u": normal(2, 8, 2).to(torch.complex128)}, "expected real numbers"),
        ({"reset": torch.zeros(2, 7, dtype=torch.bool)}, "expected bool (2, 8)"),
        ({"lengths": torch.tensor([1])}, "expected (2,)"),
        ({"lengths": torch.tensor([1, 9])}, "lengths[1] is 9"),
    ],
)
def test_refuses(change: dict[str, Tensor], words: str):
    with pytest.raises(UsageError) as error:
        long_conv(**({"u": normal(2, 8, 2), "kernel": normal(2, 8)} | change))
    assert words in str(error.value) and "\n" not in str(error.value)
