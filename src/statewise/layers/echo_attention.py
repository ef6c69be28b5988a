"""Attention by a matrix that another layer computed (Rajabzadeh et al. 2024, EchoAtt, arXiv:2409.14595)."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Traits, UsageError, wide
from .attention import Attention, Sight, attend, head_sizes


class EchoAttention(nn.Module):
    """y_t = W_o sum_s a_ts W_v x_s, where a_ts are the weights by which the attention before it saw.

    That attention (`Attention.look`) leads, and this follows: it has no queries and no keys, and its state holds values
    alone, (B, W-1, G, K). a is given as the leader's rotated queries and keys, from which the fused kernel makes it
    again; no T x T matrix is kept. So what is saved is two of four linear maps and half the cache, not the products
    with the matrix.

    As it needs what its leader saw, it is no RecurrentLayer by itself: it stands in a stack whose pattern says
    `attention(echo=true)`. heads, window, key and kv_heads are the leader's; gate and bias as in Attention.
    Order of the rows of `values`: v, gate. Linear maps start as in torch.nn.Linear.
    """

    traits = Traits()

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        window: int,
        key: int | None = None,
        kv_heads: int | None = None,
        gate: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        key, kv_heads = head_sizes("EchoAttention", width, heads=heads, window=window, key=key, kv_heads=kv_heads)
        self.width = self.out_width = width
        self.heads, self.window, self.key, self.kv_heads = heads, window, key, kv_heads
        self.sizes = [kv_heads * key, heads * key if gate else 0]
        self.values = nn.Linear(width, sum(self.sizes), bias=bias)
        self.out = nn.Linear(heads * key, width, bias=bias)

    def check(self, leader: Attention) -> None:
        """Raise UsageError unless this layer can see by what that one saw."""
        for name in ("heads", "window", "key", "kv_heads"):
            own, other = getattr(self, name), getattr(leader, name)
            if own != other:
                raise UsageError(f"attention(echo=true): {name} {own}, that of the attention before it {other}")

    def initial_state(self, batch: int) -> Tensor:
        weight = self.out.weight
        return weight.new_zeros(batch, self.window - 1, self.kv_heads, self.key, dtype=wide(weight.dtype))

    def forward(self, x: Tensor, state: Tensor | None, sight: Sight) -> tuple[Tensor, Tensor]:
        """x (B, T, D) of at least one step, zero past the lengths -> y (B, T, D) and the state after it."""
        v, gate = self.values(x).split(self.sizes, -1)
        y, state = attend(sight, v.unflatten(-1, (-1, self.key)), state, self.window)
        if self.sizes[1]:
            y = y * gate.sigmoid()
        return self.out(y).to(x.dtype), state
