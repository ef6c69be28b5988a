"""Instructions written down as rows of words, which compiled code reads (`in_numba`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .instructions import (
    Attend,
    Exact,
    Group,
    Instruction,
    Lookup,
    Places,
    Product,
    Reduction,
    Tiles,
    Unrecordable,
    Weights,
    in_order,
)

SHARED = 1 << 13  # places from which on a group of operations is shared out
PART = 1 << 19  # bytes of weights that are claimed at a time


class Rows:
    """The rows of instructions, added in the order in which they run.

    code: the module that reads them. base: of each memory, its place among the addresses that a call is told.
    registers: of memory that has no address.
    """

    def __init__(self, code: Any, base: Mapping[int, int], registers: Mapping[int, int]):
        self.code, self.base, self.registers = code, base, registers
        self.rows: list[list[int]] = []
        self.products: list[int] = []  # which rows these are
        self.numbers: list[float] = [1.0, 0.0]
        self.kept: list[Any] = []  # their addresses stand in the rows

    def add(self, instruction: Instruction) -> None:
        """Raises Unrecordable for what no row has room for."""
        WRITE[type(instruction)](self, instruction)

    def table(self) -> np.ndarray:
        """All rows; each knows the next product, whose weights can be fetched meanwhile."""
        table = np.zeros((len(self.rows), self.code.WIDTH), np.int64)
        for i, row in enumerate(self.rows):
            table[i, : len(row)] = row
        i = 0
        while i < len(table):
            table[i, self.code.ENTRY] = self.code.entry(table[i, 0])
            i += 1 + table[i, 2]
        table[:, self.code.NEXT] = -1
        for before, following in zip([0, *self.products], self.products, strict=False):
            table[before:following, self.code.NEXT] = following
        return table

    def _group(self, group: Group) -> None:
        dims = _dims(group.sizes, [o for p in group.points for o in (p.out, *p.operands)])
        count = math.prod(group.sizes)
        parts = max(1, -(-count // self.code.STRIP) // 2) if count >= SHARED else 1
        self.rows.append([self.code.GROUP, parts, len(group.points), count, *_joined(group.sizes, dims)])
        for p in group.points:
            row = [self.code.functions.CODES[p.name], self._number(p.p, p.q), *self._operand(p.out, dims)]
            self.rows.append(row + [word for o in p.operands for word in self._operand(o, dims)])

    def _product(self, product: Product) -> None:
        columns, depth = product.w.kept.shape
        size, batch = product.w.kept.element_size(), math.prod(product.x.sizes) // depth
        parts = min(columns // 4, max(4, columns * depth * size // PART)) if columns * depth > 4 * SHARED else 1
        more = [*self._at(product.bias), *self._at(product.x), *self._at(product.y), depth, batch, columns]
        self.products.append(len(self.rows))
        self.rows.append([self.code.PRODUCT, parts, 0, *self._weights(product.w), *more])

    def _tiles(self, tiles: Tiles) -> None:
        depth, columns = tiles.w.sizes
        more = [*self._at(tiles.x), *self._at(tiles.y), depth, math.prod(tiles.x.sizes) // depth, columns]
        more += [*self._at(tiles.bias), *self._at(tiles.spare)]
        self.rows.append([self.code.TILES, 1, 0, self.base[panel_of(tiles.w)], *more])

    def _lookup(self, lookup: Lookup) -> None:
        count, (many, width) = math.prod(lookup.ids.sizes), lookup.w.kept.shape
        size, w, scale = self._weights(lookup.w)
        ids = [self.base[lookup.ids.memory], lookup.id_size * lookup.ids.offset]
        more = [*ids, lookup.id_size, count, w, size, scale, many, width, *self._at(lookup.out)]
        self.rows.append([self.code.LOOKUP, 1, 0, *more])

    def _reduction(self, reduction: Reduction) -> None:
        kept = [(1, 0)] * (3 - len(reduction.kept)) + reduction.kept
        gone = [(1, 0)] * (2 - len(reduction.gone)) + reduction.gone
        total = math.prod(n for n, _ in (*kept, *gone))
        by_rows = reduction.what == self.code.sums.SUM and kept[2][1] == 1 and gone[1][1] != 1
        most = kept[0][0] * kept[1][0] * (1 if by_rows else kept[2][0])
        parts = min(most, max(1, total // SHARED)) if total >= SHARED else 1
        more = [n for n, _ in (*kept, *gone)] + [s for _, s in (*kept, *gone)]
        more = [*self._at(reduction.out), *self._at(reduction.x), *more, self._number(reduction.factor)]
        self.rows.append([self.code.REDUCTION, parts, 0, reduction.what, *more])

    def _exact(self, exact: Exact) -> None:
        everything = [exact.out, *exact.operands]
        dims = _dims(exact.out.sizes, everything)
        self.rows.append([self.code.EXACT, 1, 1, math.prod(exact.out.sizes), *_joined(exact.out.sizes, dims)])
        self.numbers.extend([0.0] * (len(self.numbers) % 2))
        halves = np.array([exact.p, exact.q]).view(np.float32).tolist()
        row = [self.code.exact.EXACTLY[exact.name], self._number(*halves)]
        for o, kind in zip(everything, exact.kinds, strict=True):
            which, strides = self.code.exact.KINDS[kind], _merge(o, dims)
            at = self.code.exact.SIZES[which] * o.offset
            row += [which, self.base[o.memory], at, *[0] * (4 - len(strides)), *strides]
        self.rows.append(row)

    def _attend(self, attend: Attend) -> None:
        batch, _, _, heads, size = attend.sizes
        parts, kind = attend.partial.sizes[0], self.code.exact.KINDS[attend.kind]
        position, first = self._at(attend.position)
        first, step = (self.code.exact.SIZES[kind] // 4 * n for n in (first, 4 * attend.position.strides[0]))
        more = [*self._at(attend.q), *self._at(attend.k), attend.k.strides[0] * 4, attend.k.strides[1] * 4]
        more += [*self._at(attend.v), attend.v.strides[0] * 4, attend.v.strides[1] * 4, position, first, step, kind]
        more += [*self._at(attend.partial), *attend.sizes]
        self.rows.append([self.code.ATTEND, parts, 0, *more])
        more = [parts, *self._at(attend.partial), *self._at(attend.y), batch * heads, size]
        self.rows.append([self.code.JOIN, 1, 0, *more])

    # ---- words that rows share

    def _at(self, o: Places | None) -> list[int]:
        """Memory and bytes into it; -1 for none."""
        return [-1, 0] if o is None else [self.base[o.memory], 4 * o.offset]

    def _number(self, *given: float) -> int:
        self.numbers.extend(given)
        return 4 * (len(self.numbers) - len(given))

    def _weights(self, w: Weights) -> list[int]:
        self.kept.append(w)
        return [w.kept.element_size(), w.kept.data_ptr(), 0 if w.scale is None else w.scale.data_ptr()]

    def _operand(self, o: Places, dims: list[int]) -> list[int]:
        if o.memory in self.registers:
            return [self.code.REGISTER, self.registers[o.memory], 0, 0, 0, 0, 0]
        strides = _merge(o, dims)
        mode = self.code.PLAIN if in_order(o) else self.code.SPREAD
        return [mode, *self._at(o), *[0] * (4 - len(strides)), *strides]


WRITE: dict[type, Callable[[Rows, Any], None]] = {
    Group: Rows._group, Product: Rows._product, Tiles: Rows._tiles, Lookup: Rows._lookup,
    Reduction: Rows._reduction, Exact: Rows._exact, Attend: Rows._attend,
}  # fmt: skip


def panel_of(w: Places) -> int:
    """What stands for the panels of w among memories."""
    return -1 - abs(hash(w))


def _dims(sizes: tuple[int, ...], operands: Sequence[Places]) -> list[int]:
    """Where the dimensions start that remain when those that follow each other in every operand are joined."""
    starts = [0] if sizes else []
    for d in range(1, len(sizes)):
        if not all(o.strides[d - 1] == sizes[d] * o.strides[d] for o in operands):
            starts.append(d)
    return starts


def _joined(sizes: tuple[int, ...], dims: list[int]) -> list[int]:
    """The sizes of the joined dimensions, filled up to four with ones before them."""
    found = [math.prod(sizes[a:b]) for a, b in zip(dims, [*dims[1:], len(sizes)], strict=False)]
    if len(found) > 4:
        raise Unrecordable("a result of too many dimensions")
    return [*[1] * (4 - len(found)), *found]


def _merge(o: Places, dims: list[int]) -> list[int]:
    """The strides of the joined dimensions."""
    return [o.strides[d - 1] for d in (*dims[1:], len(o.sizes))] if dims else []
