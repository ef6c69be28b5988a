"""Time that passes between the steps of a sequence."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from ..core import UsageError, wide

Elapsed = float | Literal["input"]


def check_elapsed(name: str, dt: Elapsed, width: int) -> int:
    """How many channels of x are features. Raises UsageError for a dt that cannot be, or that leaves no feature."""
    if dt == "input":
        if width < 2:
            raise UsageError(f"{name}: width {width} with dt 'input'; expected at least 2, time is the last channel")
        return width - 1
    if isinstance(dt, str) or not 0 < dt < math.inf:
        raise UsageError(f"{name}: dt is {dt!r}; expected a finite number above 0, or 'input'")
    return width


def split_elapsed(x: Tensor, dt: Elapsed) -> tuple[Tensor, Tensor]:
    """x (..., D) -> features (..., D or D - 1) and the time since the step before (..., 1), in float32 or wider.

    Where dt is "input" that time is the last channel of x, else dt everywhere. Time does not run backwards: below 0
    it counts as 0.
    """
    x = x.to(wide(x.dtype))
    if isinstance(dt, str):
        return x[..., :-1], x[..., -1:].clamp_min(0)
    return x, x.new_full((*x.shape[:-1], 1), dt)
