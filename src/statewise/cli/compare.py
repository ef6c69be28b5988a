"""statewise compare: many layers on one task, several seeds each, and a report."""

from __future__ import annotations

import shlex
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .parse import Positional, Repeated

if TYPE_CHECKING:
    from ..comparing import Plan
    from .board import Progress

DEFAULT_LAYERS = "gru,lstm,min_gru,lru,s5"


@dataclass(frozen=True)
class Options:
    """Train several layers on one task, several seeds each, in parallel processes; print a leaderboard, write a report.

    Stopped or killed, the same command goes on: finished runs are kept, failed ones are tried again.
    """

    task: Positional[str] = ""
    """A name from `statewise list tasks`; with --data alone it is text_file for .txt and series for all else."""
    layers: str = DEFAULT_LAYERS
    """Names from `statewise list layers` with commas, or all."""
    seeds: int = 3
    """Runs of each layer: seeds 0, 1, 2 ..."""
    width: int = 64
    """Channels between the layers."""
    depth: int = 2
    """Number of blocks."""
    steps: int = 0
    """Training steps of every run; 0 for the task's own setting."""
    minutes: float = 0.0
    """Instead of --steps: choose them so that the whole comparison takes about this long on this machine."""
    lr: str = ""
    """Learning rate, or several with commas: the first seed tries all, the best on validation is used for the rest."""
    set: Repeated[str] = ()
    """FIELD=VALUE for every run, as often as needed: task.length=200, train.batch=64, model.dropout=0.1."""
    data: Path | None = None
    """Your file or folder, for the tasks series and text_file."""
    out: Path | None = None
    """Where to keep runs, results and report. Default: runs/compare-TASK, or runs/compare-TASK-DATA."""
    workers: Literal["auto"] | int = "auto"
    """Runs at a time; auto: as many as cores and free memory allow, one on a GPU."""
    threads: int = 1
    """Threads of each run."""
    timeout: float = 0.0
    """Minutes for one run, after which it is saved and marked; 0 for no limit."""
    memory: float = 0.0
    """GiB of address space for one run, beyond which it is marked as out of memory; 0 for no limit."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""


def run(options: Options) -> int:
    from ..comparing import collect, fitting_workers, locked, run_cells
    from ..training import choose_device
    from .board import Progress, print_leaderboard

    began = time.monotonic()
    _check(options)
    device = str(choose_device(options.device))
    plan = plan_of(options)
    out = options.out or default_out(plan.base.task.name, options.data)
    plan.base.task.baseline()  # reads the data: what is wrong with it is said before anything is trained
    fitting = fitting_workers(plan.count(), options.threads) if device == "cpu" else 1
    workers = fitting if options.workers == "auto" else options.workers
    common: dict[str, Any] = {
        "workers": workers, "threads": options.threads, "device": device, "timeout": 60 * options.timeout,
        "memory": int(options.memory * 2**30),
    }  # fmt: skip
    with locked(out) as lock:
        if options.minutes:
            plan = fit_to_time(plan, out, options.minutes, lock, common)
        with Progress(plan, out, workers) as progress:
            rows = run_cells(plan.first(), out, lock=lock, on_event=progress.on_event, **common)
            rest = plan.rest(rows)
            if rest:
                rows = run_cells(rest, out, lock=lock, on_event=progress.on_event, **common)
        print("timing the streaming step of each layer ...", flush=True)
        seconds = time.monotonic() - began
        found = collect(
            plan, rows, out, command=command_of(options), workers=workers, threads=options.threads, device=device,
            seconds=_total(out, seconds, progress),
        )  # fmt: skip
        written = write_all(found, out)
    print_leaderboard(found)
    for line in written:
        print(line)
    return 0 if any(cell["status"] == "done" for entry in found["layers"] for cell in entry["cells"]) else 1


def default_out(task: str, data: Path | None) -> Path:
    """Two files of one's own are two comparisons, though the task is one."""
    return Path("runs") / "-".join(["compare", task, *([data.resolve().stem] if data else [])])


def plan_of(options: Options) -> Plan:
    """The comparison that the options ask for. Raises UsageError or DataError, before anything is trained."""
    from ..comparing import Plan, split_names
    from ..core import UsageError, layers, put
    from .build import build, experiment
    from .settings import dict_once

    task = options.task or (options.data and ("text_file" if options.data.suffix == ".txt" else "series"))
    if not task:
        raise UsageError("which task? statewise compare TASK; see statewise list tasks")
    import statewise.layers  # noqa: F401  registers them

    names = split_names(options.layers, layers.names())
    for name in names:
        layers[name]
    base = experiment(
        task, names[0] if names else "gru", width=options.width, depth=options.depth, seed=0,
        data=options.data, settings=options.set,
    )  # fmt: skip
    given = dict_once(options.set)
    for flag, field in (("steps", "train.steps"), ("lr", "train.lr")):
        if getattr(options, flag) and field in given:
            raise UsageError(f"--{flag} and --set {field} say the same thing twice; give one of them")
    if options.steps:
        base = put(base, "train.steps", options.steps)
        if "train.evaluate_every" not in given:
            base = put(base, "train.evaluate_every", _often(options.steps))
    plan = Plan(base, names, options.seeds, _rates(options.lr))
    for cell in plan.first():
        build(cell.experiment)  # a layer that cannot be built at this width is a mistake to name now
    return plan


def fit_to_time(plan: Plan, out: Path, minutes: float, lock: int, common: dict[str, Any]) -> Plan:
    """The plan with the number of steps that fills the minutes, from a short trial of every layer.

    The number is kept in the folder, so that the same command started again finds the same runs.
    """
    from dataclasses import replace

    from ..comparing import probe
    from ..core import put, read_json, write_json

    path = out / "steps.json"
    asked = {"minutes": minutes, "key": plan.base.key, "layers": list(plan.layers), "count": plan.count()}
    found = read_json(path) if path.exists() else {}
    if found.get("asked") != asked:
        print("trying a few steps of every layer ...", flush=True)
        found = {"asked": asked, "steps": probe(plan, out, minutes * 60, lock, common)}
        write_json(path, found)
    steps = int(found["steps"])
    print(f"{steps} steps for each run fill {minutes:g} min", flush=True)
    base = put(put(plan.base, "train.steps", steps), "train.evaluate_every", _often(steps))
    return replace(plan, base=base)


def write_all(found: dict[str, Any], out: Path) -> list[str]:
    """comparison.json, results.csv, leaderboard.md and report.html; returns a line for each."""
    from ..core import UsageError, write_json
    from ..report import write_csv, write_markdown, write_page

    write_json(out / "comparison.json", found)
    write_csv(found, out / "results.csv")
    write_markdown(found, out / "leaderboard.md")
    said = [f"results  {out / 'results.csv'}, {out / 'results.jsonl'}, {out / 'leaderboard.md'}"]
    try:
        write_page(found, out / "report.html")
        said.append(f"report   {out / 'report.html'}")
    except UsageError as error:
        said.append(f"report   not written: {error}")
    return said


def command_of(options: Options) -> str:
    """The command line that asks for these options."""
    words = ["statewise", "compare", *filter(None, [options.task])]
    for f in fields(options):
        value = getattr(options, f.name)
        if f.name == "task" or value == (f.default if f.default is not MISSING else None):
            continue
        for part in value if isinstance(value, tuple) else (value,):
            words += [f"--{f.name}", str(part)]
    if "--layers" not in words:  # said though it is the default, which may change
        words += ["--layers", options.layers]
    return shlex.join(words)


def _check(options: Options) -> None:
    from ..core import UsageError

    for name, value, low in (
        ("steps", options.steps, 0), ("minutes", options.minutes, 0), ("threads", options.threads, 1),
        ("timeout", options.timeout, 0), ("memory", options.memory, 0),
        ("workers", 1 if options.workers == "auto" else options.workers, 1),
    ):  # fmt: skip
        if not low <= value <= 10**9:
            raise UsageError(f"--{name} {value}; expected {low} to {10**9}")
    if options.steps and options.minutes:
        raise UsageError("--steps and --minutes both say how long to train; give one of them")


def _rates(text: str) -> tuple[float, ...]:
    from ..core import UsageError

    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--lr {text!r}; expected a number, or several with commas, as in 1e-3,3e-3") from None
    if any(not 0 < rate <= 1000 for rate in found):
        raise UsageError(f"--lr {text!r}; expected numbers above 0, at most 1000")
    return found


def _often(steps: int) -> int:
    """Ten or so evaluations in a run."""
    return max(1, steps // 10)


def _total(out: Path, seconds: float, progress: Progress) -> float | None:
    """The time the whole comparison took; None where a part of it was done by an earlier call that did not end."""
    from ..core import read_json

    path = out / "comparison.json"
    if not progress.kept:
        return seconds
    if progress.trained or not path.exists():
        return None
    found = read_json(path).get("seconds")
    return float(found) if found is not None else None
