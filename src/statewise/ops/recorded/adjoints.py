"""What else stands in the steps of users' cells, and what their derivatives are made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .instructions import Places, Unrecordable, memory_of
from .translation import TRANSLATIONS, Translate, Translation, flat

aten = torch.ops.aten
Given = tuple[Any, ...]
Named = dict[str, Any]
SUM, MAXIMUM = 0, 1


def _translates(*functions: Any) -> Any:
    """For what has no translation yet."""

    def register(translate: Translate) -> Translate:
        for function in functions:
            TRANSLATIONS.setdefault(function, translate)
        return translate

    return register


def _plainly(name: str) -> Translate:
    def translate(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
        if kwargs or not all(isinstance(a, Tensor) for a in args):
            raise Unrecordable(f"{name} with more arguments")
        tr.point(name, out, args)

    return translate


for _function, _name in (
    (aten.sin.default, "sin"), (aten.cos.default, "cos"), (aten.log.default, "log"), (aten.log1p.default, "log1p"),
    (aten.sgn.default, "sign"), (aten.sign.default, "sign"), (aten.minimum.default, "minimum"),
    (aten.eq.Tensor, "eq"), (aten.tanh_backward.default, "tanh adjoint"),
    (aten.sigmoid_backward.default, "sigmoid adjoint"), (aten.bitwise_and.Tensor, "mul"),
    (aten.logical_and.default, "mul"), (aten.bitwise_or.Tensor, "maximum"), (aten.logical_or.default, "maximum"),
):  # fmt: skip
    _translates(_function)(_plainly(_name))


@_translates(aten.bitwise_not.default, aten.logical_not.default)
def _not(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    if args[0].dtype != torch.bool:
        raise Unrecordable("not, of numbers")
    tr.point("affine", out, args, p=-1.0, q=1.0)


def _with_number(function: Any) -> Translate:
    return lambda tr, args, kwargs, out: TRANSLATIONS[function](tr, args, kwargs, out)


for _function, _like in (
    (aten.add.Scalar, aten.add.Tensor), (aten.sub.Scalar, aten.sub.Tensor), (aten.mul.Scalar, aten.mul.Tensor),
    (aten.div.Scalar, aten.div.Tensor),
):  # fmt: skip
    _translates(_function)(_with_number(_like))

_power = TRANSLATIONS[aten.pow.Tensor_Scalar]


def _pow(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    x, power = args
    if power in (1, 3, 4):
        at = _point(tr, "copy", x) if power == 1 else _point(tr, "mul", x, x)
        tr.point("copy" if power == 1 else "mul", out, {1: [at], 3: [at, x], 4: [at, at]}[power])
    else:
        _power(tr, args, kwargs, out)


TRANSLATIONS[aten.pow.Tensor_Scalar] = _pow


def _at(tr: Translation, x: Tensor | Places) -> Places:
    return tr.read(x) if isinstance(x, Tensor) else x


def _point(tr: Translation, name: str, *operands: Tensor | Places, p: float = 0.0, q: float = 0.0) -> Places:
    """What one operation gives, of the size that its operands have together."""
    given = [_at(tr, o) for o in operands]
    count = max(len(o.sizes) for o in given)
    padded = [(1,) * (count - len(o.sizes)) + o.sizes for o in given]
    sizes = [next((n for n in each if n != 1), 1) for each in zip(*padded, strict=True)]
    return tr.point(name, tr.new(sizes), given, p=p, q=q)


def _over(tr: Translation, x: Places, dims: Sequence[int], *, what: int = SUM, mean: bool = False) -> Places:
    """A sum or the like, whose dimensions stay, with size 1."""
    gone = {d % len(x.sizes) for d in dims}
    out = tr.new([1 if d in gone else n for d, n in enumerate(x.sizes)])
    tr.reduce(what, [x, list(dims)], out, mean=mean)
    return out


def _number(tr: Translation, value: float) -> Places:
    return tr.fixed(torch.full((), value))


@_translates(aten.silu_backward.default)
def _silu_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, x = args
    s = _point(tr, "sigmoid", x)
    slope = _point(tr, "mul", _point(tr, "affine", s, p=-1.0, q=1.0), x)
    slope = _point(tr, "mul", _point(tr, "affine", slope, p=1.0, q=1.0), s)
    tr.point("mul", out, [g, slope])


@_translates(aten.softplus_backward.default)
def _softplus_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, x, beta, threshold = args
    if beta != 1 or threshold < 20:
        raise Unrecordable("softplus with a slope of its own")
    tr.point("mul", out, [g, _point(tr, "sigmoid", x)])


@_translates(aten.log_sigmoid_backward.default)
def _log_sigmoid_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    tr.point("mul", out, [args[0], _point(tr, "sigmoid", _point(tr, "affine", args[1], p=-1.0))])


@_translates(aten.threshold_backward.default)
def _threshold_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, x, least = args
    tr.point("where", out, [_point(tr, "le p", x, p=least), _number(tr, 0.0), g])


@_translates(aten.hardtanh.default)
def _hardtanh(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    x, least, most = (*args, -1, 1) if len(args) == 1 else args
    tr.point("clamp", out, [x], p=least, q=most)


@_translates(aten.hardtanh_backward.default)
def _hardtanh_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, x, least, most = args
    outside = _point(tr, "maximum", _point(tr, "le p", x, p=least), _point(tr, "ge p", x, p=most))
    tr.point("where", out, [outside, _number(tr, 0.0), g])


@_translates(aten.leaky_relu.default)
def _leaky(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    x, slope = (*args, 0.01) if len(args) == 1 else args
    tr.point("where", out, [_point(tr, "gt p", x), x, _point(tr, "affine", x, p=slope)])


@_translates(aten.leaky_relu_backward.default)
def _leaky_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, x, slope, _ = args
    tr.point("where", out, [_point(tr, "gt p", x), g, _point(tr, "affine", g, p=slope)])


@_translates(aten.masked_fill.Scalar)
def _fill(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    x, mask, value = args
    tr.point("where", out, [mask, _number(tr, value), x])


@_translates(aten.linalg_vector_norm.default)
def _norm(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    x, order, dims = (*args, 2, None)[:3] if len(args) < 3 else args[:3]
    if order != 2 or kwargs:
        raise Unrecordable(f"the norm of order {order}")
    dims = range(x.ndim) if dims is None else dims
    total = _over(tr, _point(tr, "mul", x, x), list(dims))
    at = tr.point("sqrt", tr.new(total.sizes), [total])
    kept = [d for d in range(x.ndim) if d not in {e % x.ndim for e in dims}]
    strides = at.strides if out.ndim == x.ndim else tuple(at.strides[d] for d in kept)
    tr.point("copy", out, [at._replace(sizes=tuple(out.shape), strides=strides)])


def _reductions(tr: Translation, x: Tensor, dim: int) -> tuple[Places, Places]:
    """x less its largest along a dimension, and the sum of its exponentials there."""
    least = _point(tr, "add", x, _over(tr, _at(tr, x), [dim], what=MAXIMUM), p=-1.0)
    return least, _over(tr, _point(tr, "exp", least), [dim])


@_translates(aten._softmax.default)
def _softmax(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    less, total = _reductions(tr, *args[:2])
    tr.point("div", out, [_point(tr, "exp", less), total])


@_translates(aten._log_softmax.default)
def _log_softmax(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    less, total = _reductions(tr, *args[:2])
    tr.point("add", out, [less, _point(tr, "log", total)], p=-1.0)


@_translates(aten._softmax_backward_data.default)
def _softmax_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, y, dim, _ = args
    each = _point(tr, "mul", g, y)
    tr.point("add", out, [each, _point(tr, "mul", y, _over(tr, each, [dim]))], p=-1.0)


@_translates(aten._log_softmax_backward_data.default)
def _log_softmax_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, y, dim, _ = args
    tr.point("add", out, [g, _point(tr, "mul", _point(tr, "exp", y), _over(tr, _at(tr, g), [dim]))], p=-1.0)


# ---- pieces


@_translates(aten.stack.default)
def _stack(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    parts, dim = args[0], args[1] if len(args) > 1 else 0
    tr.make(out)
    for i, part in enumerate(parts):
        tr.point("copy", out.select(dim, i), [part])


@_translates(aten.flip.default)
def _flip(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    x, dims = args
    at = tr.read(x)
    strides = list(at.strides)
    for d in {d % x.ndim for d in dims}:
        at = at._replace(offset=at.offset + (at.sizes[d] - 1) * strides[d])
        strides[d] = -strides[d]
    tr.point("copy", out, [at._replace(strides=tuple(strides))])


@_translates(aten.roll.default)
def _roll(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    x, shifts, dims = args if len(args) == 3 else (*args, [])
    if len(dims) != 1:
        raise Unrecordable("roll along several dimensions")
    size = x.shape[dims[0]]
    by = shifts[0] % size if size else 0
    tr.make(out)
    for to, start, count in ((by, 0, size - by), (0, size - by, by)):
        if count:
            tr.point("copy", out.narrow(dims[0], to, count), [x.narrow(dims[0], start, count)])


def _into_zeros(tr: Translation, out: Tensor, view: Tensor, g: Tensor) -> None:
    tr.rewritten.add(memory_of(out))
    tr.point("copy", out, [_number(tr, 0.0)])
    tr.point("copy", view, [g])


@_translates(aten.select_backward.default)
def _select_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, _, dim, index = args
    _into_zeros(tr, out, out.select(dim, index), g)


@_translates(aten.slice_backward.default)
def _slice_adjoint(tr: Translation, args: Given, kwargs: Named, out: Tensor) -> None:
    g, _, dim, start, end, step = args
    _into_zeros(tr, out, aten.slice.Tensor(out, dim, start, end, step), g)


# ---- what gives several tensors


def _layer_norm(tr: Translation, args: Given, kwargs: Named, results: Sequence[Tensor | None]) -> None:
    x, shape, weight, bias, eps = args
    y, mean, rstd = results
    dims = list(range(x.ndim - len(shape), x.ndim))
    assert y is not None
    middle = _over(tr, tr.read(x), dims, mean=True)
    apart = _point(tr, "add", x, middle, p=-1.0)
    spread = _over(tr, _point(tr, "mul", apart, apart), dims, mean=True)
    by = _point(tr, "rsqrt", _point(tr, "affine", spread, p=1.0, q=eps))
    z = _point(tr, "mul", apart, by)
    z = z if weight is None else _point(tr, "mul", z, weight)
    tr.point("copy" if bias is None else "add", y, [z] if bias is None else [z, bias], p=1.0)
    for out, at in ((mean, middle), (rstd, by)):
        if out is not None and out.numel():
            tr.point("copy", out, [at])


def _layer_norm_adjoint(tr: Translation, args: Given, kwargs: Named, results: Sequence[Tensor | None]) -> None:
    g, x, shape, mean, rstd, weight, _, _ = args
    out, by_weight, by_bias = results
    before, dims = list(range(x.ndim - len(shape))), list(range(x.ndim - len(shape), x.ndim))
    z = _point(tr, "mul", _point(tr, "add", x, mean, p=-1.0), rstd)
    for sums, each in ((by_weight, lambda: _point(tr, "mul", g, z)), (by_bias, lambda: tr.read(g))):
        if sums is not None:
            tr.reduce(SUM, [each(), before], sums)
    if out is None:
        return
    g = g if weight is None else _point(tr, "mul", g, weight)
    along = _point(tr, "mul", z, _over(tr, _point(tr, "mul", g, z), dims, mean=True))
    rest_ = _point(tr, "add", _point(tr, "add", g, _over(tr, _at(tr, g), dims, mean=True), p=-1.0), along, p=-1.0)
    tr.point("mul", out, [rest_, rstd])


SEVERAL: dict[Any, Any] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_adjoint,
}


def all_of(result: Any) -> list[Tensor | None]:
    """What a call gave, None where it left something out."""
    return [r if isinstance(r, Tensor) else None for r in itertools.chain(flat(result))]
