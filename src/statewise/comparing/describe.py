"""What a report says of the task and of the machine."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..core import tree_map
from ..core.machine import cores
from ..tasks import Batch, Task

EXAMPLES, LONGEST, SHOWN = 4, 400, 12


def describe_task(task: Task) -> dict[str, Any]:
    """Name, docstring, metric, chance, baseline and a few examples of the test split, as plain values."""
    return {
        "name": task.name, "kind": task.kind, "metric": task.metric, "higher_is_better": task.higher_is_better,
        "data": task.data, "doc": inspect.cleandoc(type(task).__doc__ or ""),
        "chance": float(task.chance()), "baseline": float(task.baseline()),
        "baseline_is": _first_line(type(task).baseline.__doc__, Task.baseline.__doc__),
        "input": _input_words(task),
        "output": f"one of {task.y_width} classes"
        if task.kind == "classification"
        else _plural(task.y_width, "number"),
        "settings": {f.name: _word(getattr(task, f.name)) for f in fields(task)},  # type: ignore[arg-type]
        "train_length": getattr(task, "train_length", None),
        "examples": examples(task),
    }  # fmt: skip


def examples(task: Task) -> list[dict[str, Any]]:
    """Up to four test examples with different answers: {"rows": [[...]]} or {"text": ...}, and {"answer": ...}."""
    found: list[dict[str, Any]] = []
    spare: list[dict[str, Any]] = []
    for batch in islice(task.batches("test"), 4):
        for row in range(len(batch.x)):
            one = tree_map(lambda leaf: leaf[row], batch)  # noqa: B023
            made = {**_input(task, one), "answer": _answer(task, one)}
            (spare if any(made["answer"] == e["answer"] for e in found) else found).append(made)
            if len(found) == EXAMPLES:
                return found
    return (found + spare)[:EXAMPLES]


def _input_words(task: Task) -> str:
    return f"ids from 0 to {task.x_vocab - 1}" if task.x_vocab else f"{_plural(task.x_width or 0, 'number')} per step"


def _input(task: Task, one: Batch) -> dict[str, Any]:
    end = min(int(one.lengths) if one.lengths is not None else len(one.x), LONGEST)
    if not task.x_vocab:
        return {"rows": [[round(float(v), 4) for v in row] for row in one.x[:end].tolist()]}
    ids = one.x[: min(end, 160)].tolist()
    more = " …" if end > len(ids) else ""
    return {"text": task.readable(ids) + more}


def _answer(task: Task, one: Batch) -> str:
    asked = (one.weight > 0).nonzero()[:, 0]
    if not len(asked):
        return "nothing is asked"
    if len(asked) > SHOWN:
        return f"asked at {len(asked)} of {len(one.x)} steps"
    if task.kind == "classification":
        return "answer: " + " ".join(str(int(v)) for v in one.y[asked])
    return "answer: " + "; ".join(" ".join(f"{v:.3g}" for v in row) for row in one.y[asked].tolist())


def environment(workers: int, threads: int, device: str) -> dict[str, Any]:
    """Versions and the machine."""
    from .. import __version__

    found: dict[str, Any] = {
        "statewise": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(), "cores": cores(), "device": device, "workers": workers, "threads": threads,
    }  # fmt: skip
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _first_line(doc: str | None, inherited: str | None) -> str:
    words = inspect.cleandoc(doc).split("\n\n")[0] if doc and doc != inherited else ""
    return " ".join(words.split()).rstrip(".")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _word(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return value if isinstance(value, int | float | str | bool) or value is None else str(value)
