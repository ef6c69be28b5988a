"""Models of ids, and what they write."""

from __future__ import annotations

import pytest
import torch

from statewise.core import UsageError
from statewise.models import LanguageModel, TokenModel


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


def test_what_can_not_be_built_is_refused():
    with pytest.raises(UsageError, match="x_vocab = y_width"):
        LanguageModel().build(x_vocab=3, y_width=4)
    with pytest.raises(UsageError, match="pool"):
        LanguageModel(pool="mean").build(x_vocab=3, y_width=3)
