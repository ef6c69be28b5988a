"""A pair of kernels made differentiable, in eager mode and for whatever traces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor | None, ...]
Kernel = Callable[..., tuple[Tensor, ...]]


def differentiable(
    name: str, names: str, forward: Kernel, backward: Kernel, loop: Kernel, fake: Kernel
) -> Callable[..., tuple[Tensor, Tensor]]:
    """run(*inputs) -> (out, last) of two kernels, and a custom op `statewise::name` for whatever traces.

    names: of the inputs, those that may be None ending in "?".
    forward(*inputs, keep=True) -> out, last, and what backward wants kept. fake: the same, shapes only.
    backward(d_out, d_last, *inputs, *kept) -> gradients of the inputs that are floating and not None.
    loop(*inputs) -> out, last step by step. Products of matrices spread a NaN or infinity over the whole chunk, the
    past included; once there it never leaves the state. So where the state ends up not finite, the loop decides.

    Outside of a trace the kernels are called as they are: the first call of a custom op imports the compiler, which
    takes seconds. There is no second derivative.
    """

    def exact(*inputs: Tensor | None, keep: bool = True) -> tuple[Tensor, ...]:
        out, last, *kept = forward(*inputs, keep=keep)
        if not _finite(last):
            out, last = loop(*inputs)
            out, last = out.contiguous(), last.contiguous()
        return out, last, *kept

    def adjoint(d_out: Tensor, d_last: Tensor, last: Tensor, inputs: Inputs, kept: Inputs) -> tuple[Tensor, ...]:
        if _finite(last):
            return backward(d_out, d_last, *inputs, *kept)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() if x is not None and _floating(x) else x for x in inputs]
            wanted = [x for x in leaves if x is not None and _floating(x)]
            grads = torch.autograd.grad(loop(*leaves), wanted, (d_out, d_last), allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(grads, wanted))

    def spread(grads: tuple[Tensor, ...], inputs: Inputs) -> Inputs:
        left = iter(grads)
        return tuple(next(left) if _floating(x) else None for x in inputs)

    count = len(names.split())

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            wanted = any(ctx.needs_input_grad)
            out, last, *kept = exact(*inputs, keep=wanted)
            if wanted:
                ctx.save_for_backward(last, *inputs, *kept)
            return out, last

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, d_out, d_last):
            last, *rest = ctx.saved_tensors
            inputs = tuple(rest[:count])
            return spread(adjoint(d_out, d_last, last, inputs, tuple(rest[count:])), inputs)

    traced = _custom_op(name, names, exact, adjoint, spread, fake)

    def run(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last = (traced if _is_traced(inputs[0]) else Run.apply)(*inputs)[:2]
        return out, last

    return run


def _custom_op(name, names, exact, adjoint, spread, fake):
    arguments = [f"Tensor{'?' * n.endswith('?')} {n.rstrip('?')}" for n in names.split()]
    count = len(arguments)

    run = torch.library.custom_op(
        f"statewise::{name}",
        lambda *inputs: list(exact(*inputs)),
        mutates_args=(),
        schema=f"({', '.join(arguments)}) -> Tensor[]",
    )
    run_backward = torch.library.custom_op(
        f"statewise::{name}_backward",
        lambda d_out, d_last, last, *inputs_kept: list(
            adjoint(d_out, d_last, last, inputs_kept[:count], tuple(inputs_kept[count]))
        ),
        mutates_args=(),
        schema=f"(Tensor d_out, Tensor d_last, Tensor last, {', '.join(arguments)}, Tensor[] kept) -> Tensor[]",
    )

    @run.register_fake
    def _(*inputs):
        return list(fake(*inputs))

    @run_backward.register_fake
    def _(d_out, d_last, last, *inputs_kept):
        return [x.new_empty(x.shape) for x in inputs_kept[:count] if _floating(x)]

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output[1:])

    def gradients(ctx, grads):
        inputs, (last, *kept) = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        d_out, d_last = grads[:2]
        return spread(tuple(run_backward(d_out, d_last, last, *inputs, kept)), inputs)

    run.register_autograd(gradients, setup_context=keep)
    return run


def _finite(last: Tensor) -> bool:
    return last.is_meta or bool(last.isfinite().all())


def _floating(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _is_traced(x: Tensor | None) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
