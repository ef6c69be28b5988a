"""Cells to rows: one row per layer with its spread over seeds, chance and baseline among them, failures at the end."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import DataError

Comparison = dict[str, Any]  # the content of comparison.json
Board = dict[str, Any]  # one task of it: all that is known of its layers
FORMATS = (1, 2)  # the first had one board, whose entries stood in the comparison itself
SHARES = ("accuracy", "certain", "exact", "far")  # metrics that are a share of all that is asked: shown in per cent

# two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Row:
    """A line of the leaderboard. kind is "layer", "chance", "baseline" or "failed"; scores are of the test split.

    name: of the layer, with what the grid varied in it where it did.
    """

    kind: str
    name: str
    scores: tuple[float, ...] = ()
    rank: int | None = None
    index: int = 0  # of the layer in the command: its colour
    lr: float | None = None
    parameters: int | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    latency: float | None = None  # median seconds per streamed step
    latency_p95: float | None = None
    state_bytes: int | None = None
    reasons: tuple[str, ...] = ()
    cells: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean over seeds by Student's t; None for a single seed."""
        if self.sd is None:
            return None
        n = len(self.scores)
        t = _T95[n - 2] if n - 2 < len(_T95) else 1.96 + 2.5 / (n - 1)
        half = t * self.sd / math.sqrt(n)
        return self.mean - half, self.mean + half


def read_comparison(out: Path) -> Comparison:
    """comparison.json of a results folder. Raises DataError where there is none, or one of another format."""
    path = out / "comparison.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as why:
        raise DataError(
            f"{path}: no readable comparison ({why}); expected a folder made by `statewise compare`"
        ) from why
    if not isinstance(found, dict) or found.get("format") not in FORMATS:
        raise DataError(
            f"{path}: expected a comparison of format {FORMATS[-1]}; make it again with `statewise compare`"
        )
    return found


def boards_of(comparison: Comparison) -> list[Board]:
    """A dict for each task with its "name", "task", "train", "layers" and what holds for all. A line of the same name
    has the same "index" on every board, by which it has its colour.
    """
    old = comparison["format"] == 1
    boards = [{"name": comparison["task"]["name"], **comparison}] if old else comparison["boards"]
    names: dict[str, int] = {}
    found = []
    for board in boards:
        entries = [{**e, "index": names.setdefault(name_of(e), len(names))} for e in board["layers"]]
        found.append({**comparison, **board, "layers": entries})
    return found


def name_of(entry: dict[str, Any]) -> str:
    """What a line of the leaderboard is called."""
    return str(entry.get("label") or entry["layer"])


def leaderboard(board: Board) -> list[Row]:
    """Best first, chance and baseline in their places, layers without any finished seed last."""
    task = board["task"]
    rows = [_row(entry.get("index", i), entry) for i, entry in enumerate(board["layers"])]
    rows += [Row("chance", "chance", (task["chance"],)), Row("baseline", "baseline", (task["baseline"],))]
    sign = -1 if task["higher_is_better"] else 1
    # at equal scores a layer stands above the baseline, and the baseline above chance
    order = {"layer": 0, "baseline": 1, "chance": 2}
    scored = sorted((r for r in rows if r.scores), key=lambda r: (sign * r.mean, order[r.kind]))
    ranked, rank = [], 0
    for row in scored:
        rank += row.kind == "layer"
        ranked.append(Row(**{**vars(row), "rank": rank}) if row.kind == "layer" else row)
    return ranked + [r for r in rows if not r.scores]


def _row(index: int, entry: dict[str, Any]) -> Row:
    cells = tuple(entry["cells"])
    done = [c for c in cells if c["status"] == "done"]
    streaming = entry.get("streaming") or {}
    reasons = [c["reason"] for c in cells if c["status"] == "failed"] + [streaming.get("failed")]
    return Row(
        kind="layer" if done else "failed",
        name=name_of(entry),
        scores=tuple(c["score"] for c in done),
        index=index,
        lr=entry.get("lr"),
        parameters=max((c["parameters"] for c in done), default=None),
        tokens_per_second=statistics.median(c["tokens_per_second"] for c in done) if done else None,
        seconds=statistics.fmean(c["seconds"] for c in done) if done else None,
        peak_memory=max((c["peak_memory"] for c in done), default=None),
        latency=streaming.get("median"),
        latency_p95=streaming.get("p95"),
        state_bytes=streaming.get("state_bytes"),
        reasons=tuple(dict.fromkeys(r for r in reasons if r)),
        cells=cells,
    )


def show_score(value: float | None, metric: str) -> str:
    """Shares in per cent, everything else in four figures."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if metric in SHARES else f"{value:.4g}"


def show_tick(value: float, metric: str) -> str:
    """A score at an axis: without figures that say nothing."""
    return show_score(value, metric).replace(".0 %", " %")


def show_spread(value: float | None, metric: str) -> str:
    """A difference of scores: percentage points, or two figures."""
    if value is None:
        return ""
    return f"± {100 * value:.1f}" if metric in SHARES else f"± {value:.2g}"


def show_interval(interval: tuple[float, float] | None, metric: str) -> str:
    """95.1 to 99.3 %; of shares no end below 0 or above 1."""
    if interval is None:
        return ""
    low, high = (min(max(v, 0.0), 1.0) for v in interval) if metric in SHARES else interval
    return f"{show_score(low, metric).removesuffix(' %')} to {show_score(high, metric)}"


def show_count(value: float | None) -> str:
    """12345 -> 12.3 k."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def show_bytes(value: float | None) -> str:
    """1536 -> 1.5 KiB."""
    if value is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def show_time(seconds: float | None) -> str:
    """0.00012 -> 120 µs; 95 -> 1 min 35 s."""
    if seconds is None:
        return "–"
    if seconds == 0:
        return "0 s"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs" if seconds < 999e-6 else "1 ms"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
