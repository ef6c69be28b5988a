"""statewise reproduce: make the runs of a paper's recipe and judge its claims."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .parse import Positional

if TYPE_CHECKING:
    from ..recipes import Recipe, Results

Event = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Make the runs of a paper's recipe, three seeds each, and say which of its claims hold.

    Stopped or killed, the same command goes on: finished runs are kept, runs whose configuration has changed are made
    anew. `statewise papers` lists the recipes and what was found.
    """

    name: Positional[str] = ""
    """A recipe, as gu2022_s4 or s4, or several with commas, or all."""
    scale: Literal["smoke", "small", "paper"] = "small"
    """smoke: seconds, does it run. small: minutes on one core. paper: what the paper did, or near it."""
    results: Path = Path("results")
    """Folder of the results, one file for each recipe and scale."""
    runs: Path = Path("runs/reproduce")
    """Folder of the training runs in progress."""
    threads: int = 1
    """Threads that torch may use."""
    again: bool = False
    """Make every run anew."""


def run(options: Options) -> int:
    from ..core import UsageError
    from ..core.machine import use_threads
    from ..recipes import find, judge, names, reproduce

    if not options.name:
        raise UsageError(f"which paper? statewise reproduce NAME; known: {', '.join(names())}")
    use_threads(options.threads, least=1)
    asked = names() if options.name == "all" else [part.strip() for part in options.name.split(",") if part.strip()]
    chosen = [find(name) for name in asked]
    for name, recipe in chosen:
        made = recipe.runs(options.scale)
        print(textwrap.fill(f"{name}: {recipe.paper.cite()}", 80, subsequent_indent="    "), flush=True)
        with progress(len(made), options.scale) as on_event:
            results = reproduce(
                name, options.scale, results=options.results, runs=options.runs, again=options.again,
                signals=True, on_event=on_event,
            )  # fmt: skip
        show(recipe, results)
        print(f"kept in {options.results / f'{name}-{options.scale}.json'}\n", flush=True)
        failed = [v for v in judge(recipe, results) if v.outcome in ("not run", "stale")]
        if failed and len(chosen) == 1:
            return 1
    return 0


def show(recipe: Recipe, results: Results) -> None:
    """What was measured, then what it says of the claims."""
    from ..recipes import SEEDS, judge
    from ..recipes.write import run_lines
    from .show import table

    verdicts, seeds = judge(recipe, results), SEEDS[results.scale]
    over = "one seed" if seeds == 1 else f"mean ± sd over {seeds} seeds"
    columns = ("run", "number", "measured", "baseline", "chance", "time")
    table(columns, run_lines(results, verdicts), right=columns[2:], title=f"{over}, scale {results.scale}")
    print()
    for verdict in verdicts:
        why = f": {verdict.why}" if verdict.why else ""
        print(f"  {verdict.outcome.upper() if verdict.outcome != 'holds' else 'holds'}{why}")
        said = f"{verdict.claim.says} ({verdict.claim.where})"
        print(textwrap.fill(said, 80, initial_indent="      ", subsequent_indent="      "))


@contextmanager
def progress(runs: int, scale: Any) -> Iterator[Callable[[Event], None]]:
    """What to do with each event: a bar on a terminal, a line per finished run elsewhere."""
    from ..recipes import SEEDS

    total = runs * SEEDS[scale]
    if not sys.stdout.isatty():
        yield Lines(total, lambda text: print(text, flush=True))
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .show import console

    columns = (BarColumn(bar_width=30), TextColumn("{task.fields[now]}"), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("runs", total=total, now="")
        lines = Lines(total, lambda text: bar.console.print(text, soft_wrap=True))

        def on_event(event: Event) -> None:
            lines(event)
            part = event["step"] / event["steps"] if event["event"] == "train" else 0.0
            loss = f" loss {event['loss']:.3g}" if event["event"] == "train" else ""
            now = f"{lines.ended} of {total} runs; {event['run']} seed {event['seed']}{loss}"
            bar.update(task, completed=lines.ended + part, now=now)

        yield on_event


class Lines:
    """A line for each run that ended."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say, self.ended, self.kept = total, say, 0, 0
        self.began = time.monotonic()

    def __call__(self, event: Event) -> None:
        from ..report import show_time

        kind = event["event"]
        if kind not in ("kept", "done", "failed"):
            return
        self.ended += 1
        self.kept += kind == "kept"
        place = f"[{self.ended:>{len(str(self.total))}}/{self.total}] {event['run']} seed {event['seed']}"
        if kind == "failed":
            self.say(f"{place}: FAILED: {event['row']['failed']}")
        elif kind == "done":
            self.say(f"{place}: {show_time(event['row']['seconds'])}")
        if self.ended == self.total and self.kept:
            self.say(f"{self.kept} of {self.total} runs were finished before and kept")
