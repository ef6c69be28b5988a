"""Speculative decoding (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import RecurrentLayer, UsageError, check_sizes, past_end, tree_map, wide
from .position import check_model, check_prompt
from .sampling import GREEDY, Randomness, Sampling, draw
from .stopping import Stop


@dataclass(frozen=True)
class Speculative:
    """A small model drafts `ahead` ids, the large one reads them at once and keeps those it might have drawn itself.

    x from q is kept with probability min(1, p(x) / q(x)); the first that is not is drawn anew from max(p - q, 0):
    what is written has the distribution p of the large model alone, `sampling` applied to both. Raises UsageError for
    ahead below 1.
    """

    draft: RecurrentLayer[Any]
    ahead: int = 4
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        check_sizes("Speculative", ahead=self.ahead)
        check_model(self.draft)


class Speculation(NamedTuple):
    ids: Tensor  # (B, n) padding from a row's end on
    lengths: Tensor  # (B,)
    scores: Tensor  # (B,) log p by the large model as it is
    drafted: Tensor  # (B,) ids that the draft proposed
    kept: Tensor  # (B,) of which were kept


@torch.no_grad()
def speculate(
    model: RecurrentLayer[Any],
    ids: Tensor,
    max_new_tokens: int,
    how: Speculative,
    *,
    rng: Randomness = None,
    stop: Stop | None = None,
    lengths: Tensor | None = None,
) -> Speculation:
    """As generate; says also how many of the drafted ids were kept.

    Each round takes `ahead` + 1 steps of the draft and one forward of the model over as many ids. A recurrent state
    holds what it has read, so where a row rejects an id the model reads the kept ones again from the state before the
    round; of the draft the state after every step is at hand.
    """
    check_prompt(model, ids, lengths)
    if how.draft.vocab != model.vocab:
        raise UsageError(
            f"Speculative: the draft has {how.draft.vocab} ids, the model {model.vocab}; expected the same"
        )
    stop = Stop() if stop is None else stop
    batch, steps = ids.shape
    device, rows = ids.device, torch.arange(batch, device=ids.device)
    ends = torch.full((batch,), steps, device=device) if lengths is None else lengths.to(device)
    # all but the last id of the prompt are read; that one waits, as the last id of each round will
    state, small = (m(ids[:, :-1], lengths=(ends - 1).clamp(max=steps - 1))[1] for m in (model, how.draft))
    pending = ids[rows, ends - 1].long()
    seen = _seen(ids, ends, model.out_width)
    room = max_new_tokens + how.ahead + 1
    written = torch.full((batch, room), stop.pad, dtype=torch.int64, device=device)
    count = torch.zeros(batch, dtype=torch.int64, device=device)
    drafted, kept, ended = count.clone(), count.clone(), count.bool()
    scores: Tensor | None = None
    while max_new_tokens and not bool(ended.all()):
        proposed, q, smalls, seens = _draft(how, pending, small, seen, rng)
        read = torch.cat([pending[:, None], proposed], 1)  # (B, ahead + 1)
        y, after = model(read, state)
        p = torch.stack([how.sampling.probabilities(y[:, i], seens[i]) for i in range(how.ahead + 1)], 1)
        accepted, fresh = _judge(proposed, p, q, how.sampling, rng)
        whole = bool((accepted == how.ahead).all())
        state = after if whole else model(read, state, lengths=accepted + 1)[1]
        small = tree_map(lambda *leaf: torch.stack(leaf)[accepted, rows], *smalls)  # noqa: B023
        new = torch.where(past_end(accepted, how.ahead + 1), fresh[:, None], _wider(proposed))
        log_p = y.to(wide(y.dtype)).log_softmax(-1).gather(2, new[..., None])[..., 0]
        scores = log_p.new_zeros(batch) if scores is None else scores
        take = torch.where(ended, 0, accepted + 1)
        drafted, kept = drafted + how.ahead * ~ended, kept + torch.where(ended, 0, accepted)
        for i in range(how.ahead + 1):  # id by id, so that the one that ends a row is its last
            now = (i < take) & ~ended
            place = torch.where(now, count, room - 1)
            written[rows, place] = torch.where(now, new[:, i], stop.pad)
            count, scores = count + now, scores + torch.where(now, log_p[:, i], 0)
            ended = ended | (now & ((count == max_new_tokens) | _ended(stop, written, count)))
        seen = seens[0].scatter(1, torch.where(past_end(accepted, how.ahead), pending[:, None], proposed), True)
        seen, pending = seen.scatter(1, fresh[:, None], True), fresh
    scores = torch.zeros(batch, device=device) if scores is None else scores
    width = int(count.max()) if batch else 0
    return Speculation(written[:, :width].to(ids.dtype), count, scores, drafted, kept)


def _draft(
    how: Speculative, pending: Tensor, state: Any, seen: Tensor, rng: Randomness
) -> tuple[Tensor, Tensor, list[Any], list[Tensor]]:
    """Drafted ids (B, n), their distributions (B, n, V), the draft's states after 1 .. n + 1 ids and what was seen
    before each of n + 1 choices."""
    ids, q, states, seens = [], [], [], [seen]
    for n in range(how.ahead + 1):
        logits, state = how.draft.step(pending, state)
        states.append(state)
        if n == how.ahead:
            break
        q.append(how.sampling.probabilities(logits, seens[-1]))
        pending = draw(q[-1], rng) if how.sampling.random else q[-1].argmax(-1)
        ids.append(pending)
        seens.append(seens[-1].scatter(1, pending[:, None], True))
    return torch.stack(ids, 1), torch.stack(q, 1), states, seens


def _judge(proposed: Tensor, p: Tensor, q: Tensor, sampling: Sampling, rng: Randomness) -> tuple[Tensor, Tensor]:
    """proposed (B, n), p (B, n + 1, V), q (B, n, V) -> how many are kept (B,), and the id that comes after (B,)."""
    batch, ahead = proposed.shape
    q = q.to(p.dtype)
    of = lambda z: z.gather(2, proposed[..., None])[..., 0]
    ratio = of(p[:, :ahead]) / of(q)  # q > 0: it was drawn
    keep = _uniform(batch, ahead, rng, p) < ratio if sampling.random else ratio >= 1
    accepted = keep.long().cumprod(1).sum(1)
    left = torch.cat([(p[:, :ahead] - q).clamp_min(0), p[:, ahead:]], 1)[torch.arange(batch, device=p.device), accepted]
    # rounding may leave nothing where p and q are equal and yet one was refused
    rest = torch.where(left.sum(-1, keepdim=True) > 0, left, p[torch.arange(batch, device=p.device), accepted])
    return accepted, draw(rest, rng) if sampling.random else rest.argmax(-1)


def _uniform(batch: int, count: int, rng: Randomness, like: Tensor) -> Tensor:
    """(B, count) uniform numbers, from one generator or from one per row."""
    if isinstance(rng, torch.Generator):
        u = torch.rand(batch, count, generator=rng, dtype=torch.float64, device=rng.device)
    else:
        assert rng is not None  # draw has refused it
        u = torch.stack([torch.rand(count, generator=r, dtype=torch.float64, device=r.device) for r in rng])
    return u.to(like.device)


def _seen(ids: Tensor, ends: Tensor, vocab: int) -> Tensor:
    """(B, V) bool: what stands in the prompts."""
    counted = torch.where(past_end(ends, ids.shape[1]), ids[:, :1], ids).long()
    return torch.zeros(len(ids), vocab, dtype=torch.bool, device=ids.device).scatter(1, counted, True)


def _wider(ids: Tensor) -> Tensor:
    return torch.cat([ids, ids[:, :1]], 1)


def _ended(stop: Stop, written: Tensor, count: Tensor) -> Tensor:
    """Whether each row ends with the last of its `count` ids."""
    if not stop.strings:
        last = written.gather(1, (count - 1).clamp_min(0)[:, None])
        return stop.ended(last) & (count > 0)
    rows = [stop.ended(row[None, :n]) if n else count.new_zeros(1).bool() for row, n in zip(written, count.tolist())]
    return torch.cat(rows) if rows else count.bool()
