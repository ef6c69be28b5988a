"""Beam search, and diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import RecurrentLayer, UsageError, check_sizes, select, wide
from .position import Position, advance
from .sampling import check_numbers
from .stopping import Stop


@dataclass(frozen=True)
class Beam:
    """score(y) = log p(y) / |y|^length_penalty, |y| the new ids, the one that ended it included.

    The best `beams` texts are carried on; a text that ends is kept if it is among the best `beams` candidates of its
    step. A row ends when `beams` texts have, and the best that runs, at its present length, scores below the worst of
    them: the rule of transformers with its early_stopping=False.

    groups > 1: diverse beam search. Each group carries beams / groups texts, in order, and pays for what the groups
    before it chose: penalty times the number of their texts that took the same id at the same time; or, with ngram n,
    times how often the n-gram that the id would complete stands anywhere in their texts. What was paid stays in the
    score that decides which texts go on, and is left out of the scores that are given back.

    Raises UsageError for sizes below 1 and if groups do not divide beams.
    """

    beams: int = 4
    length_penalty: float = 1.0
    groups: int = 1
    penalty: float = 0.5
    ngram: int | None = None

    def __post_init__(self) -> None:
        check_sizes("Beam", beams=self.beams, groups=self.groups, ngram=1 if self.ngram is None else self.ngram)
        if self.beams % self.groups:
            raise UsageError(f"Beam: beams {self.beams} is not a multiple of groups {self.groups}")
        if not 0 <= self.penalty < float("inf"):
            raise UsageError(f"Beam: penalty is {self.penalty}; expected at least 0")


class Beams(NamedTuple):
    """Groups one after the other, the best of each first. K = beams."""

    ids: Tensor  # (B, K, n) padding from a text's end on
    lengths: Tensor  # (B, K)
    scores: Tensor  # (B, K) log p of the whole text, without penalties; -inf where there are fewer than K texts


class _Group(NamedTuple):
    """The texts of one group: k that run and the k best that have ended."""

    ids: Tensor  # (B, k, t)
    logp: Tensor  # (B, k)
    paid: Tensor  # (B, k) log p less the penalties: decides
    done_ids: Tensor  # (B, k, n)
    done_lengths: Tensor  # (B, k)
    done_logp: Tensor  # (B, k)
    done_score: Tensor  # (B, k) with the length penalty; -inf where nothing has ended yet
    open: Tensor  # (B,) bool: what runs may still be better than what has ended


@torch.no_grad()
def beam_search(
    model: RecurrentLayer[Any], at: Position, max_new_tokens: int, how: Beam, *, stop: Stop | None = None
) -> Beams:
    """The likeliest continuations of a position that a search of this width finds. The state follows by core.select.

    Raises NumericError for logits that are not numbers.
    """
    stop = Stop() if stop is None else stop
    batch, (beams, each) = len(at.logits), (how.beams, how.beams // how.groups)
    device, dtype = at.logits.device, wide(at.logits.dtype)
    first = torch.full((batch, each), -torch.inf, device=device, dtype=dtype)
    nothing = _Group(
        ids=torch.empty(batch, each, 0, dtype=torch.int64, device=device),
        logp=first.index_fill(1, torch.tensor([0], device=device), 0),  # one text, not k equal ones
        paid=first.index_fill(1, torch.tensor([0], device=device), 0),
        done_ids=torch.full((batch, each, max_new_tokens), stop.pad, dtype=torch.int64, device=device),
        done_lengths=torch.zeros(batch, each, dtype=torch.int64, device=device),
        done_logp=first,
        done_score=first,
        open=torch.ones(batch, dtype=torch.bool, device=device),
    )
    groups = [nothing] * how.groups
    rows = torch.arange(batch, device=device)[:, None]
    at = select(at, rows.expand(batch, beams).flatten())
    for n in range(1, max_new_tokens + 1):
        check_numbers(at.logits)
        logp = at.logits.to(dtype).log_softmax(-1).view(batch, how.groups, each, -1)
        found: list[_Group] = []
        parents = []
        for g, group in enumerate(groups):
            price = _price(found, group, how, logp.shape[-1])
            group, parent = _extend(group, logp[:, g], price, how, stop, last=n == max_new_tokens)
            found.append(group)
            parents.append(parent + g * each)
        groups = found
        if n == max_new_tokens or not any(bool(group.open.any()) for group in groups):
            break
        ids = torch.cat([group.ids[:, :, -1] for group in groups], 1)
        at = advance(model, ids.flatten(), select(at, (rows * beams + torch.cat(parents, 1)).flatten()))
    parts = zip(*((g.done_ids, g.done_lengths, g.done_logp) for g in groups), strict=True)
    ids, lengths, scores = (torch.cat(part, 1) for part in parts)
    return Beams(ids[:, :, : int(lengths.max()) if lengths.numel() else 0], lengths, scores)


def _extend(
    group: _Group, logp: Tensor, price: Tensor | float, how: Beam, stop: Stop, *, last: bool
) -> tuple[_Group, Tensor]:
    """One step of one group: logp (B, k, V) -> the group after it, and for each of its texts which one it continues."""
    batch, each, vocab = logp.shape
    paid = (group.paid[..., None] + logp - price).flatten(1)
    # so many that each text may end in every possible way and still k go on
    best, place = paid.topk(min(max(2, 1 + len(stop.ids)) * each, each * vocab), dim=1)
    parent, chosen = place // vocab, place % vocab
    plain = (group.logp[..., None] + logp).flatten(1).gather(1, place)
    ids = torch.cat([_rows(group.ids, parent), chosen[..., None]], 2)  # (B, C, t)
    steps = ids.shape[-1]
    ended = stop.ended(ids.flatten(0, 1)).view(batch, -1)
    score = (plain / steps**how.length_penalty).masked_fill(~(ended | last) | ~group.open[:, None], -torch.inf)
    score[:, each:] = -torch.inf  # behind the first k candidates an end does not count
    padded = torch.nn.functional.pad(ids, (0, group.done_ids.shape[-1] - steps), value=stop.pad)
    done_score, keep = torch.cat([group.done_score, score], 1).topk(each, dim=1)
    lengths = torch.full_like(chosen, steps).masked_fill(score == -torch.inf, 0)
    done_ids = _rows(torch.cat([group.done_ids, padded], 1), keep)
    done_lengths = torch.cat([group.done_lengths, lengths], 1).gather(1, keep)
    done_logp = torch.cat([group.done_logp, plain.masked_fill(score == -torch.inf, -torch.inf)], 1).gather(1, keep)
    running, go_on = best.masked_fill(ended, -torch.inf).topk(each, dim=1)
    logp_now = plain.gather(1, go_on).masked_fill(running == -torch.inf, -torch.inf)
    hope = logp_now[:, 0] / steps**how.length_penalty
    still = group.open & (hope > done_score[:, -1])
    ids, parent = _rows(ids, go_on), parent.gather(1, go_on)
    return _Group(ids, logp_now, running, done_ids, done_lengths, done_logp, done_score, still), parent


def _price(before: list[_Group], group: _Group, how: Beam, vocab: int) -> Tensor | float:
    """What each next id of each text costs: penalty times how often the groups before have it, (B, 1 or k, V)."""
    if not before or not how.penalty:
        return 0.0
    texts = torch.cat([other.ids for other in before], 1)  # (B, E, t)
    alive = torch.cat([other.paid for other in before], 1) > -torch.inf  # (B, E)
    if how.ngram is None:
        chosen = texts[:, :, -1]
        count = group.paid.new_zeros(len(chosen), vocab).scatter_add(1, chosen, alive.to(group.paid.dtype))
        return how.penalty * count[:, None]
    batch, each, steps = group.ids.shape
    context = how.ngram - 1
    count = group.paid.new_zeros(batch, each, vocab)
    if steps < context:
        return 0.0
    grams = texts.unfold(2, how.ngram, 1)  # (B, E, places, n)
    mine = group.ids[:, :, steps - context :]  # (B, k, n-1)
    same = (grams[:, None, ..., :context] == mine[:, :, None, None]).all(-1)  # (B, k, E, places)
    same = same & alive[:, None, :, None]
    ids = grams[:, None, ..., -1].expand_as(same)
    return how.penalty * count.scatter_add(2, ids.flatten(2), same.flatten(2).to(count.dtype))


def _rows(texts: Tensor, which: Tensor) -> Tensor:
    """texts (B, K, t), which (B, k) -> (B, k, t)."""
    return texts.gather(1, which[..., None].expand(-1, -1, texts.shape[-1]))
