"""N-gram heads against counting by hand, and as the in-context n-gram model that they are in front of ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statewise.core import UsageError
from statewise.layers import NgramHeads
from statewise.layers.ngram_heads import OF_CHANNELS
from statewise.models import Stack
from statewise.tasks import InContextLanguages
from statewise.tasks.in_context_languages import after_one


def by_hand(x: Tensor, m: int, window: int) -> Tensor:
    """One row x (T, D): the mean of what followed the last m sign patterns, step after step."""
    pattern = [tuple(row.tolist()) for row in x > 0]
    out = torch.zeros_like(x)
    for t in range(len(x)):
        end = pattern[t - m + 1 : t + 1] if t >= m - 1 else None
        found = [x[s] for s in range(max(m, t - window), t) if pattern[s - m : s] == end]
        if found:
            out[t] = torch.stack(found).mean(0)
    return out


@pytest.mark.parametrize("steps, window", [(40, 50), (40, 7), (300, 20), (5, 1)])
def test_counting_by_hand(steps: int, window: int) -> None:
    torch.manual_seed(steps + window)
    layer = NgramHeads(2, window=window, n=3).double()
    x = torch.randn(3, steps, 2, dtype=torch.float64)
    heads = [torch.stack([by_hand(row, m, window) for row in x]) for m in (1, 2, 3)]
    assert steps < 40 or all((head != 0).any() for head in heads)
    torch.testing.assert_close(layer(x)[0], layer.out(torch.cat([x, *heads], -1)))


def test_a_text_that_repeats_is_known_after_one_round() -> None:
    layer = NgramHeads(8, window=64, n=1)
    with torch.no_grad():  # read the one head
        layer.out.weight.copy_(torch.cat([torch.zeros(8, 8), torch.eye(8)], 1))
        layer.out.bias.zero_()
    x = torch.randn(2, 5, 8).repeat(1, 4, 1)
    y = layer(x)[0]
    torch.testing.assert_close(y[:, 5:-1], x[:, 6:])
    assert not y[:, :5].any()  # what follows a symbol has not been seen before it


def test_in_front_of_ids_it_is_the_bigram_model() -> None:
    """The mean embedding of what followed an id is the bigram frequencies times the table of embeddings."""
    torch.manual_seed(0)
    task = InContextLanguages(length=60, states=4, letters=5)
    x = task.batch(0, 16, seed=0).x
    model = Stack("ngram_heads", width=32, depth=1, args=dict(window=60, n=1), mlp=0).build(
        x_vocab=task.x_vocab, y_width=task.y_width
    )
    block = model.blocks[0]
    table = block.norms[0](model.embed.weight)
    counts = after_one(x, task.x_vocab)
    counts[:, 1:].scatter_add_(2, x[:, 1:, None], -(x[:, 1:] == x[:, :-1]).float()[..., None])  # s = t does not count
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    want = block.layer.out(torch.cat([table[x], share @ table], -1))
    torch.testing.assert_close(block.layer(table[x])[0], want)
    assert counts.sum(-1).max() > 3


def test_sizes_are_checked() -> None:
    with pytest.raises(UsageError, match="NgramHeads: window is 0"):
        NgramHeads(4, window=0)
    with pytest.raises(UsageError, match="NgramHeads: n is 0"):
        NgramHeads(4, window=8, n=0)


def test_symbols_are_hashes_modulo_2_64_by_sums_that_float64_holds() -> None:
    """onnxruntime adds int64 in float64."""
    layer = NgramHeads(300, window=2)
    x = torch.randn(4, 300)
    _, state = layer(x[None])
    assert layer.place.abs().double().sum(-1).max() < 2**53
    for t in range(2):
        signs = (x[2 + t] > 0).tolist()
        want = sum(pow(OF_CHANNELS, i + 1, 2**64) for i, sign in enumerate(signs) if sign) % 2**64
        assert int(state.symbols[0, t - 2]) % 2**64 == want
