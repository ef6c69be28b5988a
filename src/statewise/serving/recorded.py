"""A step, recorded once and then run without Python.

One eager step is watched from below: every operation of torch, on which tensors, and the views that these are of each
other's memory. Each becomes a row of a table that compiled code goes through (`in_numba`); what depends on parameters
alone is computed once and kept. Operations on the same places are put together, and memory is used again as soon as
nobody reads it.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import RecurrentLayer, leaves, tree_map
from ..ops.opaque import is_traced

aten = torch.ops.aten
_version = operator.attrgetter("_version")
FEW = 8  # rows of x up to which reading the weights is what takes the time
FRESH = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default} | {
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
}  # fmt: skip  # of a tensor only its shape is wanted
SHARED = 1 << 13  # places from which on a group of operations is shared out
PART = 1 << 19  # bytes of weights that are claimed at a time
KEPT = 4  # records of a step: one for each batch


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


Instruction = Group | Product | Lookup | Reduction


class Weights(NamedTuple):
    """Rows of weights (N, K): kept float32, bfloat16 or int8, the last with a scale for each row."""

    kept: Tensor
    scale: Tensor | None


# ---- watching


_here = threading.local()


def watching() -> Watch | None:
    """What watches the steps of this thread."""
    return getattr(_here, "watch", None)


class Watch(TorchDispatchMode):
    """The operations of one step, in order: (function or name, arguments, results)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.quiet:
            self.seen.append((func, args, kwargs or {}, result))
        return result

    def __enter__(self) -> Watch:
        _here.watch = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _here.watch = None
        super().__exit__(*error)

    def note(self, name: str, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """compute(), seen as one operation."""
        self.quiet = True
        try:
            result = compute()
        finally:
            self.quiet = False
        self.seen.append((name, args, {}, result))
        return result


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _places(t: Tensor) -> Places:
    return Places(_memory(t), int(t.storage_offset()), tuple(t.shape), tuple(t.stride()))


def _own(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers that hold plain numbers."""
    return [t for t in (*model.parameters(), *model.buffers()) if type(t) in (Tensor, nn.Parameter)]


# ---- translating


class _Translation:
    """What was seen, as instructions."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]):
        self.inputs = {_memory(t): t for t in inputs}
        self.constants: dict[int, Tensor] = {}  # by memory: a tensor that has all of it
        for t in _own(model):
            self.constants[_memory(t)] = t.detach()
        self.own = set(self.constants)
        self.folded: set[int] = set()  # parameters of which something was computed once
        self.made: dict[int, int] = {}  # memory that a step writes: how many numbers
        self.instructions: list[Instruction] = []
        self.alive: list[Any] = []  # memory is known by its address

    def all(self, seen: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        for func, args, kwargs, result in seen:
            self.alive.append((args, kwargs, result))
            if isinstance(func, str):
                self._special(func, args, result)
            else:
                self._one(func, args, kwargs, result)

    def _special(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        if name == "product":
            x, w, bias = args
            self.product(x, w, bias, result)
        else:
            ids, w = args
            self.look_up(w, ids, result)

    def _one(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in _flat(result) if isinstance(t, Tensor)]
        if func in (aten._local_scalar_dense.default, aten.equal.default) or not results:
            raise Unrecordable(f"{func} asks for a number")
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise Unrecordable(f"{func} is not pure")
        given = {_memory(t) for t in tensors}
        if all(_memory(r) in given for r in results):
            return  # views
        if any(_memory(r) in given for r in results):
            raise Unrecordable(f"{func} gives a view and more")
        if func in FRESH or all(_memory(t) in self.constants for t in tensors):
            self.folded |= {m for m in given if m in self.own}
            if "empty" in str(func):
                raise Unrecordable(f"{func} holds no numbers")
            for r in results:
                if _memory(r) not in self.constants:
                    self.constants[_memory(r)] = r
            return
        translate = TRANSLATIONS.get(func)
        if translate is None:
            raise Unrecordable(f"{func} has no translation")
        translate(self, args, kwargs, results[0])

    def _read(self, t: Tensor) -> Places:
        memory = _memory(t)
        if memory not in self.made and memory not in self.constants and memory not in self.inputs:
            raise Unrecordable("a tensor comes from outside of the step")
        return _places(t)

    def read(self, t: Tensor) -> Places:
        """An operand: float32, or truth values that the step itself made."""
        if t.dtype != torch.float32 and not (t.dtype == torch.bool and _memory(t) in self.made):
            raise Unrecordable(f"{t.dtype} takes part")
        return self._read(t)

    def _make(self, t: Tensor) -> None:
        if t.dtype not in (torch.float32, torch.bool):
            raise Unrecordable(f"{t.dtype} is made")
        self.made[_memory(t)] = max(1, sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1)

    def new(self, sizes: Sequence[int]) -> Places:
        """Memory that the recorded step did not have."""
        made = torch.empty(tuple(sizes))
        self.alive.append(made)
        self._make(made)
        return _places(made)

    def point(
        self, name: str, out: Tensor | Places, operands: Sequence[Tensor | Places], p: float = 0.0, q: float = 0.0
    ) -> Places:
        if isinstance(out, Tensor):
            if _memory(out) not in self.made:
                self._make(out)
            out = _places(out)
        given = [_spread(self.read(o) if isinstance(o, Tensor) else o, out.sizes) for o in operands]
        if math.prod(out.sizes):
            self._place(Point(name, out, given, float(p), float(q)))
        return out

    def _place(self, point: Point) -> None:
        """Into a group with the same sizes, if order allows."""
        order = sorted(
            (d for d in range(len(point.out.sizes)) if point.out.sizes[d] > 1), key=lambda d: -point.out.strides[d]
        )
        turn = lambda o: o._replace(sizes=tuple(o.sizes[d] for d in order), strides=tuple(o.strides[d] for d in order))
        point.out, point.operands = turn(point.out), [turn(o) for o in point.operands]
        sizes = point.out.sizes
        after: set[int] = set()
        for at in range(len(self.instructions) - 1, max(-1, len(self.instructions) - 24), -1):
            group = self.instructions[at]
            if isinstance(group, Group) and group.sizes == sizes and _in_step(group, point):
                own, rest = group.writes(), self.instructions[at + 1 :]
                if not any(own & other.reads() for other in rest):
                    self.instructions[at:] = [*rest, group]
                elif point.reads() & after:
                    continue
                group.points.append(point)
                return
            after |= group.writes()
        self.instructions.append(Group(sizes, [point]))

    def contiguous(self, t: Tensor) -> Places:
        at = self.read(t)
        if t.is_contiguous():
            return at
        return self.point("copy", self.new(t.shape), [at])

    def product(self, x: Tensor, w: Weights, bias: Tensor | None, y: Tensor) -> None:
        """x (..., K), w (N, K), y (..., N)."""
        if bias is not None and not bias.is_contiguous():
            raise Unrecordable("a bias that is a view")
        if not y.is_contiguous():
            raise Unrecordable("a product that is not laid out in rows")
        given = self.contiguous(x)
        if _memory(y) not in self.made:
            self._make(y)
        self.instructions.append(Product(w, given, _places(y), None if bias is None else self.read(bias)))

    def constant(self, t: Tensor) -> Tensor:
        if _memory(t) not in self.constants or t.dtype != torch.float32:
            raise Unrecordable("a product of two factors that change")
        return t

    def weights(self, turned: Tensor) -> Weights:
        """From (K, N)."""
        w = self.constant(turned).t()
        if not w.is_contiguous():
            self.folded |= {_memory(w)} & self.own
            w = w.contiguous()
        return Weights(w, None)

    def look_up(self, w: Weights, ids: Tensor, out: Tensor) -> None:
        if not (ids.is_contiguous() and out.is_contiguous()):
            raise Unrecordable("ids that are not laid out in rows")
        self._make(out)
        self.instructions.append(Lookup(w, self._read(ids), ids.element_size(), _places(out)))

    def reduce(self, what: int, args: Sequence[Any], out: Tensor, *, mean: bool = False) -> None:
        x, dims = args[0], args[1] if len(args) > 1 else None
        dims = range(x.ndim) if dims is None or dims == [] else ([dims] if isinstance(dims, int) else dims)
        gone_dims = {d % max(1, x.ndim) for d in dims} if x.ndim else set()
        at = self.read(x)
        kept = [(at.sizes[d], at.strides[d]) for d in range(x.ndim) if d not in gone_dims and at.sizes[d] != 1]
        gone = [(at.sizes[d], at.strides[d]) for d in sorted(gone_dims) if at.sizes[d] != 1]
        if not out.is_contiguous() or 0 in at.sizes:
            raise Unrecordable("a reduction that is not laid out in rows, or of nothing")
        self._make(out)
        kept, gone = _joined(kept), _joined(gone)
        if len(kept) > 3 or len(gone) > 2:
            raise Unrecordable("a reduction over too many dimensions")
        factor = 1 / math.prod(n for n, _ in gone) if mean else 1.0
        self.instructions.append(Reduction(what, _places(out), at, kept, gone, factor))


def _flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        for part in tree:
            yield from _flat(part)
    else:
        yield tree


def _spread(o: Places, sizes: tuple[int, ...]) -> Places:
    """As an operand of what has these sizes."""
    extra = len(sizes) - len(o.sizes)
    strides = [0] * extra + [0 if n == 1 else s for n, s in zip(o.sizes, o.strides, strict=True)]
    return o._replace(sizes=sizes, strides=tuple(strides))


def _plain(o: Places) -> bool:
    """Whether places follow each other in memory in their order."""
    step = 1
    for size, stride in zip(reversed(o.sizes), reversed(o.strides), strict=True):
        if stride != step:
            return False
        step *= size
    return True


def _in_step(group: Group, point: Point) -> bool:
    """Whether what the point reads of the group is at its own place."""
    own = {p.out.memory: p.out for p in group.points}
    return all(o == own[o.memory] for o in point.operands if o.memory in own)


def _joined(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for size, stride in dims:
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


# ---- operations of torch


Translate = Callable[[_Translation, tuple[Any, ...], dict[str, Any], Tensor], None]
TRANSLATIONS: dict[Any, Translate] = {}


def _translates(*functions: Any) -> Callable[[Translate], Translate]:
    def register(translate: Translate) -> Translate:
        TRANSLATIONS.update(dict.fromkeys(functions, translate))
        return translate

    return register


def _plainly(name: str, count: int) -> Translate:
    def translate(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if len(args) != count or kwargs:
            raise Unrecordable(f"{name} with {len(args)} arguments")
        tr.point(name, out, args)

    return translate


for _function, _name, _count in (
    (aten.rsqrt.default, "rsqrt", 1), (aten.sqrt.default, "sqrt", 1), (aten.reciprocal.default, "reciprocal", 1),
    (aten.exp.default, "exp", 1), (aten.expm1.default, "expm1", 1), (aten.sigmoid.default, "sigmoid", 1),
    (aten.silu.default, "silu", 1), (aten.tanh.default, "tanh", 1), (aten.softplus.default, "softplus", 1),
    (aten.log_sigmoid_forward.default, "log_sigmoid", 1), (aten.abs.default, "abs", 1),
    (aten.maximum.default, "maximum", 2), (aten.where.self, "where", 3), (aten.gt.Tensor, "gt", 2),
    (aten.ge.Tensor, "ge", 2), (aten.lt.Tensor, "lt", 2), (aten.le.Tensor, "le", 2),
    (aten.logaddexp.default, "logaddexp", 2),
):  # fmt: skip
    TRANSLATIONS[_function] = _plainly(_name, _count)


def _sum_of(sign: float) -> Translate:
    def translate(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        x, y = args[:2]
        by = sign * kwargs.get("alpha", 1)
        if isinstance(y, Tensor):
            tr.point("add", out, [x, y], p=by)
        else:
            tr.point("affine", out, [x], p=1.0, q=by * y)

    return translate


TRANSLATIONS[aten.add.Tensor], TRANSLATIONS[aten.sub.Tensor] = _sum_of(1.0), _sum_of(-1.0)


@_translates(aten.rsub.Scalar)
def _rsub(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("affine", out, args[:1], p=-float(args[2] if len(args) > 2 else 1), q=args[1])


@_translates(aten.mul.Tensor)
def _mul(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, y = args
    if isinstance(y, Tensor):
        tr.point("mul", out, [x, y])
    else:
        tr.point("affine", out, [x], p=y)


@_translates(aten.div.Tensor)
def _div(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if kwargs:
        raise Unrecordable("division that rounds")
    x, y = args
    if isinstance(y, Tensor):
        tr.point("div", out, [x, y])
    else:
        tr.point("affine", out, [x], p=1 / y)


@_translates(aten.neg.default)
def _neg(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("affine", out, args, p=-1.0)


@_translates(aten.pow.Tensor_Scalar)
def _pow(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, power = args
    names = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if power == 2:
        tr.point("mul", out, [x, x])
    elif power in names:
        tr.point(names[power], out, [x])
    else:
        raise Unrecordable(f"the power {power}")


@_translates(aten.clamp.default, aten.clamp_min.default, aten.relu.default)
def _clamp(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    least: Any = args[1] if len(args) > 1 else None if kwargs else 0.0  # relu has no arguments
    most: Any = args[2] if len(args) > 2 else None
    least, most = kwargs.get("min", least), kwargs.get("max", most)
    tr.point("clamp", out, args[:1], p=-math.inf if least is None else least, q=math.inf if most is None else most)


def _compared(name: str) -> Translate:
    def translate(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        tr.point(name, out, args[:1], p=args[1])

    return translate


TRANSLATIONS |= {
    aten.gt.Scalar: _compared("gt p"), aten.ge.Scalar: _compared("ge p"), aten.lt.Scalar: _compared("lt p"),
    aten.le.Scalar: _compared("le p"),
}  # fmt: skip


@_translates(aten.addcmul.default)
def _addcmul(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("addcmul", out, args, p=kwargs.get("value", 1))


@_translates(aten.clone.default, aten._to_copy.default)
def _copy(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("copy", out, args[:1])


@_translates(aten.cat.default)
def _cat(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    parts, dim = args[0], (args[1] if len(args) > 1 else 0) % out.ndim
    tr._make(out)
    start = 0
    for part in parts:
        if part.numel():
            tr.point("copy", out.narrow(dim, start, part.shape[dim]), [part])
            start += part.shape[dim]


@_translates(aten.mm.default)
def _mm(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.product(args[0], tr.weights(args[1]), None, out)


@_translates(aten.addmm.default)
def _addmm(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    bias, x, w = args
    if kwargs or bias.shape != out.shape[1:]:
        raise Unrecordable("a sum of products")
    tr.product(x, tr.weights(w), bias, out)


@_translates(aten.bmm.default)
def _bmm(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, w = args
    tr._make(out)
    for each in zip(x, w, out, strict=True):
        tr.product(each[0], tr.weights(each[1]), None, each[2])


@_translates(aten.embedding.default)
def _embedding(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    w, ids = args[:2]
    tr.look_up(Weights(tr.constant(w).contiguous(), None), ids, out)


@_translates(aten.sum.dim_IntList, aten.sum.default)
def _sum(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.reduce(0, args, out)


@_translates(aten.mean.dim, aten.mean.default)
def _mean(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.reduce(0, args, out, mean=True)


@_translates(aten.amax.default)
def _amax(tr: _Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.reduce(1, args, out)


# ---- the table


class Program:
    """What was recorded, ready to run on other inputs of the same shapes.

    Inputs and outputs are the step's tensors, contiguous. Raises Unrecordable for a step that has what the table has
    not.
    """

    def __init__(self, model: nn.Module, watched: Watch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]):
        from . import in_numba

        self.code = in_numba
        tr = _Translation(model, inputs)
        tr.all(watched.seen)
        self.inputs = [(t.shape, t.dtype) for t in inputs]
        self.outputs: list[int | tuple[int, ...]] = []  # an input again, or the shape of what is new
        given = {memory: i for i, memory in enumerate(tr.inputs)}
        self.written: list[int] = []  # by output that is new: its memory
        for out in outputs:
            memory, at = _memory(out), _places(out)
            if memory in given and at == _places(inputs[given[memory]]):
                self.outputs.append(given[memory])
                continue
            whole = memory in tr.made and _plain(at) and at.offset == 0 and tr.made[memory] == out.numel()
            if not whole or memory in self.written:
                memory = tr.point("copy", tr.new(out.shape), [tr.read(out)]).memory
            self.outputs.append(tuple(out.shape))
            self.written.append(memory)
        self.kept: list[Any] = []  # their addresses stand in the table
        self.folded = [t for t in _own(model) if _memory(t) in tr.folded and not t.is_inference()]
        self.versions = list(map(_version, self.folded))
        instructions = _needed(tr.instructions, set(self.written))
        registers = _registers(instructions, set(self.written), in_numba.REGISTERS)
        self._lay_out(tr, instructions, registers)
        self._write(tr, instructions, registers)
        self.lock = threading.Lock()

    def current(self) -> bool:
        """Whether the parameters that were made into something else are as they were."""
        return self.versions == list(map(_version, self.folded))

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        return self.inputs == [(t.shape, t.dtype) for t in inputs]

    def _lay_out(self, tr: _Translation, instructions: list[Instruction], registers: dict[int, int]) -> None:
        """Addresses: inputs, outputs, constants, then one piece of memory for all that lives between instructions."""
        last: dict[int, int] = {}
        for i, each in enumerate(instructions):
            for memory in each.reads() | each.writes():
                last[memory] = i
        where: dict[int, int] = {}
        free: list[tuple[int, int]] = []
        end = 0
        for i, each in enumerate(instructions):
            for memory in sorted(each.writes() - where.keys() - registers.keys() - set(self.written)):
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
        arena = torch.zeros(end // 4 + 16)
        start = -(-arena.data_ptr() // 64) * 64
        self.kept.append(arena)
        used = set().union(*(each.reads() for each in instructions)) if instructions else set()
        addresses = dict.fromkeys((*tr.inputs, *self.written), 0)
        self.kept.append({m: tr.constants[m] for m in used & tr.constants.keys()})
        addresses |= {m: t.untyped_storage().data_ptr() for m, t in self.kept[-1].items()}
        addresses |= {memory: start + at for memory, at in where.items()}
        self.base = {memory: i for i, memory in enumerate(addresses)}
        self.bases = np.array(list(addresses.values()), np.int64)

    def _write(self, tr: _Translation, instructions: list[Instruction], registers: dict[int, int]) -> None:
        code = self.code
        rows: list[list[int]] = []
        products: list[int] = []
        numbers: list[float] = [1.0, 0.0]

        def at(o: Places) -> list[int]:
            return [self.base[o.memory], 4 * o.offset]

        def number(*given: float) -> int:
            numbers.extend(given)
            return 4 * (len(numbers) - len(given))

        def weights(w: Weights) -> list[int]:
            self.kept.append(w)
            return [w.kept.element_size(), w.kept.data_ptr(), 0 if w.scale is None else w.scale.data_ptr()]

        def operand(o: Places, dims: list[int]) -> list[int]:
            if o.memory in registers:
                return [code.REGISTER, registers[o.memory], 0, 0, 0, 0, 0]
            strides = _merge(o, dims)
            mode = code.PLAIN if _plain(o) else code.SPREAD
            return [mode, *at(o), *[0] * (4 - len(strides)), *strides]

        for each in instructions:
            if isinstance(each, Group):
                everything = [o for p in each.points for o in (p.out, *p.operands)]
                dims = _dims(each.sizes, everything)
                sizes = [math.prod(each.sizes[a:b]) for a, b in zip(dims, [*dims[1:], len(each.sizes)], strict=False)]
                if len(sizes) > 4:
                    raise Unrecordable("a result of too many dimensions")
                count = math.prod(each.sizes)
                strips = -(-count // code.STRIP)
                parts = max(1, strips // 2) if count >= SHARED else 1
                rows.append([code.GROUP, parts, len(each.points), count, *[1] * (4 - len(sizes)), *sizes])
                for p in each.points:
                    row = [code.CODES[p.name], number(p.p, p.q), *operand(p.out, dims)]
                    rows.append(row + [word for o in p.operands for word in operand(o, dims)])
            elif isinstance(each, Product):
                columns, depth = each.w.kept.shape
                size = each.w.kept.element_size()
                batch = math.prod(each.x.sizes) // depth
                parts = min(columns // 4, max(4, columns * depth * size // PART)) if columns * depth > 4 * SHARED else 1
                bias = [-1, 0] if each.bias is None else at(each.bias)
                more = [*bias, *at(each.x), *at(each.y), depth, batch, columns]
                products.append(len(rows))
                rows.append([code.PRODUCT, parts, 0, *weights(each.w), *more])
            elif isinstance(each, Lookup):
                count, (many, width) = math.prod(each.ids.sizes), each.w.kept.shape
                size, w, scale = weights(each.w)
                ids = [self.base[each.ids.memory], each.id_size * each.ids.offset]
                more = [*ids, each.id_size, count, w, size, scale, many, width, *at(each.out)]
                rows.append([code.LOOKUP, 1, 0, *more])
            else:
                kept = [(1, 0)] * (3 - len(each.kept)) + each.kept
                gone = [(1, 0)] * (2 - len(each.gone)) + each.gone
                total = math.prod(n for n, _ in (*kept, *gone))
                by_rows = each.what == code.SUM and kept[2][1] == 1 and gone[1][1] != 1
                most = kept[0][0] * kept[1][0] * (1 if by_rows else kept[2][0])
                parts = min(most, max(1, total // SHARED)) if total >= SHARED else 1
                more = [n for n, _ in (*kept, *gone)] + [s for _, s in (*kept, *gone)]
                rows.append(
                    [code.REDUCTION, parts, 0, each.what, *at(each.out), *at(each.x), *more, number(each.factor)]
                )
        self.table = np.zeros((len(rows), code.WIDTH), np.int64)
        for i, row in enumerate(rows):
            self.table[i, : len(row)] = row
        self.table[:, code.NEXT] = -1
        for before, following in zip([0, *products], products, strict=False):
            self.table[before:following, code.NEXT] = following
        self.numbers = np.array(numbers, np.float32)
        self.flags = np.zeros(code.CLAIMS + 2 * len(rows), np.int64)
        self.scratch = torch.empty(0)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs. Raises IndexError for an id out of range."""
        made = [torch.empty(shape) for shape in self.outputs if isinstance(shape, tuple)]
        workers = self.code.threads._workers(1 << 30)
        with self.lock:
            room = workers * self.code.STRIP * (self.code.REGISTERS + 4) + 16
            if self.scratch.numel() < room:
                self.scratch = torch.zeros(room)
            given = [t.data_ptr() for t in (*inputs, *made)]
            self.bases[: len(given)] = given
            self.flags.fill(0)
            start = -(-self.scratch.data_ptr() // 64) * 64
            fine = self.code.run(self.table, self.bases, self.numbers.ctypes.data, start, self.flags, workers)
        if not fine:
            raise IndexError("index out of range in self")
        fresh = iter(made)
        return [inputs[out] if isinstance(out, int) else next(fresh) for out in self.outputs]


def _needed(instructions: list[Instruction], wanted: set[int]) -> list[Instruction]:
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


def _dims(sizes: tuple[int, ...], operands: list[Places]) -> list[int]:
    """Where the dimensions start that remain when those that follow each other in every operand are joined."""
    starts = [0] if sizes else []
    for d in range(1, len(sizes)):
        if not all(o.strides[d - 1] == sizes[d] * o.strides[d] for o in operands):
            starts.append(d)
    return starts


def _merge(o: Places, dims: list[int]) -> list[int]:
    """The strides of the joined dimensions."""
    return [o.strides[d - 1] for d in (*dims[1:], len(o.sizes))] if dims else []


# ---- steps


class _Last(NamedTuple):
    """What the last step gave."""

    program: Program
    state: Any
    leaves: list[Tensor]


def _rebuilt(tree: Any, fresh: Iterator[Tensor]) -> Any:
    """The same tree of other tensors: what tree_map does, in a third of the time."""
    if isinstance(tree, Tensor):
        return next(fresh)
    if tree is None:
        return None
    parts = [_rebuilt(part, fresh) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


class RecordedStep:
    """step of a model, recorded for each batch that it meets; as it is where it cannot be, or a gradient is wanted."""

    def __init__(self, model: RecurrentLayer[Any]):
        self.model = model
        self.programs: dict[Any, Program | str] = {}  # or why there is none
        self.last: _Last | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedStep:
        return RecordedStep(memo.get(id(self.model), self.model))

    def __call__(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        last = self.last  # of a stream that goes on nothing needs to be looked at again
        inputs = [x, *(last.leaves if last is not None and last.state is state else leaves(state))]
        if self._watched(inputs):
            return self._plain(x, state)
        key = x.shape, x.dtype
        program = self.programs.get(key)
        if program is None or (isinstance(program, Program) and not program.current()):
            program = self._record(key, x, state)
        if isinstance(program, str):
            return self._plain(x, state)
        if last is None or last.state is not state or last.program is not program:
            if not program.takes(inputs):
                return self._plain(x, state)
            inputs = [t.contiguous() for t in inputs]
        y, *after = program([x.contiguous(), *inputs[1:]])
        state = _rebuilt(state, iter(after))
        self.last = _Last(program, state, after)
        return y, state

    def _watched(self, inputs: Sequence[Tensor]) -> bool:
        """Whether something else than the numbers is wanted of a step."""
        return (
            is_traced(inputs[0])
            or not 0 < len(inputs[0]) <= FEW
            or self.model.training
            or watching() is not None
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
        )

    def _plain(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return type(self.model).step(self.model, x, state)

    def _record(self, key: Any, x: Tensor, state: Any) -> Program | str:
        inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in (x, *leaves(state))]
        _, *given = inputs
        left = iter(given)
        with torch.no_grad(), Watch() as watched:
            y, after = self._plain(inputs[0], tree_map(lambda _: next(left), state))
        outputs = [y, *leaves(after)]
        made: Program | str
        try:
            if [t.shape for t in outputs[1:]] != [t.shape for t in given]:
                raise Unrecordable("the state changes its shape")
            made = Program(self.model, watched, inputs, outputs)
            if not all(map(_near, made(inputs), outputs)):
                raise Unrecordable("the record gives other numbers")
        except Unrecordable as error:
            made = str(error)
        while len(self.programs) >= KEPT:
            del self.programs[next(iter(self.programs))]
        self.programs[key] = made
        return made


def _near(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by rounding alone: at most 1e-4 of the largest finite number."""
    size = float(want.abs().nan_to_num(posinf=0.0).max()) if want.numel() else 0.0
    return got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-4 * size, equal_nan=True)
