"""How fast tasks make their batches: tokens a second of each generator, on one thread."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..core import UsageError
from ..tasks import Generated, Split, tasks


def run(names: tuple[str, ...] = (), *, size: int = 256, repeats: int = 5) -> list[dict[str, Any]]:
    """One row per generated task, all of them if none is named: steps that are not padding, per second, in batches of
    `size` of the training and of the test split; median of `repeats` batches, after one that is not counted.

    The test split costs more: of what is drawn, an eighth is its own. Raises UsageError for a task that reads its data.
    """
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names or tuple(sorted(info.name for info in tasks if issubclass(info.cls, Generated))):
            task = tasks[name].cls()
            if not isinstance(task, Generated):
                raise UsageError(f"task {name!r} reads its data; expected a generated one")
            train, steps = _tokens(task, size, repeats, "train")
            test, _ = _tokens(task, size, repeats, "test")
            rows.append({"task": name, "batch": size, "steps": steps, "train": train, "test": test})
    finally:
        torch.set_num_threads(threads)
    return rows


def _tokens(task: Generated, size: int, repeats: int, split: Split) -> tuple[float, int]:
    """Tokens a second, and the steps of the longest row."""
    steps, speeds = task.batch(0, size, seed=0, split=split).x.shape[1], []
    for index in range(1, repeats + 1):
        began = time.perf_counter()
        batch = task.batch(index, size, seed=0, split=split)
        speeds.append(batch.tokens / (time.perf_counter() - began))
    return sorted(speeds)[len(speeds) // 2], steps
