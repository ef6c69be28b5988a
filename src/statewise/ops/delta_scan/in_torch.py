"""The delta rule by chunks of matrix products, after the WY and UT forms (arXiv:2406.06484, 2412.06464).

Within a chunk, with G the sums of the log decays from its first row on, D_ij = exp(G_i - G_j) for i >= j, and S the
state before it:
    A = tril(K K^T . D, -1) diag(beta),   R = (I + A)^-1 (V - exp(G) K S)   what each correction finds missing
    O = exp(G) Q S + tril(Q K^T . D) (beta R),   S' = exp(G_C) S + (exp(G_C - G) K)^T (beta R).
Rows depend on the state by products only, so the chunks are solved one after the other, all else many at a time.

Kept for the backward pass: the inputs, the states between chunks, R and (I + A)^-1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..contain import contained
from ..looping import loop
from ..opaque import Kernel, opaque
from . import delta_step
from .chunks import IN_TORCH, Passes, Plan, by_row, cleared, decays, fold, inverse, plan, shapes, unfold
from .dplr_in_torch import run as dplr_run

_ROWS = 64
ARGUMENTS = "q k v beta g? reset? state"


def _past(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=dtype, device=device).tril_()


def _plan(q: Tensor, k: Tensor, together: int) -> Plan:
    steps, heads = q.shape[1], len(q) * q.shape[2]
    return plan(steps, k.shape[1] // steps, heads, _ROWS, together)


def _forward(
    passes: Passes, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, reset: Tensor | None,
    state: Tensor, *, keep: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    p, dtype = _plan(q, k, passes.together), state.dtype
    batch, heads, n, c = len(q), q.shape[2], p.per_step, p.rows
    size = batch * heads
    out = v.new_empty(batch, p.chunks * p.tokens, heads, v.shape[-1])
    held = p.kept(keep)
    states = state.new_empty(held + 1, size, *state.shape[2:])
    z = state.new_empty(held, size, c, c)
    r = state.new_empty(held, size, c, v.shape[-1])
    states[0] = state.flatten(0, 1)
    for lo, hi in p.spans():
        at = slice(lo, hi) if keep else slice(0, hi - lo)
        inside = states[at.start : at.stop + 1]
        s_, z_, r_ = inside[:-1], z[at], r[at]
        q_ = fold(q, lo, hi, p.tokens, dtype)
        k_, v_, b_ = (fold(x, lo, hi, c, dtype) for x in (k, v, beta[..., None]))
        kk, qk = k_ @ k_.mT, q_ @ k_.mT
        k_write, whole = b_, None
        if g is None:
            qk.mul_(_past(c, dtype, q.device)[n - 1 :: n])
            k_read = k_.neg()
        else:
            decay = decays(fold(g[..., None], lo, hi, p.tokens, torch.float64)[..., 0], p, dtype)
            kk.mul_(decay.d)
            qk.mul_(decay.d[..., n - 1 :: n, :])
            q_.mul_(decay.from_start[..., n - 1 :: n, :])
            k_read, whole = k_ * -decay.from_start, decay.whole
            k_write = b_ * decay.to_end
        k_write = k_ * k_write
        inverse(kk.mul_(b_.mT).flatten(0, 1), z_.flatten(0, 1))
        passes.ahead(inside, r_, v_, k_read, z_, k_write, whole, None)
        o = q_ @ s_
        o.flatten(0, 1).baddbmm_(qk.flatten(0, 1), (r_ * b_).flatten(0, 1))
        last = inside[-1]
        if not keep:
            last = states[0].copy_(last)
        unfold(out, lo, hi, o)
    return out[:, : p.steps].contiguous(), last.view(state.shape).clone(), states, z, r


def _backward(
    passes: Passes,
    d_out: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    reset: Tensor | None,
    state: Tensor,
    states: Tensor,
    z: Tensor,
    r: Tensor,
) -> tuple[Tensor, ...]:
    p, dtype = _plan(q, k, passes.together), states.dtype
    n, c = p.per_step, p.rows
    d_q, d_k, d_v, d_beta = (
        x.new_empty(len(x), p.chunks * rows, *x.shape[2:]) for x, rows in ((q, p.tokens), (k, c), (v, c), (beta, c))
    )
    d_g = None if g is None else g.new_empty(len(g), p.chunks * p.tokens, g.shape[2])
    ds = d_last.flatten(0, 1)
    past = _past(c, dtype, q.device)
    for lo, hi in reversed(p.spans()):
        q_, do = (fold(x, lo, hi, p.tokens, dtype) for x in (q, d_out))
        k_, b_ = (fold(x, lo, hi, c, dtype) for x in (k, beta[..., None]))
        r_, s_ = r[lo:hi], states[lo:hi]
        qk, whole = q_ @ k_.mT, None
        if g is None:
            d, d_read = past, past[n - 1 :: n]
            q_read, k_read, k_write = q_, k_.neg(), k_
        else:
            decay = decays(fold(g[..., None], lo, hi, p.tokens, torch.float64)[..., 0], p, dtype)
            d, d_read, whole = decay.d, decay.d[..., n - 1 :: n, :], decay.whole
            q_read, k_read, k_write = (
                q_ * decay.from_start[..., n - 1 :: n, :],
                k_ * -decay.from_start,
                k_ * decay.to_end,
            )
        d_new = qk.mul_(d_read).mT @ do  # of beta r
        y = torch.empty_like(d_new)  # gradient of V - exp(G) K S
        d_states = states.new_empty(hi - lo + 1, *states.shape[1:])
        d_states[-1] = ds
        ds_after = d_states[1:]
        passes.back(d_states, d_new, y, b_, z[lo:hi], k_read, k_write, whole, q_read.mT @ do)
        ds = d_states[0]
        new = r_ * b_
        d_qk = (do @ new.mT).mul_(d_read)
        d_kk = _minus(y, r_.mT).mul_(d)
        d_kk.diagonal(0, -2, -1).zero_()
        dq_, dk_read, dk_write = do @ s_.mT, y @ s_.mT, new @ ds_after.mT
        if g is not None:
            dq_.mul_(decay.from_start[..., n - 1 :: n, :])
            dk_read.mul_(-decay.from_start)
            dk_write.mul_(decay.to_end)
            at_end = (k_ * dk_write).sum((-1, -2)) + (s_ * ds_after).sum((-1, -2)) * decay.whole[..., 0, 0]
        else:
            dk_read.neg_()
        _add(dq_, d_qk, k_)
        _add(dk_read, d_kk, k_ * b_)
        _add(dk_write, d_qk.mT, q_)
        columns = d_kk.mT @ k_
        db_ = (d_new * r_).sum(-1) + (k_ * columns).sum(-1)
        dk_write.addcmul_(columns, b_)
        if d_g is not None:
            d_total = (k_ * (dk_read - dk_write)).sum(-1).unflatten(-1, (-1, n)).sum(-1) + (q_ * dq_).sum(-1)
            d_total[..., -1] += at_end
            unfold(d_g[..., None], lo, hi, _later(d_total.double(), decay.cut)[..., None])
        unfold(d_q, lo, hi, dq_)
        unfold(d_k, lo, hi, dk_read.add_(dk_write))
        unfold(d_v, lo, hi, y)
        unfold(d_beta[..., None], lo, hi, db_[..., None])
    ends = (p.steps, p.steps * n, p.steps * n, p.steps * n, p.steps)
    grads = [x[:, :end].contiguous() for x, end in zip((d_q, d_k, d_v, d_beta, d_g), ends) if x is not None]
    return *grads, ds.reshape(state.shape)


def _later(x: Tensor, cut: Tensor) -> Tensor:
    """Sums of x (..., C) from each step on: nothing passes a cut, not even the rounding of sums that cancel."""
    if not bool(cut.any()):
        return x.flip(-1).cumsum(-1).flip(-1)
    part = cut.cumsum(-1)
    together = (part[..., :, None] == part[..., None, :]).triu_().to(x.dtype)
    return (together @ x[..., None])[..., 0].masked_fill_(cut, 0)


def _minus(x: Tensor, y: Tensor) -> Tensor:
    x, y, lead = x.flatten(0, 1), y.flatten(0, 1), x.shape[:2]
    return torch.baddbmm(x.new_zeros(1), x, y, beta=0, alpha=-1).unflatten(0, lead)


def _add(into: Tensor, x: Tensor, y: Tensor) -> None:
    into.flatten(0, 1).baddbmm_(x.flatten(0, 1), y.flatten(0, 1))


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    k, v, beta = (x.unflatten(1, (q.shape[1], -1)) for x in (k, v, beta))
    log_decay = None if g is None else g[..., None, None]
    fresh, inputs = torch.zeros_like(state), (q, k, v, beta, log_decay)
    return loop(delta_step, inputs, state, fresh=fresh, like=v[:, :, 0], reset=reset, lengths=None)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor
) -> tuple[Tensor, ...]:
    return shapes(_plan(q, k, 1), q, v, state)


def chunked(name: str, devices: str | tuple[str, ...] | None, passes: Passes) -> Kernel:
    """run(q, k, v, beta, g, reset, state) with a decay per head, g (B, T, H) or None; k, v, beta (B, n T, H, ...)."""
    kernels = functools.partial(_forward, passes), functools.partial(_backward, passes)
    forward, backward, alone = contained(ARGUMENTS, *kernels, by_loop)
    return opaque(name, devices, ARGUMENTS, forward, backward, _fake, results=2, kept=4, alone=alone)


_run = chunked("delta_chunks", None, IN_TORCH)


def solve(
    run: Kernel,
    run_dplr: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op, by run where the decay is one per head, else by run_dplr."""
    like = v if v.ndim == 4 else v[:, :, 0]
    if not like.shape[0] or not like.shape[1]:
        return like, state.clone()
    g, reset = by_row(q, state, log_decay, reset, lengths)
    q, k, v, beta = (cleared(x, lengths) for x in (q, k, v, beta))
    if k.ndim == 5:
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    if g is not None and g.shape[-1] > 1:
        out, last = run_dplr(*_as_dplr(q, k, v, beta, g, reset), state)
        n = k.shape[1] // q.shape[1]
        out = out[:, n - 1 :: n]
    else:
        out, last = run(q, k, v, beta, None if g is None else g[..., 0], reset, state)
    return cleared(out, lengths), last


def _as_dplr(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, reset: Tensor | None
) -> tuple[Tensor | None, ...]:
    """a = exp(g) k, b = -beta k, keys beta k; a correction a step, decays with the first, read after the last."""
    n = k.shape[1] // q.shape[1]
    k, beta = k.to(g.dtype), beta.to(g.dtype)
    if n > 1:
        first = torch.arange(k.shape[1], device=k.device) % n == 0
        g = g.repeat_interleave(n, 1).masked_fill(~first[:, None, None], 0)
        q = torch.nn.functional.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        reset = None if reset is None else reset.repeat_interleave(n, 1) & first
    write = beta[..., None] * k
    return q, write, v, k * g.exp(), -write, g, reset


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return solve(_run, dplr_run, q, k, v, beta, state, log_decay, reset, lengths)
