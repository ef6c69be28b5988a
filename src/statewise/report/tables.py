"""The same rows as files for papers: CSV with numbers in full, and one Markdown page."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core import UsageError
from .lengths import length_board, length_rows
from .overview import matrix
from .page import write_page
from .summary import (
    Board,
    Comparison,
    boards_of,
    leaderboard,
    name_of,
    show_bytes,
    show_count,
    show_interval,
    show_score,
    show_time,
)  # fmt: skip

COLUMNS = (
    "board", "task", "layer", "label", "seed", "lr", "chosen", "status", "reason", "score", "metric",
    "validation_score", "steps", "stopped", "parameters", "tokens", "tokens_per_second", "seconds", "peak_memory",
    "latency_median_s", "latency_p95_s", "state_bytes", "device", "threads", "workers", "version", "data", "key",
)  # fmt: skip
BOARD_COLUMNS = (
    "board", "task", "metric", "higher_is_better", "rank", "kind", "name", "seeds", "mean", "sd", "low95", "high95",
    "lr", "parameters", "tokens_per_second", "seconds", "peak_memory", "latency_median_s", "latency_p95_s",
    "state_bytes",
)  # fmt: skip
LENGTH_COLUMNS = (
    "board", "task", "layer", "seed", "train_length", "length", "steps", "examples", "score", "metric", "chance",
    "baseline", "failed", "key",
)  # fmt: skip


def write_all(comparison: Comparison, out: Path) -> list[str]:
    """Every file of a report into a folder: report.html, leaderboard.md, leaderboard.csv, results.csv and, where there
    are scores by length, lengths.csv. Returns a line about each, for people.
    """
    write_csv(comparison, out / "results.csv")
    write_leaderboard_csv(comparison, out / "leaderboard.csv")
    write_markdown(comparison, out / "leaderboard.md")
    names = ["results.csv", "leaderboard.csv", "leaderboard.md"]
    lengths = [row for board in boards_of(comparison) for row in length_rows(board)]
    if lengths:
        _write(out / "lengths.csv", LENGTH_COLUMNS, lengths)
        names.append("lengths.csv")
    said = [f"tables   {', '.join(str(out / name) for name in names)}"]
    try:
        write_page(comparison, out / "report.html")
        said.append(f"report   {out / 'report.html'}")
    except UsageError as error:
        said.append(f"report   not written: {error}")
    return said


def write_csv(comparison: Comparison, path: Path) -> None:
    """A line per run, and one each for chance and baseline of each board. Numbers are written in full."""
    rows: list[dict[str, Any]] = []
    for board in boards_of(comparison):
        task = board["task"]
        same = {"board": board["name"], "task": task["name"], "metric": task["metric"]}
        rows += [{**same, "layer": name, "score": task[name], "status": "done"} for name in ("chance", "baseline")]
        for entry in board["layers"]:
            timed = entry.get("streaming") or {}
            for cell in [*entry["cells"], *entry.get("others", [])]:
                streaming = timed if timed.get("key") == cell["key"] else {}  # of one seed
                rows.append(
                    {k: cell.get(k) for k in COLUMNS}
                    | same
                    | {
                        "label": name_of(entry), "chosen": int(cell in entry["cells"]),
                        "latency_median_s": streaming.get("median"), "latency_p95_s": streaming.get("p95"),
                        "state_bytes": streaming.get("state_bytes"),
                    }
                )  # fmt: skip
    _write(path, COLUMNS, rows)


def write_leaderboard_csv(comparison: Comparison, path: Path) -> None:
    """A line for each place of each board: mean, standard deviation and 95 % interval (Student's t) over seeds."""
    rows = []
    for board in boards_of(comparison):
        task = board["task"]
        for row in leaderboard(board):
            low, high = row.interval or (None, None)
            rows.append(
                {name: getattr(row, name, None) for name in BOARD_COLUMNS}
                | {
                    "board": board["name"], "task": task["name"], "metric": task["metric"],
                    "higher_is_better": int(task["higher_is_better"]),
                    "seeds": len(row.scores) if row.kind in ("layer", "failed") else None,
                    "mean": row.mean if row.scores else None, "low95": low, "high95": high,
                    "latency_median_s": row.latency, "latency_p95_s": row.latency_p95,
                }
            )  # fmt: skip
    _write(path, BOARD_COLUMNS, rows)


def _write(path: Path, columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for row in rows:
            values = {name: row.get(name) for name in columns}
            table.writerow({k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in values.items()})


def write_markdown(comparison: Comparison, path: Path) -> None:
    """A leaderboard for each board, above them layers by tasks where there are several, below what failed."""
    boards = boards_of(comparison)
    lines = ["# Comparison", "", f"`{comparison['command']}`", ""]
    if len(boards) > 1:
        found = matrix(boards)
        lines += ["Mean test score over seeds; rank: mean place over the tasks.", ""]
        lines += _table(
            ["layer", "mean rank", *(f"{name} ({metric})" for name, metric, _ in found["heads"])],
            [[r["name"], r["rank"], *(c["text"] for c in r["cells"])] for r in found["rows"]]
            + [[f"*{g['name']}*", "", *g["cells"]] for g in found["guides"]],
        )
    failed = []
    for board in boards:
        lines += _board(board)
        on = f" on {board['name']}" if len(boards) > 1 else ""
        failed += [f"- **{row.name}**{on}: {reason}" for row in leaderboard(board) for reason in row.reasons]
    if failed:
        lines += ["Failed:", "", *failed]
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _board(board: Board) -> list[str]:
    task, metric = board["task"], board["task"]["metric"]
    better = "higher" if task["higher_is_better"] else "lower"
    heads = ["#", "layer", "score", "95 % interval", "seeds", "parameters", "train tokens/s", "step, median",
             "step, p95", "state", "peak memory"]  # fmt: skip
    rows = []
    for row in leaderboard(board):
        if row.kind == "failed":
            continue
        layer = row.kind == "layer"
        rows.append([str(row.rank or ""), row.name if layer else f"*{row.name}*", show_score(row.mean, metric)] + (
            [show_interval(row.interval, metric), str(len(row.scores)), show_count(row.parameters),
             show_count(row.tokens_per_second), show_time(row.latency), show_time(row.latency_p95),
             show_bytes(row.state_bytes), show_bytes(row.peak_memory)] if layer else [""] * 8
        ))  # fmt: skip
    lines = [f"## {board['name']}: {metric} on test, {better} is better", ""]
    lines += ["Mean over seeds; the interval is that of the mean, by Student's t.", "", *_table(heads, rows)]
    lengths = length_board(board, str)
    if lengths:
        up_to = f", trained up to {lengths['trained']}" if lengths["trained"] else ""
        lines += [f"By length of test examples ({lengths['examples']} of each){up_to}:", ""]
        lines += _table(
            ["layer", *lengths["lengths"]], [[r["name"], *(text for text, _ in r["cells"])] for r in lengths["table"]]
        )
    return lines


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    aligned = [":--" if head == "layer" else "--:" for head in heads]
    return [*(f"| {' | '.join(row)} |" for row in [heads, aligned, *rows]), ""]
