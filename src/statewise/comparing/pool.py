"""Cells in parallel processes: followed by their logs, marked when they fail, kept when they are done.

A row is written to results.jsonl when its cell ends; a cell whose row says "done" of the same data is not trained
again. The folder is locked by a file that the workers hold too, so that a comparison started again after a kill waits
for the old workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from .. import __version__
from ..core import DataError, machine, read_json
from ..core.machine import cores, free_memory
from ..training import Stopped, data_hash, read_log, read_result
from ..training.log import Log
from ..training.signals import Stop
from .plan import Cell

Event = dict[str, Any]
Row = dict[str, Any]

WORKER_MEMORY = 1 << 30  # bytes that a worker with torch and a small model may need
RETRIES = 2  # after a death by a signal that was not ours: a worker goes on from its last checkpoint
GRACE = 30.0  # seconds between asking a worker to save and ending it


@dataclass
class _Running:
    cell: Cell
    place: Path
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    began: float
    device: str
    threads: int
    workers: int
    attempt: int = 1
    offset: int = 0
    asked: float | None = None  # when it was asked to end, for taking too long
    last: Event = field(default_factory=dict)


def fitting_workers(cells: int, threads: int) -> int:
    """As many processes as cores and free memory allow, at most one per cell."""
    free = free_memory()
    by_memory = cells if free is None else free // WORKER_MEMORY
    return max(1, min(cells, cores() // max(threads, 1), by_memory))


def read_rows(out: Path) -> dict[str, Row]:
    """The last row of every cell in a results folder, by key. Torn and damaged lines do not count."""
    return {row["key"]: row for row in read_log(out / "results.jsonl")[0]}


def run_dir(out: Path, cell: Cell) -> Path:
    return out / "runs" / f"{cell.layer}-seed{cell.seed}-{cell.key}"


@contextlib.contextmanager
def locked(out: Path, patience: float = 2 * GRACE) -> Iterator[int]:
    """Hold the folder; yields the descriptor that workers inherit. Waits for workers that outlived a killed comparison.

    Raises UsageError if another comparison is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with machine.locked(out, patience=patience, advice="wait, or name another place with --out") as fd:
        yield fd


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    lock: int,
    workers: int,
    threads: int = 1,
    device: str = "cpu",
    timeout: float = 0,
    memory: int = 0,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Row]:
    """Train every cell that has no finished row of these data yet; returns all rows by key.

    lock: descriptor from `locked`. timeout: seconds for one run, 0 for no limit. memory: bytes of address space for one
    worker, 0 for no limit. on_event gets {"event": "kept" | "changed" | "start" | "progress" | "retry" | "done" |
    "failed", "cell": Cell, ...}.

    Raises Stopped when SIGINT or SIGTERM came: the workers have then saved and ended.
    """
    rows = read_rows(out)
    waiting = []
    for cell in cells:
        row = rows.get(cell.key)
        if row and row["status"] == "done" and row.get("data") == data_hash(cell.experiment.task):
            on_event({"event": "kept", "cell": cell, "row": row})
        else:
            if row and row["status"] == "done":
                on_event({"event": "changed", "cell": cell})
            waiting.append((cell, 1))
    running: list[_Running] = []
    with Stop() as stop, Log(out / "results.jsonl") as log:
        try:
            while waiting or running:
                if stop.received is not None:
                    raise Stopped(stop.received, f"stopped; run the same command again to go on: {out}")
                while waiting and len(running) < workers:
                    cell, attempt = waiting.pop(0)
                    place = run_dir(out, cell)
                    running.append(_start(cell, place, attempt, lock, workers, threads, device, memory))
                    on_event({"event": "start", "cell": cell, "pid": running[-1].process.pid})
                time.sleep(0.05)
                for run in list(running):
                    _follow(run, on_event)
                    if run.process.poll() is None:
                        _hurry(run, timeout)
                        continue
                    running.remove(run)
                    run.errors.close()
                    again = _may_retry(run)
                    if again:
                        waiting.insert(0, (run.cell, run.attempt + 1))
                        on_event({"event": "retry", "cell": run.cell, "reason": _reason(run, timeout)})
                        continue
                    row = _row(run, timeout)
                    log.write(row, sync=True)
                    rows[run.cell.key] = row
                    on_event({"event": row["status"], "cell": run.cell, "row": row})
        finally:
            _end(running)
    return rows


def _start(
    cell: Cell, place: Path, attempt: int, lock: int, workers: int, threads: int, device: str, memory: int
) -> _Running:
    place.mkdir(parents=True, exist_ok=True)
    count = str(threads)
    env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "NUMBA_NUM_THREADS": count}
    command = [sys.executable, "-m", "statewise.comparing.worker", str(place), "--threads", count, "--device", device]
    errors = (place / "stderr.txt").open("wb")
    process = subprocess.Popen(
        [*command, "--memory", str(memory)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env=env,
        pass_fds=[lock] if lock >= 0 else [],
        start_new_session=True,  # Ctrl-C in the terminal is for the driver, which passes it on
    )  # fmt: skip
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: its exit status says why
        process.stdin.write(json.dumps(cell.experiment.record()).encode() + b"\n")
        process.stdin.flush()
    log = place / "log.jsonl"
    offset = log.stat().st_size if log.exists() else 0
    return _Running(cell, place, process, errors, time.monotonic(), device, threads, workers, attempt, offset)


def _follow(run: _Running, on_event: Callable[[Event], None]) -> None:
    with contextlib.suppress(DataError):
        records, run.offset = read_log(run.place / "log.jsonl", run.offset)
        for record in records:
            run.last = {**run.last, **record}
        if records:
            on_event({"event": "progress", "cell": run.cell, "record": run.last})


def _hurry(run: _Running, timeout: float) -> None:
    """Ask a run that has had its time to save and end; end it if it does not."""
    now = time.monotonic()
    if run.asked is None and timeout and now - run.began > timeout:
        run.asked = now
        run.process.terminate()
    elif run.asked is not None and now - run.asked > GRACE:
        run.process.kill()


def _may_retry(run: _Running) -> bool:
    return run.process.returncode < 0 and run.asked is None and run.attempt <= RETRIES


def _row(run: _Running, timeout: float) -> Row:
    cell = run.cell
    row: Row = {"key": cell.key, "layer": cell.layer, "seed": cell.seed, "lr": cell.lr}
    row |= {"device": run.device, "threads": run.threads, "workers": run.workers, "version": __version__}
    if run.process.returncode == 0:
        try:
            found = asdict(read_result(run.place))
            kept = read_json(run.place / "result.json")  # which the worker may have found finished, by another setup
        except DataError as error:
            return {**row, "status": "failed", "reason": str(error)}
        metric = cell.experiment.task.metric
        return {
            **row,
            "status": "done",
            "reason": None,
            "data": kept.get("data"),
            **{name: kept[name] for name in ("device", "threads", "version") if name in kept},
            "validation_score": found["metrics"]["validation"][metric],
            **found,
        }
    return {**row, "status": "failed", "reason": _reason(run, timeout)}


def _reason(run: _Running, timeout: float) -> str:
    """One line: why a worker ended as it did."""
    status = run.process.returncode
    if run.asked is not None:
        return f"timed out after {timeout:.0f} s at step {run.last.get('step', 0)}"
    if status == -9:
        return f"killed {run.attempt} times by SIGKILL: most likely out of memory"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = (run.place / "stderr.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"ended with status {status}")
    return last.removeprefix(f"error[{status}]: ")[:300]


def _end(running: Sequence[_Running]) -> None:
    """Ask what still runs to save and end, wait, end by force what does not. Nothing is left behind."""
    for run in running:
        run.process.terminate()
    end = time.monotonic() + GRACE
    for run in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(max(end - time.monotonic(), 0.1))
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        run.errors.close()
