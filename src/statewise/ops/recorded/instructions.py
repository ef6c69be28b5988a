"""What a recorded call consists of: operations on numbers that lie at places in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Unrecordable(Exception):
    """Why a step cannot be recorded; it then runs as it is."""


class Places(NamedTuple):
    """A tensor: where in which memory. Offset and strides count numbers."""

    memory: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Point:
    """out = f(operands, p, q), place by place; the operands have the sizes of out."""

    name: str
    out: Places
    operands: list[Places]
    p: float = 0.0
    q: float = 0.0

    def reads(self) -> set[int]:
        return {o.memory for o in self.operands}

    def writes(self) -> set[int]:
        return {self.out.memory}


@dataclass
class Group:
    """Points with the same sizes, in the order in which their results lie in memory."""

    sizes: tuple[int, ...]
    points: list[Point]

    def reads(self) -> set[int]:
        return set().union(*(p.reads() for p in self.points))

    def writes(self) -> set[int]:
        return set().union(*(p.writes() for p in self.points))


@dataclass
class Product:
    """y (batch, columns) = x (batch, depth) w^T + bias."""

    w: Any  # Weights
    x: Places
    y: Places
    bias: Places | None

    def reads(self) -> set[int]:
        return {self.x.memory} | (set() if self.bias is None else {self.bias.memory})

    def writes(self) -> set[int]:
        return {self.y.memory}


@dataclass
class Tiles:
    """y (batch, columns) = x (batch, depth) w + bias for several rows, with w (depth, columns) laid out in panels.

    spare: room for (batch, a panel's columns) where part of the last panel is beyond the columns.
    """

    w: Places  # as it stands where it is kept: it is laid out before each call
    x: Places
    y: Places
    bias: Places | None
    spare: Places | None

    def reads(self) -> set[int]:
        return {self.x.memory} | (set() if self.bias is None else {self.bias.memory})

    def writes(self) -> set[int]:
        return {self.y.memory} | (set() if self.spare is None else {self.spare.memory})


@dataclass
class Lookup:
    """Rows of w by ids."""

    w: Any
    ids: Places
    id_size: int
    out: Places

    def reads(self) -> set[int]:
        return {self.ids.memory}

    def writes(self) -> set[int]:
        return {self.out.memory}


@dataclass
class Reduction:
    """out = factor times the sum, or the largest, over some dimensions of x: (size, stride) of those kept and gone."""

    what: int
    out: Places
    x: Places
    kept: list[tuple[int, int]]
    gone: list[tuple[int, int]]
    factor: float

    def reads(self) -> set[int]:
        return {self.x.memory}

    def writes(self) -> set[int]:
        return {self.out.memory}


@dataclass
class Exact:
    """A Point on numbers of several kinds, of the result and of each operand, computed in float64."""

    name: str
    out: Places
    operands: list[Places]
    kinds: tuple[str, ...]
    p: float
    q: float

    def reads(self) -> set[int]:
        return {o.memory for o in self.operands}

    def writes(self) -> set[int]:
        return {self.out.memory}


@dataclass
class Attend:
    """y = sum_s softmax_s(q . k_s / sqrt(K)) v_s over the last min(position, S - 1) + 1 of S rows.

    sizes: B, S, G, H, K. partial: (parts, B, H, K + 2), what each part of the rows gives.
    """

    q: Places
    k: Places
    v: Places
    position: Places
    kind: str
    partial: Places
    y: Places
    sizes: tuple[int, int, int, int, int]

    def reads(self) -> set[int]:
        return {o.memory for o in (self.q, self.k, self.v, self.position)}

    def writes(self) -> set[int]:
        return {self.partial.memory, self.y.memory}


Instruction = Group | Product | Tiles | Lookup | Reduction | Exact | Attend


class Weights(NamedTuple):
    """Rows of weights (N, K): kept float32, bfloat16 or int8, the last with a scale for each row."""

    kept: Tensor
    scale: Tensor | None


def memory_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def places_of(t: Tensor) -> Places:
    return Places(memory_of(t), int(t.storage_offset()), tuple(t.shape), tuple(t.stride()))


def numbers_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers that hold plain numbers, and what stands behind those that do not."""
    everything = [*model.parameters(), *model.buffers()]
    behind: list[Any] = [getattr(t, name, None) for t in everything for name in ("kept", "scale")]
    return [t for t in [*everything, *behind] if type(t) in (Tensor, nn.Parameter)]


def spread(o: Places, sizes: tuple[int, ...]) -> Places:
    """As an operand of what has these sizes."""
    extra = len(sizes) - len(o.sizes)
    strides = [0] * extra + [0 if n == 1 else s for n, s in zip(o.sizes, o.strides, strict=True)]
    return o._replace(sizes=sizes, strides=tuple(strides))


def in_order(o: Places) -> bool:
    """Whether places follow each other in memory in their order."""
    step = 1
    for size, stride in zip(reversed(o.sizes), reversed(o.strides), strict=True):
        if stride != step:
            return False
        step *= size
    return True


def in_step(group: Group, point: Point) -> bool:
    """Whether what the point reads of the group is at its own place."""
    own = {p.out.memory: p.out for p in group.points}
    return all(o == own[o.memory] for o in point.operands if o.memory in own)
