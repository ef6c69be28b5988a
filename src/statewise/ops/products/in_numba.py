"""Products over all of time, x W^T and its two gradients: a large matrix by a small one.

A tile of the result, up to ROWS rows by VECTORS vectors, stays in registers while its depth runs. The small matrix is
laid out in panels of a tile's width; rows go in chunks that the second-level cache holds. Threads share out rows, or of
the gradient of W its rows, so every number is summed by one thread, in an order that does not depend on the others.
On the processor this was written for, an AMD one with AVX-512, MKL's products take half as long again and more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from ..compiled import in_numba as compiled
from ..fresh import empty
from ..teams import in_numba as teams
from ..vectors import in_numba as vectors

ROWS = 6  # of a tile, at most: its sums fill the registers
VECTORS = 4 if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else 1  # of a tile
BYTES = vectors.BYTES  # of a vector
PANEL = VECTORS * BYTES
CHUNK = 96  # rows of the large matrix that are multiplied by all panels before the next
DEEP = 1024  # depth after which a tile's sums are put down: a panel of it stays in the second-level cache
BROAD = 384  # columns of the large matrix at a time: with LONG rows of it they stay in the second-level cache
LONG = 128  # rows whose products are summed before they are added to the gradient of W
FEW = 1024  # rows below which laying out the small matrix costs more than it brings
LITTLE = 1 << 23  # multiplications below which a library's product is as fast

_compile = compiled.function


def _tile(rows: int) -> Any:
    """out (rows, a panel's columns) = a (rows, depth) @ panel (depth, columns), or + it; strides in bytes."""

    @intrinsic
    def run(context: Any, like: Any, depth: Any, add: Any, where: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v = vectors.Lanes(builder, like)
            a, a_row, a_step, panel, panel_row, out, out_row = cgutils.unpack_tuple(builder, args[3], 7)
            each, across = range(rows), range(VECTORS)
            to = [[builder.add(v.at(out, out.type(r), out_row), out.type(c * BYTES)) for c in across] for r in each]
            sums = [[v.variable(v.full(0.0)) for _ in across] for _ in each]
            starts = [v.at(a, a.type(r), a_row) for r in each]
            with cgutils.for_range(builder, args[1], intp=args[1].type) as loop:
                at, along = v.at(panel, loop.index, panel_row), builder.mul(loop.index, a_step)
                line = [v.load(builder.add(at, at.type(c * BYTES))) for c in across]
                for r in each:
                    one = v.splat(builder.add(starts[r], along))
                    for c in across:
                        builder.store(v.mad(one, line[c], builder.load(sums[r][c])), sums[r][c])
            with builder.if_then(builder.icmp_signed("!=", args[2], args[2].type(0))):
                for r in each:
                    for c in across:
                        builder.store(v.add(builder.load(sums[r][c]), v.load(to[r][c])), sums[r][c])
            for r in each:
                for c in across:
                    v.store(to[r][c], builder.load(sums[r][c]))
            return context.get_dummy_value()

        return types.void(like, types.intp, types.intp, types.UniTuple(types.intp, 7)), generate

    return run


_tile1, _tile2, _tile3, _tile4, _tile5, _tile6 = map(_tile, range(1, ROWS + 1))


@_compile
def multiply(like, rows, depth, add, a, a_row, a_step, panel, panel_row, out, out_row):
    """out (rows, a panel's columns) = a (rows, depth) @ panel, or out + it where add is not 0."""
    compiled.apart()
    blocks = (rows + ROWS - 1) // ROWS
    first = 0
    for block in range(blocks):
        last = rows * (block + 1) // blocks
        where = (a + first * a_row, a_row, a_step, panel, panel_row, out + first * out_row, out_row)
        if last - first == 6:
            _tile6(like, depth, add, where)
        elif last - first == 5:
            _tile5(like, depth, add, where)
        elif last - first == 4:
            _tile4(like, depth, add, where)
        elif last - first == 3:
            _tile3(like, depth, add, where)
        elif last - first == 2:
            _tile2(like, depth, add, where)
        else:
            _tile1(like, depth, add, where)
        first = last


class _Rows(NamedTuple):
    """a @ w: sizes, addresses, and strides in bytes."""

    item: int
    rows: int
    depth: int
    columns: int
    a: int
    a_row: int
    w: int  # (panels, depth, a panel's columns)
    out: int
    out_row: int
    spare: int  # per thread, (CHUNK, a panel's columns): of the last panel, if part of it is beyond the columns


class _Sums(NamedTuple):
    """a^T @ b and a^T @ c."""

    item: int
    rows: int
    height: int  # columns of a
    a: int
    a_row: int
    b: int
    b_row: int
    b_columns: int
    c: int
    c_row: int
    c_columns: int
    out: int  # (height, columns of b and of c, each in whole panels)
    out_row: int
    total: int  # (height,), of a over its rows
    spare: int  # per thread, (LONG, a panel's columns)
    part: int  # (height,)


@_compile
def _rows_work(like, q, me):
    compiled.apart()
    if teams.started(me):
        return
    panels, share = (q.columns * q.item + PANEL - 1) // PANEL, teams.share(q.rows, me)
    spare = q.spare + me[0] * CHUNK * PANEL
    rest = q.columns - (panels - 1) * PANEL // q.item
    for start in range(share.start, share.stop, CHUNK):
        count = min(CHUNK, share.stop - start)
        for depth in range(0, max(q.depth, 1), DEEP):
            a, deep = q.a + start * q.a_row + depth * q.item, min(DEEP, q.depth - depth)
            for p in range(panels):
                panel, out = q.w + (p * q.depth + depth) * PANEL, q.out + start * q.out_row + p * PANEL
                if (p + 1) * PANEL <= q.columns * q.item:
                    multiply(like, count, deep, depth, a, q.a_row, q.item, panel, PANEL, out, q.out_row)
                else:
                    multiply(like, count, deep, depth, a, q.a_row, q.item, panel, PANEL, spare, PANEL)
                    if depth + DEEP >= q.depth:
                        for r in range(count):
                            vectors.copy(like, rest, (out + r * q.out_row, spare + r * PANEL))


@_compile
def _sums_work(like, q, me):
    compiled.apart()
    if teams.started(me):
        return
    share = teams.share((q.height + ROWS - 1) // ROWS, me)
    end = min(share.stop * ROWS, q.height)
    for first in range(share.start * ROWS, end, BROAD):
        _sums_part(like, q, first, min(BROAD, end - first), q.spare + me[0] * LONG * PANEL)


@_compile
def _sums_part(like, q, first, height, spare):
    """Of so many columns of a, from the first on."""
    compiled.apart()
    at = first * q.item
    total, part = q.total + at, q.part + at
    vectors.zero(like, height, (total,))
    for start in range(0, q.rows, LONG):
        count, a = min(LONG, q.rows - start), q.a + start * q.a_row + at
        vectors.zero(like, height, (part,))
        for r in range(count):  # this brings them near, too, row by row: by columns they would come far slower
            vectors.add(like, height, (part, part, a + r * q.a_row))
        vectors.add(like, height, (total, total, part))
        where, row, columns, out = q.b, q.b_row, q.b_columns, q.out + first * q.out_row
        for _ in range(2):
            for begin in range(0, columns * q.item, PANEL):
                panel, panel_row = where + start * row + begin, row
                if begin + PANEL > columns * q.item:
                    for r in range(count):
                        vectors.copy(like, columns - begin // q.item, (spare + r * PANEL, panel + r * row))
                    panel, panel_row = spare, PANEL
                multiply(like, height, count, start, a, q.item, q.a_row, panel, panel_row, out + begin, q.out_row)
            out += (columns * q.item + PANEL - 1) // PANEL * PANEL
            where, row, columns = q.c, q.c_row, q.c_columns


def panels(w: Tensor) -> Tensor:
    """(*, depth, columns) -> (*, panels, depth, a panel's columns), filled up with zeros."""
    columns = PANEL // w.element_size()
    w = F.pad(w, (0, -w.shape[-1] % columns))
    return w.unflatten(-1, (-1, columns)).transpose(-3, -2).contiguous()


def by(a: Tensor, w: Tensor, laid: Tensor | None = None) -> Tensor:
    """a (M, K) @ w (K, N), for a large M, on a CPU in float32 or float64. laid: panels(w), for a w of many calls."""
    if len(a) < FEW or not _pays(a, w.shape[1]):
        return torch.mm(a, w, out=empty(a, len(a), w.shape[1]))
    a, laid = _rows_of(a), panels(w) if laid is None else laid
    out = empty(a, len(a), w.shape[1])
    workers = teams.available()
    spare = torch.empty(workers, CHUNK, PANEL, dtype=torch.uint8)
    item = a.element_size()
    q = _Rows(
        item=item, rows=len(a), depth=len(w), columns=w.shape[1], a=a.data_ptr(),
        a_row=a.stride(0) * item, w=laid.data_ptr(), out=out.data_ptr(), out_row=w.shape[1] * item,
        spare=spare.data_ptr(),
    )  # fmt: skip
    teams.call(_rows_work, LIKE[a.dtype], q, workers, (a, laid, out, spare))
    return out


def sums(a: Tensor, b: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """a^T @ b, a^T @ c and a.sum(0) of a (M, H), b (M, N) and c (M, P), for a large M, as `by`."""
    c = b[:, :0] if c is None else c
    if not all(t.shape[1] == 0 or _pays(a, t.shape[1]) for t in (b, c)):
        return a.T @ b, a.T @ c, a.sum(0)
    a, b, c = _rows_of(a), _rows_of(b), _rows_of(c)
    item, height = a.element_size(), a.shape[1]
    wide = [-(-t.shape[1] * item // PANEL) * PANEL // item for t in (b, c)]
    out, total, part = a.new_empty(height, sum(wide)), a.new_empty(height), a.new_empty(height)
    workers = max(1, min(teams.available(), -(-height // ROWS)))
    spare = torch.zeros(workers, LONG, PANEL, dtype=torch.uint8)
    q = _Sums(
        item=item, rows=len(a), height=height, a=a.data_ptr(), a_row=a.stride(0) * item,
        b=b.data_ptr(), b_row=b.stride(0) * item, b_columns=b.shape[1], c=c.data_ptr(), c_row=c.stride(0) * item,
        c_columns=c.shape[1], out=out.data_ptr(), out_row=sum(wide) * item, total=total.data_ptr(),
        spare=spare.data_ptr(), part=part.data_ptr(),
    )  # fmt: skip
    teams.call(_sums_work, LIKE[a.dtype], q, workers, (a, b, c, out, total, part, spare))
    by_b, by_c = out[:, : b.shape[1]].contiguous(), out[:, wide[0] : wide[0] + c.shape[1]].contiguous()
    return by_b, by_c, total


def _pays(a: Tensor, columns: int) -> bool:
    """Whether there is enough to do, and most of the last panel is wanted."""
    whole = -(-columns * a.element_size() // PANEL) * PANEL
    return a.numel() * columns >= LITTLE and whole <= 1.1 * columns * a.element_size()


LIKE = {torch.float32: np.float32(0), torch.float64: np.float64(0)}


def _rows_of(a: Tensor) -> Tensor:
    return a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()
