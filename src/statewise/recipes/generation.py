"""What recipes do and measure alike: train a model to ask it more than its score, how long one more token takes after a
context, how far two executions differ."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, layers, unroll
from ..models import Stack
from ..tasks import Batch, Task
from ..training import Experiment, Result, fit, load
from ..training.evaluate import evaluate


@torch.enable_grad()
def trained(
    experiment: Experiment, run: Path | None = None, on_event: Callable[[dict[str, Any]], None] | None = None
) -> tuple[Result, RecurrentLayer[Any]]:
    """What `fit` found, and the model with its best weights. run: where it stays, as a teacher of others must."""
    with tempfile.TemporaryDirectory() as folder:
        result = fit(experiment, run or folder, tensorboard=False, on_event=on_event)
        return result, load(run or folder)[0]


@torch.no_grad()
def test_score(model: RecurrentLayer[Any], task: Task) -> float:
    """The task's metric of a model that was not trained as it is."""

    def run(batch: Batch, state: Any) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = model(batch.x, state, reset=batch.reset, lengths=batch.lengths)
        return found

    model.eval()
    return evaluate(task, task.batches("test"), run, torch.device("cpu"))[task.metric]


def training_times(
    models: Mapping[str, RecurrentLayer[Any]], *, batch: int, length: int, rounds: int = 7
) -> dict[str, float]:
    """Seconds of a forward and a backward pass: the median over rounds in which the models take turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            x = torch.randn(batch, length, model.width)
            began = time.perf_counter()
            model(x)[0].square().mean().backward()
            if turn:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def step_times(
    models: Mapping[str, RecurrentLayer[Any]], context: int, *, steps: int, rounds: int = 5
) -> dict[str, float]:
    """Seconds of one step after `context` tokens, batch 1: the median over rounds in which the models take turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    before, x = {}, {}
    for name, model in models.items():
        model.eval()
        x[name] = torch.randn(1, context, model.width)
        before[name] = model(x[name])[1]
    for turn in range(rounds + 1):
        for name, model in models.items():
            state, u = before[name], x[name][:, 0]
            began = time.perf_counter()
            for _ in range(steps):
                _, state = model.step(u, state)
            if turn:  # the first turn fills caches
                found[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(times) for name, times in found.items()}


def against_transformer(layer: str, contexts: Sequence[int], *, width: int, depth: int, steps: int) -> dict[str, float]:
    """Tokens/s of generation after each context by a stack of `layer` and by one of full attention with its cache.

    NAME_n and transformer_n for each context n; NAME_slowdown and transformer_slowdown: time of a step after the
    longest context over that after the shortest; speedup: tokens/s over the Transformer's after the longest.
    """
    numbers: dict[str, float] = {}
    for context in contexts:
        # a window of the context, one step more: exactly full attention here
        described = {
            layer: Stack(layer, width=width, depth=depth),
            "transformer": Stack("attention", width=width, depth=depth, args={"window": context + 1}),
        }
        models = {name: stack.build(x_width=width, y_width=width) for name, stack in described.items()}
        for name, seconds in step_times(models, context, steps=steps).items():
            numbers[f"{name}_{context}"] = 1 / seconds
        for name, model in models.items():
            numbers[f"{name}_parameters"] = float(sum(p.numel() for p in model.parameters()))
    first, last = contexts[0], contexts[-1]
    for name in (layer, "transformer"):
        numbers[f"{name}_slowdown"] = numbers[f"{name}_{first}"] / numbers[f"{name}_{last}"]
    numbers["speedup"] = numbers[f"{layer}_{last}"] / numbers[f"transformer_{last}"]
    return numbers


@torch.no_grad()
def execution_error(layer: str, length: int, dtype: torch.dtype, **args: Any) -> float:
    """Largest difference between forward and one step after the other, relative to the largest output."""
    made = layers[layer].cls(**args).to(dtype).eval()
    x = torch.randn(2, length, made.width, dtype=dtype)
    return difference(made(x)[0], unroll(made, x)[0])


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())
