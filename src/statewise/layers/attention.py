"""Softmax attention (Vaswani et al. 2017, arXiv:1706.03762) over a window (Beltagy et al. 2020, arXiv:2004.05150)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import RecurrentLayer, UsageError, check_input, check_sizes, clear_past_end, clone, register_layer, wide
from ..nn import RMSNorm, positions, rotate, stretches, tail
from ..ops.recorded import watching


class AttentionState(NamedTuple):
    k: Tensor  # (B, W-1, G, K) rotated keys, newest last, zero where there was none
    v: Tensor  # (B, W-1, G, K) values
    seen: Tensor  # (B,) int64 steps since the start or the last reset


class Sight(NamedTuple):
    """Who sees whom, and how well: all that attention knows before any value."""

    q: Tensor  # (B, T, H, K) rotated
    k: Tensor  # (B, P+T, G, K) rotated; in front the P = W - 1 of the state, none where there was no state
    bad: Tensor | None  # (B, P+T) bool where k was not finite; it is zero there. None: not looked for yet
    position: Tensor  # (B, T) int64 steps since the start or the last reset
    seen: Tensor  # (B,) int64 the same after the last, or after the last within lengths
    lengths: Tensor | None  # (B,)
    causal: bool  # from the start and without resets: all earlier steps of the window are seen

    def matrix(self, window: int) -> Tensor:
        """The weights (B, H, T, P+T) themselves, which sum to one over what is seen and are zero elsewhere."""
        steps, keys, heads = self.q.shape[1], self.k.shape[1], self.q.shape[2]
        k = self.k.repeat_interleave(heads // self.k.shape[2], 2)
        score = torch.einsum("bthk,bshk->bhts", self.q, k) * self.q.shape[-1] ** -0.5
        see = _seen(self.position.clamp(max=window - 1), keys - steps, 0)
        return score.masked_fill(~see[:, None], -torch.inf).softmax(-1)


def _sized(window: int) -> Any:
    def sized(width: int) -> dict[str, int]:
        heads = next(h for h in (8, 4, 2, 1) if h == 1 or (width % h == 0 and width // h >= 16))
        return dict(width=width, heads=heads, window=window)

    return sized


@register_layer(
    "attention",
    paper="arXiv:1706.03762",
    examples=[
        dict(width=4, heads=2, window=16),
        dict(width=3, heads=4, window=5, key=3, kv_heads=2, rotary=2, base=100.0, norm_eps=1e-3, gate=True, bias=False),
    ],
    sized=_sized(1024),
)
@register_layer(
    "window_attention",
    paper="arXiv:2004.05150",
    examples=[dict(width=4, heads=2, window=3), dict(width=3, heads=1, window=1)],
    sized=_sized(64),
)
class Attention(RecurrentLayer[AttentionState]):
    """y_t = W_o sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over t - W < s <= t, per head, q and k rotated by position.

    Each step attends to itself and to at most the W - 1 before it. Nothing unbounded streams, so full attention is this
    layer with a window as long as the longest context: `attention` is registered with W = 1024, `window_attention` with
    W = 64. Positions are relative (rotary), so a stream may go on for ever. A reset hides all that came before it.
    Time and memory grow as T (W + 128) for long T, never as T^2.

    key: size K of a head, width / heads where not given. kv_heads: G, of which heads / G queries in a row each share
    one (Ainslie et al. 2023, arXiv:2305.13245). rotary: how many of the K channels turn with the position, all where
    not given, 0 for no positions; the i-th of r / 2 pairs turns by base^(-2 i / r) a step. norm_eps: an RMS norm of
    each q and k before that. gate: y = W_o (o * sigmoid(W_g x)). bias: of the linear maps. Order of qkv's rows: q, k,
    v, gate.

    A step whose key or value is not finite makes NaN of every answer that sees it, and of no other.
    Raises UsageError if heads do not divide width and no key is given, if kv_heads do not divide heads, and unless
    rotary is even or K, and at most K. Linear maps start as in torch.nn.Linear.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        window: int,
        key: int | None = None,
        kv_heads: int | None = None,
        rotary: int | None = None,
        base: float = 10_000.0,
        norm_eps: float | None = None,
        gate: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        key, kv_heads = head_sizes("Attention", width, heads=heads, window=window, key=key, kv_heads=kv_heads)
        rotary = key if rotary is None else rotary
        if not 0 <= rotary <= key or (rotary % 2 and rotary != key):
            raise UsageError(f"Attention: rotary {rotary}; expected an even number up to {key}, or {key}")
        if not 1 < base < math.inf or not (norm_eps is None or 0 < norm_eps < math.inf):
            raise UsageError(f"Attention: base {base}, norm_eps {norm_eps}; expected more than 1, and more than 0")
        self.width = self.out_width = width
        self.heads, self.window, self.key, self.kv_heads = heads, window, key, kv_heads
        self.rotary, self.base = rotary, base
        self.sizes = [heads * key, kv_heads * key, kv_heads * key, heads * key if gate else 0]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=bias)
        self.q_norm = nn.Identity() if norm_eps is None else RMSNorm(key, eps=norm_eps)
        self.k_norm = nn.Identity() if norm_eps is None else RMSNorm(key, eps=norm_eps)
        self.out = nn.Linear(heads * key, width, bias=bias)

    def initial_state(self, batch: int) -> AttentionState:
        weight = self.out.weight
        shape, dtype = (batch, self.window - 1, self.kv_heads, self.key), wide(weight.dtype)
        k, v = weight.new_zeros(shape, dtype=dtype), weight.new_zeros(shape, dtype=dtype)
        return AttentionState(k, v, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        check_input(self, x, state, reset, lengths)
        if x.shape[1] == 0:
            return x, self.initial_state(x.shape[0]) if state is None else clone(state)
        if lengths is None:
            return self._attend(x, state, reset, None)
        lengths = lengths.to(x.device)
        y, state = self._attend(clear_past_end(x, lengths), state, reset, lengths)
        return clear_past_end(y, lengths), state

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        y, state = self._attend(x[:, None], state, None, None)
        return y[:, 0], state

    def _attend(
        self, x: Tensor, state: AttentionState | None, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        y, state, _ = self.look(x, state, reset, lengths)
        return y, state

    def look(
        self, x: Tensor, state: AttentionState | None, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, AttentionState, Sight]:
        """forward of at least one step, and what it saw by. x is zero past `lengths`, which y need not be."""
        seen = torch.zeros(len(x), dtype=torch.int64, device=x.device) if state is None else state.seen
        position = positions(seen, x.shape[1], reset)  # (B, T)
        *qkv, gate = self.qkv(x).split(self.sizes, -1)
        q, k, v = (z.unflatten(-1, (-1, self.key)) for z in qkv)  # (B, T, H, K), (B, T, G, K) twice
        high = wide(self.out.weight.dtype) if state is None else state.v.dtype
        q, k = self._turn(self.q_norm(q).to(high), position), self._turn(self.k_norm(k).to(high), position)
        k = k if state is None else _behind(state.k, k)  # time t stands at t + W - 1
        seen = tail(torch.cat([seen[:, None], position + 1], 1), 1, lengths)[:, 0]
        sight = Sight(q, k, None, position, seen, lengths, state is None and reset is None)
        sight = sight if _is_recorded(sight) else _clean(sight)
        y, v = attend(sight, v, None if state is None else state.v, self.window)
        if self.sizes[3]:
            y = y * gate.sigmoid()
        return self.out(y).to(x.dtype), AttentionState(kept(sight, k, self.window), v, seen), sight

    def _turn(self, x: Tensor, position: Tensor) -> Tensor:
        turned, rest = x.split([self.rotary, self.key - self.rotary], -1)
        return torch.cat([rotate(turned, position, base=self.base), rest], -1)


def head_sizes(
    name: str, width: int, *, heads: int, window: int, key: int | None, kv_heads: int | None
) -> tuple[int, int]:
    """key and kv_heads: where they are None, such that heads fill the width and each has keys of its own.

    Raises UsageError for sizes below 1, heads that do not divide the width where they must, or groups that are uneven.
    """
    if key is None:
        check_sizes(name, width=width, heads=heads)
        if width % heads:
            raise UsageError(f"{name}: width {width} is not a multiple of heads {heads}")
        key = width // heads
    kv_heads = heads if kv_heads is None else kv_heads
    check_sizes(name, width=width, heads=heads, window=window, key=key, kv_heads=kv_heads)
    if heads % kv_heads:
        raise UsageError(f"{name}: heads {heads} is not a multiple of kv_heads {kv_heads}")
    return key, kv_heads


def attend(sight: Sight, v: Tensor, past: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """v (B, T, G, K), past (B, W-1, G, K) those before, where there is a state -> (B, T, H K) and the past after."""
    dtype = v.dtype
    v = v.to(sight.k.dtype)
    v = v if past is None else _behind(past, v)
    if _is_recorded(sight):
        given = sight.q, sight.k, v, sight.position
        y = watching().note("attend", given, lambda: _windows(_clean(sight), v, window))  # type: ignore[union-attr]
    else:
        y = _windows(sight, v.to(dtype), window)
    return y.flatten(-2), kept(sight, v, window)


def _is_recorded(sight: Sight) -> bool:
    """Whether it is one step that goes on from a state, and all that is recorded is what it sees."""
    return watching() is not None and sight.q.shape[1] == 1 and not sight.causal and sight.lengths is None


def _behind(past: Tensor, new: Tensor) -> Tensor:
    """(B, P, G, K) and (B, T, G, K) as one."""
    watch = watching()
    if watch is not None and new.shape[1] == 1 and past.shape[1] > 0:
        return watch.note("append", (past, new), lambda: torch.cat([past, new], 1))
    return torch.cat([past, new], 1)


def _clean(sight: Sight) -> Sight:
    bad = _not_finite(sight.k)
    return sight._replace(k=_without(sight.k, bad), bad=bad)


def _not_finite(z: Tensor) -> Tensor:
    """z (B, S, G, K) -> (B, S) bool: whether any number of a step is not finite."""
    return ~z.isfinite().flatten(2).all(-1)


def _without(z: Tensor, bad: Tensor) -> Tensor:
    return z.masked_fill(bad[..., None, None], 0)


def _windows(sight: Sight, v: Tensor, window: int) -> Tensor:
    """v (B, P+T, G, K) -> (B, T, H, K), in the dtype of v."""
    q, k = sight.q.to(v.dtype), sight.k.to(v.dtype)
    steps, past = q.shape[1], k.shape[1] - q.shape[1]
    visible = sight.position.clamp(max=window - 1)  # (B, T) how many earlier steps each query sees
    bad = _not_finite(v)
    v, bad = _without(v, bad), bad if sight.bad is None else bad | sight.bad
    if k.shape[2] < q.shape[2]:
        k, v = (z.repeat_interleave(q.shape[2] // k.shape[2], 2) for z in (k, v))
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, K)
    if sight.causal and steps <= window:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        blocks = []
        for start, stop in stretches(steps, window):
            first = max(0, start + past - window + 1)
            span = slice(first, stop + past)
            see = _seen(visible[:, start:stop], start + past, first)
            blocks.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, span], v[:, :, span], attn_mask=see[:, None]
                )
            )
        y = torch.cat(blocks, 2)
    count = F.pad(bad.cumsum(1), (1, 0))  # bad keys before each
    seen_bad = count[:, past + 1 :] - count.gather(1, torch.arange(steps, device=q.device) + past - visible)
    return y.transpose(1, 2).masked_fill((seen_bad > 0)[..., None, None], torch.nan)


def _seen(visible: Tensor, start: int, first: int) -> Tensor:
    """Which of the keys at first, first + 1 ... the queries at start ... see: visible (B, t) -> (B, t, keys)."""
    steps = visible.shape[1]
    at = torch.arange(start, start + steps, device=visible.device)[:, None]
    key = torch.arange(first, start + steps, device=visible.device)
    return (key <= at) & (key >= at - visible[..., None])


def kept(sight: Sight, z: Tensor, window: int) -> Tensor:
    """Of keys or values (B, P+T, G, K) the (B, W-1, G, K) that a state holds, zero where there is none."""
    if _is_recorded(sight):
        return z[:, 1:]  # where there was none the state is zero already
    past, steps, lengths = window - 1, sight.position.shape[1], sight.lengths
    count = min(past, z.shape[1])
    gone = torch.arange(count, device=z.device) < count - sight.seen[:, None]  # from before the start or the last reset
    if z.shape[1] == steps:
        z = F.pad(z, (0, 0, 0, 0, count, 0))
    z = tail(z, count, lengths).masked_fill(gone[..., None, None], 0)
    return F.pad(z, (0, 0, 0, 0, past - count, 0)) if count < past else z
