"""What `compare` shows: the runs in progress, and the leaderboard."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..comparing.plan import TRIAL_STEPS
from ..report import Row, leaderboard, show_bytes, show_count, show_score, show_time
from ..report.summary import show_spread
from .show import console

if TYPE_CHECKING:
    from ..comparing import Cell, Plan

WIDTH = 100  # columns of the leaderboard where the output is not a terminal


class Progress:
    """A line per running cell and a bar over all on a terminal; a line per beginning and end elsewhere."""

    def __init__(self, out: Path):
        self.out = out
        self.total = self.ended = self.kept = 0
        self.many = False  # leaderboards
        self.began = time.monotonic()
        self.running: dict[str, tuple[Cell, dict[str, Any]]] = {}
        self.live: Live | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def on_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "trial":
            print(f"timing {TRIAL_STEPS} steps of every model ...", flush=True)
        elif kind == "plan":
            self._begin(event["plan"], event["workers"])
        elif kind == "streaming":
            self.__exit__(None, None, None)
            if self.kept:
                print(f"{self.kept} of {self.total} runs were finished before and kept", flush=True)
            print("timing the streaming step of each layer ...", flush=True)
        else:
            self._hear(event["cell"], kind, event)

    def _begin(self, plan: Plan, workers: int) -> None:
        first = plan.first()
        self.total, self.many = plan.count(), len({cell.board for cell in first}) > 1
        steps = sorted({cell.experiment.train.steps for cell in first})
        often = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        lines = len(plan.settings)
        what = _count(len(plan.layers), "layer") if lines == len(plan.layers) else f"{lines} lines"
        tries = f", {len(plan.settings[0].candidates)} tried by the first" if plan.adaptive else ""
        print(
            f"{', '.join(dict.fromkeys(base.task.name for base in plan.bases))}: {what} x "
            f"{_count(plan.seeds, 'seed')}{tries}, {often} steps each, {workers} at a time -> {self.out}",
            flush=True,
        )
        if plan.budget.parameters:
            for cell in {(cell.board, cell.label): cell for cell in first}.values():
                self._say(f"  {self._name(cell, seed=False)}: width {cell.experiment.model.width}")
        if sys.stdout.isatty():
            self.live = Live(self._draw(), console=console(), refresh_per_second=4, transient=True)
            self.live.start()

    def _name(self, cell: Cell, *, seed: bool = True) -> str:
        return f"{cell.board}: " * self.many + (cell.name if seed else cell.label)

    def _hear(self, cell: Cell, kind: str, event: dict[str, Any]) -> None:
        name = self._name(cell)
        if kind == "start":
            self.running[cell.key] = (cell, {})
        elif kind == "progress":
            self.running[cell.key] = (cell, event["record"])
        elif kind == "changed":
            self._say(f"{name}: its data have changed since it was trained; training it anew")
        elif kind == "retry":
            self.running.pop(cell.key, None)
            self._say(f"{name}: {event['reason']}; going on from its last checkpoint")
        else:
            self.running.pop(cell.key, None)
            self.ended += 1
            self.kept += kind == "kept"
            row = event["row"]
            if kind == "done":
                took = f"in {show_time(row['seconds'])}, {show_count(row['tokens_per_second'])} tokens/s"
                self._say(f"{self._ended()} {name}: {row['metric']} {show_score(row['score'], row['metric'])} {took}")
            elif kind == "pruned":
                score = show_score(row["validation_score"], row["metric"])
                self._say(f"{self._ended()} {name}: {row['reason']}, {row['metric']} {score} on validation")
            elif kind == "failed":
                self._say(f"{self._ended()} {name}: FAILED: {row['reason']}")
        if self.live:
            self.live.update(self._draw())

    def _say(self, words: str) -> None:
        (self.live.console if self.live else console()).print(words, soft_wrap=True)
        sys.stdout.flush()

    def _ended(self) -> str:
        return f"[{self.ended:>{len(str(self.total))}}/{self.total}]"

    def _draw(self) -> Group:
        lines = Table.grid(padding=(0, 2))
        parts = 0.0
        for cell, record in self.running.values():
            step, steps = record.get("step", 0), cell.experiment.train.steps
            parts += min(step / steps, 1)
            loss = record.get("loss")
            eta = record.get("eta")
            lines.add_row(
                Text(self._name(cell), style="bold"), f"lr {cell.lr:g}", ProgressBar(steps, step, width=16),
                f"{step}/{steps}", f"loss {loss:.4g}" if isinstance(loss, float) else "starting",
                f"{show_time(eta)} left" if isinstance(eta, float) else "",
            )  # fmt: skip
        done = self.ended + parts
        gone = time.monotonic() - self.began
        fresh = done - self.kept
        left = gone * (self.total - done) / fresh if fresh > 0.2 else None
        whole = Table.grid(padding=(0, 2))
        whole.add_row(
            ProgressBar(self.total, done, width=40), f"{self.ended} of {self.total} runs",
            f"{show_time(round(gone))} gone", f"about {show_time(round(left))} left" if left is not None else "",
        )  # fmt: skip
        return Group(lines, whole)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def print_leaderboards(found: dict[str, Any]) -> None:
    """One after another, in the order of the command."""
    for board in found["boards"]:
        entries = [{**entry, "layer": entry["label"]} for entry in board["layers"]]
        print_leaderboard({**found, **board, "layers": entries})


def print_leaderboard(comparison: dict[str, Any]) -> None:
    """Best first, with chance and baseline in their places; failures below the table."""
    task, metric = comparison["task"], comparison["task"]["metric"]
    better = "higher" if task["higher_is_better"] else "lower"
    rows = leaderboard(comparison)
    seeds = max((len(r.cells) for r in rows), default=0)
    screen = console()
    if not screen.is_terminal:
        screen = Console(highlight=False, emoji=False, markup=False, width=WIDTH)
    screen.print()
    over = f"; mean ± sd over {seeds} seeds" if seeds > 1 else ", one seed"
    screen.print(f"{comparison.get('name', task['name'])}: {metric} on test, {better} is better{over}", soft_wrap=True)
    screen.print()
    screen.print(_fitting(rows, metric, seeds, screen))
    for row in rows:
        count = f" ({len(row.scores)} of {len(row.cells)} seeds finished)" if row.scores else ""
        for reason in row.reasons:
            screen.print(f"failed   {row.name}{count}: {reason}", soft_wrap=True, style="red")
    screen.print()


def _fitting(rows: Sequence[Row], metric: str, seeds: int, screen: Console) -> Table:
    """The table, without the columns that the report has as well where the screen is too narrow for all."""
    spare = ["min to max", "step\np95", "peak\nmemory", "params"]
    dropped = spare[:1] if seeds == 1 else []
    while True:
        made = _table(rows, metric, dropped)
        if (
            len(dropped) == len(spare)
            or made.__rich_measure__(screen, screen.options.update(width=1000)).maximum <= screen.width
        ):
            return made
        dropped = spare[: len(dropped) + 1]


def _table(rows: Sequence[Row], metric: str, dropped: Sequence[str]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    made.add_column("#", justify="right", no_wrap=True)
    made.add_column("layer", no_wrap=True)
    made.add_column(f"test {metric}", justify="right", no_wrap=True)
    lines = [(row, _cells(row, metric)) for row in rows if row.kind != "failed"]
    names = [name for name in _cells(Row("", ""), metric) if name not in dropped]
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for row, cells in lines:
        score = f"{show_score(row.mean, metric)} {show_spread(row.sd, metric)}".strip()
        few = "*" * (row.kind == "layer" and len(row.scores) < len(row.cells))
        style = "dim italic" if row.kind != "layer" else "bold" if row.rank == 1 else ""
        made.add_row(str(row.rank or ""), row.name + few, score, *(cells[name] for name in names), style=style)
    return made


def _cells(row: Row, metric: str) -> dict[str, str]:
    """Column to text; empty for chance and baseline."""
    low, high = (show_score(f(row.scores), metric).removesuffix(" %") if row.scores else "" for f in (min, max))
    found = {
        "min to max": f"{low} to {high}", "params": show_count(row.parameters),
        "train\ntokens/s": show_count(row.tokens_per_second), "step\nmedian": show_time(row.latency),
        "step\np95": show_time(row.latency_p95), "state": show_bytes(row.state_bytes),
        "peak\nmemory": show_bytes(row.peak_memory),
    }  # fmt: skip
    return found if row.kind == "layer" else dict.fromkeys(found, "")
