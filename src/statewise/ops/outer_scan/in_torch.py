"""Matrix products over chunks of time.

Within a chunk, with p_i the sum of log decays from its start up to i, s_j the sum after j, and S the state before it:
    o_i = e^{p_i} S^T q_i + sum_{j <= i} e^{D_ij} (q_i . k_j) v_j,    S' = e^{p_C} S + sum_j e^{s_j} k_j v_j^T,
where D_ij is the sum of the log decays in (j, i]. Nothing is ever a difference of such sums: all are sums of terms that
are at most 0, so no factor exceeds 1, a decay of 0 is one more factor, and a strong decay does not blur later ones.

One decay per head makes e^D a matrix for each head and chunk. Its small blocks on the diagonal are exponentials; the
rest, halving by halving, is e^{p_i} e^{s_j} with p and s counted from the middle of i's and j's common block.
A decay per key or value splits over the same middles: there the factors go onto rows of q and k, or of o and v.
A decay per key and value is an elementwise scan of k v^T, a few steps at a time.

Kept for backward are the inputs and the states between chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..contain import contained
from ..linear_scan import linear_scan
from ..looping import loop
from ..opaque import opaque
from . import outer_step
from .edges import normal

CHUNK = {"scalar": 128, "key": 64, "value": 64}  # steps; by measurement
LEAF = 16  # size of the diagonal blocks that are exponentials of their own
SCRATCH = 1 << 18  # elements of a (chunks, B, H, C, C) array: it stays in the caches from one operation to the next
FULL = 1 << 20  # elements of k v^T at a time
LOWEST = -1000.0  # e^-1000 is 0 in float64 too, and a sum of such numbers is not infinite


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    o, last = _run(*normal(q, k, v, log_decay, state, reset, lengths))
    return o, last


_Parts = tuple[Tensor, Tensor, Tensor, Tensor | None]  # q, k, v and log decays


class Span(NamedTuple):
    """Whole chunks, or one that is cut short by the end and filled up with zeros to a power of two."""

    first: int  # number of its first chunk
    start: int
    many: int  # chunks
    size: int  # steps of each
    steps: int  # that there are

    @property
    def time(self) -> slice:
        return slice(self.start, self.start + self.steps)

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.first + self.many)


def _spans(steps: int, size: int, rows: int) -> list[Span]:
    """rows: B H."""
    whole, rest = divmod(steps, size)
    together = max(1, SCRATCH // max(1, rows * size * size))
    spans = [
        Span(i, i * size, min(together, whole - i), size, min(together, whole - i) * size)
        for i in range(0, whole, together)
    ]
    if rest:
        spans.append(Span(whole, whole * size, 1, 1 << (rest - 1).bit_length(), rest))
    return spans


def _cut(t: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """(B, T, H, D) -> (chunks, B, H, C, D), a copy that matrix products like."""
    part, (batch, _, heads, width) = t[:, span.time], t.shape
    if span.steps == span.many * span.size:
        part = part.unflatten(1, (span.many, span.size)).permute(1, 0, 3, 2, 4)
        return part.to(dtype, memory_format=torch.contiguous_format, copy=True)
    out = t.new_zeros(1, batch, heads, span.size, width, dtype=dtype)
    out[0, :, :, : span.steps] = part.transpose(1, 2)
    return out


def _paste(out: Tensor, span: Span, t: Tensor) -> None:
    """The way back from _cut."""
    if span.steps == span.many * span.size:
        out[:, span.time].unflatten(1, (span.many, span.size)).copy_(t.permute(1, 0, 3, 2, 4))
    else:
        out[:, span.time] = t[0, :, :, : span.steps].transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the state at the end, and the states before each chunk (chunks, B, H, K, V)."""
    size, steps = _chunk(kind, v, q.shape[3]), v.shape[1]
    o, last = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
    states = state.new_empty(-(-steps // size), *state.shape)
    for rows in _row_slices(v, size, kind):
        parts = q[rows], k[rows], v[rows], None if g is None else g[rows]
        cuts, out, kept, before = None if reset is None else reset[rows], o[rows], states[:, rows], state[rows]
        for span in _spans(steps, size, len(parts[2]) * v.shape[2]):
            if kind != "full":
                y, kept[span.chunks], before = _KINDS[kind].forward(*_cut_all(parts, cuts, span, state.dtype), before)
                _paste(out, span, y)
                continue
            for number, time in _chunks(span):
                kept[number] = before
                cut = None if cuts is None else cuts[:, time]
                out[:, time], before = _elementwise(*_at(parts, time), before, cut, kind)
        last[rows] = before
    return o, last, states


def _backward(
    d_o: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    kind: str,
    states: Tensor,
) -> tuple[Tensor, ...]:
    size, steps, dtype = _chunk(kind, v, q.shape[3]), v.shape[1], states.dtype
    grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, g)]
    d_state = torch.empty_like(d_last, memory_format=torch.contiguous_format)
    for rows in _row_slices(v, size, kind):
        parts = q[rows], k[rows], v[rows], None if g is None else g[rows]
        cuts, outs = None if reset is None else reset[rows], [None if t is None else t[rows] for t in grads]
        after = d_last[rows]
        for span in reversed(_spans(steps, size, len(parts[2]) * v.shape[2])):
            if kind != "full":
                cut = _cut_all(parts, cuts, span, dtype)
                found = _KINDS[kind].backward(_cut(d_o[rows], span, dtype), after, *cut, states[span.chunks, rows])
                for out, t in zip(outs, found):
                    if out is not None and t is not None:
                        _paste(out, span, t)
                after = found[4]
                continue
            for number, time in reversed(list(_chunks(span))):
                found = _elementwise_backward(
                    d_o[rows, time], after, *_at(parts, time), states[number, rows],
                    None if cuts is None else cuts[:, time], kind,
                )  # fmt: skip
                for out, t in zip(outs, found):
                    if out is not None and t is not None:
                        out[:, time] = t
                after = found[4]
        d_state[rows] = after
    return *(t for t in grads if t is not None), d_state


def _chunk(kind: str, v: Tensor, keys: int) -> int:
    """Steps of a chunk."""
    if kind != "full":
        return CHUNK[kind]
    return max(1, FULL // max(1, len(v) * v.shape[2] * keys * v.shape[3]))


def _row_slices(v: Tensor, size: int, kind: str) -> list[slice]:
    """Rows of the batch that are worked on at once."""
    each = max(1, len(v) if kind == "full" else SCRATCH // max(1, v.shape[2] * size * size))
    return [slice(i, i + each) for i in range(0, len(v), each)]


def _chunks(span: Span) -> Iterator[tuple[int, slice]]:
    for i in range(span.many):
        start = span.start + i * span.size
        yield span.first + i, slice(start, min(start + span.size, span.start + span.steps))


def _at(parts: _Parts, time: slice) -> _Parts:
    q, k, v, g = parts
    return q[:, time], k[:, time], v[:, time], None if g is None else g[:, time]


def _cut_all(
    parts: tuple[Tensor, Tensor, Tensor, Tensor | None], reset: Tensor | None, span: Span, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs of a span; a reset is a decay of 0."""
    q, k, v, g = parts
    if reset is not None:
        whole = v.new_zeros(1, dtype=dtype).expand(*v.shape[:3], 1) if g is None else g
        part = whole[:, span.time].masked_fill(reset[:, span.time, None, None], -math.inf)
        cut: Tensor | None = _cut(part, span._replace(start=0), dtype)
    else:
        cut = None if g is None else _cut(g, span, dtype)
    return _cut(q, span, dtype), _cut(k, span, dtype), _cut(v, span, dtype), cut


class _Scalar:
    """One decay per head and step, or none."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, group = v.shape, v.shape[2] // q.shape[2]
        weights = torch.bmm(q.flatten(0, 2), k.flatten(0, 2).mT)
        if g is None:
            weights = _per_head(weights, group).tril_()
            q, k, total = _heads(q, group), _heads(k, group), None
        else:
            decay, of_start, to_end, total = _decays(g)
            weights = _times(weights, decay, group)
            q, k = _scaled(q, of_start, group), _scaled(k, to_end, group)
        v = v.flatten(0, 2)
        added = torch.bmm(k.mT, v).view(shape[0], *state.shape)
        starts, last = _pass_on(added, state, total)
        o = torch.bmm(weights, v).baddbmm_(q, starts.flatten(0, 2))
        return o.view(shape), starts, last

    @staticmethod
    def backward(
        d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        shape, group, narrow = v.shape, v.shape[2] // q.shape[2], q.shape
        qs, ks = q.flatten(0, 2), k.flatten(0, 2)
        weights = torch.bmm(qs, ks.mT)
        if g is None:
            total, d_g = None, None
            weights = _per_head(weights, group).tril_()
            q, k = _heads(q, group), _heads(k, group)
        else:
            decay, of_start, to_end, total = _decays(g)
            weights = _times(weights, decay, group)
            q, k = _scaled(q, of_start, group), _scaled(k, to_end, group)
        d_o, v = d_o.flatten(0, 2), v.flatten(0, 2)
        passed, d_state = _pass_on(torch.bmm(q.mT, d_o).view(shape[0], *d_last.shape), d_last, total, backwards=True)
        ends, starts = passed.flatten(0, 2), states.flatten(0, 2)
        d_v = torch.bmm(weights.mT, d_o).baddbmm_(k, ends)
        d_weights = torch.bmm(d_o, v.mT)
        d_q, d_k = torch.bmm(d_o, starts.mT), torch.bmm(v, ends.mT)
        if g is None:
            d_weights.tril_()
        else:
            weights.mul_(d_weights).diagonal(dim1=1, dim2=2).zero_()  # a step's own input is not decayed
            later = weights.sum(2) - weights.sum(1) + (q * d_q).sum(2)
            earlier = (k * d_k).sum(2)
            whole = (starts * ends).flatten(1).sum(1) * of_start[:, -1]
            gone = g.view(later.shape).exp() == 0
            if gone.any():  # nothing passes a decay of 0, not even the rounding of sums that cancel
                part = gone.cumsum(1)
                d_g = torch.bmm((part[:, :, None] == part[:, None]).triu_().to(later.dtype), later[..., None])[..., 0]
            else:
                d_g = later.flip(1).cumsum(1).flip(1)
            d_g += whole[:, None]
            d_g[:, 1:] += earlier.cumsum(1)[:, :-1]
            d_g = d_g.masked_fill_(gone, 0).view(g.shape)
            d_weights.mul_(decay)
            d_q.mul_(of_start[..., None]), d_k.mul_(to_end[..., None])
        if group > 1:
            d_weights = d_weights.unflatten(0, (-1, group)).sum(1)
            d_q, d_k = (t.unflatten(0, (-1, group)).sum(1) for t in (d_q, d_k))
        d_q.baddbmm_(d_weights, ks)
        d_k.baddbmm_(d_weights.mT, qs)
        return d_q.view(narrow), d_k.view(narrow), d_v.view(shape), d_g, d_state


def _per_head(t: Tensor, group: int) -> Tensor:
    return t if group == 1 else t.repeat_interleave(group, 0)


def _heads(t: Tensor, group: int) -> Tensor:
    """(chunks, B, G, C, D) -> (chunks B H, C, D)."""
    return _per_head(t.flatten(0, 2), group)


def _times(weights: Tensor, decay: Tensor, group: int) -> Tensor:
    if group == 1:
        return weights.mul_(decay)
    return (weights[:, None] * decay.unflatten(0, (-1, group))).flatten(0, 1)


def _scaled(t: Tensor, factor: Tensor, group: int) -> Tensor:
    """Rows of (chunks, B, G, C, D) times a factor (chunks B H, C)."""
    return (t.flatten(0, 2)[:, None] * factor.unflatten(0, (-1, group))[..., None]).flatten(0, 1)


def _pass_on(added: Tensor, state: Tensor, total: Tensor | None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """The states before each chunk (after it, backwards) and beyond the last one; total: a chunk's log decay.

    A decay near 1 keeps few digits of its distance to 1, and the same ones in every chunk: what they miss is added.
    """
    before = torch.empty_like(added)
    if total is not None:
        decay = total.exp()
        missed = torch.where(total > -0.5, total.expm1() - (decay - 1), 0)
    for i in range(len(added))[:: -1 if backwards else 1]:
        before[i] = state
        if total is None:
            state = state + added[i]
        else:
            state = torch.addcmul(added[i], state, decay[i]).addcmul_(state, missed[i])
    return before, state


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From (chunks, B, H, C, 1): e^D (n, C, C), e^p and e^s (n, C) with n = chunks B H, p_C over states."""
    shape, size = g.shape, g.shape[3]
    g = g.clamp(min=LOWEST).view(-1, size)
    n, leaf = len(g), min(size, LEAF)
    decay = g.new_zeros(n, size, size)
    step = torch.arange(leaf, device=g.device)
    i, j, t = step[:, None, None], step[None, :, None], step
    inside = ((j < t) & (t <= i)).to(g.dtype).view(leaf * leaf, leaf)
    future = torch.zeros(leaf, leaf, dtype=g.dtype, device=g.device).masked_fill_(i[..., 0] < j[..., 0], -math.inf)
    blocks = torch.addmm(future.view(-1), g.view(-1, leaf), inside.mT).exp_().view(n, size // leaf, leaf, leaf)
    diagonal = decay.view(n, size // leaf, leaf, size // leaf, leaf).diagonal(dim1=1, dim2=3)
    diagonal.copy_(blocks.permute(0, 2, 3, 1))
    while leaf < size:
        halves = g.view(n, -1, 2, leaf)
        below = torch.ones(leaf, leaf, dtype=g.dtype, device=g.device).tril_(-1)
        after = (halves[:, :, 0] @ below).exp_()
        upto = (halves[:, :, 1] @ below.mT + halves[:, :, 1]).exp_()
        pairs = size // (2 * leaf)
        lower = decay.view(n, pairs, 2, leaf, pairs, 2, leaf)[:, :, 1, :, :, 0]
        for b in range(pairs):
            torch.mul(upto[:, b, :, None], after[:, b, None, :], out=lower[:, b, :, b])
        leaf *= 2
    below = torch.ones(size, size, dtype=g.dtype, device=g.device).tril_(-1)
    start, end = g @ below.mT + g, g @ below
    return decay, start.exp(), end.exp(), start[:, -1].view(*shape[:3], 1, 1)


class _Vector:
    """One decay per head, step and key (or value)."""

    def __init__(self, key: bool):
        self.key = key

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert g is not None
        shape, group = v.shape, v.shape[2] // q.shape[2]
        q, k, v, g = _heads(q, group), _heads(k, group), v.flatten(0, 2), g.flatten(0, 2)
        o = (q * k).sum(2, keepdim=True) * v
        start, end = g.clone(), torch.zeros_like(g)
        size = 1
        while size < shape[3]:
            (q1, k0), (v0, o1) = (_half(q, size, 1), _half(k, size, 0)), (_half(v, size, 0), _half(o, size, 1))
            upto, after = _half(start, size, 1).exp(), _half(end, size, 0).exp()
            if self.key:
                _add_product(o1, torch.bmm(q1 * upto, (k0 * after).mT), v0)
            else:
                o1 += torch.bmm(torch.bmm(q1, k0.mT), v0 * after).mul_(upto)
            _merge(start, end, size)
            size *= 2
        whole = start[:, -1].clone()
        upto, after = start.exp_(), end.exp_()
        if self.key:
            added, total = torch.bmm((k * after).mT, v), whole.view(*shape[:3], -1, 1)
        else:
            added, total = torch.bmm(k.mT, v * after), whole.view(*shape[:3], 1, -1)
        starts, last = _pass_on(added.view(shape[0], *state.shape), state, total)
        if self.key:
            o.baddbmm_(q * upto, starts.flatten(0, 2))
        else:
            o += torch.bmm(q, starts.flatten(0, 2)).mul_(upto)
        return o.view(shape), starts, last

    def backward(
        self, d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        assert g is not None
        shape, narrow, kind, group = v.shape, q.shape, g.shape, v.shape[2] // q.shape[2]
        q, k = _heads(q, group), _heads(k, group)
        d_o, v, g, starts = (t.flatten(0, 2) for t in (d_o, v, g, states))
        own, d_own = (q * k).sum(2, keepdim=True), (d_o * v).sum(2, keepdim=True)
        d_q, d_k, d_v = d_own * k, d_own * q, own * d_o
        factors, start, end, size = [], g.clone(), torch.zeros_like(g), 1
        while size < shape[3]:
            factors.append((size, _half(start, size, 1).exp(), _half(end, size, 0).exp()))
            _merge(start, end, size)
            size *= 2
        whole = start[:, -1].clone()
        total = whole.view(*shape[:3], -1, 1) if self.key else whole.view(*shape[:3], 1, -1)
        upto, after = start.exp_(), end.exp_()
        q_, do_ = (q * upto, d_o) if self.key else (q, d_o * upto)
        k_, v_ = (k * after, v) if self.key else (k, v * after)
        ends, d_state = _pass_on(torch.bmm(q_.mT, do_).view(shape[0], *d_last.shape), d_last, total, backwards=True)
        ends = ends.flatten(0, 2)
        dq_, dk_, dv_ = torch.bmm(do_, starts.mT), torch.bmm(v_, ends.mT), torch.bmm(k_, ends)
        if self.key:
            d_start, d_end = dq_ * q_, dk_ * k_
            d_q.addcmul_(dq_, upto), d_k.addcmul_(dk_, after), d_v.add_(dv_)
        else:
            d_start, d_end = do_ * torch.bmm(q, starts), dv_ * v_
            d_q.add_(dq_), d_k.add_(dk_), d_v.addcmul_(dv_, after)
        d_start[:, -1] += (starts * ends).sum(2 if self.key else 1) * upto[:, -1]
        for size, upto, after in reversed(factors):
            _split(d_start, d_end, size)
            q1, do1, dq1, ds1 = (_half(t, size, 1) for t in (q, d_o, d_q, d_start))
            k0, v0, dk0, dv0, de0 = (_half(t, size, 0) for t in (k, v, d_k, d_v, d_end))
            if self.key:
                q1, k0 = q1 * upto, k0 * after
                d_weights = torch.bmm(do1, v0.mT)
                _add_product(dv0, torch.bmm(k0, q1.mT), do1)
                dq, dk = torch.bmm(d_weights, k0), torch.bmm(d_weights.mT, q1)
                ds1.addcmul_(dq, q1), de0.addcmul_(dk, k0)
                dq1.addcmul_(dq, upto), dk0.addcmul_(dk, after)
            else:
                do1, v0 = do1 * upto, v0 * after
                weights, d_weights = torch.bmm(q1, k0.mT), torch.bmm(do1, v0.mT)
                dv = torch.bmm(weights.mT, do1)
                _add_product(dq1, d_weights, k0)
                _add_product(dk0, d_weights.mT, q1)
                ds1.addcmul_(do1, torch.bmm(weights, v0)), de0.addcmul_(dv, v0)
                dv0.addcmul_(dv, after)
        if group > 1:
            d_q, d_k = (t.unflatten(0, (-1, group)).sum(1) for t in (d_q, d_k))
        return d_q.view(narrow), d_k.view(narrow), d_v.view(shape), d_start.view(kind), d_state


def _half(t: Tensor, size: int, which: int) -> Tensor:
    """The earlier (0) or later (1) half of each block of 2 size steps: (n, C, D) -> (blocks, size, D), a view."""
    return t.view(-1, 2 * size, t.shape[2])[:, size * which : size * (which + 1)]


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b; a tiny product straight into a view would be done matrix by matrix, with a call for each."""
    if a.shape[2] < 8:
        out.add_(torch.bmm(a, b))
    else:
        out.baddbmm_(a, b)


def _merge(start: Tensor, end: Tensor, size: int) -> None:
    """Sums from the start and to the end of blocks of `size` become those of blocks of twice that."""
    first, second = _half(start, size, 0), _half(start, size, 1)
    _half(end, size, 0).add_(second[:, -1:])
    second.add_(first[:, -1:])


def _split(d_start: Tensor, d_end: Tensor, size: int) -> None:
    """The adjoint of _merge."""
    first, second = _half(d_start, size, 0), _half(d_start, size, 1)
    first[:, -1] += second.sum(1)
    second[:, -1] += _half(d_end, size, 0).sum(1)


_KINDS: dict[str, _Scalar | _Vector] = {"scalar": _Scalar(), "key": _Vector(True), "value": _Vector(False)}


def _elementwise(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """By a scan of every element of the state."""
    q, k, v_, a = _outer_parts(q, k, v, g, state.dtype, kind)
    h, last = linear_scan(a, k * v_, state, reset=reset)
    return (q * h).sum(3).to(v.dtype), last


def _elementwise_backward(
    d_o: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """lam_t = q_t do_t^T + a_{t+1} lam_{t+1} is the gradient that reaches S_t."""
    (batch, steps, heads, _), groups, dtype = v.shape, q.shape[2], state.dtype
    q, k, v, a = _outer_parts(q, k, v, g, dtype, kind)
    a = a.expand(batch, steps, heads, *a.shape[3:])
    d_o = d_o.to(dtype)[..., None, :]
    cut = torch.zeros(batch, steps, dtype=torch.bool, device=v.device) if reset is None else reset
    h, _ = linear_scan(a, k * v, state, reset=cut)
    later_a = torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], 1)
    later_cut = torch.cat([cut[:, 1:], torch.zeros_like(cut[:, :1])], 1)
    lam, _ = linear_scan(later_a.flip(1), (q * d_o).flip(1), d_last, reset=later_cut.flip(1))
    lam = lam.flip(1)
    through = lam.masked_fill(cut[..., None, None, None], 0)  # the gradient that crosses from t - 1 to t
    d_g = None
    if g is not None:
        d_a = through * torch.cat([state[:, None], h[:, :-1]], 1).masked_fill(cut[..., None, None, None], 0)
        d_g = (d_a * a).sum_to_size(a.shape).view(g.shape)
    d_q, d_k = ((h * d_o).sum(4), (lam * v).sum(4))
    d_q, d_k = (t.unflatten(2, (groups, -1)).sum(3) for t in (d_q, d_k))
    return d_q, d_k, (lam * k).sum(3), d_g, a[:, 0] * through[:, 0]


def _outer_parts(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, dtype: torch.dtype, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (B, T, H, K, 1), v (B, T, H, 1, V), and the decay in a shape that broadcasts with them."""
    q, k = (t.to(dtype).repeat_interleave(v.shape[2] // t.shape[2], 2)[..., None] for t in (q, k))
    if g is None:
        a = v.new_ones(1, 1, 1, 1, 1, dtype=dtype)
    else:
        a = (g if kind == "full" else g[..., None, :] if kind == "value" else g[..., None]).exp()
    return q, k, v.to(dtype)[..., None, :], a


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    if g is not None and kind != "full":
        g = g[..., None, :] if kind == "value" else g[..., None]
    return loop(outer_step, (q, k, v, g), state, fresh=torch.zeros_like(state), like=v, reset=reset, lengths=None)


def _like(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str
) -> tuple[Tensor, ...]:
    count, spoilt = -(-v.shape[1] // _chunk(kind, v, q.shape[3])), v.new_empty(v.shape[:2], dtype=torch.bool)
    return v.new_empty(v.shape), state.new_empty(state.shape), spoilt, state.new_empty((count, *state.shape))


ARGUMENTS = "q k v g? state reset? kind:str"
_contained = contained(ARGUMENTS, _forward, _backward, by_loop)
_run = opaque("outer_scan_torch", None, ARGUMENTS, *_contained[:2], _like, results=2, kept=2, alone=_contained[2])
