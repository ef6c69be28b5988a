"""What the backends share: one form of the decays, and derivatives of kernels that autograd cannot see into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core import clear_past_end

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str], tuple[Tensor, Tensor, Tensor]]


def kind_of(log_decay: Tensor | None) -> str:
    """scalar, key, value or full: by the last two sizes."""
    if log_decay is None:
        return "scalar"
    key, value = log_decay.ndim > 1 and log_decay.shape[-2] > 1, log_decay.ndim > 0 and log_decay.shape[-1] > 1
    return {(0, 0): "scalar", (1, 0): "key", (0, 1): "value", (1, 1): "full"}[key, value]


def normal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str]:
    """Inputs that end with their rows, and log decays (B, T, H, 1), (B, T, H, K), (B, T, H, V) or (B, T, H, K, V).

    Past the end q, k, v and the log decay are zero, so o is zero there and the state rests.
    """
    kind, g = kind_of(log_decay), None
    if log_decay is not None:
        g = log_decay.to(state.dtype)
        g = g.view(*[1] * (5 - g.ndim), *g.shape)
        g = g.expand(*v.shape[:3], *g.shape[3:])
        g = g if kind == "full" else g.flatten(3)
    if lengths is not None:
        lengths = lengths.to(v.device)
        q, k, v = (clear_past_end(t, lengths) for t in (q, k, v))
        g = None if g is None else clear_past_end(g, lengths)
        reset = None if reset is None else clear_past_end(reset, lengths)
    return q, k, v, g, state, reset, kind


def differentiable(
    name: str,
    devices: str | tuple[str, ...] | None,
    forward: Run,
    backward: Callable[..., Any],
    size: Callable[[str, Tensor, int], int],
) -> Run:
    """Run made of two functions, and a custom op `statewise::name` for whatever traces.

    forward(q, k, v, g, state, reset, kind) -> o, the state at the end, the states before each chunk.
    backward(d_o, d_last, q, k, v, g, reset, states, kind) -> gradients of q, k, v, g and state.
    size(kind, v, K): steps of a chunk.

    Outside of a trace they are called as they are: the first call of a custom op imports the compiler, which takes
    seconds, and every call of one costs more.
    """
    plain, traced = _functions(forward, backward), _custom_op(name, devices, forward, backward, size)

    def run(q, k, v, g, state, reset, kind):
        return (traced if _is_traced(v) else plain)(q, k, v, g, state, reset, kind)

    return run


def _is_traced(x: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _functions(forward: Run, backward: Callable[..., Any]) -> Run:
    class Run(torch.autograd.Function):
        @staticmethod
        def forward(q, k, v, g, state, reset, kind):
            return forward(q, k, v, g, state, reset, kind)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(output[2])
            _keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx, d_o, d_last, _):
            return _run_backward(ctx, d_o, d_last, Adjoint.apply)

    class Adjoint(torch.autograd.Function):
        @staticmethod
        def forward(d_o, d_last, q, k, v, g, reset, states, kind):
            return backward(d_o, d_last, q, k, v, g, reset, states, kind)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError("outer_scan has first derivatives only; backend='reference' has all of them")

    return Run.apply


def _keep(ctx, inputs, output):
    q, k, v, g, _, reset, kind = inputs
    ctx.save_for_backward(q, k, v, g, reset, output[2])
    ctx.kind = kind
    ctx.set_materialize_grads(False)


def _run_backward(ctx, d_o, d_last, backward):
    q, k, v, g, reset, states = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o
    if d_last is None:
        d_last = states.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    d_q, d_k, d_v, d_g, d_state = backward(d_o, d_last, q, k, v, g, reset, states, ctx.kind)
    return d_q, d_k, d_v, None if g is None else d_g, d_state, None, None


def _custom_op(
    name: str,
    devices: str | tuple[str, ...] | None,
    forward: Run,
    backward: Callable[..., Any],
    size: Callable[[str, Tensor, int], int],
) -> Run:
    @torch.library.custom_op(f"statewise::{name}", mutates_args=(), device_types=devices)
    def run(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(q, k, v, g, state, reset, kind)

    @torch.library.custom_op(f"statewise::{name}_backward", mutates_args=(), device_types=devices)
    def adjoint(
        d_o: Tensor,
        d_last: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        reset: Tensor | None,
        states: Tensor,
        kind: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        d_q, d_k, d_v, d_g, d_state = backward(d_o, d_last, q, k, v, g, reset, states, kind)
        return d_q, d_k, d_v, v.new_empty(0) if d_g is None else d_g, d_state

    @run.register_fake
    def _(q, k, v, g, state, reset, kind):
        count = -(-v.shape[1] // size(kind, v, q.shape[3]))
        return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty((count, *state.shape))

    @adjoint.register_fake
    def _(d_o, d_last, q, k, v, g, reset, states, kind):
        d_g = v.new_empty(0) if g is None else g.new_empty(g.shape)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_g, d_last.new_empty(d_last.shape)

    run.register_autograd(lambda ctx, d_o, d_last, _: _run_backward(ctx, d_o, d_last, adjoint), setup_context=_keep)
    return run
