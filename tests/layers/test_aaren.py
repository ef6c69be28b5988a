"""Aaren against torch's own attention with the same fixed query."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise.core import UsageError, nbytes
from statewise.layers import Aaren


@pytest.mark.parametrize("width, heads", [(8, 1), (8, 2), (12, 4)])
def test_equals_softmax_attention_with_a_fixed_query(width: int, heads: int):
    layer, x = Aaren(width, heads=heads), torch.randn(3, 40, width)
    q, k, v = (layer.q(layer.query).expand_as(x), layer.k(x), layer.v(x))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    want = layer.out(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-6, atol=1e-6)


def test_its_state_does_not_grow():
    layer = Aaren(8, heads=2)
    _, state = layer(torch.randn(1, 4096, 8))
    assert nbytes(state) == 4 * 2 * (4 + 2)


def test_scores_of_any_size_are_right():
    torch.set_default_dtype(torch.float64)
    layer, x = Aaren(4, heads=1), torch.randn(1, 30, 4)
    with torch.no_grad():
        layer.query.mul_(1e4)  # scores of thousands: each step's answer is the value of the best so far
    y, best = layer(x)[0], layer.k(x) @ layer.q(layer.query)
    at = best[0].cummax(0).indices
    torch.testing.assert_close(y[0], layer.out(layer.v(x)[0, at]), rtol=1e-3, atol=1e-3)


def test_it_refuses_heads_that_do_not_divide():
    with pytest.raises(UsageError, match="multiple"):
        Aaren(6, heads=4)
