"""Which attention layers of a stack see alike, and so could share one matrix (Rajabzadeh et al. 2024, EchoAtt,
arXiv:2409.14595)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import RecurrentLayer, UsageError
from ..layers import Attention
from ..models import stack_of, watched


@torch.no_grad()
def attention_matrices(model: RecurrentLayer[Any], x: Tensor) -> dict[int, Tensor]:
    """By depth the weights (B, H, T, T) with which each attention of the model's stack sees, from a fresh state.

    Raises UsageError where the model holds no stack, or a stack without attention.
    """
    stack, found = stack_of(model), {}
    with watched(model) as entering:
        model(x)
    for depth, block in enumerate(stack.at_depths()):
        if isinstance(block.layer, Attention):
            _, _, sight = block.layer.look(block.norms[0](entering[depth]), None, None, None)
            found[depth] = sight.matrix(block.layer.window)
    if not found:
        raise UsageError("the stack holds no attention of its own")
    return found


def attention_similarity(model: RecurrentLayer[Any], x: Tensor, *, first: int = 1) -> Tensor:
    """(L, L) cosine of the weights of every two depths of attention, head by head, the mean over heads and rows.

    Taken over the steps that may be seen alone; the zeros above the diagonal would make all alike. first: the columns
    left out at the start of a row, where weight gathers that has nowhere to go. L counts the depths of attention only.
    """
    flat = []
    for weights in attention_matrices(model, x).values():
        steps = weights.shape[-1]
        t = torch.arange(steps)
        may = (t[:, None] >= t) & (t >= first)
        flat.append(F.normalize(weights[..., may].double(), dim=-1))  # (B, H, N)
    every = torch.stack(flat)
    return torch.einsum("abhn,cbhn->ac", every, every) / (every.shape[1] * every.shape[2])


def followers(similarity: Tensor, count: int, *, least: bool = False) -> tuple[int, ...]:
    """Which `count` of the L layers see by the last matrix before theirs that is left, so that they lose the least.

    One after the other, that is chosen whose matrix is most like that of the layer it would follow; the first and the
    last layer stay, and the first leads none: they see unlike the others (the paper's finding). least: the other way,
    to tell how much the choice matters. (L, L) -> rising places in 2 ... L - 2.

    Raises UsageError where there are not so many.

    >>> alike = torch.tensor([[1, 0.1, 0.1, 0.1, 0.1], [0.1, 1, 0.9, 0.2, 0.1], [0.1, 0.9, 1, 0.5, 0.1],
    ...                       [0.1, 0.2, 0.5, 1, 0.1], [0.1, 0.1, 0.1, 0.1, 1]])
    >>> followers(alike, 1), followers(alike, 1, least=True)
    ((2,), (3,))
    """
    layers = len(similarity)
    if not 0 <= count <= max(layers - 3, 0):
        raise UsageError(f"{count} followers of {layers} layers; expected 0 to {max(layers - 3, 0)}")
    chosen: set[int] = set()
    for _ in range(count):
        open_ = [i for i in range(2, layers - 1) if i not in chosen]

        def worth(i: int) -> float:
            """The likeness to its leader of i and of those that followed it, which then follow another."""
            leader = max(j for j in range(1, i) if j not in chosen)
            behind = [i]
            while behind[-1] + 1 in chosen:
                behind.append(behind[-1] + 1)
            return min(float(similarity[leader, j]) for j in behind)

        chosen.add((min if least else max)(open_, key=worth))
    return tuple(sorted(chosen))
