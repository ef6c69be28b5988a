"""What the checks are made with: inputs, warm states, and comparisons that say in words what differs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, UsageError, layers, leaves, names, tree_map, wide
from ..core.layer import weight_of

if TYPE_CHECKING:
    import jaxtyping

BATCH, STEPS = 3, 7
Layer = RecurrentLayer[Any]


def prepare(layer: Layer, *, seed: int = 0) -> Layer:
    """A copy in float64 and eval mode, its parameters moved a little: zeros at birth would hide mistakes."""
    return moved(copy.deepcopy(layer), seed=seed)


def moved(layer: Layer, *, seed: int = 0) -> Layer:
    """What `prepare` gives, of a layer that nobody else holds: itself."""
    layer = layer.double().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(0.05 * torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.device, p.dtype))
    return layer


def build(cls: type, example: Mapping[str, Any]) -> Layer:
    """cls(**example) as the checks want it; the arguments stay with it, for the checks of construction."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the one that is put back; torch.manual_seed means every GPU's too
        layer = moved(cls(**example))
    layer.__dict__["example"] = dict(example)
    return layer


def examples_of(cls: type) -> list[dict[str, Any]]:
    """Constructor arguments of tiny instances: from the registry, else from the attribute `examples`, else inferred.

    Raises UsageError for a required argument that cannot be guessed from its name.
    """
    for info in layers:
        if info.cls is cls:
            return [dict(example) for example in info.examples]
    given = getattr(cls, "examples", None)
    return [dict(example) for example in given] if given else [_inferred(cls)]


# Small, unequal where they may be, so that a mistaken axis shows, and multiples where they must be.
GUESSES = {
    "width": 4, "hidden": 6, "state": 6, "states": 8, "blocks": 2, "heads": 2, "out": 3, "out_width": 3, "vocab": 5,
    "taps": 3, "window": 3, "depth": 2, "layers": 2, "rank": 2, "key": 3, "value": 3, "size": 4, "dim": 4,
    "input_size": 4, "hidden_size": 6,
}  # fmt: skip


def _inferred(cls: type) -> dict[str, Any]:
    guessed = {}
    for p in inspect.signature(cls).parameters.values():
        if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.name not in GUESSES:
            raise UsageError(
                f"{cls.__name__}: no tiny value is known for the argument {p.name!r}; "
                f"give example={{...}} (--args NAME=VALUE), or the class an attribute `examples`, a list of arguments"
            )
        guessed[p.name] = GUESSES[p.name]
    return guessed


def dtype_of(layer: Layer) -> torch.dtype:
    """The real dtype that the layer works in."""
    weight = weight_of(layer)
    return torch.get_default_dtype() if weight is None else weight.dtype.to_real()


def device_of(layer: Layer) -> torch.device:
    weight = weight_of(layer)
    return torch.device("cpu") if weight is None else weight.device


def inputs(
    layer: Layer, steps: int = STEPS, batch: int = BATCH, *, seed: int = 0
) -> jaxtyping.Shaped[Tensor, "{batch} {steps} *D"]:
    """x (B, T, D) from a normal distribution, or ids (B, T)."""
    rng = torch.Generator().manual_seed(seed)
    if layer.vocab:
        return torch.randint(layer.vocab, (batch, steps), generator=rng).to(device_of(layer))
    x = torch.randn(batch, steps, layer.width, generator=rng, dtype=torch.float64)
    return x.to(device_of(layer), dtype_of(layer))


def warm(layer: Layer, batch: int = BATCH, *, seed: int = 5) -> Any:
    """A state that has seen a few steps, cut from its past."""
    with torch.no_grad():
        state = layer.initial_state(batch)
        for x in inputs(layer, 3, batch, seed=seed).unbind(1):
            _, state = layer.step(x, state)
    return tree_map(Tensor.detach, state)


def mask(steps: int, *at: tuple[int, int], batch: int = BATCH) -> jaxtyping.Bool[Tensor, "{batch} {steps}"]:
    """A reset mask (B, T), True at the given (row, step)."""
    reset = torch.zeros(batch, steps, dtype=torch.bool)
    for row, t in at:
        reset[row, t] = True
    return reset


def close(got: Any, want: Any, what: str, tol: float = 1e-10) -> None:
    """Every number of one tree within tol (1 + |want|) of the other's."""
    assert names(got) == names(want), f"{what}: the leaves are {names(got)}, expected {names(want)}"
    for name, g, w in zip(names(want), leaves(got), leaves(want), strict=True):
        leaf = "" if name == "state" else f" in {name!r}"
        assert g.shape == w.shape, f"{what}: shape {tuple(g.shape)}{leaf}, expected {tuple(w.shape)}"
        g, w = g.detach(), w.detach()
        if not w.is_complex() and not g.is_complex():
            g, w = g.double(), w.double()
        error = (g - w).abs()
        bad = ~((error <= tol * (1 + w.abs())) | (g == w))  # NaN is bad, equal infinities are not
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise AssertionError(
                f"{what}: at {at}{leaf} {g[tuple(at)].item():.6g}, expected {w[tuple(at)].item():.6g}; "
                f"{int(bad.sum())} of {bad.numel()} numbers differ, by up to {error[bad].max().item():.2g}"
            )


def close_gradients(got: Tensor | None, want: Tensor | None, what: str) -> None:
    """close, where a gradient that does not arrive counts as zero."""
    if got is None and want is not None:
        got = torch.zeros_like(want)
    if want is None and got is not None:
        want = torch.zeros_like(got)
    close(got, want, what, 1e-8)


def same_bits(got: Any, want: Any, what: str) -> None:
    """Equal shapes, dtypes and numbers; NaN equals NaN."""
    assert names(got) == names(want), f"{what}: the leaves are {names(got)}, expected {names(want)}"
    for g, w in zip(leaves(got), leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), (
            f"{what}: {g.dtype} {tuple(g.shape)}, expected {w.dtype} {tuple(w.shape)}"
        )
        differ = ~((g == w) | ((g != g) & (w != w)))
        if differ.any():
            at = differ.nonzero()[0].tolist()
            raise AssertionError(f"{what}: at {at} {g[tuple(at)].item():.17g}, expected {w[tuple(at)].item():.17g}")


def acts_alike(layer: Layer, got: Any, want: Any, what: str, tol: float = 1e-10) -> None:
    """States agree if they act alike from here on; their numbers may differ by a gauge."""
    probe = inputs(layer, STEPS, len_of(want, BATCH), seed=99)
    close(layer(probe, got)[0], layer(probe, want)[0], what, tol)


def len_of(state: Any, default: int) -> int:
    """The batch of a state; a layer without memory has none, then the default."""
    found = leaves(state)
    return len(found[0]) if found else default


def refuses(what: str, parts: list[Any], call: Callable[[], Any]) -> None:
    """The call raises UsageError, in one line that holds every part."""
    try:
        call()
    except UsageError as error:
        line = str(error)
        missing = [str(p) for p in parts if str(p) not in line]
        assert not missing, f"{what}: the message lacks {', '.join(missing)}: {line!r}"
        assert "\n" not in line, f"{what}: the message has several lines: {line!r}"
    except Exception as error:
        raise AssertionError(
            f"{what}: {type(error).__name__} ({_first_line(error)}); expected UsageError: call core.check_input"
        ) from error
    else:
        raise AssertionError(f"{what}: accepted; expected UsageError: call core.check_input in forward")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]


def trainable(state: Any) -> Any:
    """A copy whose floating leaves collect gradients."""
    return tree_map(lambda s: s.detach().clone().requires_grad_(s.is_floating_point() or s.is_complex()), state)


def state_dtype(layer: Layer) -> torch.dtype:
    """The real dtype that states must have at least."""
    return wide(dtype_of(layer))
