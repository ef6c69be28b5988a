"""How fast tasks make their batches: tokens a second of each generator, on one thread."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..core import UsageError
from ..models import Stack
from ..tasks import Copy, Generated, Split, tasks
from ..training import Train
from ..training.optimise import Optimizer

SMALL = ("lru", "min_gru", "s5", "gru", "linear_attention")  # which train fastest on a CPU
AMPLE = 10  # times the speed of training: generation is then a tenth of a step at most, or none in a process beside it


def run(names: tuple[str, ...] = (), *, size: int = 256, repeats: int = 5) -> list[dict[str, Any]]:
    """One row per generated task, all of them if none is named: steps that are not padding, per second, in batches of
    `size` of the training and of the test split; median of `repeats` batches, after one that is not counted. `needed`
    is what the fastest of some small models trains on, `fastest` its layer, `ratio` how many times that there is.

    The test split costs more: of what is drawn, an eighth is its own. Raises UsageError for a task that reads its data.
    """
    rows: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names or tuple(sorted(info.name for info in tasks if issubclass(info.cls, Generated))):
            task = tasks[name].cls()
            if not isinstance(task, Generated):
                raise UsageError(f"task {name!r} reads its data; expected a generated one")
            train, steps = _tokens(task, size, repeats, "train")
            test, _ = _tokens(task, size, repeats, "test")
            rows.append({"task": name, "batch": size, "steps": steps, "train": train, "test": test})
        speeds = {layer: _training(layer, repeats) for layer in SMALL}
    finally:
        torch.set_num_threads(threads)
    fastest = max(speeds, key=lambda layer: speeds[layer])
    beside = {"fastest": fastest, "needed": speeds[fastest]}
    return [{**row, **beside, "ratio": row["train"] / speeds[fastest]} for row in rows]


def _training(layer: str, repeats: int) -> float:
    """Tokens a second of training as `compare` does it by default: a stack of two blocks of width 64, 32 rows."""
    task = Copy()
    model = Stack(layer).build(x_width=task.x_width, x_vocab=task.x_vocab, y_width=task.y_width)
    optimizer, speeds = Optimizer(model, Train()), []
    for index in range(repeats + 1):
        batch = task.batch(index, 32, seed=0)  # not counted: it is what the other rows are about
        began = time.perf_counter()
        model.zero_grad(set_to_none=True)
        task.loss(model(batch.x)[0], batch).backward()
        optimizer.step(1e-3)
        speeds.append(batch.tokens / (time.perf_counter() - began))
    return sorted(speeds[1:])[repeats // 2]  # kernels are compiled or loaded in the first


def _tokens(task: Generated, size: int, repeats: int, split: Split) -> tuple[float, int]:
    """Tokens a second, and the steps of the longest row."""
    steps, speeds = task.batch(0, size, seed=0, split=split).x.shape[1], []
    for index in range(1, repeats + 1):
        began = time.perf_counter()
        batch = task.batch(index, size, seed=0, split=split)
        speeds.append(batch.tokens / (time.perf_counter() - began))
    return sorted(speeds)[len(speeds) // 2], steps
