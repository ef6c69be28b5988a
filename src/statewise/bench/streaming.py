"""Does a long stream cost more per token than a short one? Time per token and memory from 1,000 steps to a million."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..core import RecurrentLayer, layers, nbytes

BLOCK = 1000  # tokens timed together


def run(
    names: tuple[str, ...] = ("lru", "min_gru", "gru"), *, steps: int = 1_000_000, width: int = 16, blocks: int = 20
) -> list[dict[str, Any]]:
    """One row per layer and execution: `step` one token at a time, `forward` in chunks of 1,000 tokens.

    `early` and `late` are microseconds per token: the median over the first and the last `blocks` blocks of 1,000
    tokens (the first 1,000 are warm-up). `growth` is the resident memory gained between step 10,000 and the last, in
    bytes; `tensors` the tensors gained. Batch 1, float32, one thread.
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
    first: list[float] = []
    last: list[float] = []
    memory = tensors = 0
    total = steps // BLOCK
    seconds = _blocks(layer, execution, total)
    for block, took in enumerate(seconds):
        if 1 <= block <= blocks:
            first.append(took)
        if block >= total - blocks:
            last.append(took)
        if block == min(10, total - 1):
            memory, tensors = _resident(), _tensors()
    early, late = (statistics.median(part) / BLOCK * 1e6 for part in (first, last))
    return {
        "early": early,
        "late": late,
        "ratio": late / early,
        "growth": _resident() - memory,
        "tensors": _tensors() - tensors,
        "state_bytes": nbytes(layer.initial_state(1)),
    }


def _blocks(layer: RecurrentLayer[Any], execution: str, total: int) -> Iterator[float]:
    x = torch.randn(1, BLOCK, layer.width)
    state = layer.initial_state(1)
    for _ in range(total):
        began = time.perf_counter()
        if execution == "chunks":
            _, state = layer(x, state)
        else:
            for x_t in x.unbind(1):
                _, state = layer.step(x_t, state)
        yield time.perf_counter() - began


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
