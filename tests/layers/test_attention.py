"""Windowed softmax attention against the T x T definition, and as a stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError, chunked, layers
from statewise.layers import Attention
from statewise.layers.attention import QUERIES
from statewise.nn import rotate


def naive(layer: Attention, x: Tensor, segment: Tensor | None = None) -> Tensor:
    """The whole matrix of scores, one masked softmax."""
    t = torch.arange(x.shape[1])
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).unbind(-3)
    q, k = rotate(q, t), rotate(k, t)
    score = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    near = (t[:, None] >= t) & (t[:, None] - t < layer.window)
    near = near if segment is None else near & (segment[:, None, :, None] == segment[:, None, None])
    weight = score.masked_fill(~near, -torch.inf).softmax(-1)
    return layer.out(torch.einsum("bhts,bshk->bthk", weight, v).flatten(2))


@pytest.mark.parametrize("steps", [1, 7, QUERIES + 5, 2 * QUERIES])
@pytest.mark.parametrize("window", [1, 4, 40, 1000])
def test_it_is_the_masked_matrix(steps: int, window: int):
    layer, x = Attention(6, heads=2, window=window).double(), torch.randn(2, steps, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], naive(layer, x))


@pytest.mark.parametrize("window", [3, 50])
def test_resets_are_walls(window: int):
    layer, x = Attention(4, heads=1, window=window).double(), torch.randn(3, 30, 4, dtype=torch.float64)
    reset = torch.rand(3, 30) < 0.2
    want = naive(layer, x, reset.cumsum(1))
    torch.testing.assert_close(layer(x, reset=reset)[0], want)
    torch.testing.assert_close(chunked(layer, x, [1, 11, 18], reset=reset)[0], want)


def test_gradients_of_every_path_agree():
    layer, x = Attention(4, heads=2, window=40).double(), torch.randn(1, 30, 4, dtype=torch.float64)
    grads = [
        torch.autograd.grad(y.sin().sum(), list(layer.parameters()))
        for y in (layer(x)[0], naive(layer, x), layer(x, layer.initial_state(1))[0])
    ]
    for other in grads[1:]:
        for got, want in zip(other, grads[0], strict=True):
            torch.testing.assert_close(got, want)


def test_a_stream_may_be_old():
    layer, x = Attention(8, heads=2, window=5), torch.randn(1, 20, 8)
    _, state = layer(x)
    old = state._replace(k=rotate(state.k, torch.full((1, 4), 10**6)), seen=state.seen + 10**6)
    torch.testing.assert_close(layer(x, old)[0], layer(x, state)[0], rtol=1e-4, atol=1e-5)


def test_a_value_that_is_not_finite_lives_as_long_as_the_window():
    layer, x = Attention(4, heads=2, window=3), torch.randn(2, 9, 4)
    x[0, 2] = torch.inf
    y, _ = layer(x)
    assert y[0].isnan().any(-1).tolist() == [False, False, True, True, True, False, False, False, False]
    assert y[1].isfinite().all()


def test_the_scores_of_a_long_row_are_a_band():
    """16384 steps, window 64: the T x T scores would be 1 GiB for each head."""
    layer = Attention(16, heads=1, window=64)
    biggest = 0
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        layer(torch.randn(1, 16384, 16))
    for event in profile.events():
        biggest = max(biggest, event.self_cpu_memory_usage)
    assert 0 < biggest < 64 * 2**20


def test_one_implementation_two_names():
    assert layers["attention"].cls is layers["window_attention"].cls is Attention
    for width in (1, 6, 48, 64, 256):
        args = layers["attention"].sized(width)
        assert width % args["heads"] == 0
        Attention(**args)


@pytest.mark.parametrize("bad", [{"heads": 3}, {"heads": 0}, {"window": 0}])
def test_it_refuses(bad: dict[str, int]):
    with pytest.raises(UsageError, match=r"multiple|at least"):
        Attention(4, **{"heads": 2, "window": 4, **bad})
