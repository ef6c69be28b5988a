"""NaN and infinity kept to their rows, and to the steps from which on they are there.

A product of matrices with a mask carries them to every step of a chunk, since 0 * NaN is NaN; but once there they never
leave the state. Neither does a mask keep back a product of two finite numbers that overflows. So where the state at the
end or an answer is not finite, all is done again: the kernels see zeros in each row from its first bad step on, which
leaves the bits of other rows and of earlier steps as they are, and a loop does the rest.

Backwards the same holds of gradients of answers: what is not finite in them is in the gradient of the first state too.
The kernels give what comes before it; what comes after it they give with zeros in its place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .opaque import Kernel


def contained(arguments: str, forward: Kernel, backward: Kernel, loop: Kernel) -> tuple[Kernel, Kernel, Kernel]:
    """forward, backward and alone as `opaque` takes them; one more tensor is kept, before the others.

    arguments: as in `opaque`; "state" (B, ...) is the first state, "g" log decays, where -inf is in order; tensors
        other than the state are (B, T, ...) or, with n of a step after each other, (B, n T, ...).
    forward(*arguments, keep) -> out (B, T, ...), the state at the end, and what backward wants kept, if keep.
    backward(d_out, d_last, *arguments, *kept) -> gradients, as in `opaque`.
    loop(*arguments) -> out, the state at the end, step by step; autograd sees into it.
    """
    names = [name.rstrip("?") for name in arguments.split()]
    state_at = names.index("state")

    def once(*inputs: Any, keep: bool) -> tuple[Tensor, ...]:
        out, last, *kept = forward(*inputs, keep=keep)
        if not out.shape[1] or (_finite(last) and _finite(out)):
            return out, last, last.new_zeros(out.shape[:2], dtype=torch.bool), *kept
        spoilt = _spoilt(names, inputs, out.shape[1])
        out, last, *kept = forward(*_cleared(inputs, state_at, spoilt), keep=keep)
        spoilt |= ~last.isfinite().flatten(1).all(1)[:, None]
        spoilt |= (~out.isfinite()).flatten(2).any(2).cummax(1).values
        at = spoilt.any(1).nonzero()[:, 0]
        o, end = loop(*_rows(inputs, at))
        late = spoilt[at].view(len(at), -1, *[1] * (out.ndim - 2))
        out = out.index_copy(0, at, torch.where(late, o, out[at]))
        return out, last.index_copy(0, at, end.contiguous()), spoilt, *kept

    def adjoint(d_out: Tensor, d_last: Tensor, *more: Any) -> tuple[Tensor, ...]:
        inputs, spoilt, kept = more[: len(names)], more[len(names)], more[len(names) + 1 :]
        if not bool(spoilt.any()):
            return back(d_out, d_last, inputs, kept)
        grads = back(d_out, d_last, _cleared(inputs, state_at, spoilt), kept)
        at = spoilt.any(1).nonzero()[:, 0]
        with torch.enable_grad():
            rows = [x.requires_grad_() if _floating(x) else x for x in _rows(inputs, at)]
            wanted = [x for x in rows if _floating(x)]
            found = torch.autograd.grad(loop(*rows), wanted, (d_out[at], d_last[at]), materialize_grads=True)
        return tuple(grad.index_copy(0, at, mine) for grad, mine in zip(grads, found, strict=True))

    def back(d_out: Tensor, d_last: Tensor, inputs: Any, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grads, which = backward(d_out, d_last, *inputs, *kept), [i for i, x in enumerate(inputs) if _floating(x)]
        if not d_out.shape[1] or _finite(grads[which.index(state_at)]):
            return grads
        past, first, last = _leading(d_out, d_last, dict(zip(names, inputs)).get("reset"))
        if not bool(past.any()):
            return grads
        others = backward(
            d_out.masked_fill(_beside(past, d_out), 0), d_last.masked_fill(_beside(last, d_last), 0), *inputs, *kept
        )
        reached = [first if i == state_at else past for i in which]
        return tuple(torch.where(_beside(r, x), x, y) for r, x, y in zip(reached, grads, others, strict=True))

    return lambda *inputs: once(*inputs, keep=True), adjoint, lambda *inputs: once(*inputs, keep=False)


def _finite(x: Tensor) -> bool:
    """By a sum, which makes no copy. It may overflow where no number is infinite: that costs time only."""
    return math.isfinite(float(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))))


def _spoilt(names: list[str], inputs: tuple[Any, ...], steps: int) -> Tensor:
    """(B, T) bool: where a row is not finite, or was at an earlier step."""
    given = {name: x for name, x in zip(names, inputs) if _floating(x)}
    lost = ~given.pop("state").isfinite().flatten(1).all(1)
    spoilt = lost[:, None].repeat(1, steps)
    for name, x in given.items():
        bad = x.isnan() | x.isposinf() if name == "g" else ~x.isfinite()
        spoilt |= bad.flatten(2).any(2).unflatten(1, (steps, -1)).any(2)
    return spoilt.cummax(1).values


def _leading(d_out: Tensor, d_last: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What leads, no reset between, to a gradient that is not finite: steps (B, T), first and last states (B) bool."""
    times, last = torch.arange(d_out.shape[1], device=d_out.device), ~d_last.isfinite().flatten(1).all(1)
    bad = torch.where(d_out.isfinite().flatten(2).all(2), -1, times)
    bad[:, -1].masked_fill_(last, len(times))
    part = torch.zeros_like(bad) if reset is None else reset.cumsum(1)
    latest = bad.new_full((len(bad), len(times) + 1), -1).scatter_reduce(1, part, bad, "amax")
    past = times <= latest.gather(1, part)
    return past, past[:, 0] & (part[:, 0] == 0), last


def _beside(flags: Tensor, x: Tensor) -> Tensor:
    """Flags (B) as they broadcast to x (B, ...), flags (B, T) to x (B, n T, ...)."""
    if flags.ndim == 2:
        flags = flags.repeat_interleave(x.shape[1] // flags.shape[1], 1)
    return flags.view(*flags.shape, *[1] * (x.ndim - flags.ndim))


def _cleared(inputs: tuple[Any, ...], state_at: int, spoilt: Tensor) -> list[Any]:
    """Zeros where spoilt; a state that the first step spoils is one."""
    cleared = list(inputs)
    for i, x in enumerate(inputs):
        if _floating(x):
            cleared[i] = x.masked_fill(_beside(spoilt[:, 0] if i == state_at else spoilt, x), 0)
    return cleared


def _rows(inputs: tuple[Any, ...], at: Tensor) -> list[Any]:
    return [x.detach()[at] if isinstance(x, Tensor) else x for x in inputs]


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
