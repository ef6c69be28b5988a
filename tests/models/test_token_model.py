"""Models of ids, and what they write."""

from __future__ import annotations

import pytest
import torch

from statewise.core import UsageError
from statewise.models import LanguageModel, TokenModel, generate


def make(**fields: object) -> TokenModel:
    return LanguageModel("gru", width=8, depth=1, **fields).build(x_vocab=11, y_width=11).eval()


def test_tied_logits_are_products_with_the_embedding():
    tied, free = make(), make(tied=False)
    assert tied.out_width == free.out_width == 11
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, free)]
    assert sizes[1] - sizes[0] == 8 * 11 + 11
    x = torch.randint(11, (2, 5))
    h, _ = tied.body(x)
    torch.testing.assert_close(tied(x)[0], h @ tied.body.embed.weight.mT)
    storages = [t.data_ptr() for t in tied.state_dict().values()]
    assert len(storages) == len(set(storages))  # one name for each tensor: files hold it once


def test_logits_start_near_uniform():
    logits, _ = make()(torch.randint(11, (8, 50)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(11, (400,)))
    assert loss < 1.5 * torch.tensor(11.0).log()


def test_greedy_generation_is_argmax_of_forward_again_and_again():
    model, x = make(tied=False), torch.randint(11, (3, 4))
    want = x
    for _ in range(6):
        want = torch.cat([want, model(want)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, x, 6, temperature=0), want[:, 4:])
    assert generate(model, x, 0, temperature=0).shape == (3, 0)
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(generate(model, x, 6, top_k=1, rng=rng), want[:, 4:])


def test_sampling_follows_the_distribution():
    model, x = make(tied=False), torch.randint(11, (1, 4))
    with torch.no_grad():
        model.head.weight.mul_(5)
        logits = model(x)[0][0, -1]
    rng = torch.Generator().manual_seed(0)
    drawn = generate(model, x.expand(20_000, -1), 1, temperature=2.0, rng=rng).flatten()
    share = drawn.bincount(minlength=11) / 20_000
    torch.testing.assert_close(share, (logits / 2).softmax(-1), rtol=0, atol=0.015)
    few = generate(model, x.expand(2_000, -1), 1, top_k=3, rng=rng).unique()
    assert set(few.tolist()) == set(logits.topk(3).indices.tolist())


def test_a_generator_decides():
    model, x = make(), torch.randint(11, (2, 3))
    one, two = (generate(model, x, 20, rng=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)


def test_what_can_not_be_generated_is_refused():
    model, x = make(), torch.randint(11, (1, 3))
    for given in ({}, {"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(UsageError):
            generate(model, x, 3, **given)
    with pytest.raises(UsageError, match="T >= 1"):
        generate(model, x[:, :0], 3, temperature=0)
    with pytest.raises(UsageError, match="x_vocab = y_width"):
        LanguageModel().build(x_vocab=3, y_width=4)
    with pytest.raises(UsageError, match="pool"):
        LanguageModel(pool="mean").build(x_vocab=3, y_width=3)
