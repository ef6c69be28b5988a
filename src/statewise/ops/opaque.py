"""Kernels that neither autograd nor torch.compile can see into, made into one function that both take, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Kernel = Callable[..., tuple[Tensor, ...]]


def opaque(
    name: str,
    devices: str | tuple[str, ...] | None,
    arguments: str,
    forward: Kernel,
    backward: Kernel,
    like: Kernel,
    *,
    results: int,
    kept: int,
    keep_results: bool = False,
    alone: Kernel | None = None,
) -> Kernel:
    """f(*arguments) -> its results, differentiable once, and a custom op `statewise::name` for whatever traces.

    arguments: their names, "x a reset? kind:str"; those with a question mark may be None, those with a type (str, int,
        float, bool) are constants. The first is a tensor.
    forward(*arguments) -> `results` results, then `kept` tensors that backward wants; none may be an argument itself.
    backward(*gradients of the results, *arguments, *what forward kept) -> a gradient for each argument that is a tensor
        of floating or complex numbers.
    keep_results: whether the results are among what is kept, before the rest.
    like(*arguments) -> empty tensors of the shapes and dtypes that forward returns.
    alone(*arguments) -> the results, for a call outside of a trace that wants no gradients.

    Outside of a trace the kernels are called as they are: the first call of a custom op imports the compiler, which
    takes seconds, and every call of one costs more. A second derivative raises. Autocast is off in the kernels.
    """
    names = arguments.split()
    first = 0 if keep_results else results  # of what forward returns and backward wants
    forward, backward = without_autocast(forward), without_autocast(backward)
    alone = forward if alone is None else without_autocast(alone)
    plain = _function(name, forward, backward, results, first)
    traced = _custom_op(name, devices, names, forward, backward, like, results, first, kept)

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        if is_traced(inputs[0]):
            return traced(*inputs)[:results]
        return plain(*inputs) if is_watched(*inputs) else alone(*inputs)[:results]

    return run


def is_traced(x: Tensor) -> bool:
    """Whether something other than eager autograd is watching what is done to x, or there is nothing in x."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def is_watched(*inputs: Any) -> bool:
    """Whether a derivative of any kind is asked for: else a kernel is called without what autograd takes."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def without_autocast(kernel: Kernel) -> Kernel:
    """The same under autocast, which would take products of states and decays in half precision."""

    @functools.wraps(kernel)
    def exactly(*inputs: Any) -> tuple[Tensor, ...]:
        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return kernel(*inputs)
        with torch.autocast(device, enabled=False):
            return kernel(*inputs)

    return exactly


def _function(name: str, forward: Kernel, backward: Kernel, results: int, first: int) -> Kernel:
    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outs = forward(*inputs)
            _keep(ctx, inputs, outs[first:])
            return outs[:results]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            inputs, kept = _kept(ctx)
            return _spread(Adjoint.apply(*grads, *inputs, *kept), inputs)

    class Adjoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> Any:
            return tuple(backward(*tensors))

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise _once(name)

    return Run.apply


def _custom_op(
    name: str,
    devices: str | tuple[str, ...] | None,
    names: list[str],
    forward: Kernel,
    backward: Kernel,
    like: Kernel,
    results: int,
    first: int,
    kept: int,
) -> Kernel:
    given = [_declared(n) for n in names]
    more = [
        f"Tensor {kind}{i}" for kind, count in (("g", results), ("kept", results - first + kept)) for i in range(count)
    ]
    run = torch.library.custom_op(
        f"statewise::{name}", forward, mutates_args=(), device_types=devices,
        schema=f"({', '.join(given)}) -> ({', '.join(['Tensor'] * (results + kept))})",
    )  # fmt: skip
    adjoint = torch.library.custom_op(
        f"statewise::{name}_backward", lambda *tensors: list(backward(*tensors)), mutates_args=(), device_types=devices,
        schema=f"({', '.join([*more[:results], *given, *more[results:]])}) -> Tensor[]",
    )  # fmt: skip
    run.register_fake(like)

    @adjoint.register_fake
    def _(*tensors: Any) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in tensors[results : results + len(names)] if _takes(t)]

    def differentiate(ctx: Any, *grads: Any) -> Any:
        inputs, rest = _kept(ctx)
        return _spread(adjoint(*grads[:results], *inputs, *rest), inputs)

    def refuse(ctx: Any, *_: Any) -> Any:
        raise _once(name)

    run.register_autograd(differentiate, setup_context=lambda ctx, inputs, output: _keep(ctx, inputs, output[first:]))
    adjoint.register_autograd(refuse)
    return run


def _declared(name: str) -> str:
    name, _, kind = name.partition(":")
    return f"{kind or 'Tensor'}{'?' * name.endswith('?')} {name.rstrip('?')}"


def _keep(ctx: Any, inputs: tuple[Any, ...], kept: tuple[Tensor, ...]) -> None:
    ctx.constants = {i: x for i, x in enumerate(inputs) if not (x is None or isinstance(x, Tensor))}
    ctx.count = len(inputs)
    ctx.save_for_backward(*(None if i in ctx.constants else x for i, x in enumerate(inputs)), *kept)


def _kept(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    saved = ctx.saved_tensors
    return tuple(ctx.constants.get(i, x) for i, x in enumerate(saved[: ctx.count])), saved[ctx.count :]


def _takes(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _spread(grads: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    left = iter(grads)
    return tuple(next(left) if _takes(x) else None for x in inputs)


def _once(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name} has first derivatives only; backend='reference' has all of them")
