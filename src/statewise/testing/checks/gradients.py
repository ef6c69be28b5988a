"""Gradients: to x, the first state and every parameter, through outputs and last state."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from ...core import chunked, costs, leaves, names, unroll
from ..check import Skipped, check, no_numbers, no_resets
from ..sample import STEPS, Layer, close, close_gradients, inputs, mask, trainable, warm

Run = Callable[[Tensor, Any], tuple[Tensor, Any]]


@check("gradients")
def check_gradients_of_outputs(layer: Layer) -> None:
    """Through the outputs, forward has the gradients of step repeated."""
    _same_gradients(layer, lambda x, s: layer(x, s), lambda x, s: unroll(layer, x, s), through="outputs")


@check("gradients")
def check_gradients_of_last_state(layer: Layer) -> None:
    """Through the last state, forward has the gradients of step repeated."""
    _same_gradients(layer, lambda x, s: layer(x, s), lambda x, s: unroll(layer, x, s), through="last state")


@check("gradients")
def check_gradients_in_chunks(layer: Layer) -> None:
    """Run in chunks with the state carried, the gradients are those of the whole."""
    sizes = [3, 0, 4]
    for through in ("outputs", "last state"):
        _same_gradients(layer, lambda x, s: chunked(layer, x, sizes, s), lambda x, s: layer(x, s), through=through)


@check("gradients")
def check_gradients_with_lengths(layer: Layer) -> None:
    """With lengths, forward has the gradients of step repeated."""
    ends = torch.tensor([STEPS, 0, 4])
    for through in ("outputs", "last state"):
        _same_gradients(
            layer,
            lambda x, s: layer(x, s, lengths=ends),
            lambda x, s: unroll(layer, x, s, lengths=ends),
            through=through,
        )


@check("gradients", why_not=no_resets)
def check_gradients_with_resets(layer: Layer) -> None:
    """With resets, forward has the gradients of step repeated."""
    reset = mask(STEPS, (0, 3), (1, 0), (1, 1), (2, STEPS - 1))
    for through in ("outputs", "last state"):
        _same_gradients(
            layer,
            lambda x, s: layer(x, s, reset=reset),
            lambda x, s: unroll(layer, x, s, reset=reset),
            through=through,
        )


@check("gradients")
def check_gradients_over_long_time(layer: Layer) -> None:
    """Over 130 steps, past the usual block sizes, the gradients are those of step repeated."""
    _same_gradients(layer, lambda x, s: layer(x, s), lambda x, s: unroll(layer, x, s), through="outputs", steps=130)


@check("gradients")
def check_gradients_not_contiguous(layer: Layer) -> None:
    """A gradient that arrives expanded or transposed is as good as its copy."""
    x, first = inputs(layer), warm(layer)
    wrt = [p for p in layer.parameters() if p.requires_grad] + ([] if layer.vocab else [x.requires_grad_()])
    if not wrt:
        raise Skipped("nothing takes a gradient")
    y, _ = layer(x, first)
    if not y.requires_grad:
        raise Skipped("the output takes no gradient")
    for what, grad in {
        "expanded": torch.ones((), dtype=y.dtype).expand_as(y),
        "transposed": torch.randn(*y.shape[:2][::-1], y.shape[2], dtype=y.dtype).transpose(0, 1),
    }.items():
        got = torch.autograd.grad(y, wrt, grad, retain_graph=True, allow_unused=True)
        want = torch.autograd.grad(y, wrt, grad.contiguous().clone(), retain_graph=True, allow_unused=True)
        for g, w in zip(got, want, strict=True):
            if w is not None:
                close(g, w, f"a gradient that arrives {what} gives another", 1e-9)


@check("gradients")
def check_gradcheck(layer: Layer) -> None:
    """Gradients are the slopes that finite differences measure: atol 1e-8, rtol 1e-6."""
    x, first = inputs(layer, 3, 2), trainable(warm(layer, 2))
    named = {} if layer.vocab else {"x": x.requires_grad_()}
    named |= {n: s for n, s in zip(_names(first), leaves(first), strict=True) if s.requires_grad}
    named |= {n: p for n, p in layer.named_parameters() if p.requires_grad}
    wrt = list(named.values())
    if not wrt:
        raise Skipped("nothing takes a gradient")

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        # The probe makes what the last state does next part of the function, whatever its gauge.
        y, last = layer(x, first)
        return y, layer(probe, last)[0]

    probe = inputs(layer, 1, 2, seed=6)
    fast = sum(w.numel() for w in wrt) > 150  # all columns where that is quick, else random combinations of them
    try:
        gradcheck(run, wrt, eps=1e-6, atol=1e-8, rtol=1e-6, nondet_tol=0.0, fast_mode=fast)
    except GradcheckError as error:
        told = str(error).strip().split("\n")[0]
        at = re.search(r"input (\d+)", told)
        where = f"to {[*named][int(at[1])]}" if at else told
        raise AssertionError(f"the gradient {where} is not the slope that finite differences measure") from None


@check("gradients")
def check_every_parameter_learns(layer: Layer) -> None:
    """A gradient that is not all zero reaches every parameter, from the answers or from the costs."""
    y, last = layer(inputs(layer), warm(layer))
    again = layer(inputs(layer, seed=1), last)[0]
    named = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    if not named:
        raise Skipped("the layer has no parameters to train")
    loss = (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + again.cos().sum()
    for total in costs(last):
        loss = loss + total.sum()
    assert loss.requires_grad, "no gradient reaches any parameter"
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    dead = [n for n, g in zip(named, grads, strict=True) if g is None or not g.abs().any()]
    assert not dead, f"no gradient reaches {', '.join(dead)}"


@check("gradients")
def check_every_state_matters(layer: Layer) -> None:
    """The outputs depend on the given state, and a gradient reaches it."""
    first = trainable(warm(layer))
    found = {n: s for n, s in zip(_names(first), leaves(first), strict=True) if s.requires_grad and s.numel()}
    if not found:
        raise Skipped("the state has no floating leaves")
    y, last = layer(inputs(layer), first)
    loss = y.sin().sum() + layer(inputs(layer, seed=1), last)[0].cos().sum()
    assert loss.requires_grad, "no gradient reaches the first state"
    grads = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    assert any(g is not None and g.abs().any() for g in grads), "no gradient reaches the first state"


@check("gradients", why_not=no_numbers)
def check_gradients_at_zero(layer: Layer) -> None:
    """At x = 0 from the initial state every gradient is finite: no square root or norm of zero."""
    x = torch.zeros_like(inputs(layer)).requires_grad_()
    y, last = layer(x)
    loss = y.sum() + layer(x, last)[0].sum()
    named = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
        assert g is None or g.isfinite().all(), f"at x = 0 the gradient to {name} is not finite"


@check("gradients", why_not=no_numbers)
def check_gradients_when_saturated(layer: Layer) -> None:
    """At x = +-100 in float32 every output and gradient is finite: no mask after exp, no log of zero."""
    layer = layer.float()
    x = (100 * inputs(layer).sign()).requires_grad_()
    y, _ = layer(x)
    named = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    assert y.isfinite().all(), "at x = +-100 the output is not finite"
    for name, g in zip(named, torch.autograd.grad(y.sum(), list(named.values()), allow_unused=True), strict=True):
        assert g is None or g.isfinite().all(), f"at x = +-100 the gradient to {name} is not finite"


@check("gradients")
def check_trains(layer: Layer) -> None:
    """In train mode one step of gradient descent changes the outputs and leaves them finite."""
    layer.train()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not parameters:
        raise Skipped("the layer has no parameters to train")
    x = inputs(layer)
    before = layer(x)[0]
    before.pow(2).mean().backward()
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    layer.eval()
    after = layer(x)[0]
    assert after.isfinite().all(), "after one step of gradient descent the output is not finite"
    assert not torch.equal(after, before), "one step of gradient descent changes nothing"


def _same_gradients(layer: Layer, got: Run, want: Run, *, through: str, steps: int = STEPS) -> None:
    """One loss by two ways; gradients to x, each floating leaf of the first state, each parameter."""
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}

    def grads(run: Run) -> dict[str, Tensor | None]:
        x, first = inputs(layer, steps), trainable(warm(layer))
        wrt = {n: s for n, s in zip(_names(first), leaves(first), strict=True) if s.requires_grad} | parameters
        if not layer.vocab:
            wrt["x"] = x.requires_grad_()
        y, last = run(x, first)
        if through == "outputs":
            loss = (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
        else:
            loss = layer(inputs(layer, STEPS, seed=6), last)[0].sin().sum()
        if not loss.requires_grad or not wrt:
            raise Skipped("nothing takes a gradient")
        return dict(zip(wrt, torch.autograd.grad(loss, list(wrt.values()), allow_unused=True), strict=True))

    first_way, second_way = grads(got), grads(want)
    for name, w in second_way.items():
        what = f"through the {through}, the gradient to {name} is not that of the other way to run"
        close_gradients(first_way[name], w, what)


def _names(state: Any) -> list[str]:
    return [f"state leaf {name!r}" for name in names(state)]
