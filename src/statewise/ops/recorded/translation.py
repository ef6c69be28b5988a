"""What was watched, as instructions: operations on the same places are put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .instructions import (
    Group,
    Instruction,
    Lookup,
    Places,
    Point,
    Product,
    Reduction,
    Unrecordable,
    Weights,
    in_order,
    in_step,
    memory_of,
    numbers_of,
    places_of,
    spread,
)

aten = torch.ops.aten
FRESH = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default} | {
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
}  # fmt: skip  # of a tensor only its shape is wanted


class Translation:
    """What was seen, as instructions."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]):
        self.inputs = {memory_of(t): t for t in inputs}
        self.constants: dict[int, Tensor] = {}  # by memory: a tensor that has all of it
        for t in numbers_of(model):
            self.constants[memory_of(t)] = t.detach()
        self.own = set(self.constants)
        self.folded: set[int] = set()  # parameters of which something was computed once
        self.made: dict[int, int] = {}  # memory that a step writes: how many numbers
        self.kinds: dict[int, str] = {}  # of such memory, what is not float32
        self.windows: list[Any] = []  # windows.Window
        self.rows: dict[int, tuple[int, int, int]] = {}  # memory of one: (B, rows, numbers in a row)
        self.planes: dict[int, tuple[int, int]] = {}  # complex memory that it writes: that of real and imaginary parts
        self.interleaved: dict[int, int] = {}  # such memory, with both in turn
        self.rewritten: set[int] = set()  # memory of which a place is written twice
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
        elif name == "rows":
            ids, w = args
            self.look_up(w, ids, result)
        else:
            SPECIAL[name](self, args, result)

    def _one(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in flat(result) if isinstance(t, Tensor)]
        if func is aten._linalg_check_errors.default:  # what is factored does not change: it was fine
            return
        known = all(memory_of(t) in self.constants for t in tensors)
        if func in (aten._local_scalar_dense.default, aten.equal.default) or not (results or known):
            raise Unrecordable(f"{func} asks for a number")
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise Unrecordable(f"{func} is not pure")
        given = {memory_of(t) for t in tensors}
        if all(memory_of(r) in given for r in results):
            return  # views
        if any(memory_of(r) in given for r in results):
            raise Unrecordable(f"{func} gives a view and more")
        if func in FRESH or known:
            self.folded |= {m for m in given if m in self.own}
            if "empty" in str(func):
                raise Unrecordable(f"{func} holds no numbers")
            for r in results:
                if memory_of(r) not in self.constants:
                    self.constants[memory_of(r)] = r
            return
        kinds = {t.dtype for t in (*tensors, *results)}
        table = COMPLEX if torch.complex64 in kinds else EXACT if kinds & KINDS.keys() else TRANSLATIONS
        translate = table.get(func)
        if translate is None:
            raise Unrecordable(f"{func} has no translation for {', '.join(sorted(map(str, kinds)))}")
        translate(self, args, kwargs, results[0])

    def read_any(self, t: Tensor) -> Places:
        memory = memory_of(t)
        if memory in self.planes and t.dtype == torch.float32:
            return self.part_of(t)
        if memory not in self.made and memory not in self.constants and memory not in self.inputs:
            raise Unrecordable("a tensor comes from outside of the step")
        return self.in_window(t, *self.rows[memory]) if memory in self.rows else places_of(t)

    def read(self, t: Tensor) -> Places:
        """An operand: float32, or truth values, which as such are kept as 0 and 1."""
        memory = memory_of(t)
        if t.dtype == torch.bool and memory in self.constants:
            return self.fixed(t.float())
        if t.dtype != torch.float32 and not (t.dtype == torch.bool and memory in self.made):
            raise Unrecordable(f"{t.dtype} takes part")
        at = self.read_any(t)
        return self.point("affine", self.new(t.shape), [at], p=-1.0) if t.is_neg() else at

    def make(self, t: Tensor) -> None:
        if t.dtype not in (torch.float32, torch.bool):
            raise Unrecordable(f"{t.dtype} is made")
        self.made[memory_of(t)] = max(1, sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1)

    def new(self, sizes: Sequence[int]) -> Places:
        """Memory that the recorded step did not have."""
        made = torch.empty(tuple(sizes))
        self.alive.append(made)
        self.make(made)
        return places_of(made)

    def point(
        self, name: str, out: Tensor | Places, operands: Sequence[Tensor | Places], p: float = 0.0, q: float = 0.0
    ) -> Places:
        if isinstance(out, Tensor):
            if memory_of(out) not in self.made:
                self.make(out)
            out = places_of(out)
        given = [spread(self.read(o) if isinstance(o, Tensor) else o, out.sizes) for o in operands]
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
            if isinstance(group, Group) and group.sizes == sizes and in_step(group, point):
                own, rest = group.writes(), self.instructions[at + 1 :]
                if not any(own & (other.reads() | other.writes() & self.rewritten) for other in rest):
                    self.instructions[at:] = [*rest, group]
                elif (point.reads() | point.writes() & self.rewritten) & after:
                    continue
                group.points.append(point)
                return
            after |= group.writes()
        self.instructions.append(Group(sizes, [point]))

    def fixed(self, t: Tensor) -> Places:
        """A constant that the step did not have as such."""
        self.alive.append(t)
        self.constants[memory_of(t)] = t
        return places_of(t)

    def contiguous(self, t: Tensor) -> Places:
        at = self.read(t)
        if in_order(at):
            return at
        return self.point("copy", self.new(t.shape), [at])

    def in_window(self, t: Tensor, batch: int, rows: int, size: int) -> Places:
        """What torch has by batch and then by rows is kept by rows and then by batch."""
        at, whole = places_of(t), rows * size

        def turned(far: int) -> int:
            return far // whole * size + far % whole // size * batch * size + far % size

        return at._replace(offset=turned(at.offset), strides=tuple(map(turned, at.strides)))

    def part_of(self, t: Tensor) -> Places:
        """Real numbers that are a view of complex ones which the step made."""
        memory = memory_of(t)
        at, strides = places_of(t), [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]
        if any(s % 2 for s in strides):  # real and imaginary parts in turn
            return at._replace(memory=self._in_turn(memory))
        return Places(self.planes[memory][at.offset % 2], at.offset // 2, at.sizes, tuple(s // 2 for s in at.strides))

    def _in_turn(self, memory: int) -> int:
        if memory not in self.interleaved:
            count = self.made[self.planes[memory][0]]
            whole = self.new((count, 2))
            for part, plane in enumerate(self.planes[memory]):
                out = Places(whole.memory, part, (count,), (2,))
                self.point("copy", out, [Places(plane, 0, (count,), (1,))])
            self.interleaved[memory] = whole.memory
        return self.interleaved[memory]

    def product(self, x: Tensor, w: Weights, bias: Tensor | None, y: Tensor) -> None:
        """x (..., K), w (N, K), y (..., N)."""
        if not y.is_contiguous():
            raise Unrecordable("a product that is not laid out in rows")
        given, more = self.contiguous(x), None if bias is None else self.contiguous(bias)
        if memory_of(y) not in self.made:
            self.make(y)
        self.instructions.append(Product(w, given, places_of(y), more))

    def constant(self, t: Tensor) -> Tensor:
        if memory_of(t) not in self.constants or t.dtype != torch.float32:
            raise Unrecordable("a product of two factors that change")
        return t

    def weights(self, turned: Tensor) -> Weights:
        """From (K, N)."""
        w = self.constant(turned).t()
        if not w.is_contiguous():
            self.folded |= {memory_of(w)} & self.own
            w = w.contiguous()
        return Weights(w, None)

    def changing(self, x: Places, w: Places, y: Tensor) -> None:
        """x (B, M, K), w (B, K, N), y (B, M, N): a product of two factors that change."""
        (batch, rows, depth), columns = x.sizes, w.sizes[2]
        x_at, w_at = (x.strides[0], x.strides[1], x.strides[2]), (w.strides[0], w.strides[1], w.strides[2])
        if w_at[1] == 1 or columns == 1:  # (B, M, N, K)
            sizes, last = (batch, rows, columns, depth), 3
            left, right = (x_at[0], x_at[1], 0, x_at[2]), (w_at[0], 0, w_at[2], w_at[1])
        else:  # (B, M, K, N)
            sizes, last = (batch, rows, depth, columns), 2
            left, right = (x_at[0], x_at[1], x_at[2], 0), (w_at[0], 0, w_at[1], w_at[2])
        each = x._replace(sizes=sizes, strides=left), w._replace(sizes=sizes, strides=right)
        self.reduce(0, [self.point("mul", self.new(sizes), each), [last]], y)

    def look_up(self, w: Weights, ids: Tensor, out: Tensor) -> None:
        if not (ids.is_contiguous() and out.is_contiguous()):
            raise Unrecordable("ids that are not laid out in rows")
        self.make(out)
        self.instructions.append(Lookup(w, self.read_any(ids), ids.element_size(), places_of(out)))

    def reduce(self, what: int, args: Sequence[Any], out: Tensor | Places, *, mean: bool = False) -> Places:
        """args: a tensor or places, and dimensions, all where there are none."""
        at = args[0] if isinstance(args[0], Places) else self.read(args[0])
        count, dims = len(at.sizes), args[1] if len(args) > 1 else None
        dims = range(count) if dims is None or dims == [] else ([dims] if isinstance(dims, int) else dims)
        gone_dims = {d % max(1, count) for d in dims} if count else set()
        kept = [(at.sizes[d], at.strides[d]) for d in range(count) if d not in gone_dims and at.sizes[d] != 1]
        gone = [(at.sizes[d], at.strides[d]) for d in sorted(gone_dims) if at.sizes[d] != 1]
        if isinstance(out, Tensor):
            if not out.is_contiguous() or 0 in at.sizes:
                raise Unrecordable("a reduction that is not laid out in rows, or of nothing")
            self.make(out)
            out = places_of(out)
        kept, gone = joined(kept), joined(gone)
        if len(kept) > 3 or len(gone) > 2:
            raise Unrecordable("a reduction over too many dimensions")
        factor = 1 / math.prod(n for n, _ in gone) if mean else 1.0
        self.instructions.append(Reduction(what, out, at, kept, gone, factor))
        return out


def flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        for part in tree:
            yield from flat(part)
    else:
        yield tree


def joined(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for size, stride in dims:
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


# ---- operations of torch


Translate = Callable[[Translation, tuple[Any, ...], dict[str, Any], Tensor], None]
TRANSLATIONS: dict[Any, Translate] = {}
COMPLEX: dict[Any, Translate] = {}  # where a complex number takes part
SPECIAL: dict[str, Callable[[Translation, tuple[Any, ...], Any], None]] = {}  # what the watch was told of
EXACT: dict[Any, Translate] = {}  # where a number of one of these kinds does
KINDS = {torch.float64: "float64", torch.int64: "int64", torch.int32: "int32"}


def translates(*functions: Any, table: dict[Any, Translate] = TRANSLATIONS) -> Callable[[Translate], Translate]:
    def register(translate: Translate) -> Translate:
        table.update(dict.fromkeys(functions, translate))
        return translate

    return register


def _plainly(name: str, count: int) -> Translate:
    def translate(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
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
    (aten.ge.Tensor, "ge", 2), (aten.lt.Tensor, "lt", 2), (aten.le.Tensor, "le", 2), (aten.eq.Tensor, "eq", 2),
    (aten.logaddexp.default, "logaddexp", 2),
):  # fmt: skip
    TRANSLATIONS[_function] = _plainly(_name, _count)


def _sum_of(sign: float) -> Translate:
    def translate(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        x, y = args[:2]
        by = sign * kwargs.get("alpha", 1)
        if isinstance(y, Tensor):
            tr.point("add", out, [x, y], p=by)
        else:
            tr.point("affine", out, [x], p=1.0, q=by * y)

    return translate


TRANSLATIONS[aten.add.Tensor], TRANSLATIONS[aten.sub.Tensor] = _sum_of(1.0), _sum_of(-1.0)


@translates(aten.rsub.Scalar)
def _rsub(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("affine", out, args[:1], p=-float(args[2] if len(args) > 2 else 1), q=args[1])


@translates(aten.mul.Tensor)
def _mul(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, y = args
    if isinstance(y, Tensor):
        tr.point("mul", out, [x, y])
    else:
        tr.point("affine", out, [x], p=y)


@translates(aten.div.Tensor)
def _div(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if kwargs:
        raise Unrecordable("division that rounds")
    x, y = args
    if isinstance(y, Tensor):
        tr.point("div", out, [x, y])
    else:
        tr.point("affine", out, [x], p=1 / y)


@translates(aten.neg.default)
def _neg(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("affine", out, args, p=-1.0)


@translates(aten.pow.Tensor_Scalar)
def _pow(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, power = args
    names = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if power == 2:
        tr.point("mul", out, [x, x])
    elif power in names:
        tr.point(names[power], out, [x])
    else:
        raise Unrecordable(f"the power {power}")


@translates(aten.clamp.default, aten.clamp_min.default, aten.relu.default)
def _clamp(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    least: Any = args[1] if len(args) > 1 else None if kwargs else 0.0  # relu has no arguments
    most: Any = args[2] if len(args) > 2 else None
    least, most = kwargs.get("min", least), kwargs.get("max", most)
    tr.point("clamp", out, args[:1], p=-math.inf if least is None else least, q=math.inf if most is None else most)


def _compared(name: str) -> Translate:
    def translate(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        tr.point(name, out, args[:1], p=args[1])

    return translate


TRANSLATIONS |= {
    aten.gt.Scalar: _compared("gt p"), aten.ge.Scalar: _compared("ge p"), aten.lt.Scalar: _compared("lt p"),
    aten.le.Scalar: _compared("le p"), aten.eq.Scalar: _compared("eq p"),
}  # fmt: skip


@translates(aten.addcmul.default)
def _addcmul(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("addcmul", out, args, p=kwargs.get("value", 1))


@translates(aten.clone.default, aten._to_copy.default)
def _copy(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.point("copy", out, args[:1])


@translates(aten.cat.default)
def _cat(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    parts, dim = args[0], (args[1] if len(args) > 1 else 0) % out.ndim
    tr.make(out)
    start = 0
    for part in parts:
        if part.numel():
            tr.point("copy", out.narrow(dim, start, part.shape[dim]), [part])
            start += part.shape[dim]


@translates(aten.mm.default)
def _mm(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, w = args
    if memory_of(w) in tr.constants:
        tr.product(x, tr.weights(w), None, out)
    else:
        _bmm(tr, (x[None], w[None]), {}, out[None])


@translates(aten.addmm.default)
def _addmm(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    bias, x, w = args
    if kwargs or bias.shape != out.shape[1:]:
        raise Unrecordable("a sum of products")
    tr.product(x, tr.weights(w), bias, out)


@translates(aten.bmm.default)
def _bmm(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, w = args
    if memory_of(w) not in tr.constants and memory_of(x) not in tr.constants:
        tr.changing(tr.read(x), tr.read(w), out)
        return
    if memory_of(w) not in tr.constants:  # the way round in which rows of what is constant stand first
        turned = torch.empty(out.mT.shape)
        tr.alive.append(turned)
        _bmm(tr, (w.mT, x.mT), {}, turned)
        tr.point("copy", out, [turned.mT])
        return
    tr.make(out)
    for each in zip(x, w, out, strict=True):
        tr.product(each[0], tr.weights(each[1]), None, each[2])


@translates(aten.embedding.default)
def _embedding(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    w, ids = args[:2]
    tr.look_up(Weights(tr.constant(w).contiguous(), None), ids, out)


@translates(aten.sum.dim_IntList, aten.sum.default)
def _sum(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.reduce(0, args, out)


@translates(aten.mean.dim, aten.mean.default)
def _mean(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.reduce(0, args, out, mean=True)


@translates(aten.amax.default)
def _amax(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.reduce(1, args, out)
