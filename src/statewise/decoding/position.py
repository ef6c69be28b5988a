"""Where a text stands: what comes next, and the state behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import RecurrentLayer, UsageError, past_end

SPAN = 512  # ids read at once: so many rows of logits are in memory, however long the prompt


class Position(NamedTuple):
    """A place in B texts. A tree of tensors, batch first: core.select forks and reorders it, core.join puts several
    together. Nothing changes one, so that it may be kept and used again."""

    logits: Tensor  # (B, V) of the id that comes next
    seen: Tensor  # (B, V) bool: the ids so far
    state: Any  # of the model


def check_model(model: RecurrentLayer[Any]) -> None:
    """Raise UsageError unless the model maps ids to logits of the next id."""
    if model.vocab is None or model.out_width != model.vocab:
        raise UsageError(
            f"{type(model).__name__}: takes {model.vocab or 'no'} ids, answers with {model.out_width} numbers; "
            "expected a model of ids, with a logit for each"
        )


def check_prompt(model: RecurrentLayer[Any], ids: Tensor, lengths: Tensor | None) -> None:
    """Raise UsageError unless each row of ids (B, T) holds something."""
    check_model(model)
    if not isinstance(ids, Tensor):
        raise UsageError(f"the prompt is a {type(ids).__name__}; expected ids (B, T), a tensor: a tokenizer makes them")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise UsageError(f"the prompt has shape {tuple(ids.shape)}; expected (B, T) with T >= 1")
    if lengths is not None and bool((lengths < 1).any()):
        raise UsageError(f"lengths[{int((lengths < 1).nonzero()[0])}] is below 1: a prompt holds at least one id")


@torch.no_grad()
def read(
    model: RecurrentLayer[Any], ids: Tensor, at: Position | None = None, *, lengths: Tensor | None = None
) -> Position:
    """The position after ids (B, T), T >= 1, from the start or from `at`.

    lengths (B,), each at least 1: how many ids of each row count. What stands behind them may be any ids.
    Reads SPAN ids at a time, so that memory does not grow with the vocabulary times the prompt.
    Raises UsageError for a model that does not map ids to logits, and for rows without an id.
    """
    check_prompt(model, ids, lengths)
    batch, steps = ids.shape
    state = None if at is None else at.state
    logits: Tensor | None = None
    for start in range(0, steps, SPAN):
        part = ids[:, start : start + SPAN]
        if lengths is None:
            y, state = model(part, state)
            logits = y[:, -1]
            continue
        count = (lengths.to(ids.device) - start).clamp(0, part.shape[1])
        y, state = model(part, state, lengths=count)
        last = y[torch.arange(batch, device=ids.device), (count - 1).clamp_min(0)]
        logits = last if logits is None else torch.where(count[:, None] > 0, last, logits)
    assert logits is not None
    counted = ids.long() if lengths is None else ids.long().masked_fill(past_end(lengths.to(ids.device), steps), -1)
    seen = torch.zeros(batch, model.out_width + 1, dtype=torch.bool, device=ids.device)
    seen = seen.scatter(1, counted + 1, True)[:, 1:]  # column 0 takes the padding
    return Position(logits, seen if at is None else seen | at.seen, state)


@torch.no_grad()
def advance(model: RecurrentLayer[Any], ids: Tensor, at: Position) -> Position:
    """The position one id (B,) further: one step."""
    logits, state = model.step(ids, at.state)
    return Position(logits, at.seen.scatter(1, ids.long()[:, None], True), state)
