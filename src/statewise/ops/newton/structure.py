"""States as rows of numbers, and which of these numbers the next ones depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ...core import UsageError, leaves, tree_map

Step = Callable[[Any, Any], tuple[Any, Any]]
Linear = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # u, h_{t-1} -> f, df/dh_{t-1}, for rows of any number
TANGENTS = 1 << 22  # numbers in the states of one call: more rows at once cost memory, fewer cost calls


@dataclass(frozen=True)
class Structure:
    """Blocks of the Jacobian: numbers of the state that depend on each other, `size` at a time.

    order: the numbers of the first block, then of the second, and so on; None where they stand so already.
    exact: False where the Jacobian has more than these blocks: quasi-Newton, whose iterations contract only linearly.
    """

    numbers: int
    size: int
    order: tuple[int, ...] | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        if self.numbers % max(self.size, 1) or (
            self.order is not None and sorted(self.order) != [*range(self.numbers)]
        ):
            raise UsageError(f"{self}: expected blocks that share out the numbers of the state")

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]]) -> Structure:
        """From groups of equal size.

        >>> Structure.of([[0, 2], [1, 3]])
        Structure(numbers=4, size=2, order=(0, 2, 1, 3), exact=True)
        """
        order = tuple(n for group in groups for n in group)
        return cls(len(order), len(groups[0]) if groups else 1, None if order == (*range(len(order)),) else order)

    @property
    def kind(self) -> str:
        if self.size == 1:
            return "diagonal" if self.exact else "dense, its diagonal taken"
        return "dense" if self.size == self.numbers else f"blocks of {self.size}"

    @functools.cached_property
    def _striped(self) -> bool:
        """Whether the first numbers of all blocks come first, then the second ones: leaves that meet elementwise."""
        count = self.numbers // max(self.size, 1)
        return self.order == tuple(j * count + g for g in range(count) for j in range(self.size))

    def split(self, h: Tensor) -> Tensor:
        """(..., N) -> (..., groups, size)."""
        if self._striped:
            return h.unflatten(-1, (self.size, -1)).mT
        h = h if self.order is None else h.index_select(-1, _indices(self.order, h.device)[0])
        return h.unflatten(-1, (-1, self.size)) if h.shape[-1] else h.view(*h.shape[:-1], 0, self.size)

    def join(self, h: Tensor) -> Tensor:
        """(..., groups, size) -> (..., N)."""
        h = (h.mT if self._striped else h).flatten(-2)
        if self._striped:
            return h
        return h if self.order is None else h.index_select(-1, _indices(self.order, h.device)[1])


@functools.lru_cache(maxsize=64)
def _indices(order: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    there = torch.tensor(order, device=device)
    return there, there.argsort()


class Layout(NamedTuple):
    """How a state tree lies in rows of N real numbers."""

    like: Any  # the tree, one row
    dtype: torch.dtype

    @classmethod
    def of(cls, state: Any) -> Layout:
        """Raises UsageError for leaves that are not floating: no derivative leads through them."""
        found = leaves(state)
        if not found or any(not (s.is_floating_point() or s.is_complex()) for s in found):
            kinds = ", ".join(str(s.dtype) for s in found) or "nothing"
            raise UsageError(f"newton: the state holds {kinds}; expected floating point numbers")
        dtype = found[0].dtype.to_real()
        for s in found:
            dtype = torch.promote_types(dtype, s.dtype.to_real())
        return cls(tree_map(lambda s: s.new_empty(1, *s.shape[1:]).detach(), state), dtype)

    def rows(self, state: Any) -> Tensor:
        """Tree with leaves (M, ...) -> (M, N)."""
        flat = [(torch.view_as_real(s) if s.is_complex() else s).flatten(1).to(self.dtype) for s in leaves(state)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def tree(self, rows: Tensor) -> Any:
        """(M, N) -> tree with leaves (M, ...)."""
        sizes = [s.numel() * (2 if s.is_complex() else 1) for s in leaves(self.like)]
        parts = iter(rows.split(sizes, 1) if len(sizes) > 1 else [rows])

        def shaped(like: Tensor) -> Tensor:
            part = next(parts).to(like.dtype.to_real())
            if like.is_complex():
                return torch.view_as_complex(part.reshape(len(rows), *like.shape[1:], 2))
            return part.reshape(len(rows), *like.shape[1:])

        return tree_map(shaped, self.like)


def pushed(step: Step, layout: Layout, u: Any, h: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """f (M, N) and its derivatives (n, M, N) along n directions (n, N), the same for all rows."""
    h = h.contiguous()
    found, at_once = [], max(1, TANGENTS // max(1, h.numel()))
    for some in tangents.split(at_once):  # several copies of the rows, a tangent for each
        n = len(some)
        rows = h if n == 1 else h.repeat(n, 1)
        us = u if n == 1 else tree_map(lambda leaf, n=n: leaf.expand(n, *leaf.shape).flatten(0, 1), u)  # type: ignore[misc]
        with forward_ad.dual_level():
            tangent = some[:, None].expand(n, *h.shape).reshape(rows.shape).contiguous()
            dual = forward_ad.make_dual(rows, tangent)
            out = forward_ad.unpack_dual(layout.rows(step(us, layout.tree(dual))[1]))
        found.append((torch.zeros_like(rows) if out.tangent is None else out.tangent).unflatten(0, (n, -1)))
    return out.primal[: len(h)], torch.cat(found)


def by_tangents(step: Step, layout: Layout, structure: Structure) -> Linear:
    """f and the blocks of its Jacobian by forward derivatives: `size` of them, since blocks do not meet.

    Without exactness the blocks do meet, and it takes one derivative for each number of the state.
    """

    def linearise(u: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        count = structure.size if structure.exact else structure.numbers
        units = torch.eye(count, dtype=h.dtype, device=h.device)
        if structure.exact:
            units = structure.join(units[:, None].expand(count, structure.numbers // max(count, 1), count))
        f, d = pushed(step, layout, u, h, units)
        if not structure.exact:
            return f, d.diagonal(dim1=0, dim2=2)
        return f, d[0] if count == 1 else structure.split(d).permute(1, 2, 3, 0)  # (M, groups, size, size)

    return linearise
