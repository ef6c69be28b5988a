"""Routing attention: sparse by content (Roy et al. 2021, arXiv:2003.05997)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import (
    Cost,
    RecurrentLayer,
    UsageError,
    check_input,
    check_sizes,
    clear_past_end,
    clone,
    past_end,
    register_layer,
    wide,
)


class RoutingState(NamedTuple):
    k: Tensor  # (B, H, C, W, K) the latest keys of each cluster, newest last, zero where there was none
    v: Tensor  # (B, H, C, W, K) their values
    have: Tensor  # (B, H, C) int64 how many those are
    cost: Cost


@register_layer(
    "routing_attention",
    paper="arXiv:2003.05997",
    examples=[
        dict(width=4, heads=2, clusters=2, window=3),
        dict(width=6, heads=1, clusters=3, window=1, commitment=0.1),
    ],
    sized=lambda width: dict(
        width=width,
        heads=next(h for h in (8, 4, 2, 1) if h == 1 or (width % h == 0 and width // h >= 16)),
        clusters=8,
        window=32,
    ),
)
class RoutingAttention(RecurrentLayer[RoutingState]):
    """y_t = W_o sum_s softmax_s(q_t . k_s) v_s over the latest W steps s <= t with c(k_s) = c(q_t).

    Per head: q and k are layer-normed, so all are of length sqrt(K), and each goes to the nearest of C centroids mu on
    the sphere: c(z) = argmax_c mu_c . z. A query sees the keys of its own cluster alone, however old they are; where
    there are none, 0. Time grows as T (W + C), the state is C W keys and values. No positions: it is meant to stand
    beside a layer that has them.

    Centroids follow their members, and members their centroids, by the gradient of `commitment` |z - mu_c(z)|^2 over
    all q and k, which the state hands to the loss as a Cost. (The paper moves centroids by an average that each call
    writes into the layer. A gradient needs no such writing, and ranks and padding are in it as in any other.)

    The paper's clusters choose their W nearest steps, from the future as well, so that all are of the same size; then
    what stands at t depends on what comes later, and a stream cannot do it. Here each step chooses its cluster. What
    that costs: clusters may be uneven; one that is crowded forgets its oldest members, one that is not is empty room.

    Routing is computed in float32 at least, for a step sent elsewhere by rounding sees other steps. It has no gradient.
    Raises UsageError if heads do not divide width or leave fewer than two channels. Linear maps start as in
    torch.nn.Linear, centroids anywhere on the sphere.
    """

    def __init__(self, width: int, *, heads: int, clusters: int, window: int, commitment: float = 1e-4):
        super().__init__()
        check_sizes("RoutingAttention", width=width, heads=heads, clusters=clusters, window=window)
        if width % heads or width // heads < 2:
            raise UsageError(
                f"RoutingAttention: width {width}, heads {heads}; expected 2 or more whole channels a head"
            )
        if not 0 < commitment <= 1e6:
            raise UsageError(f"RoutingAttention: commitment is {commitment}; expected a number above 0, at most 1e6")
        self.width = self.out_width = width
        self.heads, self.clusters, self.window, self.commitment = heads, clusters, window, commitment
        self.key = width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.centroids = nn.Parameter(F.normalize(torch.randn(heads, clusters, self.key), dim=-1))
        self.centroids._no_weight_decay = True  # type: ignore[attr-defined]  # only its direction counts

    def initial_state(self, batch: int) -> RoutingState:
        weight = self.out.weight
        shape, dtype = (batch, self.heads, self.clusters), wide(weight.dtype)
        room = (*shape, self.window, self.key)
        have = torch.zeros(shape, dtype=torch.int64, device=weight.device)
        paid = Cost(weight.new_zeros(batch, dtype=dtype))
        return RoutingState(weight.new_zeros(room, dtype=dtype), weight.new_zeros(room, dtype=dtype), have, paid)

    def forward(
        self,
        x: Tensor,
        state: RoutingState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RoutingState]:
        check_input(self, x, state, reset, lengths)
        batch, steps, _ = x.shape
        state = self.initial_state(batch) if state is None else state
        if steps == 0:
            return torch.zeros_like(x), clone(state)
        over = None if lengths is None else past_end(lengths.to(x.device), steps)  # (B, T)
        x = x if over is None else x.masked_fill(over[..., None], 0)
        q, k, v = (z.transpose(1, 2) for z in self._project(x))  # (B, H, T, K)
        (goes, far), (comes, further) = self._route(q), self._route(k)  # (B, H, T)
        paid = self.commitment * (far + further).mean(1)
        if over is not None:
            paid, comes = paid.masked_fill(over, 0), comes.masked_fill(over[:, None], self.clusters)

        # All that may be seen, first what the state holds, in the order of clusters and, within each, of time.
        w, c = self.window, torch.arange(self.clusters, device=x.device)
        keys, values = (torch.cat([a.flatten(2, 3), b], 2) for a, b in ((state.k, k), (state.v, v)))  # (B, H, M, K)
        held = c.repeat_interleave(w).expand(batch, self.heads, -1)
        order = torch.cat([held, comes], 2).argsort(stable=True, dim=-1)
        arrived = (comes[..., None] == c).cumsum(2)  # (B, H, T, C) members that each cluster gained so far
        gained = arrived[:, :, -1]
        start = c * w + gained.cumsum(-1) - gained  # (B, H, C) where each cluster begins
        ranks = torch.arange(w, device=x.device)

        # Of those, time t counts from here; what a reset or an empty place hides comes before any beginning.
        t = torch.arange(steps, device=x.device)
        empty = torch.where(ranks >= w - state.have[..., None], -1, -2).flatten(2)
        time = torch.cat([empty, t.expand(batch, self.heads, -1)], 2)  # (B, H, M)
        begin = torch.full((batch, steps), -1, device=x.device)
        if reset is not None:
            begin = torch.where(reset if over is None else reset & ~over, t, begin).cummax(1).values

        last = start.gather(2, goes) + arrived.gather(3, goes[..., None])[..., 0]
        seen = _pick(order, last[..., None] + ranks)  # (B, H, T, W) places among the M
        visible = _pick(time, seen) >= begin[:, None, :, None]
        o = _attend(q, *_rows(keys, values, seen, visible), visible)
        y = self.out(o.transpose(1, 2).flatten(2).to(self.out.weight.dtype)).to(x.dtype)

        latest = _pick(order, (start + gained)[..., None] + ranks)  # (B, H, C, W)
        stays = _pick(time, latest) >= begin[:, -1, None, None, None]
        k, v = _rows(keys, values, latest, stays)
        after = RoutingState(k.clone(), v.clone(), stays.sum(-1), Cost(state.cost.total + paid.sum(1)))
        return (y if lengths is None else clear_past_end(y, lengths.to(x.device))), after

    def step(self, x: Tensor, state: RoutingState) -> tuple[Tensor, RoutingState]:
        q, k, v = self._project(x)  # (B, H, K)
        (goes, far), (comes, further) = (tuple(z[..., 0] for z in self._route(z[:, :, None])) for z in (q, k))
        comes_here = comes[..., None] == torch.arange(self.clusters, device=x.device)  # (B, H, C)
        keys, values = (
            torch.where(
                comes_here[..., None, None],
                torch.cat([old[..., 1:, :], new[:, :, None, None].expand(-1, -1, self.clusters, -1, -1)], 3),
                old,
            )
            for old, new in ((state.k, k), (state.v, v))
        )
        have = (state.have + comes_here).clamp(max=self.window)
        at = goes[..., None, None, None].expand(-1, -1, 1, self.window, self.key)
        known = have.gather(2, goes[..., None])
        visible = torch.arange(self.window, device=x.device) >= self.window - known
        o = _attend(q, keys.gather(2, at)[:, :, 0], values.gather(2, at)[:, :, 0], visible)
        y = self.out(o.flatten(1).to(self.out.weight.dtype)).to(x.dtype)
        paid = self.commitment * (far + further).mean(1)
        return y, RoutingState(keys, values, have, Cost(state.cost.total + paid))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, ..., H, K) in the dtype of the state."""
        weight, bias = self.qkv.weight, self.qkv.bias
        dtype = wide(weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = (
                F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            )
            return F.layer_norm(q, (self.key,)), F.layer_norm(k, (self.key,)), v

    def _route(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, H, T, K) -> the nearest centroid (B, H, T) and the squared distance to it, both on the unit sphere."""
        with torch.autocast(z.device.type, enabled=False):
            score = z @ F.normalize(self.centroids.to(z.dtype), dim=-1).mT * self.key**-0.5  # (B, H, T, C)
        near = score.argmax(-1)
        return near, 2 - 2 * score.gather(-1, near[..., None])[..., 0]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q (..., K), k and v (..., W, K), zero where not visible (..., W) -> (..., K); 0 where nothing is visible."""
    with torch.autocast(q.device.type, enabled=False):
        logits = (k @ q[..., None])[..., 0].masked_fill(~visible, torch.finfo(q.dtype).min)
        return (logits.softmax(-1).masked_fill(~visible, 0)[..., None, :] @ v)[..., 0, :]


def _pick(among: Tensor, at: Tensor) -> Tensor:
    """among (B, H, M), at (B, H, *S) -> (B, H, *S)."""
    return among.gather(2, at.flatten(2)).view(at.shape)


def _rows(k: Tensor, v: Tensor, at: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (B, H, M, K), at and visible (B, H, *S) -> their rows (B, H, *S, K), zero where not visible."""
    batch, heads, count, key = k.shape
    nothing = batch * heads * count  # the row of zeros behind all others
    rows = F.pad(torch.cat([k, v], -1).flatten(0, 2), (0, 0, 0, 1))
    first = torch.arange(batch * heads, device=at.device).view(batch, heads, *[1] * (at.ndim - 2)) * count
    found = F.embedding(torch.where(visible, first + at, nothing), rows, padding_idx=nothing).split(key, -1)
    return found[0], found[1]
