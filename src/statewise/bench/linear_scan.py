"""linear_scan beside the speed of memory, the Python loop and installed peers.

The floor is the time that the same bytes take with torch's own kernels, measured in turn with each contender:
forward reads a and x and writes h, as `torch.add(a, x)` does; backward reads a, h and the gradient and writes two
gradients, as one addition and one copy do.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import UsageError
from ..ops import linear_scan
from .clock import seconds
from .memory import peak_memory

Row = dict[str, Any]
Scan = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = ((8, 2048, 512), (1, 65536, 64), (64, 512, 128))
LOOP = 512  # steps beyond which the Python loop is not worth waiting for


def run(
    shapes: Sequence[tuple[int, ...]] | None = None,
    *,
    repeats: int = 15,
    device: str | torch.device = "cpu",
    decay: float | None = None,
    peers: bool = True,
    first_call: bool = True,
) -> list[Row]:
    """Rows of milliseconds: medians of `repeats` rounds, in each of which floor and contender take turns.

    shapes: (B, T, N) of float32 inputs. decay: what all decays are; None: random between 0 and 1. A row has way, shape,
    forward and training (forward and backward) in ms, forward_floor and training_floor (median of the ratios to the
    floor), error (largest difference from the reference of float64, relative to its largest value), peak_mb (what a
    training step adds to memory, its results included) and load. Then, for our compiled backend, rows of the
    milliseconds of the first call in a fresh process, imports of the
    backend included, with an empty cache and with a filled one.
    """
    shapes = SHAPES if shapes is None else [tuple(s) for s in shapes]
    bad = [s for s in shapes if len(s) < 2 or min(s) < 1]
    if bad or repeats < 1:
        raise UsageError(f"bench linear_scan: shapes {bad}, repeats {repeats}; expected (B, T, N) and counts above 0")
    rows = [row for shape in shapes for row in _rows(shape, repeats, torch.device(device), decay, peers)]
    return rows + (_first_calls() if first_call and torch.device(device).type == "cpu" else [])


def contenders(shape: tuple[int, ...], device: torch.device, peers: bool = True) -> Iterator[tuple[str, Scan]]:
    """Name and h = scan(a, x, h0): our backends, the loop, and the peers that are installed (they start from zero)."""
    _, steps, *n = shape
    for name, backend in linear_scan.backends.items():
        one = [torch.zeros(1, 1, *n, device=device), torch.zeros(1, 1, *n, device=device)]
        if backend.why_not((*one, one[0][:, 0]), {}) is None:
            yield f"ours: {name}", _ours(name)
    if steps <= LOOP:
        yield "loop", _ours("reference")
    if peers and len(n) == 1:
        for name, (module, make) in PEERS.items():
            if importlib.util.find_spec(module) is not None:
                yield name, make(importlib.import_module(module), shape)


def _ours(backend: str) -> Scan:
    return lambda a, x, h0: linear_scan(a, x, h0, backend=backend)[0]


def _accelerated_scan(_: Any, shape: tuple[int, ...]) -> Scan:
    ref = importlib.import_module("accelerated_scan.ref")
    return lambda a, x, h0: ref.scan(a.mT.contiguous(), x.mT.contiguous()).mT


def _mambapy(_: Any, shape: tuple[int, ...]) -> Scan:
    pscan = importlib.import_module("mambapy.pscan").pscan
    return lambda a, x, h0: pscan(a[..., None], x[..., None])[..., 0]


def _assoc_scan(module: Any, shape: tuple[int, ...]) -> Scan:
    scan = module.AssocScan()
    return lambda a, x, h0: scan(a, x)


def _mingru(module: Any, shape: tuple[int, ...]) -> Scan:
    return lambda a, x, h0: module.linear_scan(a, x)[1]


PEERS: dict[str, tuple[str, Callable[[Any, tuple[int, ...]], Scan]]] = {
    "accelerated_scan.ref": ("accelerated_scan", _accelerated_scan),
    "mambapy pscan": ("mambapy", _mambapy),
    "assoc_scan": ("assoc_scan", _assoc_scan),
    "mingru_scans": ("mingru", _mingru),
}


def _rows(
    shape: tuple[int, ...], repeats: int, device: torch.device, decay: float | None, peers: bool
) -> Iterator[Row]:
    rng = torch.Generator(device).manual_seed(0)
    make: dict[str, Any] = {"generator": rng, "device": device}
    a, x, g = torch.rand(shape, **make), torch.randn(shape, **make), torch.randn(shape, **make)
    a = a if decay is None else torch.full_like(a, decay)
    h0 = torch.zeros(shape[0], *shape[2:], device=device)
    with torch.no_grad():
        exact = linear_scan(a.double(), x.double(), h0.double(), backend="torch")[0]

    def forward_floor() -> None:
        torch.add(a, x)

    def training_floor() -> None:
        h = torch.add(a, x)
        torch.add(g, a)
        h.clone()

    for name, scan in contenders(shape, device, peers):
        row: Row = {"way": name, "shape": "x".join(map(str, shape))}
        leaves = [a.clone().requires_grad_(), x.clone().requires_grad_()]

        def forward(scan: Scan = scan) -> Tensor:
            return scan(a, x, h0)

        def training(scan: Scan = scan, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(scan(leaves[0], leaves[1], h0), leaves, g)

        slow = name == "loop"
        try:
            row["error"] = float((forward() - exact).abs().max() / exact.abs().max())
            training()
            row["forward"], row["forward_floor"] = _in_turn(forward, forward_floor, 2 if slow else repeats, device)
            row["training"], row["training_floor"] = _in_turn(training, training_floor, 2 if slow else repeats, device)
            peak = peak_memory(training, device)
            row["peak_mb"] = None if peak is None else round(peak / 2**20)
        except (RuntimeError, ImportError, TypeError, ValueError, AttributeError) as error:
            row["failed"] = (str(error).splitlines() or [type(error).__name__])[0][:80]
        yield row | {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    yield {"way": "floor: torch.add and copy", "shape": "x".join(map(str, shape))} | {
        "forward": _in_turn(forward_floor, forward_floor, repeats, device)[0],
        "training": _in_turn(training_floor, training_floor, repeats, device)[0],
    }


def _in_turn(
    ours: Callable[[], Any], floor: Callable[[], Any], repeats: int, device: torch.device
) -> tuple[float, float]:
    """Median milliseconds of ours, and the median of its ratio to the floor.

    Before each measured call stands one of its own kind, so that neither finds the caches as the other left them.
    """
    times, ratios = [], []
    for _ in range(2):
        ours(), floor()  # memory is mapped and kernels are compiled
    for _ in range(repeats):
        ours()
        took = seconds(ours, device)
        floor()
        least = seconds(floor, device)
        times.append(took * 1e3)
        ratios.append(took / least)
    return statistics.median(times), statistics.median(ratios)


_FIRST = """
import time, torch
from statewise.ops import linear_scan
torch.set_num_threads({threads})
a = torch.rand(8, 512, 64).requires_grad_()
h0 = torch.zeros(8, 64)
began = time.perf_counter()
h, _ = linear_scan(a, a, h0)
forward = time.perf_counter()
h.sum().backward()
print(forward - began, time.perf_counter() - began)
"""


def _first_calls() -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty cache", "filled cache"):
            code = _FIRST.format(threads=torch.get_num_threads())
            env = os.environ | {"NUMBA_CACHE_DIR": cache}
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            if done.returncode:
                rows.append({"way": f"first call, {state}", "failed": done.stderr.strip().splitlines()[-1][:80]})
                continue
            forward, both = map(float, done.stdout.split())
            rows.append({"way": f"first call, {state}", "forward": forward * 1e3, "training": both * 1e3})
    return rows
