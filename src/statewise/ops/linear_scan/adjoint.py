"""Derivatives of the scan, of any order, for kernels that autograd and torch.compile cannot see into.

The adjoint of a scan is a scan backwards in time, and the adjoint of that is the scan again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..opaque import is_traced, is_watched

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def differentiable(name: str, devices: str | tuple[str, ...], forward: Forward, backward: Backward) -> Forward:
    """The scan made of two kernels, and a custom op `statewise::name` for whatever traces.

    forward(a, x, h0, reset) -> h, last.
    backward(g, g_last, a, h, h0, reset) -> da in the shape of a, dx, dh0.

    Outside of a trace the kernels are called as they are: the first call of a custom op imports the compiler, which
    takes seconds, and every call of one costs more.
    """
    plain, traced = _functions(forward, backward), _custom_op(name, devices, forward, backward)

    def run(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        if is_traced(x):
            return traced(a, x, h0, reset)
        return plain(a, x, h0, reset) if is_watched(a, x, h0) else forward(a, x, h0, reset)

    return run


def _functions(forward: Forward, backward: Backward) -> Forward:
    # by forward(ctx, ...): with a setup_context of its own, each call would look up the signature of forward

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            _keep_for_run(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, g, g_last):
            saved = ctx.saved_tensors  # once: a checkpointed block recomputes them each time
            again = is_watched(g, g_last, *saved) or is_traced(g)
            return _run_backward(saved, g, g_last, Adjoint.apply if again else backward)

    class Adjoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = backward(*inputs)
            _keep_for_adjoint(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, q, p, r):
            return _adjoint_backward(ctx, q, p, r, Run.apply)

    return Run.apply


def _custom_op(name: str, devices: str | tuple[str, ...], forward: Forward, backward: Backward) -> Forward:
    @torch.library.custom_op(f"statewise::{name}", mutates_args=(), device_types=devices)
    def run(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return forward(a, x, h0, reset)

    @torch.library.custom_op(f"statewise::{name}_backward", mutates_args=(), device_types=devices)
    def adjoint(
        g: Tensor, g_last: Tensor, a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(g, g_last, a, h, h0, reset)

    @run.register_fake
    def _(a, x, h0, reset):
        return x.new_empty(x.shape), h0.new_empty(h0.shape)

    @adjoint.register_fake
    def _(g, g_last, a, h, h0, reset):
        return a.new_empty(a.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)

    run.register_autograd(
        lambda ctx, g, g_last: _run_backward(ctx.saved_tensors, g, g_last, adjoint), setup_context=_keep_for_run
    )
    adjoint.register_autograd(
        lambda ctx, q, p, r: _adjoint_backward(ctx, q, p, r, run), setup_context=_keep_for_adjoint
    )
    return run


def _keep_for_run(ctx, inputs, output):
    a, _, h0, reset = inputs
    ctx.save_for_backward(a, output[0], h0, reset)
    ctx.set_materialize_grads(False)


def _run_backward(saved, g, g_last, adjoint):
    a, h, h0, reset = saved
    g = h.new_zeros([1, 1, *h.shape[2:]]).expand_as(h) if g is None else g
    g_last = torch.zeros_like(h0) if g_last is None else g_last
    return *adjoint(g, g_last, a, h, h0, reset), None


def _keep_for_adjoint(ctx, inputs, output):
    _, _, a, h, h0, reset = inputs
    ctx.save_for_backward(a, h, h0, reset, output[1])


def _adjoint_backward(ctx, q, p, r, run):
    """The scan rho_t = a_t rho_{t-1} + p_t + q_t h_{t-1} from rho_0 = r, for gradients q, p, r of da, dx, dh0."""
    a, h, h0, reset, lam = ctx.saved_tensors
    if not h.shape[1]:
        return p, r, torch.zeros_like(a), torch.zeros_like(h), torch.zeros_like(h0), None
    q = q.expand(h.shape)
    if reset is not None:
        reset_ = reset.view(*reset.shape, *[1] * (h.ndim - 2))
        q = q.masked_fill(reset_, 0)
    h_before = torch.cat([h0[:, None], h[:, :-1]], 1)
    rho, rho_last = run(a, p + _uncut(q * h_before, reset), r, reset)
    rho_before = torch.cat([r[:, None], rho[:, :-1]], 1)
    d_a = _uncut(lam * rho_before.conj(), reset).sum_to_size(a.shape)
    d_before = lam * q.conj()
    d_h = torch.cat([d_before[:, 1:], torch.zeros_like(d_before[:, :1])], 1)
    return rho, rho_last, d_a, d_h, d_before[:, 0], None


def _uncut(t: Tensor, reset: Tensor | None) -> Tensor:
    """Zero where a reset cuts step t from the one before."""
    return t if reset is None else torch.where(reset.view(*reset.shape, *[1] * (t.ndim - 2)), 0, t)
