"""What chunked forms of the delta rule share: how time is cut up, how decays become factors, how a chunk is solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import clear_past_end, past_end

CUT = -750.0  # exp(CUT) is zero in float64 too: a log decay below it, or a reset, cuts the past off
BLOCK = 16


class Plan(NamedTuple):
    """How T steps of n corrections each are cut into chunks, and chunks into spans that fit the caches."""

    steps: int
    per_step: int  # corrections a step
    tokens: int  # steps a chunk
    chunks: int
    span: int  # chunks worked on at once

    @property
    def rows(self) -> int:
        """Corrections a chunk."""
        return self.tokens * self.per_step

    def kept(self, keep: bool) -> int:
        """Chunks that the forward pass holds at a time: all if a backward pass will come, else a span."""
        return self.chunks if keep else min(self.span, self.chunks)

    def spans(self) -> list[tuple[int, int]]:
        return [(lo, min(lo + self.span, self.chunks)) for lo in range(0, self.chunks, self.span)]


def plan(steps: int, per_step: int, heads: int, rows: int, together: int) -> Plan:
    """Chunks of about `rows` corrections, a multiple of 16; spans of about `together` chunks, heads counted."""
    least = BLOCK // math.gcd(BLOCK, per_step)
    tokens = least * max(1, min(rows // (least * per_step), -(-steps // least)))
    return Plan(steps, per_step, tokens, -(-steps // tokens), max(1, together // max(1, heads)))


def shapes(p: Plan, q: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """What a forward pass that keeps everything returns, with nothing in it: outputs, the last state and what is spoilt
    (see `contained`); and for the backward pass the states between chunks, the inverses, what each correction writes.
    """
    (batch, steps, heads, _), values = q.shape, v.shape[-1]
    return (
        v.new_empty(batch, steps, heads, values),
        state.new_empty(state.shape),
        state.new_empty(batch, steps, dtype=torch.bool),
        state.new_empty(p.chunks + 1, batch * heads, *state.shape[2:]),
        state.new_empty(p.chunks, batch * heads, p.rows, p.rows),
        state.new_empty(p.chunks, batch * heads, p.rows, values),
    )


def by_row(
    q: Tensor, state: Tensor, log_decay: Tensor | None, reset: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Log decays (B, T, H, K | 1) or None: at most CUT where the past is cut off, 0 past the end. And resets before
    the end."""
    if reset is not None and lengths is not None:
        reset = reset & ~past_end(lengths.to(reset.device), reset.shape[1])
    if log_decay is None and reset is None:
        return None, None
    if log_decay is None:
        g = torch.zeros(*q.shape[:3], 1, dtype=state.dtype, device=state.device)
    else:
        keys = log_decay.shape[-2] if log_decay.ndim > 1 else 1
        g = cleared(log_decay.to(state.dtype).expand(*q.shape[:3], keys, 1).squeeze(-1), lengths)
    return (g if reset is None else g.masked_fill(reset[..., None, None], CUT)), reset


def cleared(x: Tensor, lengths: Tensor | None) -> Tensor:
    return x if lengths is None else clear_past_end(x, lengths.to(x.device))


def fold(x: Tensor, lo: int, hi: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Chunks lo to hi of x (B, T, H, W) as (hi - lo, B H, rows, W), zeros past the end."""
    x = x[:, lo * rows : hi * rows]
    missing = (hi - lo) * rows - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
    place = x.unflatten(1, (hi - lo, rows)).permute(1, 0, 3, 2, 4)
    chunks = torch.empty(place.shape, dtype=dtype, device=x.device)  # never a view: it is written to
    return chunks.copy_(place).flatten(1, 2)


def unfold(into: Tensor, lo: int, hi: int, chunks: Tensor) -> None:
    """Write (hi - lo, B H, rows, W) back to its place in (B, T, H, W), T a multiple of rows."""
    rows = chunks.shape[2]
    place = into[:, lo * rows : hi * rows].unflatten(1, (hi - lo, rows)).permute(1, 0, 3, 2, 4)
    place.copy_(chunks.view(place.shape))


class Sums(NamedTuple):
    """Log decays summed from the first row of a chunk on: cuts are counted apart, so that they cost no precision."""

    logs: Tensor  # float64, without the cuts
    cuts: Tensor  # float64 counts

    @classmethod
    def of(cls, g: Tensor, dim: int) -> Sums:
        cut = g <= CUT
        return cls(g.double().masked_fill(cut, 0).cumsum(dim), cut.double().cumsum(dim))

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.logs - other.logs, self.cuts - other.cuts)

    def exp(self, dtype: torch.dtype) -> Tensor:
        return (self.logs + CUT * self.cuts).exp().to(dtype)

    def each(self, f: Callable[[Tensor], Tensor]) -> Sums:
        return Sums(f(self.logs), f(self.cuts))


class Decays(NamedTuple):
    """The factors of a span of chunks (chunks, G, ...), all at most 1."""

    d: Tensor  # (C, C): from the row j to the row i >= j, else 0
    from_start: Tensor  # (C, 1), the row's own included
    to_end: Tensor  # (C, 1), the row's own not included
    whole: Tensor  # (1, 1)
    cut: Tensor  # (tokens) bool: where the past is cut off


def decays(g: Tensor, p: Plan, dtype: torch.dtype) -> Decays:
    """From g (chunks, G, tokens) in float64."""
    sums = Sums.of(g, -1)
    if p.per_step > 1:
        sums = sums.each(lambda s: s.repeat_interleave(p.per_step, -1))
    end = sums.each(lambda s: s[..., -1:])
    future = torch.full((p.rows, p.rows), -torch.inf, dtype=dtype, device=g.device).triu_(1)
    from_start, to_end, whole = (x.exp(dtype)[..., None] for x in (sums, end - sums, end))
    return Decays(between(sums, future), from_start, to_end, whole, g <= CUT)


def between(sums: Sums, strict_upper: Tensor) -> Tensor:
    """exp(log_{j+1} + ... + log_i) for j <= i, else 0. sums: (..., C).

    Differences of long sums lose what small ones hold; a part on a coarse grid, whose differences are exact, and the
    rest do not.
    """
    dtype, grid = strict_upper.dtype, 128
    coarse = (sums.logs * grid).round_().div_(grid)
    fine = (sums.logs - coarse).to(dtype)
    coarse, one = coarse.add_(sums.cuts, alpha=CUT).to(dtype), torch.ones_like(fine)
    rows = torch.stack([coarse, one, fine, one], -1).flatten(0, -3)
    columns = torch.stack([one, -coarse, one, -fine], -2).flatten(0, -3)
    return torch.baddbmm(strict_upper, rows, columns).exp_().view(*fine.shape, fine.shape[-1])


def ahead(
    states: Tensor, r: Tensor, base: Tensor, read: Tensor, z: Tensor, write: Tensor, whole: Tensor | None,
    extra: Tensor | None,
) -> None:  # fmt: skip
    for i in range(len(r)):
        before, after = states[i], states[i + 1]
        torch.bmm(z[i], base[i].baddbmm_(read[i], before), out=r[i])
        torch.mul(before, 1 if whole is None else whole[i], out=after)
        if extra is not None:
            after.add_(extra[i])
        after.baddbmm_(write[i].mT, r[i])


def back(
    d_states: Tensor, d_r: Tensor, y: Tensor, scale: Tensor | None, z: Tensor, read: Tensor, write: Tensor,
    whole: Tensor | None, extra: Tensor,
) -> None:  # fmt: skip
    for i in reversed(range(len(y))):
        before, after = d_states[i], d_states[i + 1]
        d_r[i].baddbmm_(write[i], after)
        torch.bmm(z[i].mT, d_r[i] if scale is None else d_r[i] * scale[i], out=y[i])
        if whole is None:
            torch.add(after, extra[i], out=before)
        else:
            torch.addcmul(extra[i], after, whole[i], out=before)
        before.baddbmm_(read[i].mT, y[i])


def inverse(a: Tensor, z: Tensor) -> None:
    """z = (I + tril(a, -1))^-1 of (M, C, C), C a multiple of 16: rows in small blocks, then blocks in pairs."""
    many, size, n = a.shape[0], a.shape[1], BLOCK
    count = size // n
    blocks = a.view(many, count, n, count, n).diagonal(0, 1, 3).permute(1, 2, 0, 3).reshape(n, n, -1).neg()
    small = torch.zeros_like(blocks)  # the many blocks come last, so that each row is one long multiply and add
    small.diagonal(0, 0, 1).fill_(1)
    for i in range(1, n):
        torch.sum(blocks[i, :i, None] * small[:i, :i], 0, out=small[i, :i])
    small = small.view(n, n, many, count).permute(2, 3, 0, 1)
    z.zero_()
    for b in range(count):
        z[:, b * n : b * n + n, b * n : b * n + n] = small[:, b]
    while n < size:
        for p in range(0, size - n, 2 * n):
            q, r = p + n, min(p + 2 * n, size)
            below = torch.bmm(a[:, q:r, p:q], z[:, p:q, p:q])
            z[:, q:r, p:q] = torch.bmm(z[:, q:r, q:r], below).neg_()
        n *= 2


class Passes(NamedTuple):
    """What a backend does in its own way: the two loops over chunks, one state after the other, and more.

    All tensors are (chunks, B H, ...).

    ahead(states, r, base, read, z, write, whole, extra): r = z (base + read S), S' = whole S + extra + write^T r, with
        states[0] given and states[1:] and r filled; base may be overwritten.
    back(d_states, d_r, y, scale, z, read, write, whole, extra): d_r += write dS', y = z^T (scale d_r),
        dS = whole dS' + extra + read^T y, with d_states[-1] given and d_states[:-1], d_r and y filled.
    whole is (1, 1) or (K, 1) wide or None, scale (C, 1) wide or None, extra (K, V) or None.
    together: chunks worked on at once, heads counted.
    """

    ahead: Callable[..., None]
    back: Callable[..., None]
    together: int


IN_TORCH = Passes(ahead, back, 32)
