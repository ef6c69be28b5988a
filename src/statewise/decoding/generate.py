"""generate: ids after ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import RecurrentLayer, UsageError, wide
from .beams import Beam, beam_search
from .position import Position, advance, check_prompt, read
from .prefixes import PrefixCache
from .sampling import GREEDY, Randomness, Sampling
from .speculative import Speculative, speculate
from .stopping import Stop


class Token(NamedTuple):
    """One id of each row."""

    ids: Tensor  # (B,)
    ended: Tensor  # (B,) bool: the row ends with this id, or did before; an id after the end is padding
    at: Position  # where the ids were chosen; advance(model, ids, at) goes on


class Written(NamedTuple):
    """What `generate` gives back."""

    ids: Tensor  # (B, n) new ids, padding from a row's end on; n <= max_new_tokens
    lengths: Tensor  # (B,) how many of them are the row's, the one that ended it included
    scores: Tensor  # (B,) sum of their log-probabilities by the model as it is, whatever the sampling


def generate(
    model: RecurrentLayer[Any],
    ids: Tensor,
    max_new_tokens: int,
    how: Sampling | Beam | Speculative = GREEDY,
    *,
    rng: Randomness = None,
    stop: Stop | None = None,
    lengths: Tensor | None = None,
    prefixes: PrefixCache | None = None,
    on_token: Callable[[Token], None] | None = None,
) -> Written:
    """Continue each prompt of ids (B, T), T >= 1, by at most max_new_tokens ids.

    model: any layer from ids to logits: a TokenModel, a hybrid with attention, one of yours. Memory per token is
    that of the state: it does not grow with what was written, beyond the ids themselves.
    how: GREEDY, Sampling(...), Beam(...) (the best one is given back; `beam_search` gives all), or Speculative(draft).
    rng: for what is drawn: a generator, or one per row; then a row draws the same alone and in any batch.
    stop: where rows end. lengths (B,): prompts of different lengths, each at the start of its row.
    prefixes: a cache of states behind prompts. on_token: called with each Token, not for beams and drafts.

    >>> import torch
    >>> from statewise.models import LanguageModel
    >>> model = LanguageModel("gru", width=8, depth=1).build(x_vocab=5, y_width=5).eval()
    >>> found = generate(model, torch.tensor([[1, 2, 3]]), 4, Sampling(top_p=0.9), rng=torch.Generator().manual_seed(0))
    >>> found.ids.shape, found.lengths.tolist()
    (torch.Size([1, 4]), [4])

    Raises UsageError for prompts, options or models that do not fit, NumericError for logits that are not numbers.
    """
    check_prompt(model, ids, lengths)
    if not hasattr(max_new_tokens, "__index__") or max_new_tokens < 0:
        raise UsageError(f"generate: max_new_tokens is {max_new_tokens}; expected a whole number of at least 0")
    stop = Stop() if stop is None else stop
    if on_token is not None and not isinstance(how, Sampling):
        raise UsageError(f"generate: on_token with {type(how).__name__}; ids come one by one from Sampling only")
    if max_new_tokens == 0:
        nothing = torch.zeros(len(ids), device=ids.device)
        return Written(ids[:, :0], nothing.long(), nothing)
    if isinstance(how, Speculative):
        if prefixes is not None:
            raise UsageError("generate: a cache of prefixes holds the states of one model, Speculative has two")
        return Written(*speculate(model, ids, max_new_tokens, how, rng=rng, stop=stop, lengths=lengths)[:3])
    at = read(model, ids, lengths=lengths) if prefixes is None else _cached(prefixes, model, ids, lengths)
    if isinstance(how, Beam):
        found = beam_search(model, at, max_new_tokens, how, stop=stop)
        best = (found.scores / found.lengths.clamp_min(1) ** how.length_penalty).argmax(1)
        rows = torch.arange(len(best), device=best.device)
        count = found.lengths[rows, best]
        width = int(count.max()) if len(count) else 0
        return Written(found.ids[rows, best, :width].to(ids.dtype), count, found.scores[rows, best])
    columns: list[Tensor] = []
    count = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    scores = torch.zeros(len(ids), dtype=wide(at.logits.dtype), device=ids.device)
    alive = torch.ones_like(count, dtype=torch.bool)
    for token in write(model, at, max_new_tokens, how, rng=rng, stop=stop):
        if on_token is not None:
            on_token(token)
        columns.append(token.ids.to(ids.dtype))
        scores = torch.where(alive, scores + log_probability(token.at.logits, token.ids), scores)
        count, alive = count + alive, ~token.ended
    return Written(torch.stack(columns, 1), count, scores)


@torch.no_grad()
def write(
    model: RecurrentLayer[Any],
    at: Position,
    max_new_tokens: int,
    how: Sampling = GREEDY,
    *,
    rng: Randomness = None,
    stop: Stop | None = None,
) -> Iterator[Token]:
    """Yield Tokens one by one from a position, until every row has ended or max_new_tokens came. Lazy: a step is taken
    when the next token is asked for."""
    stop = Stop() if stop is None else stop
    ended = torch.zeros(len(at.logits), dtype=torch.bool, device=at.logits.device)
    last = torch.empty(len(ended), 0, dtype=torch.int64, device=ended.device)
    for n in range(max_new_tokens):
        if n:
            at = advance(model, last[:, -1], at)
        ids = how.choose(at.logits, at.seen, rng).masked_fill(ended, stop.pad)
        last = torch.cat([last, ids[:, None]], 1)[:, -stop.window :]
        ended = ended | stop.ended(last)
        yield Token(ids, ended, at)
        if bool(ended.all()):
            return


def log_probability(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[ids] by the model as it is: logits (B, V), ids (B,) -> (B,)."""
    z = logits.to(wide(logits.dtype))
    return z.gather(1, ids.long()[:, None])[:, 0] - z.logsumexp(-1)


def _cached(prefixes: PrefixCache, model: RecurrentLayer[Any], ids: Tensor, lengths: Tensor | None) -> Position:
    if prefixes.model is not model:
        raise UsageError("generate: the cache of prefixes belongs to another model")
    return prefixes.read(ids, lengths)
