"""Newton's method and the recorded loop beside the loop: measured, and as `parallelize` foresees it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Cell, UsageError, layers
from ..layers.parallelized import Parallelized, parallelize
from ..ops.newton import Layout
from .clock import seconds

Row = dict[str, Any]
CELLS = ("para_gru", "para_lstm", "cfc")  # diagonal, blocks of two, dense
WIDTHS = (16, 64, 256)
LENGTHS = (16, 64, 256, 1024, 4096)
DENSE = 16  # the widest state whose dense Jacobians are worth trying
WAYS = ("loop", "newton", "recorded")


class _Bare(Cell[Any]):
    """A layer's recurrence without the scan it brings, so that only the loop and Newton's method stand beside."""

    def __init__(self, cell: Cell[Any]):
        super().__init__()
        self.inner, self.traits, self.width, self.out_width = cell, cell.traits, cell.width, cell.out_width
        if hasattr(cell, "linearise"):
            linearise: Any = cell.linearise
            self.jacobian = lambda u, state: linearise(u, Layout.of(state).rows(state))[1]

    def initial_state(self, batch: int) -> Any:
        return self.inner.initial_state(batch)

    def encode(self, x: Tensor) -> Any:
        return self.inner.encode(x)

    def transition(self, u: Any, state: Any) -> tuple[Any, Any]:
        return self.inner.transition(u, state)

    def decode(self, o: Any, x: Tensor) -> Tensor:
        return self.inner.decode(o, x)


def run(names: Sequence[str] = (), *, widths: Sequence[int] = (), batch: int = 1, repeats: int = 3) -> list[Row]:
    """One row per cell, width and length: seconds of a training step by the loop, by Newton's method and, on a CPU, by
    the recorded loop, medians of `repeats` in turn after a first call, beside what the cost model says of them; chosen:
    what "auto" takes.

    Raises UsageError for a layer that is no cell or whose recurrence Newton's method cannot run.
    """
    import statewise.layers  # noqa: F401  registers them

    rows: list[Row] = []
    for name in names or CELLS:
        for width in widths or (WIDTHS if name in ("para_gru", "para_lstm") else (DENSE,)):
            torch.manual_seed(0)
            cell = layers[name].cls(**layers[name].sized(width))
            if not isinstance(cell, Cell):
                raise UsageError(f"bench newton: {name} is no Cell: it has no transition to run")
            made = parallelize(_Bare(cell))
            if "newton" not in made.plan.methods:
                raise UsageError(
                    f"bench newton: {name}: {made.plan.refused.get('newton', 'is affine: a scan runs it')}"
                )
            rows += [_row(made, name, width, batch, steps, repeats) for steps in LENGTHS]
    return rows


def crossovers(rows: Sequence[Row]) -> list[Row]:
    """Of each cell and width, beside the loop and beside the recorded loop where it ran: the first length at which
    Newton's method is faster, measured and predicted, or None.
    """
    found = []
    for name, width in dict.fromkeys((row["cell"], row["width"]) for row in rows):
        mine = [row for row in rows if (row["cell"], row["width"]) == (name, width)]
        for other in ("loop", "recorded"):
            if all(f"{other}_measured" in row for row in mine):
                first = {
                    kind: next((row["steps"] for row in mine if row[f"newton_{kind}"] < row[f"{other}_{kind}"]), None)
                    for kind in ("measured", "predicted")
                }
                found.append({"cell": name, "width": width, "than": other, **first})
    return found


def _row(made: Parallelized, name: str, width: int, batch: int, steps: int, repeats: int) -> Row:
    x = torch.randn(batch, steps, made.width, generator=torch.Generator().manual_seed(steps))
    predicted = made.predict(batch, steps)
    times: dict[str, list[float]] = {way: [] for way in WAYS if way in made.plan.methods}
    ways = {method: parallelize(made.cell, method, verify=False) for method in times}  # type: ignore[arg-type]
    for turn in range(repeats + 1):
        for method, way in ways.items():
            took = seconds(lambda: way(x)[0].square().mean().backward(), x.device)  # noqa: B023
            if turn:
                times[method].append(took)
    told = ways["newton"].diagnose(x)
    return {
        "cell": name, "width": width, "batch": batch, "steps": steps,
        **{f"{method}_measured": statistics.median(took) for method, took in times.items()},
        **{f"{method}_predicted": predicted[method] for method in times},
        "chosen": made.choose(batch, steps), "iterations": sum(sum(d.iterations) for d in told),
        "sequential": max((max(d.sequential, default=0) for d in told), default=0),
    }  # fmt: skip
