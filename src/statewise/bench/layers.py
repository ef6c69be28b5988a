"""Every layer beside the Python loop, torch.nn and installed peers: forward, training, streaming, memory."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import RecurrentLayer, UsageError, layers, nbytes, unroll

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
    first: float = 0.0
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
) -> list[Row]:
    """Rows of seconds, the medians of `repeats` rounds; in each round every contender is timed once, in turn.

    names: registered layers, all of them if empty. shape: (B, T, D) of x.
    A row has layer, way, batch, steps, width, forward, training (forward and backward), first (the first call, imports
    and compilation included), peak (bytes that a training step adds to the resident memory), parameters, and for "ours"
    step (streaming, batch 1) and state (bytes); load is the load average, noisy is True where it exceeds the cores.
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
            _first(one, x)
        for _ in range(repeats):
            for one in found:
                _round(one, x)
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


def _first(one: Contender, x: Tensor) -> None:
    """Time of the first call, and the memory of a training step after the first."""
    if one.failed is not None:
        return
    try:
        one.first = _time(_forward, one, x)
        _training_step(one, x)
        one.peak = peak_memory(lambda: _training_step(one, x), x.device)
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        one.failed = _first_line(error)


def _round(one: Contender, x: Tensor) -> None:
    if one.failed is None:
        one.times["forward"].append(_time(_forward, one, x))
        one.times["training"].append(_time(_training_step, one, x))


def _time(work: Callable[[Contender, Tensor], None], one: Contender, x: Tensor) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    work(one, x)
    wait()
    return time.perf_counter() - began


def _row(one: Contender, shape: tuple[int, int, int]) -> Row:
    load = os.getloadavg()[0]
    row: Row = {
        "layer": one.layer, "way": one.way, "batch": shape[0], "steps": shape[1], "width": shape[2],
        "parameters": sum(p.numel() for p in one.module.parameters()),
        "load": load, "noisy": load > (os.cpu_count() or 1),
    }  # fmt: skip
    if one.failed is not None:
        return {**row, "failed": one.failed}
    row |= {name: statistics.median(times) for name, times in one.times.items()}
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


def peak_memory(work: Callable[[], None], device: torch.device) -> int | None:
    """Bytes by which the memory in use rises at most while `work` runs; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark falls to what is resident now
        before = _resident("VmRSS")
        work()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, StopIteration):
        return None


def _resident(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
