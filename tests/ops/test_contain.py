"""What is not finite, or overflows in a product, spoils what it spoils in the loop, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statewise.ops import delta_scan, dplr_scan, outer_scan

B, T, H, K, V = 2, 40, 2, 8, 8
LOG_DECAYS = {"none": None, "head": (1, 1), "key": (K, 1)}


def call(op: str, decay: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A query of 1e25 before a key of 1e25: the loop never multiplies them, a block of times does."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, a, b = (0.1 * torch.randn(B, T, H, K, generator=rng) for _ in range(5))
    q[0, 3], k[0, 7], v[0, 7] = 1e25, 1e25, 1e-30
    state, beta = torch.zeros(B, H, K, V), torch.full((B, T, H), 0.5)
    beta[0, 7] = 1e-30  # what the delta rule writes there is small too
    shape = LOG_DECAYS[decay]
    named = {} if shape is None else {"log_decay": -torch.rand(B, T, H, *shape, generator=rng)}
    return {"outer": [q, k, v, state], "delta": [q, k, v, beta, state], "dplr": [q, k, v, a, b, state]}[op], named


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("decay", LOG_DECAYS)
@pytest.mark.parametrize("op", ["outer", "delta", "dplr"])
def test_a_product_that_overflows_reaches_no_earlier_answer(op: str, decay: str, backend: str, grad: bool):
    run = {"outer": outer_scan, "delta": delta_scan, "dplr": dplr_scan}[op]
    given, named = call(op, decay)
    want, _ = run(*given, **named, backend="reference")
    assert want[:, :7].isfinite().all() and want[1].isfinite().all()
    given[0].requires_grad_(grad)
    got, _ = run(*given, **named, backend=backend)
    assert torch.equal(got.isfinite(), want.isfinite())
    torch.testing.assert_close(got[:, :7], want[:, :7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("decay", LOG_DECAYS)
@pytest.mark.parametrize("op", ["outer", "delta", "dplr"])
def test_a_gradient_that_is_not_finite_reaches_no_later_step(op: str, decay: str, backend: str):
    """Neither does it pass a reset, nor leave its row."""
    run = {"outer": outer_scan, "delta": delta_scan, "dplr": dplr_scan}[op]
    given, named = call(op, decay)
    given = [t.clamp(-1, 1).requires_grad_() for t in given]
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 5] = True
    ways = []
    for name in (backend, "reference"):
        out, last = run(*given, **named, reset=reset, backend=name)
        g, g_last = torch.ones_like(out), torch.ones_like(last)
        g[0, 9, 0, 1], g_last[1, 1] = torch.nan, torch.inf
        ways.append(torch.autograd.grad((out, last), given, (g, g_last)))
    for got, want in zip(*ways, strict=True):
        if want.shape[1] == T:
            assert want[0, 10:].isfinite().all() and want[0, :5].isfinite().all()
            torch.testing.assert_close(got[0, 10:], want[0, 10:])
            torch.testing.assert_close(got[0, :5], want[0, :5])
        else:  # of the state
            torch.testing.assert_close(got[0], want[0])
    assert not all(want[0].isfinite().all() and want[1].isfinite().all() for want in ways[1])
