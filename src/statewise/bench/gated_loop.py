"""The gated loops beside torch.nn's RNN, GRU and LSTM: time, memory, first call, and a step of a stream.

A training step is forward and backward with gradients to x and all parameters. What of it is not recurrent is four
products over all of time in ours as in theirs: `products` is the time of those, a floor for both.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import UsageError
from ..ops import elman_loop, gru_loop, lstm_loop
from .clock import seconds
from .memory import peak_memory

Row = dict[str, Any]
SHAPES = (
    (32, 512, 256), (16, 1024, 64), (1, 2048, 256), (1, 4096, 128), (1, 512, 32), (4, 512, 256), (4, 512, 512),
    (8, 256, 64), (8, 1024, 128), (16, 128, 100), (64, 128, 128), (64, 64, 512), (128, 64, 32), (2, 128, 1024),
    (32, 64, 16),
)  # fmt: skip
CELLS: dict[str, tuple[Any, Any, Any, int]] = {  # ours, theirs, their step, tensors of the state
    "lstm": (lstm_loop, nn.LSTM, nn.LSTMCell, 2),
    "gru": (gru_loop, nn.GRU, nn.GRUCell, 1),
    "elman": (elman_loop, nn.RNN, nn.RNNCell, 1),
}


def run(
    cells: Sequence[str] = (),
    *,
    shapes: Sequence[tuple[int, ...]] = (),
    repeats: int = 7,
    device: str | torch.device = "cpu",
    first_call: bool = True,
) -> list[Row]:
    """A row for each cell and shape (B, T, N) of x, float32, as many units as inputs.

    ours, theirs: medians of seconds of a training step, in turn; ratio: median of theirs / ours, above 1 where ours is
    faster; forward: the same ratio without gradients; products: seconds of the products over all of time; backend: what
    ran; peak, their_peak: bytes that a training step adds to memory. Then a row for each cell of the first call in a
    fresh process, imports of the backend included, with an empty cache and with a filled one.

    Raises UsageError for a cell or a shape that is none.
    """
    unknown, wrong = set(cells) - set(CELLS), [s for s in shapes if len(s) != 3 or min(s) < 1]
    if unknown or wrong or repeats < 1:
        known = ", ".join(CELLS)
        raise UsageError(
            f"bench gated_loop: cells {sorted(unknown)}, shapes {wrong}, repeats {repeats}; expected some of {known}, "
            "(B, T, N) and counts above 0"
        )
    chosen, device = tuple(cells) or tuple(CELLS), torch.device(device)
    rows = [_row(cell, shape, repeats, device) for shape in shapes or SHAPES for cell in chosen]
    return rows + ([_first_calls(cell) for cell in chosen] if first_call and device.type == "cpu" else [])


def _row(cell: str, shape: tuple[int, ...], repeats: int, device: torch.device) -> Row:
    batch, steps, width = shape
    loop, make, _, states = CELLS[cell]
    torch.manual_seed(0)
    theirs = make(width, width, batch_first=True).to(device)
    weights = list(theirs.parameters())
    x = torch.randn(batch, steps, width, device=device, requires_grad=True)
    g, state = torch.randn(x.shape, device=device), [torch.zeros(batch, width, device=device)] * states
    args = (x, *state, *weights)

    def train(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], None]:
        def once() -> None:
            torch.autograd.grad(run()[0], [x, *weights], g)

        return once

    def infer(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], None]:
        def once() -> None:
            with torch.no_grad():
                run()

        return once

    wide = torch.randn(batch * steps, len(weights[0]), device=device)
    flat, w = x.detach().flatten(0, 1), weights[0].detach()

    def products() -> None:
        for p, q in ((flat, w.T), (wide, w), (wide.T, flat), (wide.T, flat)):
            torch.mm(p, q)

    ours_first, theirs_first = lambda: loop(*args), lambda: theirs(x)
    took, their, ratio = _in_turn(train(ours_first), train(theirs_first), repeats, device)
    return {
        "cell": cell, "shape": (batch, steps, width), "ours": took, "theirs": their, "ratio": ratio,
        "forward": _in_turn(infer(ours_first), infer(theirs_first), repeats, device)[2],
        "products": statistics.median(seconds(products, device) for _ in range(repeats)),
        "backend": next((b for b, why in loop.explain(*args).items() if why == "ok"), "reference"),
        "peak": peak_memory(train(ours_first), device), "their_peak": peak_memory(train(theirs_first), device),
    }  # fmt: skip


def _in_turn(
    ours: Callable[[], None], theirs: Callable[[], None], repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios theirs / ours."""
    ours()
    theirs()
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
    mine, other = zip(*pairs, strict=True)
    return statistics.median(mine), statistics.median(other), statistics.median(b / a for a, b in pairs)


def steps(width: int = 128, *, batch: int = 1, rounds: int = 21) -> list[Row]:
    """Seconds of a streaming step of our layers and of torch.nn's cells, without gradients: medians, in turn."""
    from ..layers import GRULayer, LSTMLayer
    from ..layers.elman import Elman

    rows = []
    for name, layer in {"lstm": LSTMLayer, "gru": GRULayer, "elman": Elman}.items():
        ours, theirs = layer(width, width).eval(), CELLS[name][2](width, width).eval()
        x, state, blank = torch.randn(batch, width), ours.initial_state(batch), torch.zeros(batch, width)
        hidden: Any = (blank, blank) if name == "lstm" else blank

        def mine(ours: Any = ours, x: Tensor = x, state: Any = state) -> None:
            for _ in range(200):
                _, state = ours.step(x, state)

        def other(theirs: Any = theirs, x: Tensor = x, hidden: Any = hidden) -> None:
            for _ in range(200):
                hidden = theirs(x, hidden)

        with torch.no_grad():
            took, their, ratio = _in_turn(mine, other, rounds, torch.device("cpu"))
        rows.append({"cell": name, "step": took / 200, "their_step": their / 200, "ratio": ratio})
    return rows


_FIRST = """
import time, torch
from statewise.ops import {cell}_loop as loop
torch.set_num_threads({threads})
x = torch.rand(8, 64, 16).requires_grad_()
w = torch.rand({gates} * 16, 16)
state = [torch.zeros(8, 16)] * {states}
began = time.perf_counter()
h = loop(x, *state, w, w, backend="numba")[0]
forward = time.perf_counter()
h.sum().backward()
print(forward - began, time.perf_counter() - began)
"""


def _first_calls(cell: str) -> Row:
    """Seconds of a process's first call, with an empty cache of compiled code and with a filled one."""
    row: Row = {"cell": cell}
    gates = {"lstm": 4, "gru": 3, "elman": 1}[cell]
    code = _FIRST.format(cell=cell, threads=torch.get_num_threads(), gates=gates, states=CELLS[cell][3])
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "filled"):
            env = os.environ | {"NUMBA_CACHE_DIR": cache}
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            if done.returncode:
                return row | {"failed": done.stderr.strip().splitlines()[-1][:80]}
            forward, both = map(float, done.stdout.split())
            row |= {f"{state}_forward": forward, f"{state}_backward": both - forward}
    return row
