"""Every layer beside the byte floor, the Python loop, torch.nn and installed peers: time, streaming, memory."""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import RecurrentLayer, UsageError, layers, nbytes, unroll
from ..core.machine import cores
from .clock import seconds
from .memory import peak_memory

Row = dict[str, Any]
STEPS = 64  # streamed steps timed together
TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}


@dataclass
class Contender:
    """One way to do a layer's work: forward(x) -> y, with gradients to x and the parameters."""

    layer: str
    way: str  # "ours", "loop", "torch.nn" or the name of a peer
    forward: Callable[[Tensor], Tensor]
    module: nn.Module
    times: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "training": []})
    floors: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "training": []})
    first: float | None = None
    peak: int | None = None
    failed: str | None = None


def run(
    names: Sequence[str] = (),
    *,
    shape: tuple[int, int, int] = (8, 256, 64),
    repeats: int = 5,
    device: str | torch.device = "cpu",
    peers: bool = True,
    loop: bool = True,
    first_call: bool = True,
) -> list[Row]:
    """Rows of seconds, the medians of `repeats` rounds; in each round every contender is timed once, in turn.

    names: registered layers, all of them if empty. shape: (B, T, D) of x.
    A row has layer, way, batch, steps, width, forward, training (forward and backward), peak (bytes that a training
    step adds to the resident memory), parameters, and for "ours" step (streaming, batch 1) and state (bytes); load is
    the load average (None where the system has none), noisy is True where it exceeds the cores.
    forward_floor and training_floor are medians of the ratios to the byte floor, timed in the same rounds: reading x
    and writing y; for training also reading y's gradient and writing x's.
    first, except for the loop and unless first_call is False: seconds of the first call in a fresh process, the imports
    and the compilation of the backend included.
    A contender that fails has a row with `failed` and no times.
    """
    import statewise.layers  # noqa: F401  registers them

    batch, steps, width = shape
    if min(shape) < 1 or repeats < 1:
        raise UsageError(f"bench layers: shape {shape}, repeats {repeats}; expected 1 or more of each")
    x = torch.randn(batch, steps, width, device=device)
    rows = []
    for name in names or layers.names():
        found = list(contenders(name, width, torch.device(device), peers=peers, loop=loop))
        for one in found:
            _warm_up(one, x)
        for _ in range(repeats):
            for one in found:
                _round(one, x)
        for one in found:
            if first_call and one.failed is None and one.way != "loop":
                one.first = _first_call(one, shape, device)
        rows += [_row(one, shape) for one in found]
    return rows


def contenders(name: str, width: int, device: torch.device, *, peers: bool, loop: bool) -> Iterator[Contender]:
    """Ours first, then the others that do the same work at the same width."""
    info = layers[name]
    torch.manual_seed(0)
    layer: RecurrentLayer[Any] = info.cls(**info.sized(width)).to(device)
    yield Contender(name, "ours", lambda x: layer(x)[0], layer)
    if loop:
        yield Contender(name, "loop", lambda x: unroll(layer, x)[0], layer)
    if name in TORCH:
        theirs = TORCH[name](width, width, batch_first=True).to(device)
        yield Contender(name, "torch.nn", lambda x: theirs(x)[0], theirs)
    if peers and name in PEERS:
        package, make = PEERS[name]
        if importlib.util.find_spec(package) is not None:
            yield _peer(name, package, lambda: make(width).to(device))


def _peer(name: str, package: str, make: Callable[[], nn.Module]) -> Contender:
    try:
        peer = make()
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        return Contender(name, package, _tensor, nn.Module(), failed=_first_line(error))
    return Contender(name, package, lambda x: _tensor(peer(x)), peer)


def _s5(width: int) -> nn.Module:
    from s5 import S5

    return S5(width, width)


def _min_gru(width: int) -> nn.Module:
    from minGRU_pytorch import minGRU

    return minGRU(width)


PEERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "s5": ("s5", _s5),
    "min_gru": ("minGRU_pytorch", _min_gru),
}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _training_step(one: Contender, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    y = one.forward(x)
    y.sum().backward()
    one.module.zero_grad(set_to_none=True)


def _forward(one: Contender, x: Tensor) -> None:
    with torch.no_grad():
        one.forward(x)


FLOORS: dict[str, Callable[[Tensor], Any]] = {
    "forward": lambda x: x.clone(),
    "training": lambda x: (x.clone(), x.clone()),
}


def _warm_up(one: Contender, x: Tensor) -> None:
    """Kernels are compiled and memory is mapped before anything is timed; then the memory of a training step."""
    if one.failed is not None:
        return
    try:
        _forward(one, x)
        _training_step(one, x)
        one.peak = peak_memory(lambda: _training_step(one, x), x.device)
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        one.failed = _first_line(error)


def _round(one: Contender, x: Tensor) -> None:
    if one.failed is None:
        for name, work in (("forward", _forward), ("training", _training_step)):
            one.times[name].append(seconds(lambda: work(one, x), x.device))  # noqa: B023
            one.floors[name].append(seconds(lambda: FLOORS[name](x), x.device))  # noqa: B023


_FIRST = """
import sys, torch
from statewise.bench.layers import call_once
name, way, device, threads, *shape = sys.argv[1:]
torch.set_num_threads(int(threads))
print(call_once(name, way, tuple(map(int, shape)), device))
"""


def call_once(name: str, way: str, shape: tuple[int, int, int], device: str) -> float:
    """Seconds of a contender's first call; a fresh process alone can tell them."""
    importlib.import_module("statewise.layers")
    x = torch.randn(shape, device=device)
    found = contenders(name, shape[-1], x.device, peers=way not in ("ours", "torch.nn"), loop=False)
    one = next(one for one in found if one.way == way)
    return seconds(lambda: _forward(one, x), x.device)


def _first_call(one: Contender, shape: tuple[int, int, int], device: str | torch.device) -> float | None:
    words = [one.layer, one.way, str(device), str(torch.get_num_threads()), *map(str, shape)]
    done = subprocess.run([sys.executable, "-c", _FIRST, *words], capture_output=True, text=True)
    return None if done.returncode else float(done.stdout)


def _row(one: Contender, shape: tuple[int, int, int]) -> Row:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    row: Row = {
        "layer": one.layer, "way": one.way, "batch": shape[0], "steps": shape[1], "width": shape[2],
        "parameters": sum(p.numel() for p in one.module.parameters()),
        "load": load, "noisy": load is not None and load > cores(),
    }  # fmt: skip
    if one.failed is not None:
        return {**row, "failed": one.failed}
    for name, times in one.times.items():
        row[name] = statistics.median(times)
        row[f"{name}_floor"] = statistics.median(t / floor for t, floor in zip(times, one.floors[name], strict=True))
    row |= {"first": one.first, "peak": one.peak}
    if one.way == "ours" and isinstance(one.module, RecurrentLayer):
        row |= {"step": step_latency(one.module), "state": nbytes(one.module.initial_state(1))}
    return row


@torch.no_grad()
def step_latency(layer: RecurrentLayer[Any], rounds: int = 5) -> float:
    """Median seconds per streamed step at batch 1."""
    weight = next(layer.parameters())
    if layer.vocab:
        x = torch.zeros(1, dtype=torch.int64, device=weight.device)
    else:
        x = torch.randn(1, layer.width, device=weight.device).to(weight.dtype)
    state, found = layer.initial_state(1), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(STEPS):
            y, state = layer.step(x, state)
        y.sum().item()  # waits for a GPU
        found.append((time.perf_counter() - began) / STEPS)
    return statistics.median(found[1:])
