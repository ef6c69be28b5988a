"""statewise bench: speed and memory, beside what else there is on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .parse import Positional, Repeated

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Measure speed and memory in one run, beside the Python loop, torch.nn and installed peers."""

    what: Positional[
        Literal["linear_scan", "layers", "streaming", "peers", "tasks", "decoding", "gated_loop", "newton", "scaling"]
    ]
    """linear_scan: beside the byte floor. layers: beside torch.nn. streaming: a million steps, is the last as fast?
    peers: the linear family beside other implementations and beside matrix products. tasks: generators of data.
    decoding: tokens per second at batch 1, beside reading the weights once.
    gated_loop: LSTM, GRU and Elman beside torch.nn.
    newton: Newton's method and the recorded loop beside the loop, and from which length on Newton's is faster.
    scaling: 10,000 runs on a simulated cluster."""
    results: Path | None = None
    """Of scaling: a folder of `statewise compare` or of recipes, whose measured run times are taken instead of ours."""
    layers: str = ""
    """Names with commas, for layers, streaming, the cases of peers and tasks, all of them if empty; for decoding,
    where empty is mamba."""
    shape: Repeated[str] = ()
    """B,T,D as often as needed; for decoding width,depth,vocabulary."""
    repeats: int = 0
    """Rounds, of which medians are printed; 0 leaves it to the measurement."""
    decay: float | None = None
    """Of linear_scan: every decay is this number; without it they are random between 0 and 1."""
    steps: int = 1_000_000
    """Of streaming: how far the streams go."""
    device: str = "cpu"
    """cpu, cuda, cuda:1; for linear_scan and layers."""
    threads: int = 0
    """Threads that torch may use; 0 leaves it to torch."""
    json: Path | None = None
    """Also write the rows to this file."""


def run(options: Options) -> int:
    import torch

    from ..core.files import check_writable
    from ..core.machine import cores, use_threads

    use_threads(options.threads)
    if options.json is not None:  # before the minutes that it takes to have something to write
        options.json.parent.mkdir(parents=True, exist_ok=True)
        check_writable(options.json)
    load, count = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, cores()
    noisy = "; NOISY: more work than cores, do not trust these times" if load > count else ""
    print(f"load average {load:.1f} on {count} cores, torch on {torch.get_num_threads()} threads{noisy}")
    rows = MEASURES[options.what](options)
    if options.json is not None:
        from ..core.files import replace_file

        replace_file(options.json, [json.dumps(rows, indent=1, default=str).encode() + b"\n"])
        print(f"rows written to {options.json}")
    return 0


def measure_layers(options: Options) -> list[Row]:
    from ..bench import layers
    from ..training import choose_device
    from .explain import read_shape
    from .show import table

    device, rows = choose_device(options.device), []
    for shape in map(read_shape, options.shape or ("8,256,64",)):
        repeats = options.repeats or 5
        found = layers.run(names(options.layers), shape=shape[:3], repeats=repeats, device=device)  # type: ignore[arg-type]
        rows += found
        columns = ("layer", "way", "forward", "training", "x floor", "step", "first call", "peak")
        title = f"x (B, T, D) = {shape[:3]}, float32, {device}: medians of {repeats}"
        table(columns, map(cells, found), right=columns[2:], title=title)
    return rows


def cells(row: Row) -> list[str]:
    from ..report import show_bytes, show_time

    if "failed" in row:
        return [row["layer"], row["way"], row["failed"], *[""] * 5]
    times = [show_time(row.get(key)) for key in ("forward", "training", "step", "first")]
    floors = " / ".join(f"{row[key]:.3g}" for key in ("forward_floor", "training_floor"))
    return [row["layer"], row["way"], *times[:2], floors, *times[2:], show_bytes(row.get("peak"))]


def measure_streaming(options: Options) -> list[Row]:
    from ..bench import streaming
    from ..core import UsageError

    if options.steps < 12_000:
        raise UsageError(f"--steps {options.steps}; expected at least 12000: blocks of 1,000 at the start and the end")
    chosen = names(options.layers) or streaming.LAYERS
    rows = streaming.run(chosen, steps=options.steps, blocks=min(50, options.steps // 3000))
    generic(rows)
    return rows


def measure_peers(options: Options) -> list[Row]:
    from ..bench import peers
    from .show import table

    say = lambda line: print(line, flush=True)
    rows = peers.run(names(options.layers), repeats=options.repeats or 5, say=say)
    columns = ("way", "time", "x ours", "first call", "peak", "off")
    for case, shape in dict.fromkeys((row["case"], row["shape"]) for row in rows):
        found = [row for row in rows if (row["case"], row["shape"]) == (case, shape)]
        title = f"{case}: {shape}, float32, forward and backward"
        if case == "gemm":
            heads = ("op", "way", "time", "GFLOP/s", "of GEMM", "of batched", "least")
            table(heads, map(gemm_cells, found), right=heads[2:], title=f"products: {shape}, float32")
        else:
            measured = [row for row in found if "failed" not in row]
            table(columns, map(peer_cells, measured), right=columns[1:], title=title)
        for row in found:
            if "failed" in row:
                print(f"{row['way']}: {row['failed']}")
    return rows


def measure_tasks(options: Options) -> list[Row]:
    from ..bench import tasks
    from .show import table

    rows = tasks.run(names(options.layers), repeats=options.repeats or 5)
    columns = ("task", "steps", "training, M tokens/s", "test, M tokens/s", "x a model's training")
    found = [
        [row["task"], str(row["steps"]), *(f"{row[key] / 1e6:.2f}" for key in ("train", "test")), times(row["ratio"])]
        for row in rows
    ]
    table(columns, found, right=columns[1:], title="generators, on one thread, in batches of 256")
    layer, speed = rows[0]["fastest"], rows[0]["needed"]
    print(f"the fastest small model trains on {speed / 1e6:.3f} M tokens/s: {layer}, width 64, depth 2, one thread")
    slow = [f"{row['task']} ({row['ratio']:.1f})" for row in rows if row["ratio"] < tasks.AMPLE]
    print(f"below {tasks.AMPLE} times that: {', '.join(slow) or 'none'}")
    return rows


def measure_decoding(options: Options) -> list[Row]:
    from ..bench import decoding
    from .explain import read_shape
    from .show import table

    sizes = dict(zip(("width", "depth", "vocab"), read_shape(options.shape[0]) if options.shape else (), strict=False))
    rows: list[Row] = []
    columns = ("way", "tokens/s", "ms", "reading the weights, ms", "fraction", "x transformers")
    for layer in names(options.layers) or ("mamba",):
        found = decoding.run(layer, rounds=options.repeats or 7, **sizes)
        lines = [
            [row["way"], *(f"{row[k]:.1f}" for k in ("tokens_per_second", "ms", "limit")), times(row["fraction"]),
             times(row.get("speedup"))]
            for row in found
        ]  # fmt: skip
        title = f"{layer}, {found[0]['parameters'] / 1e6:.0f} M random weights, float32, batch 1"
        table(columns, lines, right=columns[1:], title=title)
        rows += found
    return rows


def measure_gated_loop(options: Options) -> list[Row]:
    from ..bench import gated_loop
    from ..report import show_bytes, show_time
    from ..training import choose_device
    from .explain import read_shape
    from .show import table

    shapes = [read_shape(text)[:3] for text in options.shape]
    chosen, device = names(options.layers), choose_device(options.device)
    rows = gated_loop.run(chosen, shapes=shapes, repeats=options.repeats or 7, device=device)
    measured = [row for row in rows if "shape" in row]
    columns = ("(B, T, N)", "cell", "backend", "ours", "torch.nn", "x faster", "forward", "products", "peak", "theirs")
    lines = [
        [str(row["shape"]), row["cell"], row["backend"], show_time(row["ours"]), show_time(row["theirs"]),
         times(row["ratio"]), times(row["forward"]), show_time(row["products"]), show_bytes(row["peak"]),
         show_bytes(row["their_peak"])]
        for row in measured
    ]  # fmt: skip
    table(columns, lines, right=columns[3:], title=f"training steps, float32, {options.device}")
    steps = gated_loop.steps() if str(device) == "cpu" else []
    generic(steps)
    generic(row for row in rows if "shape" not in row)
    return rows + steps


def measure_newton(options: Options) -> list[Row]:
    from ..bench import newton
    from ..report import show_time
    from .show import table

    rows = newton.run(names(options.layers), repeats=options.repeats or 3)
    columns = ("cell", "width", "T", "loop", "predicted", "Newton", "predicted", "x faster", "iterations", "recorded",
               "predicted", "auto takes")  # fmt: skip
    shown = lambda row, way, kind: show_time(row[f"{way}_{kind}"]) if f"{way}_{kind}" in row else "-"
    lines = [
        [row["cell"], str(row["width"]), str(row["steps"]),
         *(shown(row, way, kind) for way in ("loop", "newton") for kind in ("measured", "predicted")),
         times(row["loop_measured"] / row["newton_measured"]), str(row["iterations"]),
         *(shown(row, "recorded", kind) for kind in ("measured", "predicted")), row["chosen"]]
        for row in rows
    ]  # fmt: skip
    table(columns, lines, right=columns[1:], title="training steps of one row, float32")
    lines = [
        [row["cell"], *(str(row[k] or "-") for k in ("width", "than", "measured", "predicted"))]
        for row in newton.crossovers(rows)
    ]
    heads = ("cell", "width", "than", "measured", "predicted")
    table(heads, lines, right=("width", *heads[3:]), title="first length at which Newton's method is faster")
    return rows


def simulate_scaling(options: Options) -> list[Row]:
    from ..bench import scaling

    place = options.results or scaling.MEASURED
    print(scaling.as_markdown(place))
    return list(scaling.run(place))


def peer_cells(row: Row) -> list[str]:
    from ..report import show_bytes, show_time

    off = f"{row['off']:.1e}" if "off" in row else ""
    return [
        row["way"], show_time(row["time"]) + (" (once)" if row["rounds"] == 1 else ""), times(row["ratio"]),
        show_time(row["first"]), show_bytes(row.get("peak")), off,
    ]  # fmt: skip


def gemm_cells(row: Row) -> list[str]:
    from ..report import show_time

    speeds = [f"{row['gflops']:.3g}", *(times(row[key]) for key in ("fraction", "of_batched", "least"))]
    return [row["op"], row["way"], show_time(row["time"]), *speeds]


def measure_linear_scan(options: Options) -> list[Row]:
    from ..bench import linear_scan, memory
    from ..training import choose_device
    from .explain import read_shape
    from .show import table

    shapes = [read_shape(text) for text in options.shape] or None
    memory.keep_freed()
    print("freed memory is kept, so that times are not those of the system handing it out")
    device, decay = choose_device(options.device), options.decay
    rows = linear_scan.run(shapes, repeats=options.repeats or 15, device=device, decay=decay)
    columns = ("way", "forward", "x floor", "training", "x floor", "error", "peak")
    for shape in dict.fromkeys(row.get("shape") for row in rows):
        title = f"x (B, T, N) = {shape}, float32, {options.device}" if shape else "in a fresh process"
        table(columns, [scan_cells(row) for row in rows if row.get("shape") == shape], right=columns[1:], title=title)
    return rows


def scan_cells(row: Row) -> list[str]:
    if "failed" in row:
        return [row["way"], row["failed"], *[""] * 5]
    found = [row["way"]]
    for name in ("forward", "training"):
        found += [milliseconds(row.get(name)), times(row.get(f"{name}_floor"))]
    error, peak = row.get("error"), row.get("peak_mb")
    return [*found, "" if error is None else f"{error:.1e}", "" if peak is None else f"{peak:.0f} MiB"]


def milliseconds(value: float | None) -> str:
    from ..report import show_time

    return "" if value is None else show_time(value / 1e3)


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def generic(rows: Iterable[Row]) -> None:
    """A table of whatever the rows hold."""
    from .show import table

    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cell = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    table(columns, [[cell(row.get(c, "")) for c in columns] for row in rows], right=columns)


MEASURES = {
    "linear_scan": measure_linear_scan,
    "layers": measure_layers,
    "streaming": measure_streaming,
    "peers": measure_peers,
    "tasks": measure_tasks,
    "gated_loop": measure_gated_loop,
    "newton": measure_newton,
    "decoding": measure_decoding,
    "scaling": simulate_scaling,
}
