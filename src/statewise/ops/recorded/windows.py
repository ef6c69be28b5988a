"""Windows of the past: what is new is written behind what is there, and nothing moves.

A state that holds the last P rows would be copied in every step, to let the oldest go. Instead the rows stand in a
buffer with room behind them. A step writes one row more, and its state is a view that begins one row later: the state
before stays whole. Where a step does not go on from the latest state of a buffer, it gets a buffer of its own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import fresh
from .instructions import Attend, Places, Unrecordable, memory_of, places_of
from .translation import KINDS, SPECIAL, Translation

LEAST = 16  # rows of room
SHARE = 4  # of the window: what its room is
PART = 1 << 18  # bytes of keys and values that are claimed at a time
MOST = 32  # parts


class Window(NamedTuple):
    """Rows that a step appends to: which input, (B, P, ...), and the memory in which they and the new one stand."""

    input: int
    memory: int
    shape: tuple[int, ...]

    def is_after(self, out: Places) -> bool:
        """Whether a result is the rows without the oldest."""
        return (out.memory, out.offset, out.sizes) == (self.memory, math.prod(self.shape[2:]), self.shape)


def _append(tr: Translation, args: tuple[Any, ...], whole: Tensor) -> None:
    """old (B, P, ...) and new (B, 1, ...) as one; one more than P rows."""
    old, new = args
    memory, row = memory_of(old), math.prod(old.shape[2:])
    index = list(tr.inputs).index(memory) if memory in tr.inputs else None
    known = memory in tr.rows or any(memory in each.reads() for each in tr.instructions)
    if index is None or known or not old.numel() or places_of(old) != places_of(tr.inputs[memory]):
        raise Unrecordable("rows are put behind what is no state")
    tr.windows.append(Window(index, memory_of(whole), tuple(old.shape)))
    tr.rows[memory_of(whole)], tr.rows[memory] = (len(old), whole.shape[1], row), (len(old), old.shape[1], row)
    tr.made[memory_of(whole)] = whole.numel()
    tr.point("copy", tr.read_any(whole[:, -1:]), [tr.read(new)])


def _attend(tr: Translation, args: tuple[Any, ...], y: Tensor) -> None:
    """q (B, 1, H, K), k and v (B, S, G, K), position (B, 1) whole numbers -> y (B, 1, H, K)."""
    q, k, v, position = args
    batch, rows, groups, size = k.shape
    heads = q.shape[2]
    if v.shape != k.shape or not y.is_contiguous() or y.dtype != torch.float32:
        raise Unrecordable("values that are no keys' size")
    keys, values = tr.read_any(k), tr.read_any(v)
    if any(at.strides[3] != 1 or (groups > 1 and at.strides[2] != size) for at in (keys, values)):
        raise Unrecordable("keys that are not laid out in rows")
    at = tr.read_any(position)
    kind = tr.kinds.get(at.memory) or KINDS[position.dtype]
    parts = max(1, min(MOST, batch * rows * groups * size * 8 // PART))
    tr.make(y)
    partial = tr.new((parts, batch, heads, size + 2))
    tr.instructions.append(
        Attend(tr.contiguous(q), keys, values, at, kind, partial, places_of(y), (batch, rows, groups, heads, size))
    )


SPECIAL |= {"append": _append, "attend": _attend}


@dataclass
class _Buffers:
    tensors: list[Tensor]
    end: int  # rows that were written behind the first window


class Rooms:
    """The windows of a program, and the buffers in which they stand as long as somebody has their latest state."""

    def __init__(self, windows: Sequence[Window]):
        self.windows = windows
        self.inputs = {w.input for w in windows}
        self.room = max([LEAST, *(w.shape[1] // SHARE for w in windows)])
        self._latest: dict[int, tuple[list[weakref.ref[Tensor]], _Buffers, int]] = {}

    def enter(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The windows of a step's state as they stand in buffers with room for a row, and those of the state after."""
        given = [inputs[w.input] for w in self.windows]
        if not given:
            return [], []
        refs, buffers, used = self._latest.get(id(given[0]), ([], _Buffers([], 0), 0))
        latest = len(refs) == len(given) and all(ref() is t for ref, t in zip(refs, given, strict=True))
        if not latest or used != buffers.end or used == self.room:
            buffers, used = self._fresh(given), 0
        buffers.end = used + 1
        before, after = (
            [t[start : start + w.shape[1]].transpose(0, 1) for t, w in zip(buffers.tensors, self.windows, strict=True)]
            for start in (used, used + 1)
        )
        key = id(after[0])
        gone = lambda _: self._latest.pop(key, None)
        self._latest[key] = [weakref.ref(after[0], gone), *map(weakref.ref, after[1:])], buffers, used + 1
        return before, after

    def _fresh(self, given: Sequence[Tensor]) -> _Buffers:
        made = []
        for t in given:
            rows = t.detach().transpose(0, 1)  # so that where a row of the batch begins does not depend on the room
            made.append(fresh.empty(rows, len(rows) + self.room, *rows.shape[1:]))
            made[-1][: len(rows)] = rows
        return _Buffers(made, 0)
