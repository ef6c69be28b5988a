"""The loop over time that the specifications of the ops are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import clear_past_end, leaves, tree_map, where


def loop(
    step: Callable[..., tuple[Tensor, Any]],
    inputs: Sequence[Tensor | None],
    state: Any,
    *,
    fresh: Any,
    like: Tensor,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Any]:
    """step(*inputs at t, state) -> (o at t, state), over dim 1 of the inputs, in the dtype of the state.

    fresh: the state that a reset leaves. like (B, T, ...): gives the outputs their dtype, and their shape if T = 0.
    Returns the outputs (B, T, ...), zero past a row's end, and the state at the end of each row.
    """
    dtype = leaves(state)[0].dtype
    inputs = [None if i is None else i.to(dtype) for i in inputs]
    if lengths is not None:
        lengths = lengths.to(like.device)
        inputs = [None if i is None else clear_past_end(i, lengths) for i in inputs]
    outs = []
    for t in range(like.shape[1]):
        before = state if reset is None else where(reset[:, t], fresh, state)
        o, new = step(*(None if i is None else i[:, t] for i in inputs), before)
        state = new if lengths is None else where(t < lengths, new, state)
        outs.append(o.to(like.dtype))
    if not outs:
        return like, tree_map(Tensor.clone, state)
    out = torch.stack(outs, 1)
    return (out if lengths is None else clear_past_end(out, lengths)), state
