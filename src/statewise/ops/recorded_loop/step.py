"""One step of a cell and its vector-Jacobian product, recorded together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import Cell, leaves, tree_map
from ..recorded import Unrecordable, Watch
from ..recorded.adjoints import SEVERAL, all_of
from ..recorded.instructions import (
    Group,
    Instruction,
    Places,
    Product,
    Reduction,
    Tiles,
    in_order,
    memory_of,
    places_of,
)
from ..recorded.program import Table, needed, panel_of
from ..recorded.translation import FRESH, Translation, flat

PANEL = 64  # columns: in_numba's panels in float32


class Recording(Translation):
    """What was seen of a step. What it makes of parameters alone is noted, to be made again before each call."""

    def __init__(self, cell: Cell[Any], inputs: Sequence[Tensor]):
        super().__init__(cell, inputs)
        self.remade: set[int] = set()
        self.renamed: dict[int, int] = {}  # memory that was written again: where that stands
        self.before: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def _one(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = {memory_of(t) for t in flat((args, kwargs)) if isinstance(t, Tensor)}
        if func in SEVERAL and not given <= self.constants.keys():
            SEVERAL[func](self, args, kwargs, all_of(result))
            return
        if func._schema.is_mutable and func.name().split(".")[0].endswith("_"):
            self._in_place(func, args, kwargs)
            return
        results = [r for r in flat(result) if isinstance(r, Tensor)]
        new = {memory_of(r) for r in results} - self.constants.keys() - given
        super()._one(func, args, kwargs, result)
        if func not in FRESH and new & self.constants.keys() and given & (self.own | self.remade):
            self.remade |= new
            self.before.append((func, args, kwargs, results))

    def read(self, t: Tensor) -> Places:
        if t.dtype != torch.float32 and memory_of(t) in self.own | self.remade:
            raise Unrecordable(f"{t.dtype} that parameters or buffers hold takes part")
        return super().read(t)

    def read_any(self, t: Tensor) -> Places:
        at = super().read_any(t)
        return at._replace(memory=self.renamed.get(at.memory, at.memory))

    def _in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same, written elsewhere: what reads the tensor from here on finds it there."""
        name, _, overload = func.name().removeprefix("aten::").partition(".")
        plain = getattr(getattr(torch.ops.aten, name[:-1], None), overload or "default", None)
        t, memory = args[0], memory_of(args[0])
        whole = memory in self.made and t.storage_offset() == 0 and self.made[memory] == t.numel()
        if plain is None or not whole:
            raise Unrecordable(f"{func} is not pure")
        out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        super()._one(plain, args, kwargs, out)
        self.alive.append(out)
        self.renamed[memory] = memory_of(out)

    def weights(self, turned: Tensor) -> Any:
        return self.constant(turned)

    def product(self, x: Tensor, w: Any, bias: Tensor | None, y: Tensor) -> None:
        if not isinstance(w, Tensor):
            raise Unrecordable("weights that are kept smaller")
        if not y.is_contiguous():
            raise Unrecordable("a product that is not laid out in rows")
        given, more = self.contiguous(x), None if bias is None else self.contiguous(bias)
        if memory_of(y) not in self.made:
            self.make(y)
        depth, columns = w.shape
        spare = self.new((math.prod(given.sizes) // max(depth, 1), PANEL)) if columns % PANEL else None
        self.instructions.append(Tiles(places_of(w), given, places_of(y), more, spare))

    def dense(self, t: Tensor | None, like: Tensor) -> int:
        """The memory that holds a result, and nothing else. None: zeros."""
        if t is None:
            zero = self.fixed(torch.zeros(()))
            return self.point("copy", self.new(like.shape), [zero]).memory
        at = places_of(t)
        memory = self.renamed.get(at.memory, at.memory)
        if memory in self.made and in_order(at) and at.offset == 0 and self.made[memory] == t.numel():
            return memory
        return self.point("copy", self.new(t.shape), [self.read(t)]).memory


def kinds(instructions: Sequence[Instruction]) -> Iterator[tuple[set[int], set[int], bool]]:
    """What each operation reads and writes, and whether that is better kept than computed again."""
    for each in instructions:
        if isinstance(each, Group):
            yield from ((point.reads(), point.writes(), False) for point in each.points)
        elif isinstance(each, Tiles):
            yield each.reads(), {each.y.memory}, True
        else:
            yield each.reads(), each.writes(), isinstance(each, Product | Reduction)


class Half:
    """The step, or its product backwards: a table, and which memory is which."""

    def __init__(self, tr: Recording, instructions: list[Instruction], ports: Sequence[int], kept: Sequence[int],
                 wanted: set[int]):  # fmt: skip
        instructions = needed(instructions, wanted)
        self.reads = set().union(*(each.reads() for each in instructions)) if instructions else set()
        tiles = {each.w for each in instructions if isinstance(each, Tiles)}
        self.weights = sorted(tiles)
        self.remade = sorted(self.reads & tr.remade)
        self.ports, self.kept = list(dict.fromkeys(ports)), list(kept)
        self.given = [*self.ports, *self.kept, *self.remade, *map(panel_of, self.weights)]
        if len(set(self.given)) < len(self.given):
            raise Unrecordable("two weights that look the same")
        self.table = Table(tr, instructions, self.given, wanted)
        self.index = {memory: i for i, memory in enumerate(self.given)}


class Step:
    """transition of a cell for so many rows, ready to be run through time; with its vector-Jacobian product if asked.

    Raises Unrecordable for a transition that has what the table has not.
    """

    def __init__(self, cell: Cell[Any], u: Any, state: Any, train: bool):
        self.rows = leaves(u)[0].shape[0]
        with torch.inference_mode(False), torch.no_grad(), _exactly():
            u = tree_map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), u)
            state = tree_map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), state)
            with torch.set_grad_enabled(train), Watch() as watched:
                state = tree_map(lambda leaf: leaf.requires_grad_(train), state)
                o, after = cell.transition(u, state)
                outs = [*leaves(o), *leaves(after)]
                given: list[Tensor] = []
                back: list[Tensor | None] = []
                if train:
                    reached = [t for t in outs if t.requires_grad]
                    watched.quiet = True
                    given = [torch.ones_like(t, memory_format=torch.contiguous_format) for t in reached]
                    watched.quiet = False
                    found = torch.autograd.grad(reached, leaves(state), given, allow_unused=True) if reached else []
                    back = list(found) or [None] * len(leaves(state))
        self.u, self.state = leaves(u), leaves(state)
        self.o, self.after = o, after
        _check(self.rows, self.state, o, after)
        drawn = [f for f, *_ in watched.seen if torch.Tag.nondeterministic_seeded in getattr(f, "tags", ())]
        if drawn:
            raise Unrecordable(f"{drawn[0]} draws random numbers")
        tr = Recording(cell, [*self.u, *self.state, *given])
        tr.all(watched.seen)
        made = [tr.dense(t, t) for t in outs]
        self.outs, self.lasts = made[: len(leaves(o))], made[len(leaves(o)) :]
        self.adjoints: list[int | None] = []  # by output and state: what arrives there
        arriving = iter(given)
        self.adjoints = [memory_of(next(arriving)) if train and t.requires_grad else None for t in outs]
        self.backs = [tr.dense(t, like) for t, like in zip(back, self.state, strict=True)] if train else []

        late = {m for m in self.adjoints if m is not None}
        worth: set[int] = set()
        for reads, writes, costly in kinds(tr.instructions):
            if reads & late:
                late |= writes
            elif costly:
                worth |= writes
        inputs = [memory_of(t) for t in (*self.u, *self.state)]
        self.inputs = inputs
        kept: list[int] = []
        self.backward: Half | None = None
        if train:
            rest = [each for each in tr.instructions if isinstance(each, Group) or not each.writes() & worth]
            reads = set().union(*(each.reads() for each in needed(rest, set(self.backs))))
            kept = sorted(worth & reads)
            ports = [*inputs, *(m for m in self.adjoints if m is not None), *self.backs]
            self.backward = Half(tr, rest, ports, kept, set(self.backs))
        self.forward = Half(tr, tr.instructions, [*inputs, *made], kept, {*made, *kept})
        self.sizes = {m: tr.made[m] for m in {*made, *kept, *self.backs}}
        self.sizes |= {memory_of(t): t.numel() for t in (*self.u, *self.state, *given)}
        self.numbers = sum(tr.made.values()) // self.rows + 1  # that a row's step makes, forwards and back
        halves = [self.forward] + ([self.backward] if self.backward else [])
        wanted = set().union(*({*h.remade, *(w.memory for w in h.weights)} for h in halves))
        self.before: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        for each in reversed(tr.before):
            results = {memory_of(r) for r in each[3]}
            if results & wanted:
                wanted |= {memory_of(t) for t in flat((each[1], each[2])) if isinstance(t, Tensor)}
                self.before.insert(0, each)
        self.constants = {m: tr.constants[m] for m in wanted if m in tr.constants}

    def weights_now(self) -> dict[int, Tensor]:
        """What the step makes of parameters alone, made of them as they are."""
        made: dict[int, Tensor] = {}

        def now(x: Any) -> Any:
            if isinstance(x, Tensor) and memory_of(x) in made:
                return made[memory_of(x)].as_strided(x.shape, x.stride(), x.storage_offset())
            if isinstance(x, tuple | list):
                return type(x)(map(now, x))
            return x

        with torch.no_grad(), _exactly():
            for func, args, kwargs, results in self.before:
                new = [r for r in flat(func(*now(args), **{k: now(v) for k, v in kwargs.items()})) if r is not None]
                made |= {memory_of(old): one for old, one in zip(results, new, strict=True)}
        return made

    def laid(self, w: Places, made: dict[int, Tensor]) -> Tensor:
        """A matrix of parameters in panels."""
        from ..products.in_numba import panels

        whole = made.get(w.memory, self.constants[w.memory])
        return panels(whole.detach().as_strided(w.sizes, w.strides, w.offset))


def _check(rows: int, state: list[Tensor], o: Any, after: Any) -> None:
    for t in (*leaves(o), *leaves(after)):
        if t.dtype != torch.float32 or t.ndim == 0 or len(t) != rows:
            raise Unrecordable(f"a result is {t.dtype} {tuple(t.shape)}")
    if [t.shape for t in leaves(after)] != [t.shape for t in state]:
        raise Unrecordable("the state changes its shape")


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False):
        yield
