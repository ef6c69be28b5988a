"""Diagonal plus rank one by chunks of matrix products, with a decay per key channel (arXiv:2503.14456).

Within a chunk, with G the sums of the log decays from its first row on and S the state before it, a row i of a sees
what row j < i of b or k wrote through exp(G_{i-1} - G_j), a row of q through exp(G_i - G_j), j <= i:
    P = (I - A_ab)^-1 (A_ak V + exp(G_-) a S)   what is read by a
    O = exp(G) q S + A_qb P + A_qk V,   S' = exp(G_C) S + (exp(G_C - G) b)^T P + (exp(G_C - G) k)^T V.

exp(G_i - G_j) is a product over i and j only up to a reference between them. So the scores come in levels: in each
block of 2 s rows the second half sees the first half through the border between them, s = 1, 2, 4 ... Each side's
exponent is a plain sum of at most s logs: no factor exceeds 1 and a cut costs its neighbours no precision.

Kept for the backward pass: the inputs, the states between chunks, P and (I - A_ab)^-1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contain import contained
from ..looping import loop
from ..opaque import Kernel, opaque
from . import dplr_step
from .chunks import CUT, IN_TORCH, Passes, Plan, by_row, cleared, fold, inverse, plan, shapes, unfold

_ROWS = 64
ARGUMENTS = "q k v a b g? reset? state"


class _Level:
    """Factors of rows that look back to their block's start, and of rows that look ahead to their block's end."""

    def __init__(self, g: Tensor):
        """g: (..., s, K) logs of decays."""
        size = g.shape[-2]
        ones = torch.ones(size, size, dtype=g.dtype, device=g.device)
        self.upto, self.after = ones.tril(), ones.triu(1)
        self.back, self.ahead = (self.upto @ g).exp_(), (self.after @ g).exp_()

    @property
    def back_before(self) -> Tensor:
        """As back, but without the row's own decay."""
        return torch.cat([torch.ones_like(self.back[..., :1, :]), self.back[..., :-1, :]], -2)

    def d_g(self, d_back: Tensor, d_back_before: Tensor, d_ahead: Tensor, ahead: _Level) -> tuple[Tensor, Tensor]:
        """Gradients of the logs that look back here and ahead there, from those of the exponents; changes d_back."""
        d_back[..., :-1, :] += d_back_before[..., 1:, :]
        return self.upto.mT @ d_back, ahead.after.mT @ d_ahead


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """x (M, C, W) as the first and the second halves (M, C / 2 s, s, W) of its blocks of 2 s rows."""
    first, second = x.unflatten(1, (-1, 2, s)).unbind(2)
    return first, second


def _at_level(scores: Tensor, s: int) -> Tensor:
    """The part of scores (M, 2, C, 2, C) that level s is for, as a view (M, C / 2 s, 2, s, 2, s)."""
    count = scores.shape[2] // (2 * s)
    blocks = scores.view(scores.shape[0], 2, count, 2, s, 2, count, 2, s)
    return blocks[:, :, :, 1, :, :, :, 0].diagonal(0, 2, 5).permute(0, 5, 1, 2, 3, 4)


class _Chunks:
    """A span of chunks: inputs (M, C, K), factors, and the scores (M, 2, C, 2, C) of a and q against b and k."""

    def __init__(self, q: Tensor, a: Tensor, b: Tensor, k: Tensor, g: Any):
        self.q, self.a, self.b, self.k, self.g = q, a, b, k, g
        self.scores = q.new_zeros(len(q), 2, q.shape[1], 2, q.shape[1])
        if g is None:
            both = torch.cat([a, q], 1) @ torch.cat([b, k], 1).mT
            self.scores = both.view(self.scores.shape).mul_(self.seen())
            self.q_read, self.a_read, self.write = q, a, torch.cat([b, k], 1)
            self.whole: Any = None
            return
        self.levels: dict[int, tuple[_Level, _Level]] = {}
        s = q.shape[1] // 2
        while s:
            rows, columns = self.at(s)
            _at_level(self.scores, s).copy_((rows @ columns.mT).unflatten(3, (2, s)).unflatten(2, (2, s)))
            s //= 2
        self.scores[:, 1, :, 0].diagonal(0, 1, 2).copy_((q * b).sum(-1))
        self.scores[:, 1, :, 1].diagonal(0, 1, 2).copy_((q * k).sum(-1))
        self.chunk = _Level(g)
        self.q_read, self.a_read = q * self.chunk.back, a * self.chunk.back_before
        self.write = torch.cat([b * self.chunk.ahead, k * self.chunk.ahead], 1)
        self.whole = self.chunk.back[:, -1, :, None]

    def seen(self) -> Tensor:
        """What a row of a and of q sees without decays: (2, C, 1, C)."""
        ones = self.q.new_ones(self.q.shape[1], self.q.shape[1])
        return torch.stack([ones.tril(-1), ones.tril()])[:, :, None]

    def at(self, s: int) -> tuple[Tensor, Tensor]:
        """Rows and columns (M, C / 2 s, 2 s, K) of level s, the factors multiplied in."""
        if s not in self.levels:
            first, second = _halves(self.g, s)
            self.levels[s] = _Level(second), _Level(first)
        rows, columns = self.levels[s]
        (a, q), (b, k) = (_halves(x, s)[1] for x in (self.a, self.q)), (_halves(x, s)[0] for x in (self.b, self.k))
        return (
            torch.cat([a * rows.back_before, q * rows.back], 2),
            torch.cat([b * columns.ahead, k * columns.ahead], 2),
        )

    def gradients(
        self, d_scores: Tensor, d_q: Tensor, d_a: Tensor, d_write: Tensor, d_whole: Any
    ) -> tuple[Tensor | None, ...]:
        """From those of scores, q_read, a_read, write and whole to those of q, a, b, k and g."""
        c = self.q.shape[1]
        if self.g is None:
            d_scores = d_scores.mul_(self.seen()).view(-1, 2 * c, 2 * c)
            d_rows, d_columns = d_scores @ self.write, d_scores.mT @ torch.cat([self.a, self.q], 1)
            d_write += d_columns
            return d_q + d_rows[:, c:], d_a + d_rows[:, :c], d_write[:, :c], d_write[:, c:], None
        chunk = self.chunk
        d_back, d_back_before = self.q_read * d_q, self.a_read * d_a
        d_back[:, -1] += d_whole * self.whole[..., 0]
        d_ahead = (self.write * d_write).unflatten(1, (2, c)).sum(1)
        back, ahead = chunk.d_g(d_back, d_back_before, d_ahead, chunk)
        d_g = back + ahead
        d_q, d_a = d_q * chunk.back, d_a * chunk.back_before
        d_b, d_k = d_write[:, :c] * chunk.ahead, d_write[:, c:] * chunk.ahead
        s = c // 2
        while s:
            rows, columns = self.at(s)
            d = _at_level(d_scores, s).reshape(*rows.shape[:3], 2 * s)
            d_rows, d_columns = d @ columns, d.mT @ rows
            row, column = self.levels[s]
            _halves(d_a, s)[1].addcmul_(d_rows[:, :, :s], row.back_before)
            _halves(d_q, s)[1].addcmul_(d_rows[:, :, s:], row.back)
            _halves(d_b, s)[0].addcmul_(d_columns[:, :, :s], column.ahead)
            _halves(d_k, s)[0].addcmul_(d_columns[:, :, s:], column.ahead)
            d_rows.mul_(rows)
            d_columns.mul_(columns)
            first, second = _halves(d_g, s)
            back, ahead = row.d_g(d_rows[:, :, s:], d_rows[:, :, :s], d_columns.unflatten(2, (2, s)).sum(2), column)
            second += back
            first += ahead
            s //= 2
        for d_written, written, which in ((d_b, self.b, 0), (d_k, self.k, 1)):
            d = d_scores[:, 1, :, which].diagonal(0, 1, 2)[..., None]
            d_q.addcmul_(d, written)
            d_written.addcmul_(d, self.q)
        return d_q, d_a, d_b, d_k, d_g


def _plan(q: Tensor, together: int) -> Plan:
    p = plan(q.shape[1], 1, len(q) * q.shape[2], _ROWS, together)
    rows = 1 << (p.rows - 1).bit_length()  # levels want a power of two
    return p._replace(tokens=rows, chunks=-(-p.steps // rows))


def _span(p: Plan, lo: int, hi: int, dtype: torch.dtype, *inputs: Tensor, g: Tensor | None) -> _Chunks:
    q, a, b, k = (fold(x, lo, hi, p.rows, dtype).flatten(0, 1) for x in inputs)
    if g is None:
        return _Chunks(q, a, b, k, None)
    return _Chunks(q, a, b, k, fold(g, lo, hi, p.rows, dtype).flatten(0, 1).clamp_(min=CUT))


def _by(size: int) -> Callable[[Any], Any]:
    return lambda t: None if t is None else t.unflatten(0, (-1, size))


def _forward(
    passes: Passes, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, reset: Tensor | None,
    state: Tensor, *, keep: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    p, dtype = _plan(q, passes.together), state.dtype
    size, c = len(q) * q.shape[2], p.rows
    by = _by(size)
    out = v.new_empty(len(q), p.chunks * c, q.shape[2], v.shape[-1])
    held = p.kept(keep)
    states = state.new_empty(held + 1, size, *state.shape[2:])
    z = state.new_empty(held, size, c, c)
    read = state.new_empty(held, size, c, v.shape[-1])
    states[0] = state.flatten(0, 1)
    for lo, hi in p.spans():
        at = slice(lo, hi) if keep else slice(0, hi - lo)
        inside = states[at.start : at.stop + 1]
        s_, z_, read_ = inside[:-1], z[at], read[at]
        x, v_ = _span(p, lo, hi, dtype, q, a, b, k, g=g), fold(v, lo, hi, c, dtype).flatten(0, 1)
        inverse(x.scores[:, 0, :, 0].neg(), z_.flatten(0, 1))
        base, extra = by(torch.bmm(x.scores[:, 0, :, 1], v_)), by(torch.bmm(x.write[:, c:].mT, v_))
        rest = z_, by(x.write[:, :c]), by(x.whole)
        passes.ahead(inside, read_, base, by(x.a_read), *rest, extra)
        o = torch.bmm(x.q_read, s_.flatten(0, 1))
        o.baddbmm_(x.scores[:, 1, :, 0], read_.flatten(0, 1)).baddbmm_(x.scores[:, 1, :, 1], v_)
        last = inside[-1]
        if not keep:
            last = states[0].copy_(last)
        unfold(out, lo, hi, by(o))
    return out[:, : p.steps].contiguous(), last.view(state.shape).clone(), states, z, read


def _backward(
    passes: Passes, d_out: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    g: Tensor | None, reset: Tensor | None, state: Tensor, states: Tensor, z: Tensor, read: Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    p, dtype, size = _plan(q, passes.together), states.dtype, states.shape[1]
    c, by = p.rows, _by(size)
    wanted = [x for x in (q, k, v, a, b, g) if x is not None]
    grads = [x.new_empty(len(x), p.chunks * c, *x.shape[2:]) for x in wanted]
    ds = d_last.flatten(0, 1)
    for lo, hi in reversed(p.spans()):
        x = _span(p, lo, hi, dtype, q, a, b, k, g=g)
        v_, do = (fold(t, lo, hi, c, dtype).flatten(0, 1) for t in (v, d_out))
        d_states = states.new_empty(hi - lo + 1, *states.shape[1:])
        d_states[-1] = ds
        d_read = x.scores[:, 1, :, 0].mT @ do
        y = torch.empty_like(d_read)  # gradient of A_ak V + a_read S
        inside = z[lo:hi], by(x.a_read), by(x.write[:, :c]), by(x.whole)
        passes.back(d_states, by(d_read), by(y), None, *inside, by(x.q_read.mT @ do))
        ds = d_states[0]
        s_, ds_after = states[lo:hi].flatten(0, 1), d_states[1:].flatten(0, 1)
        d_v = x.write[:, c:] @ ds_after
        d_v.baddbmm_(x.scores[:, 0, :, 1].mT, y).baddbmm_(x.scores[:, 1, :, 1].mT, do)
        both = torch.cat([read[lo:hi].flatten(0, 1), v_], 1)
        d_scores = torch.stack([y @ both.mT, do @ both.mT], 1).unflatten(-1, (2, c))
        d_whole = None if g is None else (s_ * ds_after).sum(-1)
        d_q, d_a, d_b, d_k, d_g = x.gradients(d_scores, do @ s_.mT, y @ s_.mT, both @ ds_after.mT, d_whole)
        for into, d in zip(grads, (d_q, d_k, d_v, d_a, d_b, d_g)):
            unfold(into, lo, hi, by(d))
    return *(d[:, : p.steps].contiguous() for d in grads), ds.reshape(state.shape)


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, a, b, None if g is None else g[..., None])
    return loop(dplr_step, inputs, state, fresh=torch.zeros_like(state), like=v, reset=reset, lengths=None)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor
) -> tuple[Tensor, ...]:
    return shapes(_plan(q, 1), q, v, state)


def chunked(name: str, devices: str | tuple[str, ...] | None, passes: Passes) -> Kernel:
    """run(q, k, v, a, b, g, reset, state), g (B, T, H, K) or None."""
    kernels = functools.partial(_forward, passes), functools.partial(_backward, passes)
    forward, backward, alone = contained(ARGUMENTS, *kernels, by_loop)
    return opaque(name, devices, ARGUMENTS, forward, backward, _fake, results=2, kept=4, alone=alone)


run = chunked("dplr_chunks", None, IN_TORCH)


def solve(
    run: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op, by run."""
    if not v.shape[0] or not v.shape[1]:
        return v, state.clone()
    g, reset = by_row(q, state, log_decay, reset, lengths)
    g = None if g is None else g.expand(q.shape)
    if reset is not None:  # a reads what was there before the decay, so that no decay can hide it
        a = a.masked_fill(reset[..., None, None], 0)
    out, last = run(*(cleared(x, lengths) for x in (q, k, v, a, b)), g, reset, state)
    return cleared(out, lengths), last


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return solve(run, q, k, v, a, b, state, log_decay, reset, lengths)
