"""Several boards at a glance: layers x tasks, and what can be said of all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .summary import SHARES, Board, Row, leaderboard, show_interval, show_score

Said = list[str | dict[str, str]]


def lines_of(boards: Sequence[Board]) -> dict[str, dict[int, Row]]:
    """Name of each line to its row on every board that it was run on, by the number of the board."""
    found: dict[str, dict[int, Row]] = {}
    for number, board in enumerate(boards):
        for row in leaderboard(board):
            if row.kind in ("layer", "failed"):
                found.setdefault(row.name, {})[number] = row
    return found


def mean_ranks(boards: Sequence[Board]) -> dict[str, float]:
    """The mean place of every line that finished on all boards, best first; equal means share their places."""
    ranks: dict[str, list[float]] = {}
    for board in boards:
        rows = [r for r in leaderboard(board) if r.kind == "layer"]
        for row in rows:
            places = [r.rank for r in rows if r.mean == row.mean and r.rank]
            ranks.setdefault(row.name, []).append(statistics.fmean(places))
    full = {name: statistics.fmean(found) for name, found in ranks.items() if len(found) == len(boards)}
    return dict(sorted(full.items(), key=lambda item: item[1]))


def matrix(boards: Sequence[Board]) -> dict[str, Any]:
    """Heads and rows of the overview; the share of a cell is how far it lies from chance to the best there can be."""
    ranks, lines = mean_ranks(boards), lines_of(boards)
    names = [*ranks, *(name for name in lines if name not in ranks)]
    best = {n: max((r[n].mean for r in lines.values() if n in r and r[n].scores), default=math.nan,
                   key=lambda v: v if b["task"]["higher_is_better"] else -v)
            for n, b in enumerate(boards)}  # fmt: skip
    rows = []
    for name in names:
        cells = [_cell(b, lines[name].get(n), best[n]) for n, b in enumerate(boards)]
        index = next(iter(lines[name].values())).index
        rows.append(
            {"name": name, "index": index, "rank": f"{ranks[name]:.1f}" if name in ranks else "–", "cells": cells}
        )
    guides = [
        {"name": kind, "cells": [show_score(b["task"][kind], b["task"]["metric"]) for b in boards]}
        for kind in ("baseline", "chance")
    ]
    heads = [(b["name"], b["task"]["metric"], "higher" if b["task"]["higher_is_better"] else "lower") for b in boards]
    return {"heads": heads, "rows": rows, "guides": guides}


def _cell(board: Board, row: Row | None, best: float) -> dict[str, Any]:
    task, metric = board["task"], board["task"]["metric"]
    if row is None or not row.scores:
        words = "not run" if row is None else f"failed: {'; '.join(row.reasons)}"
        return {
            "text": "–" if row is None else "failed",
            "value": "",
            "share": "0",
            "words": words,
            "kind": "absent" if row is None else "none",
        }
    sign = 1 if task["higher_is_better"] else -1
    perfect = 1.0 if metric in SHARES else 0.0 if not task["higher_is_better"] else best
    far = perfect - task["chance"]
    share = min(max((row.mean - task["chance"]) / far, 0.0), 1.0) if far else 0.0
    beaten = sign * row.mean > sign * task["baseline"]
    interval = f", 95 % interval {show_interval(row.interval, metric)}" if row.interval else ""
    return {
        "text": show_score(row.mean, metric), "value": repr(row.mean), "share": f"{share:.3f}",
        "words": f"{row.name}{interval}, {len(row.scores)} seeds",
        "kind": "best" if row.mean == best and beaten else "" if beaten else "below",
    }  # fmt: skip


def headline_of_all(boards: Sequence[Board]) -> Said:
    """Who ranks best over all tasks, and who wins where."""
    ranks = mean_ranks(boards)
    won: dict[str, list[str]] = {}
    for board in boards:
        first = next((r for r in leaderboard(board) if r.kind == "layer"), None)
        sign = 1 if board["task"]["higher_is_better"] else -1
        beaten = first and sign * first.mean > sign * board["task"]["baseline"]
        won.setdefault(first.name if first and beaten else "", []).append(board["name"])
    said: Said = []
    if len(ranks) > 1:
        (name, rank), (_, second) = list(ranks.items())[:2]
        said += [{"name": name}, f" ranks best on average over the {len(boards)} tasks (mean rank {rank:.1f}, "
                 f"the next has {second:.1f}). "]  # fmt: skip
    for name, tasks in sorted(won.items(), key=lambda item: -len(item[1])):
        if name:
            said += [{"name": name}, f" scores best on {', '.join(tasks)}. "]
    if "" in won:
        said.append(f"No layer beats the baseline on {', '.join(won[''])}. ")
    return said or ["No layer finished a run; the reasons are below."]
