"""How far every execution is from the float64 loop: a table, by op and decay, and by layer.

The truth is the reference of an op, or a layer's `step` repeated, in float64 on the same float32 numbers. rms is the
root mean square of the error over that of the truth, worst the largest error over the largest truth.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, chunked, unroll
from ..ops import Op, nothing_seen, observe, ops, use_backend
from .sample import inputs

DECAYS = (0.0, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6, 1.0)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str  # op or layer
    decay: float | None  # of an op's call; a layer has its own
    execution: str  # forward, chunks, step, or a backend
    steps: int
    rms: float
    worst: float

    @property
    def limit(self) -> float:
        """What rms may be: 1e-5 up to 4,096 steps and 5e-5 beyond; of an op's loop 5e-6 and 1e-4, of a layer's 1e-5 and
        1e-4: it works out its decays in float32 too, which the truth does not."""
        short = self.steps <= 4096
        if self.execution == "reference":
            return 5e-6 if short else 1e-4
        return 1e-5 if short else 1e-4 if self.execution == "step" else 5e-5

    @property
    def ok(self) -> bool:
        return self.rms <= self.limit


def of_ops(steps: int, *, only: Iterable[str] = (), seed: int = 0) -> Iterator[Row]:
    """Every op, every backend that runs here, every decay of DECAYS; the rows of one batch have one each."""
    for name, make in CALLS.items():
        if only and name not in only:
            continue
        op, call = ops[name.split(" ")[0]], make(steps, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            truth = op.reference(**{k: _to(v, torch.float64) for k, v in call.items()})[0]
            able = [b for b, reason in op.explain(**call).items() if reason == "ok"]
            for backend in able:
                got = _run(op, backend, call)
                for row, decay in enumerate(DECAYS if len(truth) == len(DECAYS) else (None,)):
                    rows = slice(None) if decay is None else slice(row, row + 1)
                    yield Row(name, decay, backend, steps, *_error(got[rows], truth[rows]))


def of_layer(name: str, layer: RecurrentLayer[Any], steps: int, *, seed: int = 0) -> Iterator[Row]:
    """forward, in chunks, step by step, and forward by every backend of the ops that the layer calls."""
    low = copy.deepcopy(layer).float().eval()
    high = copy.deepcopy(low).double()
    x = inputs(low, steps, 2, seed=seed)
    cuts = random.Random(seed).sample(range(steps + 1), 6 if steps > 6 else 0)
    edges = [0, *sorted(cuts), steps]
    runs: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: low(x)[0],
        "chunks": lambda: chunked(low, x, [b - a for a, b in itertools.pairwise(edges)])[0],
        "step": lambda: unroll(low, x)[0],
    }
    called: dict[str, None] = {}

    def note(op: Op, chosen: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        called.update({b: None for b, reason in op.explain(*args, **kwargs).items() if reason == "ok" and b != chosen})

    with torch.no_grad():
        truth = unroll(high, x if low.vocab else x.double())[0]
        with observe(note):
            low(x[:, :2])
        for execution, run in runs.items():
            yield Row(name, None, execution, steps, *_error(run(), truth))
        for backend in called:
            if backend != "reference":
                with use_backend(backend):
                    yield Row(name, None, f"forward, {backend}", steps, *_error(low(x)[0], truth))


def _run(op: Op, backend: str, call: dict[str, Any]) -> Tensor:
    return (op.reference(**call) if backend == "reference" else op(**call, backend=backend))[0]


def _error(got: Tensor, truth: Tensor) -> tuple[float, float]:
    error = (got.to(truth.dtype) - truth).abs()
    if not error.isfinite().all():
        return math.nan, math.nan
    size = truth.abs()
    return (
        float(error.pow(2).mean().sqrt() / size.pow(2).mean().sqrt().clamp_min(1e-300)),
        float(error.max() / size.max().clamp_min(1e-300)),
    )


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return type(value)(*(_to(v, dtype) for v in value))
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype.to_complex() if value.is_complex() else dtype)


def _decays(steps: int, *more: int) -> Tensor:
    """(B, T, 1...), one decay a row."""
    one = torch.tensor(DECAYS, dtype=torch.float64).view(-1, *[1] * (1 + len(more)))
    return one.expand(-1, steps, *more).float()


def _normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(len(DECAYS), *shape, generator=rng)


def _unit(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(_normal(rng, *shape), dim=-1)


def _memory(steps: int, rng: torch.Generator, heads: int = 1, key: int = 8, value: int = 8) -> dict[str, Tensor]:
    q, k = (_unit(rng, steps, heads, key) for _ in range(2))
    v, state = _normal(rng, steps, heads, value), _normal(rng, heads, key, value)
    return {"q": q, "k": k, "v": v, "state": state}


def _linear(steps: int, rng: torch.Generator) -> dict[str, Any]:
    return {"a": _decays(steps, 8), "x": _normal(rng, steps, 8), "h0": _normal(rng, 8)}


def _blocks(steps: int, rng: torch.Generator) -> dict[str, Any]:
    angle = 6 * torch.rand(len(DECAYS), steps, 4, generator=rng)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    return {"a": _decays(steps, 4, 2, 2) * turn, "x": _normal(rng, steps, 4, 2), "h0": _normal(rng, 4, 2)}


def _conv(steps: int, rng: torch.Generator) -> dict[str, Any]:
    """A channel for each decay; its kernel has the decay's powers."""
    kernel = torch.tensor(DECAYS, dtype=torch.float64)[:, None] ** torch.arange(steps)
    return {"u": torch.randn(2, steps, len(DECAYS), generator=rng), "kernel": kernel.float()}


def _outer(*kind: int) -> Callable[[int, torch.Generator], dict[str, Any]]:
    return lambda steps, rng: {**_memory(steps, rng), "log_decay": _decays(steps, 1, *kind).log()}


def _delta(*kind: int) -> Callable[[int, torch.Generator], dict[str, Any]]:
    def call(steps: int, rng: torch.Generator) -> dict[str, Any]:
        beta = 2 * torch.rand(len(DECAYS), steps, 1, generator=rng)
        return {**_memory(steps, rng), "beta": beta, "log_decay": _decays(steps, 1, *kind).log()}

    return call


def _dplr(steps: int, rng: torch.Generator) -> dict[str, Any]:
    direction, strength = _unit(rng, steps, 1, 8), torch.rand(len(DECAYS), steps, 1, 8, generator=rng)
    decay = _decays(steps, 1, 8)
    return {
        **_memory(steps, rng),
        "a": -direction,
        "b": decay * direction * strength,
        "log_decay": decay.log()[..., None],
    }


def _selective(steps: int, rng: torch.Generator) -> dict[str, Any]:
    dt = -_decays(steps, 8).log().clamp_min(-1e4)
    keys, values = (_normal(rng, steps, 4) for _ in range(2))
    # dt is the decay here, so what enters is divided by it and a is -1
    x = torch.where(dt > 0, _normal(rng, steps, 8) / dt.clamp_min(1e-6), 0)
    return {"x": x, "dt": dt, "a": -torch.ones(8, 4), "b": keys, "c": values, "state": _normal(rng, 8, 4)}


def _softmax(steps: int, rng: torch.Generator) -> dict[str, Any]:
    v = torch.randn(2, steps, 2, 4, generator=rng)
    state = nothing_seen(2, 2, 4, like=v)
    return {"score": 3 * torch.randn(2, steps, 2, generator=rng), "v": v, "state": state}


def _log_sum_exp(steps: int, rng: torch.Generator) -> dict[str, Any]:
    x = 3 * torch.randn(2, steps, 4, generator=rng)
    return {"x": x, "z0": torch.full((2, 4), torch.finfo(torch.float32).min)}


CALLS: dict[str, Callable[[int, torch.Generator], dict[str, Any]]] = {
    "linear_scan": _linear,
    "block_scan": _blocks,
    "long_conv": _conv,
    "outer_scan (scalar)": _outer(1, 1),
    "outer_scan (per key)": _outer(8, 1),
    "outer_scan (per value)": _outer(1, 8),
    "delta_scan (scalar)": _delta(1, 1),
    "delta_scan (per key)": _delta(8, 1),
    "dplr_scan": _dplr,
    "selective_scan": _selective,
    "softmax_scan": _softmax,
    "log_sum_exp_scan": _log_sum_exp,
}
