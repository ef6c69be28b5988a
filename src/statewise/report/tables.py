"""The same rows as files: results.csv with a line per trained model, leaderboard.md with a line per layer."""

from __future__ import annotations

import csv
from pathlib import Path

from .summary import Comparison, leaderboard, show_bytes, show_count, show_score, show_spread, show_time

COLUMNS = (
    "layer", "seed", "lr", "chosen", "status", "reason", "score", "metric", "validation_score", "steps", "stopped",
    "parameters", "tokens_per_second", "seconds", "peak_memory", "latency_median_s", "latency_p95_s", "state_bytes",
    "device", "threads", "workers", "version", "data", "key",
)  # fmt: skip


def write_csv(comparison: Comparison, path: Path) -> None:
    """A line per cell, and one each for chance and baseline. Numbers are written in full."""
    task = comparison["task"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        for name in ("chance", "baseline"):
            table.writerow({"layer": name, "score": repr(task[name]), "metric": task["metric"], "status": "done"})
        for entry in comparison["layers"]:
            timed = entry.get("streaming") or {}
            for cell in [*entry["cells"], *entry.get("others", [])]:
                streaming = timed if timed.get("key") == cell["key"] else {}  # of one seed
                table.writerow(
                    {k: cell[k] for k in COLUMNS if cell.get(k) is not None}
                    | {
                        "chosen": int(cell in entry["cells"]),
                        "metric": task["metric"],
                        "latency_median_s": streaming.get("median", ""),
                        "latency_p95_s": streaming.get("p95", ""),
                        "state_bytes": streaming.get("state_bytes", ""),
                    }
                )


def write_markdown(comparison: Comparison, path: Path) -> None:
    """The leaderboard as a Markdown table."""
    task, metric = comparison["task"], comparison["task"]["metric"]
    better = "higher" if task["higher_is_better"] else "lower"
    lines = [
        f"# {task['name']}: {metric} on test, {better} is better",
        "",
        f"`{comparison['command']}`",
        "",
        "| # | layer | score (mean ± sd) | min to max | seeds | parameters | train tokens/s | step, median | step, p95 "
        "| state | peak memory |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    failed = []
    for row in leaderboard(comparison):
        failed += [f"- **{row.name}**: {reason}" for reason in row.reasons]
        if row.kind == "failed":
            continue
        score = f"{show_score(row.mean, metric)} {show_spread(row.sd, metric)}".strip()
        cells = [str(row.rank or ""), row.name if row.kind == "layer" else f"*{row.name}*", score]
        if row.kind == "layer":
            cells += [
                f"{show_score(min(row.scores), metric)} to {show_score(max(row.scores), metric)}",
                str(len(row.scores)), show_count(row.parameters), show_count(row.tokens_per_second),
                show_time(row.latency), show_time(row.latency_p95), show_bytes(row.state_bytes),
                show_bytes(row.peak_memory),
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells + [""] * (11 - len(cells))) + " |")
    if failed:
        lines += ["", "Failed:", "", *failed]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
