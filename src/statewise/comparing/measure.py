"""What one step of a stream costs: batch 1, one step after another, as a user who waits for each answer sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, nbytes

WARM_UP = 200


def measure_streaming(
    model: RecurrentLayer[Any], x: Tensor, *, steps: int = 2000, seconds: float = 5.0
) -> dict[str, Any]:
    """Time `steps` calls of model.step on x (1, T, D) or (1, T), going round; fewer if `seconds` are over.

    Returns median and p95 in seconds, steps timed, and the bytes of the state after the last of them.
    """
    model = model.eval()
    inputs = list(x.unbind(1))
    cuda = x.is_cuda
    taken: list[float] = []
    with torch.inference_mode():
        state = model.initial_state(1)
        end = time.perf_counter() + seconds
        for i in range(WARM_UP + steps):
            start = time.perf_counter()
            _, state = model.step(inputs[i % len(inputs)], state)
            if cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if i >= WARM_UP or end - now < seconds / 2:  # a step so slow that the warm-up alone takes half the time
                taken.append(now - start)
            if now > end and taken:
                break
    return {
        "median": percentile(taken, 50),
        "p95": percentile(taken, 95),
        "steps": len(taken),
        "state_bytes": nbytes(state),
    }


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, linear between neighbours. q in [0, 100]; values not empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
