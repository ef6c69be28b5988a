"""Cells in parallel processes: followed by their logs, marked when they fail, kept when they are done.

A row is written to results.jsonl when its cell ends; a cell whose row says "done" is never trained again. The folder is
locked by a file that the workers hold too, so that a comparison started again after a kill waits for the old workers.
"""

from __future__ import annotations

import contextlib
import fcntl
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

from ..core import DataError, UsageError
from ..training import Stopped, read_log, read_result
from ..training.log import Log
from ..training.signals import Stop
from .describe import cores
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
    attempt: int = 1
    offset: int = 0
    asked: float | None = None  # when it was asked to end, for taking too long
    last: Event = field(default_factory=dict)


def fitting_workers(cells: int, threads: int) -> int:
    """As many processes as cores and free memory allow, at most one per cell."""
    by_memory = cells
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        by_memory = free // WORKER_MEMORY
    return max(1, min(cells, cores() // max(threads, 1), by_memory))


def read_rows(out: Path) -> dict[str, Row]:
    """The last row of every cell in a results folder, by key. Torn and damaged lines do not count."""
    return {row["key"]: row for row in read_log(out / "results.jsonl")[0]}


def run_dir(out: Path, cell: Cell) -> Path:
    return out / "runs" / f"{cell.layer}-seed{cell.seed}-{cell.key}"


@contextlib.contextmanager
def locked(out: Path, patience: float = 2 * GRACE) -> Iterator[int]:
    """Hold the folder; yields the descriptor that workers inherit.

    Raises UsageError if another comparison is at work there. Waits for workers that outlived a killed one.
    """
    out.mkdir(parents=True, exist_ok=True)
    fd = os.open(out / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                if _alive(holder) or time.monotonic() > end:
                    who = f"process {holder}" if _alive(holder) else "workers of an earlier comparison"
                    raise UsageError(f"{out}: {who} is at work there; wait, or name another place with --out") from None
                time.sleep(0.1)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield fd
    finally:
        os.close(fd)


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
    """Train every cell that has no finished row yet; returns all rows by key.

    lock: descriptor from `locked`. timeout: seconds for one run, 0 for no limit. memory: bytes of address space for one
    worker, 0 for no limit. on_event gets {"event": "kept" | "start" | "progress" | "retry" | "done" | "failed",
    "cell": Cell, ...}.

    Raises Stopped when SIGINT or SIGTERM came: the workers have then saved and ended.
    """
    rows = read_rows(out)
    waiting = []
    for cell in cells:
        if cell.key in rows and rows[cell.key]["status"] == "done":
            on_event({"event": "kept", "cell": cell, "row": rows[cell.key]})
        else:
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
                    running.append(_start(cell, place, attempt, lock, threads, device, memory))
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


def _start(cell: Cell, place: Path, attempt: int, lock: int, threads: int, device: str, memory: int) -> _Running:
    place.mkdir(parents=True, exist_ok=True)
    count = str(threads)
    env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "NUMBA_NUM_THREADS": count}
    command = [sys.executable, "-m", "statewise.comparing.worker", str(place), "--threads", count, "--device", device]
    errors = (place / "stderr.txt").open("wb")
    process = subprocess.Popen(
        [*command, "--memory", str(memory)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env=env,
        pass_fds=[lock], start_new_session=True,  # Ctrl-C in the terminal is for the driver, which passes it on
    )  # fmt: skip
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: its exit status says why
        process.stdin.write(json.dumps(cell.experiment.record()).encode() + b"\n")
        process.stdin.flush()
    log = place / "log.jsonl"
    offset = log.stat().st_size if log.exists() else 0
    return _Running(cell, place, process, errors, time.monotonic(), attempt, offset)


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
    if run.process.returncode == 0:
        try:
            found = asdict(read_result(run.place))
        except DataError as error:
            return {**row, "status": "failed", "reason": str(error)}
        metric = cell.experiment.task.metric
        return {
            **row,
            "status": "done",
            "reason": None,
            "validation_score": found["metrics"]["validation"][metric],
            **found,
        }
    return {**row, "status": "failed", "reason": _reason(run, timeout)}


def _reason(run: _Running, timeout: float) -> str:
    """One line: why a worker ended as it did."""
    status = run.process.returncode
    if run.asked is not None:
        return f"timed out after {timeout:.0f} s at step {run.last.get('step', 0)}"
    if status == -signal.SIGKILL:
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


def _alive(pid: str) -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
