"""Tiny models of ids, and what they would write, by enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from statewise.core import RecurrentLayer
from statewise.models import LanguageModel


def tiny(layer: str = "gru", vocab: int = 4, seed: int = 0, sharp: float = 3.0, **args: Any) -> RecurrentLayer[Any]:
    """A float64 model whose distributions differ from the uniform one: sharp scales its logits."""
    torch.manual_seed(seed)
    described = LanguageModel(layer, width=8, depth=1, tied=False, args=args)
    model = described.build(x_vocab=vocab, y_width=vocab).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(sharp)
    return model


@torch.no_grad()
def enumerated(model: RecurrentLayer[Any], prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Every continuation of prompt (T,): ids (V^steps, steps), and log p of each."""
    every = torch.tensor(list(itertools.product(range(model.out_width), repeat=steps)))
    whole = torch.cat([prompt.expand(len(every), -1), every], 1)
    logp = model(whole[:, :-1])[0].log_softmax(-1)[:, len(prompt) - 1 :]
    return every, logp.gather(2, every[..., None])[..., 0].sum(1)
