"""statewise train: one model on one task."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parse import Positional, Repeated

if TYPE_CHECKING:
    from ..training import Experiment, LengthScore, Ranks, Result

Event = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Train one model on one task. A run that was stopped goes on where it stood when called again."""

    task: Positional[str] = ""
    """A name from `statewise list tasks`; series and text_file read your own data."""
    layer: str = "gru"
    """A name from `statewise list layers`, or a pattern that repeats to the depth: mamba2*3,attention."""
    width: int = 64
    """Channels between the layers."""
    depth: int = 2
    """Number of blocks."""
    set: Repeated[str] = ()
    """FIELD=VALUE, as often as needed: task.length=200, train.lr=1e-4, model.dropout=0.1, model.args.NAME=VALUE."""
    data: Path | None = None
    """Your file or folder, for the tasks series and text_file."""
    field: str = ""
    """For text_file: the name of the text in JSON lines and Parquet. Default: text."""
    run: Path | None = None
    """Where to keep the run. Default: runs/TASK-LAYER-KEY, where KEY names the configuration."""
    seed: int = 0
    """Of the weights, the order of the data and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    threads: int = 0
    """Threads that torch may use; 0 leaves it to torch."""
    fresh: bool = False
    """Start anew: an earlier run in the same place is moved aside, not deleted."""
    shard: bool = False
    """With torchrun: each process holds a part of the weights, gradients and moments (FSDP)."""
    lengths: str = ""
    """Also test examples of these lengths, with commas: 40,80,160. For generated tasks; of a finished run as well."""
    replay: Path | None = None
    """An experiment.json of an earlier run: train exactly that again, in the place that --run names."""


def run(options: Options) -> int:
    from ..core import NumericError, UsageError
    from ..core.machine import use_threads
    from ..training import Stopped, choose_device
    from ..training.distributed import from_torchrun, joined

    rank, size, local = from_torchrun()
    device = choose_device(options.device)
    if size > 1 and device.type == "cuda" and device.index is None:
        device = choose_device(f"cuda:{local}")
    use_threads(options.threads)
    if rank == 0:
        with joined(device, shard=options.shard) as ranks:
            return train(options, ranks)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), joined(device, shard=options.shard) as ranks:
        try:
            return train(options, ranks)
        except (UsageError, NumericError, Stopped) as error:  # which rank 0 meets too, and says
            return error.code


def train(options: Options, ranks: Ranks) -> int:
    """What each of the processes does; rank 0 alone writes, and goes first where it does."""
    from ..training import Stopped, add_lengths, at_lengths, fit
    from .build import build
    from .compiling import telling
    from .settings import lengths

    made = described(options)
    with preparing() as on_progress, ranks.first_goes_first():
        made.task.prepare(on_progress)
    for remark in made.task.remarks():
        print(remark)
    build(made)
    asked = lengths(options.lengths)
    if asked:
        at_lengths(made.task, asked)  # a length that cannot be had is a mistake to name now
    layer = re.sub(r"[^\w.+-]+", "_", made.model.layer)[:80]
    place = options.run or Path("runs") / f"{made.task.name}-{layer}-{made.key[:8]}"
    beside = {"baseline": made.task.baseline(), "chance": made.task.chance()}  # reads the data before a folder is made
    with ranks.first_goes_first():
        if options.fresh and ranks.writes:
            move_aside(place)
        refuse_other(place, made)
    if (place / "result.json").is_file():
        print(f"{place} holds a finished run; --fresh trains anew")
    with telling(sys.stdout), progress(made.train.steps) as on_event:
        teller = Teller(on_event)
        try:
            result = fit(made, place, device=str(ranks.device), signals=True, on_event=teller, ranks=ranks)
        except Stopped:
            if teller.lost is not None:
                raise teller.lost from None
            raise
    show(made, result, beside, place)
    if asked and ranks.writes:
        show_lengths(made, add_lengths(place, asked, device=str(ranks.device)))
    return 0


def described(options: Options) -> Experiment:
    """The experiment that the options ask for."""
    from ..core import UsageError, read_json
    from ..training import Experiment
    from .build import experiment

    if options.replay is None:
        if not options.task:
            raise UsageError("which task? statewise train TASK; see statewise list tasks")
        settings = [*options.set, *([f"task.field={options.field}"] if options.field else [])]
        return experiment(
            options.task, options.layer, width=options.width, depth=options.depth, seed=options.seed,
            data=options.data, settings=settings,
        )  # fmt: skip
    other = [name for name in ("task", "set", "data", "field") if getattr(options, name)]
    if other:
        raise UsageError(f"--replay trains what the file says; leave out {' and '.join(other)}")
    return Experiment.from_record(read_json(options.replay))


def move_aside(place: Path) -> None:
    """Make room for a new run; refuses to touch a folder that holds something else."""
    from ..core import UsageError

    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / "experiment.json").is_file():
        raise UsageError(f"--fresh: {str(place)!r} holds something that is not a run; name another place with --run")
    number = next(n for n in range(1, 10**6) if not place.with_name(f"{place.name}.old{n}").exists())
    aside = place.with_name(f"{place.name}.old{number}")
    place.rename(aside)
    print(f"the earlier run is now {aside}")


def refuse_other(place: Path, made: Experiment) -> None:
    """Raise UsageError where the folder holds a run of another configuration."""
    from ..core import UsageError, read_json
    from ..training.experiment import differences

    if not (place / "experiment.json").exists():
        return
    found = list(differences(read_json(place / "experiment.json"), made.record()))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UsageError(
            f"{str(place)!r} is a run of another configuration: {', '.join(found[:3])}{more}; "
            "name another place with --run, or start anew with --fresh"
        )


@contextmanager
def progress(steps: int) -> Iterator[Callable[[Event], None]]:
    """What to do with each event of fit: a bar on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..report import show_count
    from .show import console

    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task("train", total=steps, loss="-", speed="")

        def show_event(event: Event) -> None:
            if event["event"] == "train":
                speed = f"{show_count(event['tokens_per_second'])} tokens/s"
                bar.update(task, completed=event["step"], loss=f"{event['loss']:.4g}", speed=speed)
            elif text := words(event):
                bar.console.print(text)

        yield show_event


class Teller:
    """Passes events on. Where nobody can be told any more, as in `train | head`, the run saves and stops."""

    def __init__(self, tell: Callable[[Event], None]):
        self.tell = tell
        self.lost: OSError | None = None

    def __call__(self, event: Event) -> None:
        if self.lost is not None:
            return
        try:
            self.tell(event)
        except OSError as error:
            self.lost = error
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def preparing() -> Iterator[Callable[[str, int, int], None]]:
    """What to do with the progress of reading data: a bar on a terminal, a line now and then elsewhere."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        from .show import console

        columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console(), transient=True) as bar:
            shown: dict[str, Any] = {}

            def move(what: str, done: int, total: int) -> None:
                if what not in shown:
                    shown[what] = bar.add_task(what, total=total)
                bar.update(shown[what], completed=done)

            yield move
        return
    last = time.monotonic()

    def say(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            last = time.monotonic()
            print(f"{what}: {100 * done / max(total, 1):.0f} %", flush=True)

    yield say


class Lines:
    """Events as plain lines: losses about once in two seconds, everything else at once."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, event: Event) -> None:
        from ..report import show_count, show_time

        if event["event"] != "train":
            if text := words(event):
                print(text, flush=True)
        elif time.monotonic() - self.last > 2:
            self.last = time.monotonic()
            left = f", {show_time(event['eta'])} left" if event["eta"] else ""
            speed = f"{show_count(event['tokens_per_second'])} tokens/s"
            print(f"step {event['step']:>6}  loss {event['loss']:<10.4g} {speed}{left}", flush=True)


def words(event: Event) -> str:
    """An event of another kind in words; empty where there is nothing to say."""
    if event["event"] == "start" and event["step"]:
        return f"goes on from step {event['step']}"
    if event["event"] == "evaluate":
        found = ", ".join(f"{name} {value:.4g}" for name, value in event.get("metrics", {}).items())
        return f"step {event['step']:>6}  {event.get('split', 'validation')}: {found}"
    if event["event"] == "warning":
        return f"warning: {event['message']}"
    return ""


def show_lengths(made: Experiment, scores: Sequence[LengthScore]) -> None:
    """Score, chance and baseline at each length."""
    from ..report import show_count, show_score
    from .show import table

    metric, columns = (
        made.task.metric,
        ("length", "steps", "examples", f"test {made.task.metric}", "chance", "baseline"),
    )
    found = [
        [str(s.length), show_count(s.steps), str(s.examples), s.failed or show_score(s.score, metric),
         show_score(s.chance, metric), show_score(s.baseline, metric)]
        for s in scores
    ]  # fmt: skip
    trained = getattr(made.task, "train_length", None)
    table(columns, found, right=columns, title=f"by length; trained up to {trained}")


def show(made: Experiment, result: Result, beside: dict[str, float], place: Path) -> None:
    """The result beside chance and baseline."""
    from ..report import show_bytes, show_count, show_score, show_time

    task, metric = made.task, made.task.metric
    better = "higher" if task.higher_is_better else "lower"
    print(f"{task.name}, {made.model.layer}: {metric} on test ({better} is better)")
    rows = [(made.model.layer, result.score), *beside.items()]
    for name, score in sorted(rows, key=lambda row: row[1], reverse=task.higher_is_better):
        print(f"  {name:<18}{show_score(score, metric)}")
    early = " (stopped early)" if result.stopped == "early" else ""
    print(
        f"  {show_count(result.parameters)} parameters, {result.steps} steps{early} in {show_time(result.seconds)}, "
        f"{show_count(result.tokens_per_second)} tokens/s, peak memory {show_bytes(result.peak_memory)}"
    )
    print(f"kept in {place}; answer a stream with: statewise stream {place}")
