"""Traits: each declared fact is tried."""

from __future__ import annotations

import torch

from ...core import Traits
from ..check import check, no_numbers
from ..sample import STEPS, Layer, acts_alike, close, inputs, mask, refuses


@check("traits")
def check_traits_are_traits(layer: Layer) -> None:
    """traits is a Traits, the same for every instance it is declared on."""
    assert isinstance(layer.traits, Traits), f"traits is a {type(layer.traits).__name__}, expected core.Traits"


@check("traits", why_not=lambda layer: no_numbers(layer) or _undeclared(layer, "linear_in_input"))
def check_linear_in_input(layer: Layer) -> None:
    """From the zero state, y(u + 2v) = y(u) + 2 y(v)."""
    u, v = inputs(layer), inputs(layer, seed=1)
    close(layer(u + 2 * v)[0], layer(u)[0] + 2 * layer(v)[0], "traits say linear in the input, it is not")


@check("traits", why_not=lambda layer: no_numbers(layer) or _undeclared(layer, "time_invariant"))
def check_time_invariant(layer: Layer) -> None:
    """From the zero state, delaying the input delays the output."""
    x = inputs(layer)
    late = torch.cat([torch.zeros_like(x[:, :3]), x], 1)
    (y, last), (want, after) = layer(late), layer(x)
    close(y[:, 3:], want, "traits say time invariant, a delay changes the output")
    acts_alike(layer, last, after, "traits say time invariant, a delay changes the state")


@check("traits", why_not=lambda layer: "traits say resets=True" if layer.traits.resets else None)
def check_resets_are_refused(layer: Layer) -> None:
    """A layer that declares resets=False refuses a reset mask with UsageError."""
    reset = mask(STEPS, (1, 4))
    refuses("traits say resets=False; a reset mask", [type(layer).__name__], lambda: layer(inputs(layer), reset=reset))


def _undeclared(layer: Layer, trait: str) -> str | None:
    return None if getattr(layer.traits, trait) else f"traits do not claim {trait}"
