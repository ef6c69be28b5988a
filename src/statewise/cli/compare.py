"""statewise compare: layers x tasks x hyperparameters x seeds, and a report."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .parse import Positional, Repeated

if TYPE_CHECKING:
    from ..comparing import Plan, Range, Search
    from ..training import Experiment

DEFAULT_LAYERS = "gru,lstm,min_gru,lru,s5"


@dataclass(frozen=True)
class Options:
    """Train several layers on one or more tasks, several seeds each, in parallel; print leaderboards, write a report.

    Stopped or killed, the same command goes on: finished runs are kept, failed ones are tried again.
    """

    task: Positional[str] = ""
    """Names from `statewise list tasks` with commas; with --data alone text_file for .txt and series for all else."""
    layers: str = DEFAULT_LAYERS
    """Names from `statewise list layers` with commas, or all; a hybrid with plus signs: mamba2*3+attention."""
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
    budget: Repeated[str] = ()
    """Equal cost for every run: parameters=200k (chooses widths, within tolerance=0.05), tokens=10M, seconds=60."""
    lr: str = ""
    """Learning rate, or several with commas: the first seed tries all, the best on validation is used for the rest."""
    set: Repeated[str] = ()
    """FIELD=VALUE for every run, as often as needed: task.length=200 train.batch=64; for one task mqar:task.pairs=8."""
    grid: Repeated[str] = ()
    """FIELD=VALUE,VALUE: every combination is a line of the leaderboard: model.width=32,64 train.weight_decay=0,0.1."""
    tune: Literal["none", "optuna"] = "none"
    """optuna: draw --trials candidates from --grid, where train.lr=1e-4..1e-2 is a range, and halve them."""
    trials: int = 12
    """Candidates of --tune for each layer on each task; the first seed tries them, the others take the best."""
    lengths: str = ""
    """Score models of generated tasks also on test examples of these lengths: 40,80,160. Finished runs get them too."""
    data: Path | None = None
    """Your file or folder, for the tasks series and text_file."""
    out: Path | None = None
    """Where to keep runs, results and report. Default: runs/compare-TASK, or runs/compare-TASK-DATA."""
    engine: Literal["local", "ray"] = "local"
    """ray: on the cluster that RAY_ADDRESS names, or one on this machine."""
    workers: Literal["auto"] | int = "auto"
    """Runs at a time; auto: as many as cores and free memory allow, one on a GPU."""
    threads: int = 1
    """Threads of each run."""
    timeout: float = 0.0
    """Minutes for one run, after which it is saved and marked; 0 for no limit."""
    cell_timeout: float = 30.0
    """Minutes without a sign of life, after which a run is killed and marked; 0 for no limit."""
    memory: float = 0.0
    """GiB of address space for one run, beyond which it is marked as out of memory; 0 for no limit."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""


def run(options: Options) -> int:
    from ..comparing import compare
    from ..report import write_all
    from .board import Progress, print_leaderboards
    from .settings import lengths

    _check(options)
    plan = plan_of(options)
    out = options.out or default_out([base.task.name for base in plan.bases], options.data)
    for base in plan.bases:
        base.task.baseline()  # reads the data: what is wrong with it is said before anything is trained
    with Progress(out) as progress:
        found = compare(
            plan, out, engine=options.engine, workers=options.workers, threads=options.threads, device=options.device,
            memory=int(options.memory * 2**30), timeout=60 * options.timeout, silence=60 * options.cell_timeout,
            lengths=lengths(options.lengths), command=command_of(options), on_event=progress.on_event,
        )  # fmt: skip
    written = write_all(found, out)
    print_leaderboards(found)
    print(f"rows     {out / 'results.jsonl'}; ask with: statewise results {shlex.quote(str(out))}", *written, sep="\n")
    entries = [entry for board in found["boards"] for entry in board["layers"]]
    return 0 if any(cell["status"] == "done" for entry in entries for cell in entry["cells"]) else 1


def default_out(tasks: list[str], data: Path | None) -> Path:
    """Two files of one's own are two comparisons, though the task is one."""
    some = tasks if len(tasks) <= 4 else [*tasks[:3], f"{len(tasks) - 3}-more"]
    return Path("runs") / "-".join(["compare", *some, *([data.resolve().stem] if data else [])])


def plan_of(options: Options) -> Plan:
    """The comparison that the options ask for. Raises UsageError or DataError, before anything is trained."""
    from ..comparing import Budget, Plan, split_names
    from ..core import UsageError, layers
    from ..models import places
    from ..tasks import tasks
    from .build import build

    own = options.data and ("text_file" if options.data.suffix == ".txt" else "series")
    names = split_names(options.task or own or "", tasks.names())
    if not names:
        raise UsageError("which task? statewise compare TASK; see statewise list tasks")
    known = split_names(options.layers, layers.names())
    for place in (place for name in known for place in places(name)):
        layers[place.layer]
    for name in names:
        tasks[name]
    budget = Budget.parse(options.budget)
    _once(options, budget)
    bases = tuple(_base(options, name, names, known[0] if known else "gru") for name in names)
    search, grid = _varied(options, bases)
    plan = Plan(
        bases, known, options.seeds, () if search else _rates(options.lr), grid, search, budget, options.minutes,
        spread_evaluations=not any("train.evaluate_every=" in text for text in options.set),
    )  # fmt: skip
    for made in plan.models():
        build(made)  # a layer that cannot be built at this width is a mistake to name now
    return plan


def _base(options: Options, name: str, names: Iterable[str], layer: str) -> Experiment:
    """What the runs on one task have in common."""
    from ..core import UsageError, put
    from .build import experiment

    settings = for_task(options.set, name, names, "--set")
    try:
        made = experiment(
            name, layer, width=options.width, depth=options.depth, seed=0, data=options.data, settings=settings
        )
    except UsageError as error:
        many = len(list(names)) > 1
        raise UsageError(
            f"{error}" + f"; task {name}: settings of one task alone: {name}:task.FIELD=VALUE" * many
        ) from None
    if options.steps:
        made = put(made, "train.steps", options.steps)
        if not any(text.startswith("train.evaluate_every=") for text in settings):
            made = put(made, "train.evaluate_every", max(1, options.steps // 10))
    return made


def for_task(texts: Iterable[str], name: str, names: Iterable[str], flag: str) -> list[str]:
    """Of FIELD=VALUE and TASK:FIELD=VALUE what concerns one task; its own say more than those for all.

    Raises UsageError for a task that is not compared.
    """
    from ..core import UsageError, near

    common, own = [], []
    for text in texts:
        path, equals, value = text.partition("=")
        task, colon, field = path.rpartition(":")
        if colon and task not in names:
            raise UsageError(f"{flag} {path}: no task {task[:60]!r} in this comparison; {near(task[:60], list(names))}")
        if not colon:
            common.append(text)
        elif task == name:
            own.append(field + equals + value)
    mine = {text.partition("=")[0] for text in own}
    return [text for text in common if text.partition("=")[0] not in mine] + own


def _varied(options: Options, bases: tuple[Experiment, ...]) -> tuple[Search | None, dict[str, Any]]:
    """--grid and --tune: a search whose space the grid is, or the grid itself."""
    from ..comparing import Range, Search
    from ..core import UsageError

    axes = _axes(options.grid, bases)
    if options.tune == "none":
        if found := next((path for path, values in axes.items() if isinstance(values, Range)), None):
            raise UsageError(f"--grid {found}: a range is for --tune optuna; without it name the values with commas")
        if options.trials != Options.trials:
            raise UsageError("--trials is for --tune optuna")
        return None, axes
    if options.lr:
        axes["train.lr"] = _rates(options.lr)
    return Search(axes or {"train.lr": Range(3e-4, 3e-2)}, options.trials), {}


def _axes(texts: Iterable[str], bases: tuple[Experiment, ...]) -> dict[str, Any]:
    """Dotted path -> values or Range, each read as what the field of the task concerned holds."""
    from ..core import UsageError
    from .settings import dict_once, value_of

    found: dict[str, Any] = {}
    for full, text in dict_once(texts, "--grid").items():
        task, colon, path = full.rpartition(":")
        names = [base.task.name for base in bases]
        for_task([f"{full}="], "", names, "--grid")
        if path == "seed" or path in ("task", "model", "train", "model.layer"):
            raise UsageError(f"--grid {path}: expected a field, as train.lr; seeds are --seeds, layers are --layers")
        for base in bases:
            if not colon or base.task.name == task:
                found[full] = _values(text, lambda part: value_of(base, path, part, "--grid"))  # noqa: B023
    return found


def _values(text: str, read: Any) -> tuple[Any, ...] | Range:
    from ..comparing import Range

    low, dots, high = text.partition("..")
    if dots:
        return Range(read(low), read(high))
    return tuple(read(part) for part in text.split(",") if part)


def _once(options: Options, budget: Any) -> None:
    """Raise UsageError where two flags say the same thing."""
    from ..core import UsageError

    set_, grid = (
        {text.partition("=")[0].rpartition(":")[2] for text in texts} for texts in (options.set, options.grid)
    )
    both = sorted(set_ & grid)
    said = [f"--set {path} and --grid {path}" for path in both]
    for flag, field in (("--steps", "train.steps"), ("--lr", "train.lr"), ("--minutes", "train.steps")):
        if getattr(options, flag[2:]):
            said += [
                f"{flag} and {how} {field}" for how, paths in (("--set", set_), ("--grid", grid)) if field in paths
            ]
    long = [f"--budget {kind}" for kind in budget.asked if kind != "parameters"]
    for flag, given in (
        ("--steps", options.steps), ("--set train.steps", "train.steps" in set_), ("--grid train.steps",
        "train.steps" in grid), ("--minutes", options.minutes),
    ):  # fmt: skip
        said += [f"{flag} and {one}" for one in long if given]
    if budget.parameters:
        wide = (("--width", options.width != Options.width), ("--set model.width", "model.width" in set_))
        said += [f"{flag} and --budget parameters" for flag, given in wide if given]
    if said:
        raise UsageError(f"{said[0]} say the same thing twice; give one of them")


def command_of(options: Options) -> str:
    """The command line that asks for these options."""
    words = ["statewise", "compare", *filter(None, [options.task])]
    for f in fields(options):
        value = getattr(options, f.name)
        if f.name == "task" or value == (f.default if f.default is not MISSING else None):
            continue
        for part in value if isinstance(value, tuple) else (value,):
            words += [f"--{f.name.replace('_', '-')}", str(part)]
    if "--layers" not in words:  # said though it is the default, which may change
        words += ["--layers", options.layers]
    return shlex.join(words)


def _check(options: Options) -> None:
    from ..core import UsageError
    from ..core.machine import MOST_THREADS

    for name, value, low in (
        ("steps", options.steps, 0), ("minutes", options.minutes, 0), ("threads", options.threads, 1),
        ("timeout", options.timeout, 0), ("cell-timeout", options.cell_timeout, 0), ("memory", options.memory, 0),
        ("workers", 1 if options.workers == "auto" else options.workers, 1),
    ):  # fmt: skip
        high = MOST_THREADS if name == "threads" else 10**9
        if not low <= value <= high:
            raise UsageError(f"--{name} {value}; expected {low} to {high}")
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
