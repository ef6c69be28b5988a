"""A grid of many runs on a cluster, on paper: a simulated driver and its workers, with run times that were measured.

The driver is that of `comparing`: it looks at every running cell in turn, reads the ends of their logs, writes rows,
starts what there is room for, and sleeps. So it has a price per running cell and per cell, and it notices an end only
when it looks. Everything is a function of the arguments: same arguments, same table.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core import DataError, read_json

WORKERS = (2, 8, 32, 128, 512, 1024)


@dataclass(frozen=True)
class Costs:
    """Seconds, of which docs/scaling.md says where they are from."""

    start: float = 2.4  # of a worker: Python, torch, layers; until the first step
    look: float = 0.0001  # at one running cell: asking Ray for it, the end of its log
    submit: float = 0.0008  # of one task through Ray, until its result is back, beside its work
    row: float = 0.0042  # what is said of a cell, written and synced
    tick: float = 0.05  # between two rounds of looks


@dataclass(frozen=True)
class Cluster:
    """What can go wrong, and how cells are handed out.

    slow, factor: the share of workers that are slow, and by how much. deaths: a worker's process per hour of work; the
    cell goes on from its last checkpoint, of which there are `checkpoints` in a run, at most `retries` times.
    together: cells that one worker process trains one after another. longest_first: hand out what takes long first.
    """

    workers: int
    slow: float = 0.0
    factor: float = 3.0
    deaths: float = 0.0
    retries: int = 2
    checkpoints: int = 10
    together: int = 1
    longest_first: bool = False


@dataclass(frozen=True)
class Outcome:
    """Of one simulated grid. efficiency: training time over the time that all workers were there for."""

    workers: int
    hours: float
    efficiency: float
    bound: float  # hours that no schedule is below: the work shared out evenly, or its longest run
    tail: float  # hours in which workers had nothing left to do, while the last ones worked
    driver: float  # share of the time in which the driver was at work
    noticed: float  # seconds, mean, from the end of a task to the driver's look
    failed: int  # cells that died more often than they are retried


MEASURED = Path(__file__).parent / "run_seconds.json"


def run_times(place: Path = MEASURED) -> list[float]:
    """Measured seconds of runs, in a fixed order: of a folder of `statewise compare` or of recipes (`results/`), or
    those that come with this file, which says where they are from.

    Raises DataError where there are none.
    """
    found: list[float] = []
    if place.suffix == ".json" and place.is_file():
        found = [float(seconds) for seconds in read_json(place)["seconds"]]
    elif (place / "results.jsonl").is_file():
        for line in (place / "results.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("status") == "done":
                found.append(float(row["seconds"]))
    else:
        for path in sorted(place.glob("*.json")):
            runs = json.loads(path.read_text(encoding="utf-8")).get("runs", {})
            found += [float(seed["seconds"] or 0) for run in runs.values() for seed in run["seeds"].values()]
    found = [seconds for seconds in found if seconds >= 1.0]  # shorter ones trained nothing
    if not found:
        raise DataError(f"{place}: no measured runs; expected a folder of statewise compare, or of results of recipes")
    return found


def simulate(times: Sequence[float], cluster: Cluster, costs: Costs = Costs(), seed: int = 0) -> Outcome:
    """Run the cells of these training times on a cluster of which the driver is one more machine."""
    rng = random.Random(seed)
    order = sorted(times, reverse=True) if cluster.longest_first else list(times)
    tasks = [order[i : i + cluster.together] for i in range(0, len(order), cluster.together)]
    queue = iter(tasks)
    pace = [cluster.factor if i < round(cluster.slow * cluster.workers) else 1.0 for i in range(cluster.workers)]
    rng.shuffle(pace)
    free = list(range(cluster.workers))
    running: list[tuple[float, int, int, int]] = []  # end, worker, cells, those of them that are given up
    now = busy = waited = 0.0
    first_idle = math.inf
    failed = ended = 0
    last = None
    while True:
        began = now
        while running and running[0][0] <= now:
            end, worker, cells, lost = heapq.heappop(running)
            waited, ended, failed = waited + now - end, ended + 1, failed + lost
            now += costs.row * cells
            free.append(worker)
        while free and (last := next(queue, None)) is not None:
            worker = free.pop()
            now += costs.submit
            took, lost = _work(last, pace[worker], cluster, costs, rng)
            heapq.heappush(running, (now + took, worker, len(last), lost))
        if last is None and free and first_idle == math.inf:
            first_idle = now
        if not running:
            break
        now += costs.look * len(running)
        busy += now - began
        each = costs.look * len(running) + costs.tick  # of a round in which nothing happens
        now += costs.tick
        if running[0][0] > now:
            rounds = math.ceil((running[0][0] - now) / each) if each else 0
            now = now + rounds * each if each else running[0][0]
            busy += rounds * (each - costs.tick)
    work, there = sum(times), now * cluster.workers
    bound = max(work / cluster.workers, max(times))
    tail = max(now - first_idle, 0.0)
    return Outcome(
        cluster.workers, now / 3600, work / there, bound / 3600, tail / 3600, busy / now, waited / ended, failed
    )


def _work(cells: Sequence[float], pace: float, cluster: Cluster, costs: Costs, rng: random.Random) -> tuple[float, int]:
    """Seconds that a worker takes for cells one after another, and how many of them were given up."""
    took, failed = costs.start * pace, 0
    for seconds in cells:
        left, attempt = seconds * pace, 1
        while cluster.deaths:
            until = rng.expovariate(cluster.deaths / 3600)
            if until >= left:
                break
            between = seconds * pace / cluster.checkpoints
            kept = math.floor((seconds * pace - left + until) / between) * between  # of the whole run
            took += until
            if attempt > cluster.retries:
                failed, left = failed + 1, 0.0
                break
            took, left, attempt = took + costs.start * pace, seconds * pace - kept, attempt + 1
        took += left
    return took, failed


def draw(measured: Sequence[float], count: int, stretch: float = 1.0, seed: int = 0) -> list[float]:
    """`count` run times drawn from measured ones, each `stretch` times as long."""
    return [stretch * seconds for seconds in random.Random(seed).choices(measured, k=count)]


def run(place: Path = MEASURED, *, count: int = 10_000, costs: Costs = Costs()) -> Iterator[dict[str, Any]]:
    """The tables of docs/scaling.md as rows: {"case", "stretch", ...Outcome}."""
    measured = run_times(place)
    cases: list[tuple[str, float, dict[str, Any], tuple[int, ...]]] = [
        ("as it is", 1.0, {}, WORKERS),
        ("runs 20 times as long", 20.0, {}, WORKERS),
        ("longest first", 20.0, {"longest_first": True}, (128, 1024)),
        ("5 % of the workers 3 times slower", 20.0, {"slow": 0.05}, (128, 1024)),
        ("the same, longest first", 20.0, {"slow": 0.05, "longest_first": True}, (128, 1024)),
        ("a death in 10 h of work", 20.0, {"deaths": 0.1}, (128, 1024)),
        ("a death in an hour of work", 20.0, {"deaths": 1.0}, (128, 1024)),
        *((f"{n} cells to a process", 1.0, {"together": n}, (32, 128, 1024)) for n in (4, 16, 64)),
    ]
    for case, stretch, how, workers in cases:
        times = draw(measured, count, stretch)
        for number in workers:
            yield {"case": case, "stretch": stretch, **asdict(simulate(times, Cluster(number, **how), costs))}


def gpu(measured: Sequence[float], costs: Costs = Costs(), *, start: float = 10.0) -> list[dict[str, Any]]:
    """ASSUMED: what one GPU adds, in cores of the machine that was measured, were a run on it `speed` times as fast and
    `shared` runs on it at a time without slowing each other; its processes take `start` seconds to start.
    """
    mean = statistics.fmean(measured)
    return [
        {"stretch": stretch, "speed": speed, "shared": shared,
         "cores": shared * (stretch * mean + costs.start) / (stretch * mean / speed + start)}
        for stretch in (1.0, 20.0, 400.0)
        for speed, shared in ((2, 1), (10, 1), (50, 1), (10, 8))
    ]  # fmt: skip


def as_markdown(place: Path = MEASURED, *, count: int = 10_000) -> str:
    """The tables of docs/scaling.md."""
    measured = run_times(place)
    middle = f"median {statistics.median(measured):.1f} s, mean {statistics.fmean(measured):.1f} s"
    ends = f"{min(measured):.0f} to {max(measured):.0f} s"
    heads = ("case", "workers", "hours", "efficiency", "bound, hours", "tail, hours", "driver busy", "noticed after")
    lines = [f"{count:,} runs, drawn from {len(measured)} measured ones of {ends}, {middle}.", ""]
    lines += [f"| {' | '.join(heads)} | given up |", f"|:--{'|--:' * len(heads)}|"]
    for r in run(place, count=count):
        cells = [
            r["case"], str(r["workers"]), f"{r['hours']:.2f}", f"{100 * r['efficiency']:.0f} %", f"{r['bound']:.2f}",
            f"{r['tail']:.2f}", f"{100 * r['driver']:.0f} %", f"{r['noticed']:.2f} s", str(r["failed"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| run on one core | assumed: on the GPU | at a time | one GPU is then worth |", "|--:|--:|--:|--:|"]
    for r in gpu(measured):
        time = f"{r['stretch'] * statistics.fmean(measured):,.0f} s"
        lines.append(f"| {time} | {r['speed']} times as fast | {r['shared']} | {r['cores']:.1f} cores |")
    return "\n".join(lines)
