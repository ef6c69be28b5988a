"""What the layers over outer_scan share: a matrix memory per head, written by keys and values, read by queries."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from ..core import Cell, check_sizes, tree_map, wide
from ..ops import outer_scan, outer_step

S = TypeVar("S")


class Outer(NamedTuple):
    """What enters the memory at one time."""

    q: Tensor  # (..., H, K)
    k: Tensor  # (..., H, K)
    v: Tensor  # (..., H, V)
    log_decay: Tensor | None = None  # (..., H, K, 1), float32 or wider


class MemoryCell(Cell[S]):
    """S_t = a_t S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t  per head, with q, k, v = W x and y = W_o (of o), no bias."""

    def __init__(self, width: int, *, heads: int, key: int, value: int):
        super().__init__()
        check_sizes(type(self).__name__, width=width, heads=heads, key=key, value=value)
        self.width = self.out_width = width
        self.heads, self.key, self.value = heads, key, value
        self.qkv = nn.Linear(width, heads * (2 * key + value), bias=False)
        self.out = nn.Linear(heads * value, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D) -> q, k (..., H, K) and v (..., H, V)."""
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).split([self.key, self.key, self.value], -1)
        return q, k, v


class OuterCell(MemoryCell[Tensor]):
    """A MemoryCell whose state is the memory alone, S (B, H, K, V), float32 or wider; encode makes an Outer."""

    def initial_state(self, batch: int) -> Tensor:
        return empty_memory(self, batch)

    def transition(self, u: Outer, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = tree_map(lambda leaf: leaf.to(state.dtype), u)
        o, state = outer_step(q, k, v, log_decay, state)
        return o.to(u.v.dtype), state

    def scan(self, u: Outer, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return outer_scan(u.q, u.k, u.v, state, log_decay=u.log_decay, reset=reset, lengths=lengths)


def empty_memory(layer: Any, batch: int) -> Tensor:
    """Zeros (B, H, K, V), float32 or wider, for a layer that has heads, key, value and out."""
    weight = layer.out.weight
    return weight.new_zeros(batch, layer.heads, layer.key, layer.value, dtype=wide(weight.dtype))


def normalised_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """outer_step and z = n . q of the normaliser n (B, H, K), which decays as S does -> o, z, S, n."""
    o, state = outer_step(q, k, v, log_decay, state)
    norm = k + (norm if log_decay is None else log_decay[..., 0].exp() * norm)
    return o, (norm * q).sum(-1), state, norm


def usual_heads(width: int) -> int:
    """At most 8 heads, of at least 16 channels each."""
    return next(h for h in (8, 4, 2, 1) if h == 1 or (width % h == 0 and width // h >= 16))
