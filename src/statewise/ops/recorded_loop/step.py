"""One step of a cell and its vector-Jacobian product, recorded together.

Gradients of parameters are sums over time: theta' = sum_t (ds_t/dtheta)^T lam_t. What makes them is linear in lam, so
whatever of it meets nothing but parameters may come after the sum. Where a parameter is a factor of a product, the
g_t^T x_t of each step is not formed: g and x are noted for all times and multiplied once. What remains, as of biases,
is added up by the steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
from ..recorded.program import Table, needed
from ..recorded.rows import panel_of
from ..recorded.translation import FRESH, Translation, flat

PANEL = 64  # columns: in_numba's panels in float32
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default}
Seen = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Later(NamedTuple):
    """An operation on what is summed over time: done once, after all steps."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    factors: tuple[Places, ...]  # of a product: where each step has them


class Recording(Translation):
    """What was seen of a step. What it makes of parameters alone is noted, to be made again before each call."""

    def __init__(self, cell: Cell[Any], inputs: Sequence[Tensor]):
        super().__init__(cell, inputs)
        self.remade: set[int] = set()
        self.renamed: dict[int, int] = {}  # memory that was written again: where that stands
        self.before: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.later: list[Later] = []
        self.after: set[int] = set()  # memory that is known only after all steps
        self.sums: dict[Places, Places] = {}  # what the steps add up, and where

    def gradient(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """What only a parameter's gradient needs."""
        tensors = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        given = {memory_of(t) for t in tensors}
        product = func in PRODUCTS and not given & (self.constants.keys() | self.after)
        if not product and not given & self.after:
            self.all([(func, args, kwargs, result)])
            return
        if func._schema.is_mutable and memory_of(args[0]) in self.constants:
            raise Unrecordable(f"{func} is not pure")
        self.alive.append((args, kwargs, result))
        factors = tuple(map(self._noted, tensors)) if product else ()
        for t in () if product else tensors:
            self.summed(t)
        results = [r for r in flat(result) if isinstance(r, Tensor)]
        self.after |= {memory_of(r) for r in results}
        self.later.append(Later(func, args, kwargs, results, factors))

    def _noted(self, t: Tensor) -> Places:
        at = self.read(t)
        return at if at.memory in self.made else self.point("copy", self.new(at.sizes), [at])

    def summed(self, t: Tensor) -> None:
        """Over time, unless it is known only later, or always the same."""
        at = places_of(t)
        if at.memory not in self.after | self.constants.keys() and at not in self.sums:
            total = self.sums[at] = self.new(t.shape)
            self.point("add", total, [total, t], p=1.0)

    def noted(self) -> set[int]:
        """Memory of factors."""
        return {at.memory for each in self.later for at in each.factors}

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
        whole = memory in self.made and in_order(at) and at.offset == 0 and self.made[memory] == t.numel()
        if whole and memory not in self.noted():
            return memory
        return self.point("copy", self.new(t.shape), [self.read(t)]).memory


def apart(seen: Sequence[Seen], wanted: set[int]) -> list[bool]:
    """Of each operation: whether none of these memories depends on it."""
    found: list[bool] = []
    for _, args, kwargs, result in reversed(seen):
        mine = {memory_of(t) for t in flat(result) if isinstance(t, Tensor)}
        found.append(bool(mine) and not mine & wanted)
        if not found[-1]:
            wanted = wanted | {memory_of(t) for t in flat((args, kwargs)) if isinstance(t, Tensor)}
    return found[::-1]


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
                 wanted: set[int], sums: Sequence[int] = ()):  # fmt: skip
        instructions = needed(instructions, wanted)
        self.reads = set().union(*(each.reads() for each in instructions)) if instructions else set()
        tiles = {each.w for each in instructions if isinstance(each, Tiles)}
        self.weights = sorted(tiles)
        self.remade = sorted(self.reads & tr.remade)
        self.ports, self.kept, self.sums = list(dict.fromkeys(ports)), list(kept), list(sums)
        self.given = [*self.ports, *self.kept, *self.sums, *self.remade, *map(panel_of, self.weights)]
        if len(set(self.given)) < len(self.given):
            raise Unrecordable("two weights that look the same")
        self.table = Table(tr, instructions, self.given, wanted)
        self.index = {memory: i for i, memory in enumerate(self.given)}


class Step:
    """transition of a cell for so many rows, ready to be run through time; with its vector-Jacobian product if asked.

    by_step: that product gives u's and the parameters' gradients too, not those of the state alone.
    Raises Unrecordable for a transition that has what the table has not.
    """

    def __init__(self, cell: Cell[Any], u: Any, state: Any, train: bool, by_step: bool):
        self.rows = leaves(u)[0].shape[0]
        self.by_step = by_step
        numbers = [p for p in cell.parameters() if p.requires_grad] if by_step else []
        with torch.inference_mode(False), torch.no_grad(), _exactly():
            u = tree_map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), u)
            state = tree_map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), state)
            with torch.set_grad_enabled(train), Watch() as watched:
                u = tree_map(lambda leaf: leaf.requires_grad_(by_step), u)
                state = tree_map(lambda leaf: leaf.requires_grad_(train), state)
                o, after = cell.transition(u, state)
                outs = [*leaves(o), *leaves(after)]
                given: list[Tensor] = []
                wrt = [*leaves(state), *(leaves(u) if by_step else []), *numbers] if train else []
                back: list[Tensor | None] = [None] * len(wrt)
                reached = [t for t in outs if t.requires_grad]
                if train and reached:
                    watched.quiet = True
                    given = [torch.ones_like(t, memory_format=torch.contiguous_format) for t in reached]
                    watched.quiet = False
                    back = list(torch.autograd.grad(reached, wrt, given, allow_unused=True))
        self.u, self.state = leaves(u), leaves(state)
        self.o, self.after = o, after
        _check(self.rows, self.state, o, after)
        drawn = [f for f, *_ in watched.seen if torch.Tag.nondeterministic_seeded in getattr(f, "tags", ())]
        if drawn:
            raise Unrecordable(f"{drawn[0]} draws random numbers")
        inputs = [*self.state, *self.u][: len(wrt)]
        back, gradients = back[: len(inputs)], back[len(inputs) :]
        tr = Recording(cell, [*self.u, *self.state, *given])
        alone = apart(watched.seen, {memory_of(t) for t in (*outs, *back) if t is not None})
        for each, gradient in zip(watched.seen, alone, strict=True):
            if gradient and gradients and not isinstance(each[0], str):
                tr.gradient(*each)
            else:
                tr.all([each])
        for t in gradients:
            if t is not None:
                tr.summed(t)
        made = [tr.dense(t, t) for t in outs]
        self.outs, self.lasts = made[: len(leaves(o))], made[len(leaves(o)) :]
        self.adjoints: list[int | None] = []  # by output and state: what arrives there
        arriving = iter(given)
        self.adjoints = [memory_of(next(arriving)) if train and t.requires_grad else None for t in outs]
        backs = [tr.dense(t, like) for t, like in zip(back, inputs, strict=True)]
        self.backs, self.by_u = backs[: len(self.state)], backs[len(self.state) :]
        self.gradients, self.later, self.sums = gradients, tr.later, tr.sums

        late = {m for m in self.adjoints if m is not None}
        worth: set[int] = set()
        for reads, writes, costly in kinds(tr.instructions):
            if reads & late:
                late |= writes
            elif costly:
                worth |= writes
        totals = [at.memory for at in self.sums.values()]
        if not late.issuperset(totals):
            raise Unrecordable("a parameter's gradient is no sum over time")
        self.inputs = [memory_of(t) for t in (*self.u, *self.state)]
        kept: list[int] = []
        self.backward: Half | None = None
        if train:
            rest = [each for each in tr.instructions if isinstance(each, Group) or not each.writes() & worth]
            wanted = {*backs, *tr.noted(), *totals}
            kept = sorted(worth & (set().union(*(each.reads() for each in needed(rest, wanted))) | tr.noted()))
            ports = [*self.inputs, *(m for m in self.adjoints if m is not None), *backs]
            self.backward = Half(tr, rest, ports, [*kept, *sorted(tr.noted() - {*kept})], wanted, totals)
        self.forward = Half(tr, tr.instructions, [*self.inputs, *made], kept, {*made, *kept})
        self.sizes = {m: tr.made[m] for m in {*made, *kept, *backs, *tr.noted(), *totals}}
        self.sizes |= {memory_of(t): t.numel() for t in (*self.u, *self.state, *given)}
        self.numbers = sum(tr.made.values()) // self.rows + 1  # that a row's step makes, forwards and back
        halves = [self.forward] + ([self.backward] if self.backward else [])
        wanted = set().union(*({*h.remade, *(w.memory for w in h.weights)} for h in halves))
        constants = {m: tr.constants[m] for m in wanted if m in tr.constants}
        wanted |= {memory_of(t) for each in self.later for t in flat((each.args, each.kwargs)) if isinstance(t, Tensor)}
        self.before: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        for one in reversed(tr.before):
            results = {memory_of(r) for r in one[3]}
            if results & wanted:
                wanted |= {memory_of(t) for t in flat((one[1], one[2])) if isinstance(t, Tensor)}
                self.before.insert(0, one)
        self.constants = constants

    def weights_now(self) -> dict[int, Tensor]:
        """What the step makes of parameters alone, made of them as they are."""
        made: dict[int, Tensor] = {}
        with torch.no_grad(), _exactly():
            for func, args, kwargs, results in self.before:
                _again(func, args, kwargs, results, made, {})
        return made

    def summed(self, noted: dict[int, Tensor], totals: dict[int, Tensor]) -> list[Tensor | None]:
        """The gradients of parameters. noted, (n, a memory): factors at all steps; totals: what the steps added up."""
        sums = {at: totals[total.memory].view(at.sizes) for at, total in self.sums.items()}
        with torch.no_grad(), _exactly():
            made = self.weights_now() if self.later else {}
            for func, args, kwargs, results, factors in self.later:
                if factors:
                    x, w = (_at_all_steps(noted[at.memory], at) for at in factors)
                    total = x.movedim(0, -2).flatten(-2) @ w.movedim(0, -3).flatten(-3, -2)
                    made[memory_of(results[0])] = torch.empty_like(results[0]).copy_(total)
                else:
                    _again(func, args, kwargs, results, made, sums)
        return [None if t is None else _now(t, made, sums).clone() for t in self.gradients]  # two may be one

    def laid(self, w: Places, made: dict[int, Tensor]) -> Tensor:
        """A matrix of parameters in panels."""
        from ..products.in_numba import panels

        whole = made.get(w.memory, self.constants[w.memory])
        return panels(whole.detach().as_strided(w.sizes, w.strides, w.offset))


def _at_all_steps(memory: Tensor, at: Places) -> Tensor:
    """memory (n, its numbers) -> what stands at these places, (n, ...)."""
    return memory.as_strided((len(memory), *at.sizes), (memory.shape[1], *at.strides), at.offset)


def _now(x: Any, made: dict[int, Tensor], sums: dict[Places, Tensor]) -> Any:
    """What stands for x of the recorded step."""
    if isinstance(x, tuple | list):
        return type(x)(_now(each, made, sums) for each in x)
    if not isinstance(x, Tensor):
        return x
    if memory_of(x) in made:
        return made[memory_of(x)].as_strided(x.shape, x.stride(), x.storage_offset())
    return sums.get(places_of(x), x)


def _again(
    func: Any, args: Any, kwargs: dict[str, Any], results: list[Tensor], made: dict[int, Tensor],
    sums: dict[Places, Tensor],
) -> None:  # fmt: skip
    """One operation, on what now stands for its arguments."""
    found = flat(func(*_now(args, made, sums), **{k: _now(v, made, sums) for k, v in kwargs.items()}))
    new = [r for r in found if isinstance(r, Tensor)]
    made |= {memory_of(old): one for old, one in zip(results, new, strict=True)}


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
