"""Windowed softmax attention against the T x T definition, and as a stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError, chunked, layers
from statewise.layers import Attention
from statewise.nn import rotate
from statewise.nn.segments import QUERIES


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


def test_shared_keys_are_equal_keys():
    """Two queries to a key are as many keys, where those are equal."""
    shared = Attention(6, heads=4, window=5, key=2, kv_heads=2, gate=True, norm_eps=1e-3).double()
    full = Attention(6, heads=4, window=5, key=2, gate=True, norm_eps=1e-3).double()
    tensors = shared.state_dict()
    for part in ("weight", "bias"):
        q, k, v, gate = tensors[f"qkv.{part}"].split(shared.sizes)
        k, v = (z.unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1) for z in (k, v))
        tensors[f"qkv.{part}"] = torch.cat([q, k, v, gate])
    full.load_state_dict(tensors)
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    assert shared.initial_state(1).k.shape == (1, 4, 2, 2)
    torch.testing.assert_close(shared(x)[0], full(x)[0])


def test_without_rotation_the_order_of_the_past_does_not_matter():
    x, order = torch.randn(1, 9, 4, dtype=torch.float64), torch.tensor([3, 0, 2, 1])
    mixed = torch.cat([x[:, order], x[:, 4:]], 1)
    for rotary, same in ((0, True), (2, False)):
        layer = Attention(4, heads=1, window=16, rotary=rotary).double()
        assert torch.allclose(layer(x)[0][:, 4:], layer(mixed)[0][:, 4:], rtol=1e-10) == same


def test_options_are_what_they_say():
    """One step sees itself alone: y = W_o (v * sigmoid(W_g x)), whatever q and k are."""
    layer = Attention(3, heads=2, window=4, key=5, rotary=4, norm_eps=1e-6, gate=True, bias=False).double()
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    v, gate = layer.qkv(x).split([20, 10, 10], -1)[1:]
    torch.testing.assert_close(layer(x)[0], layer.out(v * gate.sigmoid()))
    assert layer.qkv.bias is None and layer.out.bias is None
    with torch.no_grad():
        layer.qkv.weight[:20] *= 1e3  # q and k have one length, whatever their maps
    y = torch.randn(2, 8, 3, dtype=torch.float64)
    before = layer(y)[0]
    with torch.no_grad():
        layer.qkv.weight[:20] *= 10
    torch.testing.assert_close(layer(y)[0], before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "bad", [dict(kv_heads=3), dict(rotary=3), dict(rotary=6), dict(key=0), dict(base=1.0), dict(norm_eps=0.0)]
)
def test_options_that_do_not_fit_are_refused(bad):
    with pytest.raises(UsageError, match=r"Attention: .*(expected|multiple)"):
        Attention(8, **{"heads": 4, "window": 4, "key": 4, **bad})
