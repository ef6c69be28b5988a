"""Cells in parallel processes: followed by their logs, marked when they fail, kept when they are done.

A row is written to results.jsonl when its cell ends; a cell whose row says "done" of the same data is not trained
again. The folder is locked by a file that the workers hold too, so that a comparison started again after a kill waits
for the old workers. Where the processes run is the engine's business.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..core import DataError, machine, read_json
from ..core.machine import cores, free_memory
from ..tasks import Generated
from ..training import Stopped, data_hash, read_log, read_result
from ..training.evaluate import MEASURED, refusal
from ..training.log import Log
from ..training.signals import Stop
from .command import train_command
from .launch import Engine, Local, Process, Setup
from .plan import Cell
from .rows import RESULTS, Row, read_rows
from .search import Halving

Event = dict[str, Any]

WORKER_MEMORY = 1 << 30  # bytes that a worker with torch and a small model may need
RETRIES = 2  # after a death by a signal that was not ours: a worker goes on from its last checkpoint
GRACE = 30.0  # seconds between asking a worker to save and ending it
TICK = 0.05  # seconds between two looks at the workers
FINAL = ("done", "pruned")  # rows that are not trained again


@dataclass
class _Running:
    cell: Cell
    place: Path
    process: Process
    began: float
    attempt: int
    offset: int  # in its log: what an earlier driver saw of it is not shown again
    quiet: float = 0.0  # seconds since its log grew, as far as this process saw them pass
    asked: float | None = None  # when it was asked to end
    why: str = ""  # it was: "timeout", "silent" or "pruned"
    last: Event = field(default_factory=dict)


def fitting_workers(cells: int, threads: int) -> int:
    """As many processes as cores and free memory allow, at most one per cell."""
    free = free_memory()
    by_memory = cells if free is None else free // WORKER_MEMORY
    return max(1, min(cells, cores() // max(threads, 1), by_memory))


def run_dir(out: Path, cell: Cell) -> Path:
    layer = "-".join(re.findall(r"\w+", cell.layer))  # of a hybrid without its signs
    return out / "runs" / f"{layer}-seed{cell.seed}-{cell.key}"


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
    setup: Setup,
    engine: Engine | None = None,
    timeout: float = 0,
    silence: float = 0,
    halving: Halving | None = None,
    on_event: Callable[[Event], object] = lambda event: None,
) -> dict[str, Row]:
    """Train every cell that has no finished row of these data yet; returns all rows by key.

    lock: descriptor from `locked`. engine: where the processes run, this machine if none is named. timeout: seconds for
    one run, silence: seconds without a sign of life after which it is ended; 0 for no limit. halving: what stops runs
    that promise little. on_event gets {"event": "kept" | "changed" | "start" | "progress" | "retry" | "done" |
    "failed" | "pruned", "cell": Cell, ...}.

    Raises Stopped when SIGINT or SIGTERM came: the workers have then saved and ended.
    """
    pool = _Pool(out, lock, setup, engine or Local(), timeout, silence, halving, on_event, read_rows(out))
    with Stop() as stop, Log(out / RESULTS) as pool.log:
        try:
            pool.take(cells)
            while pool.waiting or pool.running or pool.held:
                if stop.received is not None:
                    raise Stopped(stop.received, f"stopped; run the same command again to go on: {out}")
                pool.fill()
                time.sleep(TICK)
                pool.look()
        finally:
            _end(pool.running)
    return pool.rows


@dataclass
class _Pool:
    out: Path
    lock: int
    setup: Setup
    engine: Engine
    timeout: float
    silence: float
    halving: Halving | None
    on_event: Callable[[Event], object]
    rows: dict[str, Row]
    log: Log = field(init=False)
    waiting: list[tuple[Cell, int]] = field(default_factory=list)  # and the number of the attempt
    running: list[_Running] = field(default_factory=list)
    held: list[tuple[Cell, Row]] = field(default_factory=list)  # ended, while halving has not decided about them
    guides: dict[tuple[str, str], Row] = field(default_factory=dict)
    looked: float = field(default_factory=time.monotonic)

    def take(self, cells: Sequence[Cell]) -> None:
        """Sort out what is finished; what halving can know of the others it is told before any of them starts."""
        for cell in {cell.key: cell for cell in cells}.values():
            row = self.rows.get(cell.key)
            if row and row["status"] in FINAL and not self._wanting(cell, row):
                if row.get("data") == data_hash(cell.experiment.task):
                    self._hear(cell, row["curve"])
                    self._over(cell, row)
                    self.on_event({"event": "kept", "cell": cell, "row": row})
                    continue
                self.on_event({"event": "changed", "cell": cell})
            elif self.halving:
                self._hear(cell, curve_of(run_dir(self.out, cell)))
            self.waiting.append((cell, 1))

    def _wanting(self, cell: Cell, row: Row) -> bool:
        """Whether lengths are asked for that a finished run has no score at: its worker then adds them."""
        task = cell.experiment.task
        if row["status"] != "done" or not isinstance(task, Generated):
            return False
        found = {entry["length"]: entry["failed"] for entry in row.get("scores_by_length") or []}
        return any(
            length not in found or (found[length] is not None and refusal(task, [length]) is None)
            for length in self.setup.lengths
        )

    def fill(self) -> None:
        """Start what there is room for."""
        while self.waiting and len(self.running) < self.setup.workers:
            cell, attempt = self.waiting.pop(0)
            place = run_dir(self.out, cell)
            if cell.fault:
                self._finish(cell, {**self._about(cell), "status": "failed", "failure": "error", "reason": cell.fault})
            elif self.halving and self.halving.stopped(cell.key) is not None:
                self._finish(cell, self._pruned(cell))
            else:
                log = place / "log.jsonl"
                offset = log.stat().st_size if log.exists() else 0
                process = self.engine.start(cell.experiment.record(), place, self.setup, self.lock)
                self.running.append(_Running(cell, place, process, time.monotonic(), attempt, offset))
                self.on_event({"event": "start", "cell": cell, "pid": getattr(process, "pid", None)})

    def look(self) -> None:
        """See how everything that runs is doing; settle what has ended."""
        now = time.monotonic()
        # no more than a second, so that a machine that slept or a driver that was halted accuses nobody
        passed, self.looked = min(now - self.looked, 1.0), now
        for run in list(self.running):
            ended = run.process.poll() is not None  # before its log is read for the last time
            self._follow(run, passed)
            if not ended:
                self._hurry(run, now)
                continue
            self.running.remove(run)
            reason = _reason(run, self.timeout, self.silence)
            if _status(run) < 0 and not run.why and run.attempt <= RETRIES:
                self.waiting.insert(0, (run.cell, run.attempt + 1))
                self.on_event({"event": "retry", "cell": run.cell, "reason": reason})
            else:
                self._finish(run.cell, self._row(run, reason))
        for cell, row in list(self.held):
            if self.halving is None or self.halving.settled(cell.key):
                self.held.remove((cell, row))
                self._write(cell, row)

    # ---- while it runs

    def _follow(self, run: _Running, passed: float) -> None:
        run.quiet += passed
        with contextlib.suppress(DataError):
            records, run.offset = read_log(run.place / "log.jsonl", run.offset)
            if not records:
                return
            run.quiet = 0.0
            for record in records:
                run.last = {**run.last, **record}
            self._hear(run.cell, _curve(records))
            self.on_event({"event": "progress", "cell": run.cell, "record": run.last})

    def _hurry(self, run: _Running, now: float) -> None:
        """Ask a run that has had its time, or is stopped, to save and end; end one that does not, or is silent."""
        if run.asked is not None:
            if now - run.asked > GRACE:
                run.process.kill()
        elif self.silence and run.quiet > self.silence:
            run.why = "silent"
            run.asked = now
            run.process.kill()  # asking has no sense where nothing answers; its last checkpoint stays
        elif (self.timeout and now - run.began > self.timeout) or self._stopped(run.cell):
            run.why = "pruned" if self._stopped(run.cell) else "timeout"
            run.asked = now
            run.process.terminate()

    # ---- when it has ended

    def _finish(self, cell: Cell, row: Row) -> None:
        """Write the row, or hold it until halving has decided about it."""
        self._over(cell, row)
        if self.halving is None or self.halving.settled(cell.key):
            self._write(cell, row)
        else:
            self.held.append((cell, row))

    def _write(self, cell: Cell, row: Row) -> None:
        if self._stopped(cell):
            row = self._pruned(cell)
        self.log.write(row, sync=True)
        self.rows[cell.key] = row
        self.on_event({"event": row["status"], "cell": cell, "row": row})

    def _about(self, cell: Cell) -> Row:
        """What a row says before anything was trained."""
        task = cell.experiment.task
        return {
            "key": cell.key, "task": task.name, "board": cell.board, "layer": cell.layer, "label": cell.label,
            "seed": cell.seed, "lr": cell.lr, "overrides": dict(cell.overrides), "tried": dict(cell.tried),
            "budget": dict(cell.budget), "trial": cell.trial, "status": "", "failure": None, "reason": None,
            "score": None, "validation_score": None, "metric": task.metric,
            "higher_is_better": task.higher_is_better, **self._guides(cell), "curve": curve_of(run_dir(self.out, cell)),
            "device": self.setup.device, "threads": self.setup.threads, "workers": self.setup.workers,
            "engine": self.engine.name, "version": __version__, "ended": round(time.time(), 1),
            "data": data_hash(task), "record": cell.experiment.record(),
            "command": train_command(cell.experiment, self.setup.device, self.setup.threads),
        }  # fmt: skip

    def _guides(self, cell: Cell) -> Row:
        """Chance and baseline of the task, which may take a look at all of its data."""
        task = cell.experiment.task
        about = (cell.board, data_hash(task))
        if about not in self.guides:
            self.guides[about] = {"chance": float(task.chance()), "baseline": float(task.baseline())}
        return self.guides[about]

    def _row(self, run: _Running, reason: str) -> Row:
        cell = run.cell
        row = self._about(cell)
        if _status(run) != 0 and not _trained(run, row["data"]):
            return {**row, "status": "failed", "failure": _failure(run, reason), "reason": reason}
        try:
            found = asdict(read_result(run.place))
            kept = read_json(run.place / "result.json")  # which the worker may have found finished, by another setup
            measured = run.place / MEASURED
            beside = read_json(measured) if measured.exists() else {}
        except DataError as error:
            return {**row, "status": "failed", "failure": "error", "reason": str(error)}
        setup: Row = {name: kept[name] for name in ("device", "threads", "version", "data") if name in kept}
        score = found["metrics"]["validation"][cell.experiment.task.metric]
        lost = f"trained; its lengths are not all scored: {reason}" if _status(run) != 0 else None
        return {**row, **beside, **setup, "status": "done", "reason": lost, "validation_score": score, **found}

    def _pruned(self, cell: Cell) -> Row:
        """The row of a run that halving stopped: as it was at that step, however far it had come since."""
        assert self.halving is not None
        step, row = self.halving.stopped(cell.key), self._about(cell)
        row["curve"] = [point for point in row["curve"] if point["step"] <= step]
        best = max if row["higher_is_better"] else min
        row["validation_score"] = best((point["score"] for point in row["curve"]), default=None)
        last: Mapping[str, Any] = row["curve"][-1] if row["curve"] else {}
        reason = f"stopped at step {step} by successive halving"
        return {**row, "status": "pruned", "reason": reason, "steps": step, "seconds": last.get("seconds")}

    # ---- halving, where there is any

    def _hear(self, cell: Cell, curve: Sequence[Mapping[str, Any]]) -> None:
        if self.halving:
            for point in curve:
                self.halving.hear(cell.key, point["step"], point["score"])

    def _over(self, cell: Cell, row: Row) -> None:
        if self.halving:
            self.halving.end(cell.key, done=row["status"] == "done")

    def _stopped(self, cell: Cell) -> bool:
        return self.halving is not None and self.halving.stopped(cell.key) is not None


def curve_of(place: Path) -> list[dict[str, Any]]:
    """Validation scores of a run so far: step, seconds of training, score."""
    try:
        return _curve(read_log(place / "log.jsonl")[0])
    except DataError:
        return []


def _curve(records: Sequence[Event]) -> list[dict[str, Any]]:
    # a run that was resumed may have evaluated a step twice, with the same bits
    found = {r["step"]: r for r in records if r["event"] == "evaluate" and r["split"] == "validation"}
    return [
        {"step": step, "seconds": r.get("seconds"), "score": r["score"]}
        for step, r in sorted(found.items())
        if isinstance(r["score"], float)
    ]


def _status(run: _Running) -> int:
    status = run.process.poll()
    return 0 if status is None else status


def _reason(run: _Running, timeout: float, silence: float) -> str:
    """One line: why a worker ended as it did."""
    status = _status(run)
    at = f"at step {run.last.get('step', 0)}"
    if run.why == "timeout":
        return f"timed out after {timeout:.0f} s {at}"
    if run.why == "silent":
        return f"gave no sign of life for {silence:.0f} s {at}; killed"
    if status == -9:
        return f"killed {run.attempt} times by SIGKILL: most likely out of memory"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    errors = run.place / "stderr.txt"
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines() if errors.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"ended with status {status}")
    return last.removeprefix(f"error[{status}]: ")[:300]


def _trained(run: _Running, data: str) -> bool:
    """Whether a run that ended otherwise than it should has a result of these data: only its lengths are missing."""
    try:
        return bool(read_json(run.place / "result.json").get("data", data) == data)
    except DataError:
        return False


def _failure(run: _Running, reason: str) -> str:
    """The kind of a failure, for those who count them."""
    if run.why in ("timeout", "silent"):
        return run.why
    if "out of memory" in reason:
        return "out of memory"
    return "killed" if _status(run) < 0 else "error"


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
            run.process.wait(GRACE)
