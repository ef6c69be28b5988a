"""A check: a plain function of a layer, with its group and the reason why it may not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core import RecurrentLayer, Registry, costs

Function = Callable[[RecurrentLayer[Any]], None]


class Skipped(Exception):
    """Raised inside a check that finds out only while it runs that it cannot be made here; its words say why."""


@dataclass(frozen=True)
class Check:
    """One law. Calling it with a layer (float64, eval mode) raises AssertionError, in words, if the law is broken."""

    name: str
    group: str
    function: Function
    why_not: Callable[[RecurrentLayer[Any]], str | None]
    slow: bool = False

    def __call__(self, layer: RecurrentLayer[Any]) -> None:
        self.function(layer)

    @property
    def law(self) -> str:
        """What must hold, in one line: the first of the function's docstring."""
        return (self.function.__doc__ or self.name.replace("_", " ")).strip().split("\n")[0]


checks: Registry[Check] = Registry("check")


def check(
    group: str, *, why_not: Callable[[RecurrentLayer[Any]], str | None] | None = None, slow: bool = False
) -> Callable[[Function], Function]:
    """Enter check_NAME into the suite under NAME. why_not(layer) says why it does not apply, or None."""

    def enter(function: Function) -> Function:
        name = function.__name__.removeprefix("check_")
        checks.add(name, Check(name, group, function, why_not or (lambda layer: None), slow))
        return function

    return enter


def no_resets(layer: RecurrentLayer[Any]) -> str | None:
    """Why checks of the reset mask do not apply."""
    return None if layer.traits.resets else "traits say resets=False"


def no_numbers(layer: RecurrentLayer[Any]) -> str | None:
    """Why checks of x as numbers do not apply."""
    return "x holds ids, not numbers" if layer.vocab else None


def no_costs(layer: RecurrentLayer[Any]) -> str | None:
    """Why checks of costs do not apply."""
    return None if costs(layer.initial_state(0)) else "the state holds no cost"
