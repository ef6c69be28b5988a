"""Score against the length of test examples, of one board: a chart, a table, and the same as rows."""

from __future__ import annotations

import math
from typing import Any

from . import charts
from .charts import Curve, Guide
from .summary import SHARES, Board, leaderboard, show_count, show_interval, show_score, show_tick
from .summary import Row as Line

Score = dict[str, Any]  # an entry of scores_by_length


def scores_at(row: Line) -> dict[int, list[Score]]:
    """The entries of all finished seeds by length, in rising order."""
    found: dict[int, list[Score]] = {}
    for cell in row.cells:
        for score in (cell.get("scores_by_length") or []) if cell["status"] == "done" else []:
            found.setdefault(score["length"], []).append(score)
    return dict(sorted(found.items()))


def length_board(board: Board, safe: Any) -> dict[str, Any] | None:
    """Chart and table, or None where nothing was scored by length."""
    task, metric = board["task"], board["task"]["metric"]
    rows = [row for row in leaderboard(board) if row.kind == "layer" and scores_at(row)]
    if not rows:
        return None
    known = {length: scores[0] for row in rows for length, scores in scores_at(row).items()}
    lengths = sorted(known)
    lines, table = [], []
    for row in rows:
        scores = {length: _means(row, length) for length in lengths}
        points = [(float(n), m.mean, min(m.scores), max(m.scores)) for n, m in scores.items() if m]
        if points:
            lines.append(Curve(row.name, row.index, tuple(points)))
        cells = [(show_score(m.mean if m else None, metric), show_interval(m.interval, metric) if m else "failed")
                 for m in scores.values()]  # fmt: skip
        table.append({"name": row.name, "index": row.index, "marker": safe(charts.marker(row.index, 0, 0, 6)),
                      "cells": cells})  # fmt: skip
    guides = [
        Guide(name, known[lengths[-1]][name], "", tuple((float(n), known[n][name]) for n in lengths))
        for name in ("chance", "baseline")
        if all(math.isfinite(known[n][name]) for n in lengths)
    ]
    for guide in guides:
        table.append({"name": guide.name, "index": 0, "marker": "", "cells": [
            (show_score(value, metric), "") for _, value in guide.points
        ]})  # fmt: skip
    trained = task.get("train_length")
    svg = charts.curves(
        lines, guides, title="Score by length.", x_label="length of test examples", y_label=f"{metric} on test",
        show_x=show_count, show_y=lambda v: show_tick(v, metric), at=_apart([float(n) for n in lengths]),
        mark=(float(trained), "trained up to here") if trained else None, most=1.0 if metric in SHARES else math.inf,
    )  # fmt: skip
    counts = sorted({known[n]["examples"] for n in lengths} - {0}) or [0]  # 0 where the task cannot have the length
    many = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}, fewer the longer they are,"
    return {
        "svg": safe(svg) if lines else "", "lengths": [f"{n:,}" for n in lengths], "table": table, "examples": many,
        "trained": f"{trained:,}" if trained else "",
    }  # fmt: skip


def _means(row: Line, length: int) -> Line | None:
    """The scores at a length as a row has them; None where a seed has none."""
    scores = [score["score"] for score in scores_at(row).get(length, [])]
    if not scores or any(score is None for score in scores):
        return None
    return Line("layer", row.name, tuple(scores))


def length_rows(board: Board) -> list[dict[str, Any]]:
    """A plain row for each run and length, as lengths.csv has them."""
    return [
        {
            "board": board["name"], "task": board["task"]["name"], "layer": row.name, "seed": cell["seed"],
            "train_length": board["task"].get("train_length"), "metric": board["task"]["metric"], "key": cell["key"],
            **{name: score[name] for name in ("length", "steps", "examples", "score", "chance", "baseline", "failed")},
        }
        for row in leaderboard(board)
        for cell in row.cells
        for score in cell.get("scores_by_length") or []
    ]  # fmt: skip


def _apart(places: list[float]) -> list[float]:
    """At most some eight of them, evenly taken, for which an axis has room."""
    return places[:: max(1, math.ceil(len(places) / 8))]
