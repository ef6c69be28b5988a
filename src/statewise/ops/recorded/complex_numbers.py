"""Complex numbers: what a step makes of them lies in two planes, of real and of imaginary parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .instructions import Places, Unrecordable, memory_of
from .translation import COMPLEX, Translation, aten, translates

Parts = tuple[Places, Places | None]  # no imaginary part: a real number


def _parts(tr: Translation, t: Tensor) -> Parts:
    if not t.is_complex():
        return tr.read(t), None
    if t.dtype != torch.complex64:
        raise Unrecordable(f"{t.dtype} takes part")
    memory, (offset, shape, strides) = memory_of(t), (int(t.storage_offset()), tuple(t.shape), t.stride())
    if memory in tr.constants:
        tr.folded |= {memory} & tr.own
        return tr.fixed(t.real.clone().contiguous()), tr.fixed(t.imag.resolve_neg().clone().contiguous())
    if memory in tr.planes:
        real, imag = (Places(plane, offset, shape, tuple(strides)) for plane in tr.planes[memory])
    elif memory in tr.made or memory in tr.inputs:  # in turn
        real, imag = (Places(memory, 2 * offset + part, shape, tuple(2 * s for s in strides)) for part in (0, 1))
    else:
        raise Unrecordable("a tensor comes from outside of the step")
    return real, tr.point("affine", tr.new(shape), [imag], p=-1.0) if t.is_conj() else imag


def _made(tr: Translation, out: Tensor) -> tuple[Places, Places]:
    if out.dtype != torch.complex64:
        raise Unrecordable(f"{out.dtype} is made")
    extent = max(1, sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True)) + 1)
    real, imag = tr.new((extent,)), tr.new((extent,))
    tr.planes[memory_of(out)] = real.memory, imag.memory
    at = lambda plane: Places(plane.memory, int(out.storage_offset()), tuple(out.shape), tuple(out.stride()))
    return at(real), at(imag)


def _mul(tr: Translation, x: Parts, y: Parts, out: tuple[Places, Places]) -> None:
    if x[1] is None:
        x, y = y, x
    assert x[1] is not None
    if y[1] is None:
        for part, to in zip(x, out, strict=True):
            tr.point("mul", to, [part, y[0]])  # type: ignore[list-item]
        return
    sizes = out[0].sizes
    tr.point("addcmul", out[0], [tr.point("mul", tr.new(sizes), [x[0], y[0]]), x[1], y[1]], p=-1.0)
    tr.point("addcmul", out[1], [tr.point("mul", tr.new(sizes), [x[0], y[1]]), x[1], y[0]], p=1.0)


@translates(aten.mul.Tensor, table=COMPLEX)
def _times(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, y = args
    if isinstance(y, complex):
        y = torch.tensor(y)
        tr.fixed(y)
    if isinstance(y, Tensor):
        _mul(tr, _parts(tr, x), _parts(tr, y), _made(tr, out))
        return
    for part, to in zip(_parts(tr, x), _made(tr, out), strict=True):
        tr.point("affine", to, [part], p=y)  # type: ignore[list-item]


@translates(aten.neg.default, table=COMPLEX)
def _neg(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    _times(tr, (*args, -1.0), {}, out)


def _sum_of(sign: float) -> Any:
    def translate(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        by = sign * kwargs.get("alpha", 1)
        x, y = (t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.complex64) for t in args)
        for t, given in zip((x, y), args, strict=True):
            if t is not given:
                tr.fixed(t)
        a, b, to = _parts(tr, x), _parts(tr, y), _made(tr, out)
        tr.point("add", to[0], [a[0], b[0]], p=by)
        if a[1] is None or b[1] is None:
            given, factor = (a[1], 1.0) if b[1] is None else (b[1], by)
            tr.point("affine", to[1], [given], p=factor)  # type: ignore[list-item]
        else:
            tr.point("add", to[1], [a[1], b[1]], p=by)

    return translate


translates(aten.add.Tensor, table=COMPLEX)(_sum_of(1.0))
translates(aten.sub.Tensor, table=COMPLEX)(_sum_of(-1.0))


@translates(aten.div.Tensor, table=COMPLEX)
def _div(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, y = args
    if kwargs or (isinstance(y, Tensor) and y.is_complex()) or isinstance(y, complex):
        raise Unrecordable("a complex number divides")
    if not isinstance(y, Tensor):
        _times(tr, (x, 1 / y), {}, out)
        return
    under = tr.read(y)
    for part, to in zip(_parts(tr, x), _made(tr, out), strict=True):
        tr.point("div", to, [part, under])  # type: ignore[list-item]


@translates(aten.clone.default, aten._to_copy.default, aten._conj_physical.default, table=COMPLEX)
def _copy(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if not (args[0].is_complex() and out.is_complex()):
        raise Unrecordable("a number becomes complex, or real")
    for part, to in zip(_parts(tr, args[0]), _made(tr, out), strict=True):
        tr.point("copy", to, [part])  # type: ignore[list-item]


@translates(aten.complex.default, table=COMPLEX)
def _complex(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    for part, to in zip(args, _made(tr, out), strict=True):
        tr.point("copy", to, [tr.read(part)])


@translates(aten.where.self, table=COMPLEX)
def _where(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    condition, x, y = args
    if not (x.is_complex() and y.is_complex()):
        raise Unrecordable("a real number or a complex one")
    for a, b, to in zip(_parts(tr, x), _parts(tr, y), _made(tr, out), strict=True):
        tr.point("where", to, [tr.read(condition), a, b])  # type: ignore[list-item]


def in_turn(tr: Translation, out: Tensor) -> int:
    """Memory with the parts of a result in turn, as torch has them."""
    whole = tr.new((*out.shape, 2))
    for k, part in enumerate(_parts(tr, out)):
        assert part is not None
        to = Places(whole.memory, k, tuple(out.shape), tuple(s for s in whole.strides[:-1]))
        tr.point("copy", to, [part])
    return whole.memory
