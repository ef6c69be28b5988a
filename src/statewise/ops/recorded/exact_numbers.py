"""Whole numbers and float64: positions, counts, angles. There are few, so they go one by one, as float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .instructions import Exact, Places, Unrecordable, Weights, memory_of, places_of, spread
from .translation import EXACT, KINDS, TRANSLATIONS, Translate, Translation, aten, translates


def _read(tr: Translation, t: Tensor | float) -> tuple[Places, str]:
    """Where, and what kind of number."""
    if not isinstance(t, Tensor):
        return tr.fixed(torch.tensor(float(t), dtype=torch.float64)), "float64"
    memory = memory_of(t)
    if memory in tr.kinds:
        return places_of(t), tr.kinds[memory]
    if t.dtype in (torch.bool, torch.float32):
        return tr.read(t), "float32"
    return tr.read_any(t), KINDS[t.dtype]


def _make(tr: Translation, out: Tensor) -> tuple[Places, str]:
    if out.dtype in (torch.bool, torch.float32):
        tr.make(out)
        return places_of(out), "float32"
    extent = max(1, sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True)) + 1)
    tr.made[memory_of(out)] = 2 * extent
    tr.kinds[memory_of(out)] = "float64"
    return places_of(out), "float64"


def _put(
    tr: Translation, name: str, to: tuple[Places, str], given: Sequence[tuple[Places, str]], p: float = 0, q: float = 0
) -> None:
    out = to[0]
    operands = [spread(at, out.sizes) for at, _ in given]
    if math.prod(out.sizes):
        tr.instructions.append(Exact(name, out, operands, (to[1], *(kind for _, kind in given)), float(p), float(q)))


def whole(tr: Translation, out: Tensor) -> int:
    """Memory with a result as torch has it."""
    made = torch.empty(out.shape, dtype=out.dtype)
    tr.alive.append(made)
    memory = memory_of(made)
    tr.made[memory] = max(1, made.numel() * made.element_size() // 4)
    tr.kinds[memory] = KINDS[out.dtype]
    _put(tr, "copy", (places_of(made), KINDS[out.dtype]), [_read(tr, out)])
    return memory


def _plainly(name: str) -> Translate:
    def translate(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        _put(tr, name, _make(tr, out), [_read(tr, t) for t in args])

    return translate


for _name, _functions in {
    "mul": (aten.mul.Tensor, aten.mul.Scalar), "cos": (aten.cos.default,), "sin": (aten.sin.default,),
    "exp": (aten.exp.default,), "where": (aten.where.self,), "eq": (aten.eq.Tensor, aten.eq.Scalar),
    "gt": (aten.gt.Tensor, aten.gt.Scalar), "ge": (aten.ge.Tensor, aten.ge.Scalar),
    "lt": (aten.lt.Tensor, aten.lt.Scalar), "le": (aten.le.Tensor, aten.le.Scalar),
    "maximum": (aten.maximum.default,), "minimum": (aten.minimum.default,), "pow": (aten.pow.Scalar,),
}.items():  # fmt: skip
    translates(*_functions, table=EXACT)(_plainly(_name))


def _sum_of(sign: float) -> Translate:
    def translate(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        _put(tr, "add", _make(tr, out), [_read(tr, t) for t in args[:2]], p=sign * kwargs.get("alpha", 1))

    return translate


translates(aten.add.Tensor, table=EXACT)(_sum_of(1.0))
translates(aten.sub.Tensor, table=EXACT)(_sum_of(-1.0))


@translates(aten.rsub.Scalar, table=EXACT)
def _rsub(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if len(args) > 2 or kwargs:
        raise Unrecordable("a difference with a factor")
    _put(tr, "add", _make(tr, out), [_read(tr, args[1]), _read(tr, args[0])], p=-1.0)


@translates(aten.neg.default, table=EXACT)
def _neg(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    _put(tr, "mul", _make(tr, out), [_read(tr, args[0]), _read(tr, -1.0)])


@translates(aten.div.Tensor, table=EXACT)
def _div(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if kwargs:
        raise Unrecordable("division that rounds")
    _put(tr, "div", _make(tr, out), [_read(tr, t) for t in args])


@translates(aten.clamp.default, aten.clamp_min.default, table=EXACT)
def _clamp(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    least, most = ((*args, None, None)[k] for k in (1, 2))
    least, most = kwargs.get("min", least), kwargs.get("max", most)
    given = [args[0], -math.inf if least is None else least, math.inf if most is None else most]
    _put(tr, "clamp", _make(tr, out), [_read(tr, t) for t in given])


@translates(aten.clone.default, aten._to_copy.default, table=EXACT)
def _copy(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if args[0].is_floating_point() and not out.is_floating_point():
        raise Unrecordable("a number is cut to a whole one")
    _put(tr, "copy", _make(tr, out), [_read(tr, args[0])])


@translates(aten.cat.default, table=EXACT)
def _cat(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    dim, start = (args[1] if len(args) > 1 else 0) % out.ndim, 0
    _, kind = _make(tr, out)
    for part in args[0]:
        if part.numel():
            to = places_of(out.narrow(dim, start, part.shape[dim]))
            _put(tr, "copy", (to, kind), [_read(tr, part)])
            start += part.shape[dim]


@translates(aten.gather.default, table=EXACT)
def _gather(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, dim, index = args
    at, kind = _read(tr, x)
    along = at.strides[dim % x.ndim]
    strides = tuple(0 if d == dim % x.ndim else s for d, s in enumerate(at.strides))
    first = at._replace(sizes=tuple(out.shape), strides=strides)
    _put(tr, "gather", _make(tr, out), [(first, kind), _read(tr, index)], p=along)


@translates(aten.argmax.default, table=EXACT)
def _argmax(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """The first of the largest; the first NaN, where there is one."""
    x, dim, *keep = args
    if dim is None or (keep and keep[0]):
        raise Unrecordable("the place of the largest of all")
    at, dim = tr.read(x), dim % x.ndim
    rest = [d for d in range(x.ndim) if d != dim]
    first = at._replace(sizes=tuple(at.sizes[d] for d in rest), strides=tuple(at.strides[d] for d in rest))
    _put(tr, "argmax", _make(tr, out), [(first, "float32")], p=at.strides[dim], q=at.sizes[dim])


@translates(aten._linalg_solve_ex.default, table=EXACT)
def _solve(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A^-1 B of constant A (D, N, N): the inverse, rounded to float32, times B (D, N, M)."""
    a, b = args
    if kwargs or a.ndim != 3 or b.ndim != 3 or memory_of(a) not in tr.constants:
        raise Unrecordable("equations whose factors change")
    inverse = torch.linalg.inv(a.double()).float().contiguous()
    given = torch.empty(out.mT.shape)  # (D, M, N)
    found = torch.empty_like(given)
    tr.alive += [inverse, given, found]
    _put(tr, "copy", _make(tr, given), [_read(tr, b.mT)])
    tr.make(found)
    for d in range(len(a)):
        tr.product(given[d], Weights(inverse[d], None), None, found[d])
    _put(tr, "copy", _make(tr, out), [_read(tr, found.mT)])


EXACT[aten.embedding.default] = TRANSLATIONS[aten.embedding.default]
