"""Numbers: near float64 in every precision, the same by every backend, and what is not finite stays in its place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import leaves, names, tree_map, unroll
from ...ops import Op, observe, use_backend
from ..check import Skipped, check, no_numbers
from ..sample import BATCH, STEPS, Layer, close, dtype_of, inputs, same_bits, trainable, warm


@check("numbers")
def check_float32_near_float64(layer: Layer) -> None:
    """In float32, forward is at most 4 times as far from float64 as step repeated is, or within 2e-6."""
    low = copy.deepcopy(layer).float()
    high, x = copy.deepcopy(low).double(), inputs(low, 40)
    with torch.no_grad():
        want = unroll(high, _to(x, torch.float64))[0]
        got, loop = (_error(y, want) for y in (low(x)[0], unroll(low, x)[0]))
    assert got <= 4 * loop + 2e-6, f"in float32 forward is {got:.2g} from float64, step repeated {loop:.2g}"


@check("numbers")
def check_float32_gradients_near_float64(layer: Layer) -> None:
    """In float32 the gradients are those of float64 to 1e-4 of their size, or as near as the conditioning allows.

    That is within 8 times what float64's move by when the parameters are moved within half a step of float32: a way
    through the layer and back rounds dozens of times where the parameters are rounded once. A norm over a vector that
    is nearly zero, such as a read by a query nearly orthogonal to all keys, needs it.
    """
    low = copy.deepcopy(layer).float()
    high, x = copy.deepcopy(low).double(), inputs(low)
    exact = _to(x, torch.float64)
    named = [n for n, p in low.named_parameters() if p.requires_grad]
    if not named:
        raise Skipped("the layer has no parameters to train")

    def grads(one: Layer, x: Tensor) -> list[Tensor | None]:
        wrt = dict(one.named_parameters())
        return list(torch.autograd.grad(one(x)[0].sin().sum(), [wrt[n] for n in named], allow_unused=True))

    allowed: list[float] = []
    want = grads(high, exact)
    for i, (name, g, w) in enumerate(zip(named, grads(low, x), want, strict=True)):
        if g is not None and w is not None:
            error, bound = _error(g, w), 1e-4
            if error > bound:  # rarely, as in _near
                allowed = allowed or _moved(
                    high, lambda one: grads(one, exact), want, torch.finfo(torch.float32).eps / 2
                )
                bound = max(bound, 8 * allowed[i])
            assert error <= bound, (
                f"in float32 the gradient to {name} is {error:.2g} from that of float64; allowed {bound:.2g}"
            )


@check("numbers")
def check_float32_dtypes(layer: Layer) -> None:
    """In float32 outputs and states are float32."""
    _has_dtypes(layer.float(), torch.float32)


@check("numbers")
def check_bfloat16_dtypes(layer: Layer) -> None:
    """With bfloat16 parameters y is bfloat16 and the state float32, from forward and from step."""
    _has_dtypes(_half(layer, torch.bfloat16), torch.bfloat16)


@check("numbers")
def check_bfloat16_near_float64(layer: Layer) -> None:
    """With bfloat16 parameters the output is within 5 % of float64's, or as near as the layer's conditioning allows.

    That is within twice what float64's moves by when its parameters are moved within half a step of bfloat16.
    """
    _near(_half(layer, torch.bfloat16), 0.05)


@check("numbers")
def check_float16_dtypes(layer: Layer) -> None:
    """With float16 parameters y is float16 and the state float32, from forward and from step."""
    _has_dtypes(_half(layer, torch.float16), torch.float16)


@check("numbers")
def check_float16_near_float64(layer: Layer) -> None:
    """With float16 parameters the output is within 2 % of float64's, or as near as the layer's conditioning allows."""
    _near(_half(layer, torch.float16), 0.02)


@check("numbers")
def check_autocast_keeps_state_wide(layer: Layer) -> None:
    """Under bfloat16 autocast states stay float32 and closed, from forward and from step."""
    layer = layer.float()
    x, first = inputs(layer), layer.initial_state(BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        after = {"forward": layer(x)[1], "step": layer.step(x[:, 0], first)[1]}
    for name, state in after.items():
        for leaf, a, b in zip(names(first), leaves(first), leaves(state), strict=True):
            assert a.dtype == b.dtype, (
                f"under autocast {name} turns leaf {leaf!r} from {a.dtype} into {b.dtype}: cast to core.wide"
            )


@check("numbers")
def check_autocast_near_float64(layer: Layer) -> None:
    """Under bfloat16 autocast the output is within 5 % of float64's, forward and step alike."""
    low = copy.deepcopy(layer).float()
    high, x = copy.deepcopy(low).double(), inputs(low)
    want = high(_to(x, torch.float64))[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name, y in (("forward", low(x)[0]), ("step repeated", unroll(low, x)[0])):
            error = _error(y, want)
            assert error <= 0.05, f"under autocast {name} is {error:.2g} from float64"


@check("numbers")
def check_autocast_trains(layer: Layer) -> None:
    """Under bfloat16 autocast the gradients of the parameters are finite, and float32."""
    layer = layer.float()
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    if not parameters:
        raise Skipped("the layer has no parameters to train")
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(inputs(layer))
    for name, g in zip(parameters, torch.autograd.grad(y.float().sum(), list(parameters.values()), allow_unused=True)):
        if g is not None:
            assert g.isfinite().all() and g.dtype == parameters[name].dtype, f"the gradient to {name} is {g.dtype}"


@check("numbers")
def check_backends_agree(layer: Layer) -> None:
    """Every backend that takes the layer's calls gives the reference's outputs and last state."""
    x, first = inputs(layer, 20), warm(layer)
    with use_backend("reference"), _obstacles() as obstacles:
        want, after = layer(x, first)
    for name in _able(obstacles):
        with use_backend(name):
            y, last = layer(x, first)
        close(y, want, f"by the backend {name!r} the output is not the reference's")
        close(last, after, f"by the backend {name!r} the last state is not the reference's")


@check("numbers")
def check_backend_gradients_agree(layer: Layer) -> None:
    """Every backend that takes the layer's calls gives the reference's gradients, through outputs and last state."""

    def grads() -> list[Tensor]:
        first = trainable(warm(layer))
        x = inputs(layer, 20)
        wrt = [s for s in leaves(first) if s.requires_grad] + [p for p in layer.parameters() if p.requires_grad]
        wrt += [] if layer.vocab else [x.requires_grad_()]
        y, last = layer(x, first)
        loss = y.sin().sum() + sum((s * s.conj()).real.sum() for s in leaves(last) if s.requires_grad)
        found = torch.autograd.grad(loss, wrt, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wrt, strict=True)]

    with use_backend("reference"), _obstacles() as obstacles:
        want = grads()
    for name in _able(obstacles):
        with use_backend(name):
            got = grads()
        close(tuple(got), tuple(want), f"by the backend {name!r} the gradients are not the reference's", 1e-9)


@check("numbers", why_not=no_numbers)
def check_nan_stays_in_its_row(layer: Layer) -> None:
    """NaN or inf in one row of x leaves the other rows' bits as they were."""
    x = inputs(layer)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[0, 2] = value
        same_bits(layer(bad)[0][1:], layer(x)[0][1:], f"{value} in row 0 reaches other rows")


@check("numbers", why_not=no_numbers)
def check_nan_stays_in_its_future(layer: Layer) -> None:
    """NaN or inf in x at t leaves the bits of all earlier outputs as they were."""
    x = inputs(layer)
    for value in (torch.nan, torch.inf):
        for t in (2, STEPS - 1):
            bad = x.clone()
            bad[0, t] = value
            same_bits(layer(bad)[0][:, :t], layer(x)[0][:, :t], f"{value} at step {t} reaches earlier outputs")


@check("numbers", why_not=no_numbers)
def check_nan_is_not_swallowed(layer: Layer) -> None:
    """NaN in x shows in the outputs of forward exactly where it shows in those of step repeated."""
    x = inputs(layer)
    x[0, 2] = torch.nan
    got, want = layer(x)[0].isnan(), unroll(layer, x)[0].isnan()
    assert torch.equal(got, want), f"forward has NaN at {_where(got)}, step repeated at {_where(want)} (row, step)"


@check("numbers")
def check_nan_in_a_state_stays_in_its_row(layer: Layer) -> None:
    """A state gone NaN in one row leaves the other rows' bits as they were."""
    x, first = inputs(layer), warm(layer)

    def spoil(s: Tensor) -> Tensor:
        s = s.clone()
        if s.is_floating_point() or s.is_complex():
            s[0] = torch.nan
        return s

    bad = tree_map(spoil, first)
    same_bits(layer(x, bad)[0][1:], layer(x, first)[0][1:], "NaN in row 0 of the state reaches other rows")
    same_bits(
        layer.step(x[:, 0], bad)[0][1:], layer.step(x[:, 0], first)[0][1:], "in step NaN in row 0 reaches other rows"
    )


@check("numbers", why_not=no_numbers)
def check_large_inputs_stay_finite(layer: Layer) -> None:
    """Inputs of 10,000 in float32 give finite outputs and states: no exp overflows."""
    layer = layer.float()
    for sign in (1, -1):
        y, last = layer(sign * 1e4 * inputs(layer, 20).abs())
        assert y.isfinite().all(), f"inputs of {sign}e4 give outputs that are not finite"
        assert all(s.isfinite().all() for s in leaves(last)), f"inputs of {sign}e4 give states that are not finite"


@check("numbers")
def check_long_stays_finite(layer: Layer) -> None:
    """After 300 steps in float32 outputs and states are finite and below 1e6."""
    layer = layer.float()
    with torch.no_grad():
        y, last = layer(inputs(layer, 300, 1))
    for what, s in [("output", y), *((f"state leaf {n!r}", s) for n, s in zip(names(last), leaves(last), strict=True))]:
        if s.is_floating_point() or s.is_complex():
            assert s.abs().lt(1e6).all(), f"after 300 steps the {what} reaches {s.abs().max().item():.2g}"


@check("numbers")
def check_gpu_near_cpu(layer: Layer) -> None:
    """On a GPU, forward and step give the CPU's numbers in float64, the state included."""
    if not torch.cuda.is_available():
        raise Skipped("no GPU here")
    x, first, there = inputs(layer), warm(layer), copy.deepcopy(layer).cuda()
    (want, after), moved = layer(x, first), tree_map(Tensor.cuda, first)
    y, last = there(x.cuda(), moved)
    close(y.cpu(), want, "on the GPU the output is not the CPU's", 1e-8)
    close(tree_map(Tensor.cpu, last), after, "on the GPU the last state is not the CPU's", 1e-8)
    close(there.step(x[:, 0].cuda(), moved)[0].cpu(), want[:, 0], "on the GPU step is not the CPU's", 1e-8)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _error(got: Tensor, want: Tensor) -> float:
    """rms of the difference over rms of what is wanted."""
    size = want.abs().pow(2).mean().sqrt().clamp_min(1e-3)
    return float((got.to(want.dtype) - want).detach().abs().pow(2).mean().sqrt() / size)


def _half(layer: Layer, dtype: torch.dtype) -> Layer:
    if any(w.is_complex() for w in (*layer.parameters(), *layer.buffers())):
        raise Skipped(f"complex parameters have no {str(dtype)[6:]}; keep real pairs to have one")
    return copy.deepcopy(layer).to(dtype)


def _near(low: Layer, bound: float) -> None:
    low_dtype = dtype_of(low)
    high, x = copy.deepcopy(low).double(), inputs(low)
    exact = _to(x, torch.float64)
    with torch.no_grad():
        want = unroll(high, exact)[0]
        for name, y in (("forward", low(x)[0]), ("step repeated", unroll(low, x)[0])):
            error = _error(y, want)
            if error > bound:  # rarely: what is asked costs eight more runs
                by = _moved(high, lambda one: [unroll(one, exact)[0]], [want], torch.finfo(low_dtype).eps / 2)
                bound = max(bound, 2 * by[0])
            assert error <= bound, f"{name} is {error:.2g} (relative rms) from float64; allowed {bound:.2g}"


def _moved(
    layer: Layer,
    get: Callable[[Layer], Sequence[Tensor | None]],
    want: Sequence[Tensor | None],
    step: float,
    draws: int = 8,
) -> list[float]:
    """How far each tensor of get(layer) moves on average when each parameter is moved by up to `step` of its size."""
    rng, moved = torch.Generator().manual_seed(0), [0.0] * len(want)
    for _ in range(draws):
        other = copy.deepcopy(layer)
        with torch.no_grad():
            for p in other.parameters():
                if p.is_floating_point():
                    p.mul_(1 + step * (2 * torch.rand(p.shape, generator=rng, dtype=torch.float64).to(p.device) - 1))
        for i, (got, w) in enumerate(zip(get(other), want, strict=True)):
            moved[i] += 0.0 if got is None or w is None else _error(got, w) / draws
    return moved


def _has_dtypes(layer: Layer, dtype: torch.dtype) -> None:
    x, first = inputs(layer), layer.initial_state(BATCH)
    after = {"forward": layer(x), "forward from a state": layer(x, first), "step": layer.step(x[:, 0], first)}
    for name, (y, state) in after.items():
        assert y.dtype == dtype, f"{name}: y is {y.dtype}, expected {dtype}"
        for leaf, s in zip(names(state), leaves(state), strict=True):
            if s.is_floating_point() or s.is_complex():
                assert s.dtype.to_real() == torch.float32, (
                    f"{name}: leaf {leaf!r} is {s.dtype}, expected float32: use core.wide"
                )


def _where(mask: Tensor) -> str:
    return str(sorted({(row, t) for row, t, *_ in mask.nonzero().tolist()}))


@contextlib.contextmanager
def _obstacles() -> Iterator[dict[str, str | None]]:
    """Backend to the first reason why it cannot take one of the op calls made within the block; None: it takes all."""
    found: dict[str, str | None] = {}

    def note(op: Op, chosen: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for backend in op.backends.values():
            found[backend.name] = found.get(backend.name) or backend.why_not(args, kwargs)

    with observe(note):
        yield found


def _able(obstacles: dict[str, str | None]) -> list[str]:
    """The backends without an obstacle, one at least; Skipped says why there is none."""
    if not obstacles:
        raise Skipped("the layer calls no op that has backends")
    able = [name for name, reason in obstacles.items() if reason is None]
    if not able:
        reasons = ", ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise Skipped(f"no backend takes the layer's calls here ({reasons})")
    return able
