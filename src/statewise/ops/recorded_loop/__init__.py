"""Any cell's loop over time, recorded and run as one compiled call; nothing of the cell is compiled for it.

One step, o_t, s_t = f(u_t, s_{t-1}), is run under a watch that sees the operations of torch below it, and each becomes
a row of a table that compiled code goes through: see `ops.recorded`. Here that code runs the table for t = 0..T-1, for
some rows of the batch at a time, and threads share out these groups of rows. Backwards the same is done with what
torch's own derivatives make of the step: lam_{t-1} = (ds_t/ds_{t-1})^T lam_t + (do_t/ds_{t-1})^T g_t, and likewise the
gradients of u and of the parameters, see `step`. Where the latter have no translation, the loop backwards finds lam
alone; then one vector-Jacobian product of the eager step over many times at once gives the rest.

Products and sums of the forward pass are kept for the backward one, the rest is computed again. What the step makes of
parameters alone is made again before each call, so an optimiser's step is seen. A record is compared with the eager
step, values and gradients, before it is used.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Cell, clear_past_end, leaves, tree_map
from .. import dispatch
from ..fresh import empty
from ..opaque import is_traced
from ..recorded import Unrecordable, watching

__all__ = ["recorded_loop", "why_not"]

ROWS = 16  # of the batch that go through time together, at most: more share reads of weights, but leave the caches
SHORTEST = 4  # steps: below, recording never pays
KEPT = 8  # records of one cell, by batch
STRETCH = 1 << 21  # numbers that the eager step makes at once in the product over all times: a cache's worth
TILE = 1 << 15  # bytes of an input's rows over a tile of time, which lie beside each other in the nearest caches
LONGEST = 32  # steps in a tile
TRIED = 3  # steps that a record is compared over
CLOSE = 1e-4  # of the largest number: by how much a record may differ from the eager step
NOTHING = 1e-6  # of the largest number of all: what is smaller may be rounding alone


def recorded_loop(
    cell: Cell[Any], u: Any, state: Any, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Any, Any]:
    """cell.transition over dim 1 of u: what `Cell.scan` returns, and its gradients, without Python between the steps.

    u: a tree of (B, T, ...); state: a tree of (B, ...), both float32 on a CPU. reset (B, T) bool: the state before t is
    cell.initial_state. lengths (B,): row b ends after lengths[b] steps; outputs are zero from there on.
    The transition must be pure and treat each row by itself. Where it cannot be recorded (`why_not`), this is the loop.
    Differentiable once in u, state, the initial state and the cell's parameters; a second derivative raises.
    """
    found = _find(cell, u, state)
    if isinstance(found, str):
        return Cell.scan(cell, u, state, reset, lengths)
    return found(u, state, reset, lengths)


def why_not(cell: Cell[Any], u: Any, state: Any) -> str | None:
    """Why `recorded_loop` would run this as the plain loop, or None."""
    found = _find(cell, u, state)
    return found if isinstance(found, str) else None


# ---- records of cells


@dataclass
class _Records:
    found: dict[Any, _Recorded | str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: Any) -> _Records:
        return _Records()


_of_cells: weakref.WeakKeyDictionary[Cell[Any], _Records] = weakref.WeakKeyDictionary()
_trying = threading.local()


def _find(cell: Cell[Any], u: Any, state: Any) -> _Recorded | str:
    reason = _unfit(u, state)
    if reason is not None:
        return reason
    if any(type(t) not in (Tensor, nn.Parameter) for t in _numbers(cell)):
        return "parameters that are no plain tensors"
    batch = len(leaves(u)[0])
    frozen = tuple(not p.requires_grad for p in cell.parameters())
    train = torch.is_grad_enabled() and not all((*frozen, *(not t.requires_grad for t in (*leaves(u), *leaves(state)))))
    rows = _rows(batch)
    where = tuple((t.data_ptr(), t.shape, t.stride()) for t in _numbers(cell))
    key = rows, train and frozen, cell.training, _shape(u, 2), _shape(state, 1), where, _attributes(cell)
    records = _of_cells.get(cell)
    if records is None:
        records = _of_cells.setdefault(cell, _Records())
    made = records.found.get(key)
    if made is None:
        with records.lock:
            made = records.found.get(key)
            if made is None:
                made = _record(cell, u, state, rows, train)
                while len(records.found) >= KEPT:
                    del records.found[next(iter(records.found))]
                records.found[key] = made
    return made


def _unfit(u: Any, state: Any) -> str | None:
    given = [*leaves(u), *leaves(state)]
    if not leaves(u) or not leaves(state):
        return "nothing comes in, or nothing is kept"
    if any(is_traced(t) for t in given) or watching() is not None or torch.is_inference_mode_enabled():
        return "something else watches the operations"
    if any(t.device.type != "cpu" for t in given):
        return f"device {next(t.device.type for t in given if t.device.type != 'cpu')} (takes cpu)"
    if any(t.dtype != torch.float32 for t in given):
        return f"dtype {next(t.dtype for t in given if t.dtype != torch.float32)} (takes torch.float32)"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if not _installed():
        return "numba is not installed"
    if dispatch.asked_for() not in (None, "numba"):
        return f"backend {dispatch.asked_for()!r} was asked for"
    batch, steps = leaves(u)[0].shape[:2]
    if batch == 0 or steps < SHORTEST or getattr(_trying, "on", False):
        return f"{batch} rows of {steps} steps"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def _rows(batch: int) -> int:
    """Of a group: as many for each thread, few enough sizes to record."""
    from .in_numba import workers

    threads = workers(batch)
    groups = -(-batch // (ROWS * threads)) * threads
    few = -(-batch // groups)
    return next(n for n in (1, 2, 3, 4, 6, 8, 12, 16) if n >= few)


def _shape(tree: Any, skip: int) -> Any:
    if isinstance(tree, Tensor):
        return tuple(tree.shape[skip:])
    return None if tree is None else (type(tree), *(_shape(part, skip) for part in tree))


def _numbers(cell: Cell[Any]) -> list[Tensor]:
    return [*cell.parameters(), *cell.buffers()]


def _attributes(cell: Cell[Any]) -> tuple[Any, ...]:
    """Plain values that a step may have read: a record holds what they were."""
    plain = (bool, int, float, str)
    return tuple((k, v) for m in cell.modules() for k, v in m.__dict__.items() if isinstance(v, plain))


def _record(cell: Cell[Any], u: Any, state: Any, rows: int, train: bool) -> _Recorded | str:
    reason = ""
    for by_step in (True, False) if train else (False,):
        try:
            _trying.on = True
            with torch.random.fork_rng(devices=[]):
                return _Recorded(cell, u, state, rows, train, by_step)
        except Unrecordable as error:
            reason = str(error)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        finally:
            _trying.on = False
    return reason


# ---- one record


class _Recorded:
    """What was recorded of a cell's step, as a loop."""

    def __init__(self, cell: Cell[Any], u: Any, state: Any, rows: int, train: bool, by_step: bool):
        from .step import Step

        self.cell = weakref.ref(cell)
        self.rows, self.train = rows, train
        pick = torch.arange(rows) % len(leaves(u)[0])
        self.step = Step(
            cell, tree_map(lambda leaf: leaf.detach()[pick, 0], u), tree_map(lambda s: s.detach()[pick], state), train,
            by_step,
        )  # fmt: skip
        self.check(cell, u, state)

    def __call__(self, u: Any, state: Any, reset: Tensor | None, lengths: Tensor | None) -> tuple[Any, Any]:
        cell = self.cell()
        assert cell is not None
        fresh = cell.initial_state(len(leaves(u)[0])) if reset is not None else None
        job = _Job(self, cell, u, reset, lengths)
        inputs, first, after = leaves(u), leaves(state), leaves(fresh)
        if not self.train:
            with torch.no_grad():
                found = job.forward(inputs, first, after)
        else:
            numbers = [p for p in cell.parameters() if p.requires_grad]
            job.counts = len(inputs), len(first), len(after)
            found = _Loop.apply(job, *inputs, *first, *after, *numbers)
        results = iter(found)
        o = tree_map(lambda _: next(results), self.step.o)
        return o, tree_map(lambda _: next(results), self.step.after)

    def check(self, cell: Cell[Any], u: Any, state: Any) -> None:
        """Raises Unrecordable where values or gradients are not those of the loop."""
        batch = self.rows + 1  # in two groups, so that a step that mixes rows is found
        rng = torch.Generator().manual_seed(0)

        def near(t: Tensor, rows: Tensor) -> Tensor:
            t = t.detach()[rows]
            size = t.abs().nan_to_num(0, 0, 0).mean() if t.numel() else 0.0
            return t + 0.3 * (size + 0.1) * torch.randn(t.shape, generator=rng)

        pick = torch.arange(batch) % len(leaves(u)[0])
        with torch.inference_mode(False), torch.no_grad():
            us = tree_map(lambda leaf: near(leaf[:, :TRIED], pick), u)
            s = tree_map(lambda leaf: near(leaf, pick), state)
        results = []
        for run in (self, functools.partial(Cell.scan, cell)):
            with torch.inference_mode(False), torch.set_grad_enabled(self.train):
                us = tree_map(lambda leaf: leaf.detach().requires_grad_(self.train), us)
                s = tree_map(lambda leaf: leaf.detach().requires_grad_(self.train), s)
                o, last = run(us, s, None, None)
                found = [*leaves(o), *leaves(last)]
                if self.train:
                    weigh = torch.Generator().manual_seed(1)
                    total = sum((t * torch.randn(t.shape, generator=weigh)).sum() for t in found if t.requires_grad)
                    if isinstance(total, Tensor):
                        wrt = [*leaves(us), *leaves(s), *(p for p in cell.parameters() if p.requires_grad)]
                        found += torch.autograd.grad(total, wrt, allow_unused=True, materialize_grads=True)
                results.append([t.detach() for t in found])
        largest = max((_size(t) for t in results[1]), default=0.0)
        for got, want in zip(*results, strict=True):
            if not _near(got, want, NOTHING * largest):
                raise Unrecordable("the record gives other numbers: a step must be pure and treat each row by itself")


def _size(t: Tensor) -> float:
    """The largest finite number."""
    return float(t.abs().nan_to_num(0, 0, 0).max()) if t.numel() else 0.0


def _near(got: Tensor, want: Tensor, rounding: float) -> bool:
    allowed = CLOSE * _size(want) + rounding
    return got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=allowed, equal_nan=True)


class _Job:
    """One call."""

    counts: tuple[int, int, int]

    def __init__(self, loop: _Recorded, cell: Cell[Any], u: Any, reset: Tensor | None, lengths: Tensor | None):
        self.loop, self.step, self.cell, self.u = loop, loop.step, cell, tree_map(lambda _: None, u)
        self.like = tree_map(lambda leaf: leaf.new_empty(0), u)
        self.batch, self.steps = leaves(u)[0].shape[:2]
        self.groups = -(-self.batch // loop.rows)
        self.whole = self.groups * loop.rows  # rows: the last one stands again for those that are missing in a group
        self.reset = None if reset is None else self._filled(reset)
        self.lengths = None if lengths is None else self._filled(lengths.to(torch.int32))
        self.kept: list[Tensor] = []  # products and sums of each step
        self.before: list[Tensor] = []  # states before each step

    def forward(self, u: list[Tensor], first: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
        """o and the last state; notes what the way back needs."""
        step, half = self.step, self.step.forward
        u, first, fresh = ([self._filled(t) for t in given] for given in (u, first, fresh))
        outs = [self._times(t) for t in leaves(step.o)]
        lasts = [torch.empty_like(t) for t in first]
        if self.loop.train:
            self.before = [self._times(t) for t in first]
            self.kept = [self._by_step(m) for m in half.kept]
        states = [
            (step.inputs[len(u) + i], step.lasts[i], t, fresh[i] if fresh else None,
             self.before[i] if self.before else None, lasts[i])
            for i, t in enumerate(first)
        ]  # fmt: skip
        inputs, outputs = list(zip(step.inputs, u, strict=False)), list(zip(step.outs, outs, strict=True))
        self._run(half, inputs, outputs, states, self.kept, False)
        return [t[: self.batch] for t in (*outs, *lasts)]

    def backward(
        self,
        u: list[Tensor],
        numbers: list[Tensor],
        g_outs: list[Tensor],
        g_lasts: list[Tensor],
        wanted: Sequence[bool],
    ) -> tuple[list[Tensor | None], ...]:
        """The gradients of u where wanted, of the first states, of what resets left, and of the parameters.

        g_outs are zero past a row's end.
        """
        step, half = self.step, self.step.backward
        assert half is not None
        u = [self._filled(t) for t in u]
        g_outs, g_lasts = ([self._filled(g, zero=True) for g in given] for given in (g_outs, g_lasts))
        inputs = list(zip(step.inputs, [*u, *self.before], strict=True))
        count = len(g_outs)
        inputs += [(m, g) for m, g in zip(step.adjoints[:count], g_outs, strict=True) if m is not None]
        lam = [self._times(g) for g in g_lasts] if not step.by_step else []
        by_u = [self._times(t[:, 0]) if want and step.by_step else None for t, want in zip(u, wanted, strict=True)]
        firsts = [torch.empty_like(g) for g in g_lasts]
        fresh = [torch.zeros_like(g) if self.reset is not None else None for g in g_lasts]
        states = [
            (step.adjoints[count + i], step.backs[i], g, fresh[i], lam[i] if lam else None, firsts[i])
            for i, g in enumerate(g_lasts)
        ]
        outputs = [(m, g) for m, g in zip(step.by_u, by_u, strict=False) if g is not None]
        noted = [*self.kept, *map(self._by_step, half.kept[len(self.kept) :])]
        totals = self._run(half, inputs, outputs, states, noted, True)
        if step.by_step:
            by_step = {m: t.flatten(0, 1) for m, t in zip(half.kept, noted, strict=True)}
            sums = step.summed(by_step, totals)
        else:
            by_u, sums = self.rest(u, numbers, g_outs, lam, wanted)
        return *([None if t is None else t[: self.batch] for t in found] for found in (by_u, firsts, fresh)), sums

    def _filled(self, t: Tensor, zero: bool = False) -> Tensor:
        """With whole groups of rows."""
        if self.whole == self.batch:
            return t.contiguous()
        more = t[-1:].expand(self.whole - self.batch, *t.shape[1:])
        return torch.cat([t, torch.zeros_like(more) if zero else more])

    def _by_step(self, memory: int) -> Tensor:
        """For what a step makes, at all times."""
        return empty(self.before[0], self.groups, self.steps, self.step.sizes[memory])

    def _times(self, like: Tensor) -> Tensor:
        return empty(like.detach(), self.whole, self.steps, *like.shape[1:])

    def _run(
        self, half: Any, inputs: Any, outputs: Any, states: Any, kept: list[Tensor], back: bool
    ) -> dict[int, Tensor]:
        """kept: memory of which each step has its own. Returns what the steps added up."""
        import numpy as np

        from . import in_numba

        step, rows = self.step, self.loop.rows
        made = step.weights_now()
        remade = [made[m].contiguous() if not made[m].is_contiguous() else made[m] for m in half.remade]
        laid = [step.laid(w, made) for w in half.weights]
        largest = max(step.sizes[m] for m in half.ports)
        tile = min(self.steps, max(1, min(LONGEST, TILE // (4 * largest))))
        places: list[int] = []  # of the dense rows that a step reads and writes, by time in a tile, and one more
        end = 0
        for memory in half.ports:
            places.append(end)
            end += -(-4 * (tile + 1) * step.sizes[memory] // 64) * 64
        totals = []
        for memory in half.sums:
            totals.append(end)
            end += -(-4 * step.sizes[memory] // 64) * 64
        # an adjoint that the step does not read is carried all the same, in memory at the end
        spare = [-(-4 * (tile + 1) * rows * math.prod(s[2].shape[1:]) // 64) * 64 for s in states]
        room = -(-(end + half.table.room + sum(spare)) // 64) * 64
        workers = in_numba.workers(self.groups)
        arena = torch.zeros(workers * room // 4 + 16)
        start = -(-arena.data_ptr() // 64) * 64
        words = len(half.given) + len(half.table.constants) + len(half.table.within)
        bases = np.zeros((self.groups, words + len(states)), np.int64)
        for g, thread in enumerate(in_numba.owners(self.groups, workers)):
            own = start + thread * room
            given = [own + at for at in places]
            for t in kept:
                size = 4 * t.shape[2]
                given.append(t.data_ptr() + (g * self.steps + (self.steps - 1 if back else 0)) * size)
            given += [own + at for at in totals]
            given += [t.data_ptr() for t in (*remade, *laid)]
            bases[g, :words] = half.table.addresses(given, own + end)
            bases[g, words:] = own + end + half.table.room + np.cumsum([0, *spare[:-1]])
        advance = [[len(half.ports) + i, -4 * t.shape[2] if back else 4 * t.shape[2]] for i, t in enumerate(kept)]

        def row(t: Tensor, skip: int) -> int:
            return 4 * math.prod(t.shape[skip:])

        ins = [[half.index[m], row(t, 2), t.data_ptr()] for m, t in inputs if m in half.reads]
        outs = [[half.index[m], row(t, 2), t.data_ptr()] for m, t in outputs]
        moves = {base: rows * size for base, size, _ in (*ins, *outs)}
        carried = []
        for i, (memory, after, first, fresh, keep, last) in enumerate(states):
            base = half.index[memory] if memory is not None else words + i
            address = [0 if t is None else t.data_ptr() for t in (fresh, keep)]
            carried.append([base, row(first, 1), first.data_ptr(), *address, half.index[after], last.data_ptr()])
            if keep is not None:
                moves[base] = rows * row(first, 1)
        table = lambda rows, width: np.array(rows, np.int64).reshape(-1, width)
        scratch = torch.empty((workers * in_numba.SCRATCH + 64) // 4)
        call = in_numba.Call(
            table=half.table.rows, numbers=half.table.numbers.ctypes.data, bases=bases,
            moves=table(list(moves.items()), 2), advance=table(advance, 2),
            inputs=table(ins, 3), outputs=table(outs, 3), states=table(carried, 7), rows=rows, steps=self.steps,
            tile=tile, reset=0 if self.reset is None else self.reset.data_ptr(),
            lengths=0 if self.lengths is None else self.lengths.data_ptr(), back=int(back),
            scratch=-(-scratch.data_ptr() // 64) * 64,
        )  # fmt: skip
        in_numba.run(call, workers, (half, arena, scratch, remade, laid, self, inputs, outputs, states, kept))
        begin = (start - arena.data_ptr()) // 4
        return {
            m: arena.as_strided((workers, step.sizes[m]), (room // 4, 1), begin + at // 4).sum(0)
            for m, at in zip(half.sums, totals, strict=True)
        }

    def rest(self, u: list[Tensor], wanted: list[Tensor], g_outs: list[Tensor], lam: list[Tensor],
             into: Sequence[bool]) -> tuple[list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """Gradients of u, where they are wanted, and of parameters, by the eager step over many times at once."""
        by_u = [self._times(t[:, 0]) if want else None for t, want in zip(u, into, strict=True)]
        sums: list[Tensor | None] = [None] * len(wanted)
        flat = lambda tensors: [t.flatten(0, 1) for t in tensors]
        us, gs, states = flat(u), flat([*g_outs, *lam]), flat(self.before)  # what stands for missing rows has g zero
        to = [None if t is None else t.flatten(0, 1) for t in by_u]
        size = max(1, STRETCH // self.step.numbers)
        for low in range(0, self.whole * self.steps, size):
            part = slice(low, low + size)
            mine = [t[part].detach().requires_grad_(want) for t, want in zip(us, into, strict=True)]
            left, held = iter(mine), iter(states)
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                o, after = self.cell.transition(
                    tree_map(lambda _: next(left), self.like),  # noqa: B023
                    tree_map(lambda _: next(held)[part], self.step.after),  # noqa: B023
                )
                pairs = [(t, g[part]) for t, g in zip([*leaves(o), *leaves(after)], gs, strict=True) if t.requires_grad]
                wrt = [*(t for t, want in zip(mine, into, strict=True) if want), *wanted]
                if not pairs or not wrt:
                    continue
                found = torch.autograd.grad([t for t, _ in pairs], wrt, [g for _, g in pairs], allow_unused=True)
            each = iter(found)
            for out in to:
                if out is not None:
                    g = next(each)
                    out[part] = 0 if g is None else g
            for i, g in enumerate(each):
                before = sums[i]
                sums[i] = g if before is None else before if g is None else before + g
        return by_u, sums


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Any:
        inputs, first, fresh = job.counts
        ctx.job = job
        ctx.save_for_backward(*tensors)
        ends = inputs, inputs + first, inputs + first + fresh
        u, state, start = (list(tensors[a:b]) for a, b in zip((0, *ends), ends))
        return tuple(job.forward(u, state, start))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        job, tensors = ctx.job, ctx.saved_tensors
        found = _Back.apply(job, ctx.needs_input_grad[1:], len(grads), *grads, *tensors)
        return None, *found


class _Back(torch.autograd.Function):
    """The gradients; a function of its own, so that a second derivative is refused."""

    @staticmethod
    def forward(ctx: Any, job: _Job, wanted: Sequence[bool], count: int, *tensors: Tensor) -> Any:
        grads, tensors = tensors[:count], tensors[count:]
        inputs, first, fresh = job.counts
        u, numbers = list(tensors[:inputs]), list(tensors[inputs + first + fresh :])
        outs = len(grads) - first
        g_outs = list(grads[:outs])
        if job.lengths is not None:
            g_outs = [clear_past_end(g, job.lengths[: job.batch]) for g in g_outs]
        by_u, firsts, freshs, sums = job.backward(u, numbers, g_outs, list(grads[outs:]), wanted[:inputs])
        return (*by_u, *firsts, *(freshs[:fresh] if fresh else ()), *sums)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "a recorded loop has first derivatives only: a second one needs the loop (method='loop')"
        )
