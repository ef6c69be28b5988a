"""A table of instructions that compiled code goes through.

One eager call is watched from below: every operation of torch, on which tensors, and the views that these are of each
other's memory. Each becomes a row of a table (`in_numba`); what depends on parameters alone is computed once and kept.
Memory is used again as soon as nobody reads it.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import complex_numbers, composed, exact_numbers, windows  # noqa: F401  # translations
from .instructions import Group, Instruction, Point, in_order, memory_of, numbers_of, places_of
from .rows import Rows
from .translation import KINDS, Translation
from .watch import Watch

_version = operator.attrgetter("_version")


class Fresh(NamedTuple):
    """An output that gets memory of its own."""

    shape: torch.Size
    dtype: torch.dtype


class Program:
    """What was recorded, ready to run on other inputs of the same shapes.

    Inputs and outputs are the step's tensors, contiguous. Raises Unrecordable for a step that has what the table has
    not.
    """

    def __init__(self, model: nn.Module, watched: Watch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]):
        from . import in_numba

        self.code = in_numba
        tr = Translation(model, inputs)
        tr.all(watched.seen)
        self.inputs = [(t.shape, t.dtype) for t in inputs]
        self.rooms = windows.Rooms(tr.windows)
        self.outputs: list[int | Fresh | windows.Window] = []  # an input again, or what is new
        given = {memory: i for i, memory in enumerate(tr.inputs)}
        self.written: list[int] = []  # by output that is new: its memory
        for out in outputs:
            memory, at = memory_of(out), places_of(out)
            if memory in given and at == places_of(inputs[given[memory]]):
                self.outputs.append(given[memory])
                continue
            window = next((w for w in tr.windows if w.is_after(at)), None)
            if window is not None and window not in self.outputs:
                self.outputs.append(window)
                continue
            whole = memory in tr.made and in_order(at) and at.offset == 0 and tr.made[memory] == out.numel()
            if out.dtype in KINDS:
                memory = exact_numbers.whole(tr, out)
            elif out.is_complex():
                memory = complex_numbers.in_turn(tr, out)
            elif not whole or memory in self.written:
                memory = tr.point("copy", tr.new(out.shape), [tr.read(out)]).memory
            self.outputs.append(Fresh(out.shape, out.dtype))
            self.written.append(memory)
        self.folded = [t for t in numbers_of(model) if memory_of(t) in tr.folded and not t.is_inference()]
        self.versions = list(map(_version, self.folded))
        behind = [w.memory for w in tr.windows]
        told = (*tr.inputs, *self.written, *behind)
        self.table = Table(tr, tr.instructions, told, {*self.written, *behind})
        self.arena = torch.zeros(self.table.room // 4 + 16)
        start = -(-self.arena.data_ptr() // 64) * 64
        self.bases = self.table.addresses([0] * len(told), start)
        self.words = in_numba.CLAIMS + 2 * len(self.table.rows)  # that the threads of a call share
        self.scratch = torch.empty(0)
        self.lock = threading.Lock()

    def current(self) -> bool:
        """Whether the parameters that were made into something else are as they were."""
        return self.versions == list(map(_version, self.folded))

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        return self.inputs == [(t.shape, t.dtype) for t in inputs]

    def laid_out(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs as a call takes them."""
        return [t if i in self.rooms.inputs else t.contiguous() for i, t in enumerate(inputs)]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs. Raises IndexError for an id out of range."""
        made = [torch.empty(out.shape, dtype=out.dtype) for out in self.outputs if isinstance(out, Fresh)]
        workers = self.code.teams.available()
        with self.lock:
            room = workers * self.code.STRIP * (self.code.REGISTERS + 4) + 16
            if self.scratch.numel() < room:
                self.scratch = torch.zeros(room)
            before, after = self.rooms.enter(inputs)
            given = [t.data_ptr() for t in (*inputs, *made, *before)]
            self.bases[: len(given)] = given
            for window, t in zip(self.rooms.windows, before, strict=True):
                self.bases[window.input] = t.data_ptr()
            flags = np.zeros(self.words, np.int64)  # a thread of an interrupted call may still look at its own
            start = -(-self.scratch.data_ptr() // 64) * 64
            numbers = self.table.numbers.ctypes.data
            held = self, self.scratch, inputs, made, before, after
            fine = self.code.run(self.table.rows, self.bases, numbers, start, flags, workers, held)
        if not fine:
            raise IndexError("index out of range in self")
        fresh, later = iter(made), {w.memory: t for w, t in zip(self.rooms.windows, after, strict=True)}
        return [
            inputs[out]
            if isinstance(out, int)
            else later[out.memory]
            if isinstance(out, windows.Window)
            else next(fresh)
            for out in self.outputs
        ]


class Table:
    """Instructions as rows of a table that compiled code goes through; addresses are told at each call.

    given: memory whose address the caller tells. wanted: what the caller reads of what is written.
    """

    def __init__(self, tr: Translation, instructions: list[Instruction], given: Sequence[int], wanted: set[int]):
        from . import in_numba

        self.kept: list[Any] = []  # their addresses stand in the table
        instructions = needed(instructions, wanted)
        registers = _registers(instructions, wanted, in_numba.REGISTERS)
        self._lay_out(tr, instructions, registers, given)
        written = Rows(in_numba, self.base, registers)
        for each in instructions:
            written.add(each)
        self.rows, self.numbers = written.table(), np.array(written.numbers, np.float32)
        self.kept += written.kept

    def addresses(self, given: Sequence[int], arena: int) -> np.ndarray:
        """Of each memory: those given, those of constants, and those within an arena of `room` bytes."""
        return np.array([*given, *self.constants, *(arena + at for at in self.within)], np.int64)

    def _lay_out(
        self, tr: Translation, instructions: list[Instruction], registers: dict[int, int], given: Sequence[int]
    ) -> None:
        """Addresses: those given, constants, then one piece of memory for all that lives between instructions."""
        last: dict[int, int] = {}
        for i, each in enumerate(instructions):
            for memory in each.reads() | each.writes():
                last[memory] = i
        where: dict[int, int] = {}
        free: list[tuple[int, int]] = []
        end = 0
        for i, each in enumerate(instructions):
            for memory in sorted(each.writes() - where.keys() - registers.keys() - set(given)):
                size = -(-4 * tr.made[memory] // 64) * 64
                fits = next((k for k, (_, room) in enumerate(free) if room >= size), None)
                if fits is None:
                    where[memory], end = end, end + size
                else:
                    at, room = free.pop(fits)
                    where[memory] = at
                    if room > size:
                        free.append((at + size, room - size))
            for memory in [m for m, when in last.items() if when == i and m in where]:
                free.append((where[memory], -(-4 * tr.made[memory] // 64) * 64))
        used = set().union(*(each.reads() for each in instructions)) if instructions else set()
        constants = {m: tr.constants[m] for m in used & tr.constants.keys() - set(given)}
        self.kept.append(constants)
        self.constants = [t.untyped_storage().data_ptr() for t in constants.values()]
        self.within, self.room = list(where.values()), end
        self.base = {memory: i for i, memory in enumerate((*given, *constants, *where))}


def needed(instructions: list[Instruction], wanted: set[int]) -> list[Instruction]:
    """Those that something wanted depends on."""
    found: list[Instruction] = []
    for each in reversed(instructions):
        if isinstance(each, Group):
            points: list[Point] = []
            for point in reversed(each.points):
                if point.writes() & wanted:
                    points.append(point)
                    wanted = wanted | point.reads()
            if points:
                found.append(Group(each.sizes, points[::-1]))
        elif each.writes() & wanted:
            found.append(each)
            wanted = wanted | each.reads()
    return found[::-1]


def _registers(instructions: list[Instruction], wanted: set[int], most: int) -> dict[int, int]:
    """A register for what one point writes and only its group reads."""
    writes: dict[int, int] = {}
    outside: set[int] = set(wanted)
    for i, each in enumerate(instructions):
        for point in each.points if isinstance(each, Group) else []:
            outside |= point.writes() & writes.keys()
            writes |= dict.fromkeys(point.writes(), i)
    for i, each in enumerate(instructions):
        outside |= {m for m in each.reads() if writes.get(m) != i}
    found: dict[int, int] = {}
    for group in (each for each in instructions if isinstance(each, Group)):
        last = {m: k for k, point in enumerate(group.points) for m in point.reads()}
        free = list(range(most))
        for k, point in enumerate(group.points):
            memory = point.out.memory
            if memory not in outside and free:
                found[memory] = free.pop()
            free += [found[m] for m, when in last.items() if when == k and m in found]
    return found
