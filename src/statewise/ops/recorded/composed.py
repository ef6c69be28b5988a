"""Operations of torch that are several of ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .instructions import Places, Unrecordable, places_of
from .translation import Translation, aten, translates


@translates(aten.gelu.default)
def _gelu(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if kwargs.get("approximate", "none") != "none":
        raise Unrecordable("gelu by tanh")
    tr.point("gelu", out, args[:1])


@translates(aten.glu.default)
def _glu(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    value, gate = args[0].chunk(2, args[1] if len(args) > 1 else -1)
    tr.point("mul", out, [value, tr.point("sigmoid", tr.new(gate.shape), [gate])])


@translates(aten.stack.default)
def _stack(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    tr.make(out)
    for part, to in zip(args[0], out.unbind(args[1] if len(args) > 1 else 0), strict=True):
        tr.point("copy", to, [part])


@translates(aten.flip.default)
def _flip(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Places in their order, written in the other one."""
    tr.make(out)
    at, to = tr.read(args[0]), places_of(out)
    for d in args[1]:
        last = (to.sizes[d] - 1) * to.strides[d]
        strides = tuple(-s if i == d % out.ndim else s for i, s in enumerate(to.strides))
        to = to._replace(offset=to.offset + last, strides=strides)
    tr.point("copy", to, [at])


def _normed(tr: Translation, x: Tensor, rows: int, eps: float) -> Places:
    """x in so many rows, each with mean 0 and variance 1."""
    width = x.numel() // rows
    at = tr.contiguous(x)._replace(sizes=(rows, width), strides=(width, 1))
    mean = tr.reduce(0, [at, [1]], tr.new((rows, 1)), mean=True)
    off = tr.point("add", tr.new((rows, width)), [at, mean], p=-1.0)
    square = tr.point("mul", tr.new((rows, width)), [off, off])
    variance = tr.reduce(0, [square, [1]], tr.new((rows, 1)), mean=True)
    larger = tr.point("affine", tr.new((rows, 1)), [variance], p=1.0, q=eps)
    by = tr.point("rsqrt", tr.new((rows, 1)), [larger])
    return tr.point("mul", tr.new((rows, width)), [off, by])


def _scaled(tr: Translation, at: Places, weight: Places | None, bias: Places | None, out: Tensor) -> None:
    if weight is not None:
        at = tr.point("mul", tr.new(at.sizes), [at, weight])
    to = out if bias is None and weight is None else places_of(out)
    if isinstance(to, Places):
        tr.make(out)
    tr.point("copy" if bias is None else "add", to, [at] if bias is None else [at, bias], p=1.0)


@translates(aten.native_layer_norm.default)
def _layer_norm(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, shape, weight, bias, eps = args
    found = _normed(tr, x, x.numel() // math.prod(shape), eps)
    strides = out.contiguous().stride()
    at = found._replace(sizes=tuple(out.shape), strides=tuple(strides))
    by, more = (None if t is None else tr.read(t) for t in (weight, bias))
    _scaled(tr, at, by, more, out)


@translates(aten.native_group_norm.default)
def _group_norm(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, weight, bias, batch, channels, size, groups, eps = args
    at = _normed(tr, x, batch * groups, eps)._replace(sizes=(batch, channels, size), strides=(channels * size, size, 1))
    by, more = (
        None if t is None else tr.read(t)._replace(sizes=(1, channels, 1), strides=(0, t.stride(0), 0))
        for t in (weight, bias)
    )
    _scaled(tr, at, by, more, out.view(batch, channels, size))


@translates(aten._softmax.default)
def _softmax(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, dim, _ = args
    one = [1 if d == dim % x.ndim else n for d, n in enumerate(x.shape)]
    at = tr.read(x)
    most = tr.reduce(1, [at, [dim]], tr.new(one))
    power = tr.point("exp", tr.new(x.shape), [tr.point("add", tr.new(x.shape), [at, most], p=-1.0)])
    total = tr.reduce(0, [power, [dim]], tr.new(one))
    tr.point("div", out, [power, total])


@translates(aten.masked_fill.Scalar)
def _masked_fill(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, mask, value = args
    tr.point("where", out, [mask, tr.fixed(torch.tensor(float(value))), x])


def _logical(name: str) -> Any:
    def translate(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if any(not isinstance(t, Tensor) or t.dtype != torch.bool for t in args):
            raise Unrecordable("bits of whole numbers")
        tr.point(name, out, args)

    return translate


translates(aten.bitwise_and.Tensor, aten.logical_and.default)(_logical("mul"))
translates(aten.bitwise_or.Tensor, aten.logical_or.default)(_logical("maximum"))


@translates(aten.bitwise_not.default, aten.logical_not.default)
def _not(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    if args[0].dtype != torch.bool:
        raise Unrecordable("bits of whole numbers")
    tr.point("affine", out, args, p=-1.0, q=1.0)


@translates(aten.ne.Scalar, aten.ne.Tensor)
def _ne(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, y = args
    same = tr.new(out.shape)
    if isinstance(y, Tensor):
        tr.point("eq", same, [x, y])
    else:
        tr.point("eq p", same, [x], p=y)
    tr.point("affine", out, [same], p=-1.0, q=1.0)


@translates(aten.linalg_vector_norm.default)
def _vector_norm(tr: Translation, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    x, power, *rest = (*args, 2) if len(args) == 1 else args
    if power != 2 or kwargs.get("dtype") is not None:
        raise Unrecordable(f"the norm {power}")
    square = tr.point("mul", tr.new(x.shape), [x, x])
    dims = rest[0] if rest else None
    one = [1 if dims is None or d in {e % x.ndim for e in dims} else n for d, n in enumerate(x.shape)]
    total = tr.reduce(0, [square, dims], tr.new(one))
    tr.make(out)
    to = places_of(out)
    if len(one) != out.ndim:
        total = total._replace(sizes=to.sizes, strides=to.strides)
    tr.point("sqrt", to, [total])
