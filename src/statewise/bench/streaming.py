"""Does a long stream cost more per token than a short one? Time per token and memory from 1,000 steps to a million."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, layers, nbytes

BLOCK = 1000  # tokens timed together
LAYERS = ("lru", "min_gru", "gru")


def run(
    names: tuple[str, ...] = LAYERS, *, steps: int = 1_000_000, width: int = 16, blocks: int = 50
) -> list[dict[str, Any]]:
    """One row per layer and execution: `step` one token at a time, `forward` in chunks of 1,000 tokens.

    `late` are microseconds per token of the last `blocks` blocks of 1,000 tokens, `early` those of as many blocks that
    begin a stream, in turn; `ratio` is the median of their ratios. `growth` is the resident memory gained between step
    10,000 and the last, in bytes; `tensors` the tensors gained. Batch 1, float32, one thread.
    """
    import statewise.layers  # noqa: F401  registers them

    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            info = layers[name]
            for execution in ("step", "chunks"):
                torch.manual_seed(0)
                layer = info.cls(**info.sized(width)).eval()
                rows.append(
                    {"layer": name, "execution": execution, "steps": steps, **_one(layer, execution, steps, blocks)}
                )
    finally:
        torch.set_num_threads(threads)
    return rows


@torch.no_grad()
def _one(layer: RecurrentLayer[Any], execution: str, steps: int, blocks: int) -> dict[str, Any]:
    x = torch.randn(1, BLOCK, layer.width)
    total = steps // BLOCK
    old, young, memory, tensors = [], [], 0, 0
    state = layer.initial_state(1)
    for block in range(total):
        took, state = _block(layer, execution, x, state)
        if block >= total - blocks:  # in turn, so that a machine that changes its pace changes both
            old.append(took)
            young.append(_block(layer, execution, x, layer.initial_state(1))[0])
        if block == min(10, total - 1):
            tensors = _tensors()  # first: the list of all objects takes memory itself
            memory = _resident()
    growth = _resident() - memory
    return {
        "early": statistics.median(young) / BLOCK * 1e6,
        "late": statistics.median(old) / BLOCK * 1e6,
        "ratio": statistics.median(o / y for o, y in zip(old, young, strict=True)),
        "growth": growth,
        "tensors": _tensors() - tensors,
        "state_bytes": nbytes(layer.initial_state(1)),
    }


def _block(layer: RecurrentLayer[Any], execution: str, x: Tensor, state: Any) -> tuple[float, Any]:
    """Seconds of a thousand tokens, and the state after them."""
    began = time.perf_counter()
    if execution == "chunks":
        _, state = layer(x, state)
    else:
        for x_t in x.unbind(1):
            _, state = layer.step(x_t, state)
    return time.perf_counter() - began, state


def _resident() -> int:
    """Bytes of this process in memory now (Linux; 0 where /proc is not there)."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    except OSError:
        return 0


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
