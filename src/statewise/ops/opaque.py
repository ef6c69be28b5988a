"""Kernels that neither autograd nor torch.compile can see into, made into one function that both take, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kernel = Callable[..., tuple[Tensor, ...]]


def opaque(
    name: str,
    devices: str | tuple[str, ...],
    arguments: str,
    forward: Kernel,
    backward: Kernel,
    like: Kernel,
    *,
    results: int,
    kept: int,
    keep_results: bool = False,
) -> Kernel:
    """f(*arguments) -> its results, differentiable once, and a custom op `statewise::name` for whatever traces.

    arguments: their names, "x a reset?"; those with a question mark may be None and take no gradient.
    forward(*arguments) -> `results` results, then `kept` tensors that backward wants; none may be an argument itself.
    backward(*gradients of the results, *arguments, *what forward kept) -> a gradient for each argument that takes one.
    keep_results: whether the results are among what is kept, before the rest.
    like(*arguments) -> empty tensors of the shapes and dtypes that forward returns.

    Outside of a trace the kernels are called as they are: the first call of a custom op imports the compiler, which
    takes seconds, and every call of one costs more. A second derivative raises.
    """
    names = arguments.split()
    takes = [not n.endswith("?") for n in names]
    first = 0 if keep_results else results  # of what forward returns and backward wants
    plain = _function(forward, backward, results, first, takes)
    traced = _custom_op(name, devices, names, forward, backward, like, results, first, kept, takes)

    def run(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        return traced(*inputs)[:results] if is_traced(inputs[0]) else plain(*inputs)  # type: ignore[arg-type]

    return run


def is_traced(x: Tensor) -> bool:
    """Whether something other than eager autograd is watching what is done to x."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _function(forward: Kernel, backward: Kernel, results: int, first: int, takes: list[bool]) -> Kernel:
    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outs = forward(*inputs)
            ctx.save_for_backward(*inputs, *outs[first:])
            return outs[:results]

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return _spread(backward(*grads, *ctx.saved_tensors), takes)

    return Run.apply


def _custom_op(
    name: str,
    devices: str | tuple[str, ...],
    names: list[str],
    forward: Kernel,
    backward: Kernel,
    like: Kernel,
    results: int,
    first: int,
    kept: int,
    takes: list[bool],
) -> Kernel:
    given = [("Tensor " if take else "Tensor? ") + n.rstrip("?") for n, take in zip(names, takes)]
    more = [
        f"Tensor {kind}{i}" for kind, count in (("g", results), ("kept", results - first + kept)) for i in range(count)
    ]

    def returns(count: int) -> str:
        return f"({', '.join(['Tensor'] * count)})"

    run = torch.library.custom_op(
        f"statewise::{name}", forward, mutates_args=(), device_types=devices,
        schema=f"({', '.join(given)}) -> {returns(results + kept)}",
    )  # fmt: skip
    adjoint = torch.library.custom_op(
        f"statewise::{name}_backward", backward, mutates_args=(), device_types=devices,
        schema=f"({', '.join([*more[:results], *given, *more[results:]])}) -> {returns(sum(takes))}",
    )  # fmt: skip
    run.register_fake(like)

    @adjoint.register_fake
    def _(*tensors: Any) -> tuple[Tensor, ...]:
        inputs = tensors[results : results + len(names)]
        return tuple(t.new_empty(t.shape) for t, take in zip(inputs, takes) if take)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output[first:])

    def differentiate(ctx: Any, *grads: Any) -> Any:
        return _spread(adjoint(*grads[:results], *ctx.saved_tensors), takes)

    run.register_autograd(differentiate, setup_context=keep)
    return run


def _spread(grads: tuple[Tensor, ...], takes: list[bool]) -> tuple[Tensor | None, ...]:
    left = iter(grads)
    return tuple(next(left) if take else None for take in takes)
