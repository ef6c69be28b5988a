"""The report: one HTML file that needs nothing beside it. jinja2 (extra `plots`) fills the template and escapes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core import UsageError
from . import charts, drawing
from .charts import Curve, Dot, Guide
from .lengths import length_board
from .overview import headline_of_all, matrix
from .summary import (
    SHARES,
    Board,
    Comparison,
    Row,
    boards_of,
    leaderboard,
    name_of,
    show_bytes,
    show_count,
    show_interval,
    show_score,
    show_tick,
    show_time,
)  # fmt: skip

HERE = Path(__file__).parent
WHOLE = (-math.inf, math.inf)


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the report: a section for each board. Raises UsageError where jinja2 is missing, naming what to install."""
    try:
        import jinja2
    except ImportError:
        raise UsageError(
            "the HTML report needs jinja2: pip install 'statewise[plots]', then run the same again"
        ) from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    safe = jinja2.utils.markupsafe.Markup  # only for what this package drew itself, with every name escaped
    style, script = (safe((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    boards = boards_of(comparison)
    page = template.render(
        **_words(comparison, boards),
        boards=[{**_section(b, safe), **_table(b, safe), **_pictures(b, safe)} for b in boards],
        matrix=matrix(boards) if len(boards) > 1 else None, css=style, js=script,
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def curves_of(board: Board, against: str) -> list[Curve]:
    """Learning curves over seeds. against: "step", or "seconds" of training."""
    found = []
    for row in leaderboard(board):
        seeds = [c["curve"] for c in row.cells if c["status"] == "done" and c["curve"]]
        if not seeds:
            continue
        points = []
        for step in sorted({p["step"] for s in seeds for p in s}):
            at = [
                p
                for s in seeds
                for p in s
                if p["step"] == step and math.isfinite(p["score"]) and p[against] is not None
            ]
            if len(at) == len(seeds):  # a mean over fewer seeds would jump where one stopped early
                scores = [p["score"] for p in at]
                x = sum(p[against] for p in at) / len(at)
                points.append((x, sum(scores) / len(scores), min(scores), max(scores)))
        if points:
            found.append(Curve(row.name, row.index, tuple(points)))
    return found


def guides_of(board: Board, note: str = "") -> list[Guide]:
    """Chance and baseline, which are numbers of the test split: `note` says so beside other splits."""
    task = board["task"]
    return [Guide(name, task[name], note) for name in ("chance", "baseline") if math.isfinite(task[name])]


def headline(board: Board) -> list[str | dict[str, str]]:
    """What was found, in sentences; layer names are {"name": ...}."""
    task, metric = board["task"], board["task"]["metric"]
    rows = [r for r in leaderboard(board) if r.kind == "layer"]
    if not rows:
        return ["No layer finished a run; the reasons are below."]
    first = rows[0]
    spread = f" (95 % interval {show_interval(first.interval, metric)})" if first.interval else ""
    said: list[str | dict[str, str]] = [
        {"name": first.name}, " scores best" if len(rows) > 1 else " scores",
        f": {show_score(first.mean, metric)}{spread} on the test split, where the baseline has "
        f"{show_score(task['baseline'], metric)} and chance {show_score(task['chance'], metric)}. ",
    ]  # fmt: skip
    sign = 1 if task["higher_is_better"] else -1
    if sign * first.mean <= sign * task["baseline"]:
        said.append("That is not better than the baseline. ")
    if len(rows) > 1:
        close = [r for r in rows[1:] if first.interval and _overlap(first, r)]
        if close:
            said.append("By 95 % intervals over seeds (Student's t) it cannot be told from ")
            said += _enumerate([r.name for r in close])
            said.append(". ")
        elif len(first.scores) == 1:
            said.append("With a single seed small differences mean little. ")
        said += _quickest(rows)
    return said


def _overlap(a: Row, b: Row) -> bool:
    """Whether the 95 % intervals of two means overlap, or one of them has none."""
    (low, high), (lowest, highest) = a.interval or WHOLE, b.interval or WHOLE
    return low <= highest and lowest <= high


def _enumerate(names: Sequence[str]) -> list[str | dict[str, str]]:
    said: list[str | dict[str, str]] = []
    for i, name in enumerate(names):
        said += [{"name": name}, " and " if i == len(names) - 2 else ", "]
    return said[:-1]


def _quickest(rows: Sequence[Row]) -> list[str | dict[str, str]]:
    said: list[str | dict[str, str]] = []
    streamed = [r for r in rows if r.latency is not None]
    if len(streamed) > 1:
        fast = min(streamed, key=lambda r: r.latency or 0)
        least = min(r.state_bytes or 0 for r in streamed)
        small = [r.name for r in streamed if r.state_bytes == least]
        said += [{"name": fast.name}, f" streams fastest ({show_time(fast.latency)} a step), "]
        said += _enumerate(small)
        said.append(f" {'carries' if len(small) == 1 else 'carry'} the smallest state ({show_bytes(least)}), ")
    train = max(rows, key=lambda r: r.tokens_per_second or 0)
    said += [{"name": train.name}, f" trains fastest ({show_count(train.tokens_per_second)} tokens/s)."]
    return said


def _words(comparison: Comparison, boards: Sequence[Board]) -> dict[str, Any]:
    """What stands above and below the boards."""
    env = comparison["environment"]
    entries = [e for b in boards for e in b["layers"]]
    lines = len({name_of(e) for e in entries})
    seeds = len({c["seed"] for e in entries for c in e["cells"]})
    steps = list(dict.fromkeys(str(b["train"].get("steps", "–")) for b in boards))
    layers = len({e["layer"] for e in entries})
    of = f"{layers} sequence {'layer' if layers == 1 else 'layers'}"
    if lines > layers:
        of = f"{lines} variants of {of}"
    where = _title(boards[0]["name"]) if len(boards) == 1 else f"{len(boards)} tasks"
    facts = [("Layers", str(lines)), ("Seeds", str(seeds))]
    if len(boards) > 1:
        facts.insert(0, ("Tasks", str(len(boards))))
    facts += [
        ("Steps each", steps[0] if len(steps) == 1 else "by task"),
        ("Whole comparison", show_time(comparison["seconds"]) if comparison["seconds"] else "in several parts"),
        ("Workers", f"{env.get('workers', '–')} × {_threads(env.get('threads', '–'))}"),
        ("Processor", str(env.get("cpu", "–"))),
    ]
    return {
        "command": comparison["command"], "version": env.get("statewise", ""),
        "created": comparison.get("created", ""), "title": f"{where}: {of} compared",
        "headline": headline(boards[0]) if len(boards) == 1 else headline_of_all(boards), "facts": facts,
        "method": comparison.get("method", []),
        "environment": [(k.replace("_", " "), str(v)) for k, v in env.items()],
        "failures": [failure for b in boards for failure in _failures(b, len(boards) > 1)],
    }  # fmt: skip


def _title(name: str) -> str:
    """selective_copy length=80 -> Selective copy length=80."""
    task, space, settings = name.partition(" ")
    return task[:1].upper() + task[1:].replace("_", " ") + space + settings


def _section(board: Board, safe: Any) -> dict[str, Any]:
    """What a board says of its task."""
    task, metric = board["task"], board["task"]["metric"]
    seeds = max((len(r.scores) for r in leaderboard(board)), default=0)
    over = (
        f"mean over seeds, and its 95 % confidence interval by Student's t ({seeds} seeds), "
        "which takes the scores of seeds as normal; with so few it is wide"
        if seeds > 1
        else "one seed, so no interval"
    )
    budget = ", ".join(f"{k} {show_count(v)}" for k, v in (board.get("budget") or {}).items())
    train = {k: v for k, v in board["train"].items() if not isinstance(v, dict)}
    return {
        "name": board["name"], "title": _title(board["name"]), "task": task, "lead": headline(board),
        "metric_label": metric[:1].upper() + metric[1:], "percent": metric in SHARES,
        "better": "higher" if task["higher_is_better"] else "lower", "over": over,
        "bar_start": f"chance ({show_score(task['chance'], metric)})",
        "bar_end": show_score(_best(board), metric),
        "task_facts": [
            ("Input", task["input"]),
            ("Answer", task["output"]),
            ("Ranked by", f"{metric}, {'higher' if task['higher_is_better'] else 'lower'} is better"),
            ("Chance", show_score(task["chance"], metric)),
            ("Baseline", ": ".join(filter(None, (show_score(task["baseline"], metric), task.get("baseline_is"))))),
            *((k, str(v)) for k, v in task.get("settings", {}).items()),
            *([("Equal budget", budget)] if budget else []),
            ("Training", ", ".join(f"{k} {v}" for k, v in train.items() if k in ("steps", "batch", "warmup"))),
        ],
        "notes": board["method"] if board["format"] != 1 else [],
        "lengths": length_board(board, safe),
    }  # fmt: skip


def _threads(count: Any) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _failures(board: Board, several: bool) -> list[tuple[str, str, str]]:
    """(layer, on which task and seed, reason); runs that successive halving stopped did not fail."""
    found: list[tuple[str, str, str]] = []
    on = f" on {board['name']}" if several else ""
    for entry in board["layers"]:
        name = name_of(entry)
        for cell in [*entry["cells"], *entry.get("others", [])]:
            if cell["status"] == "failed" or (cell["status"] == "done" and cell.get("reason")):
                found.append((name, f"{on}, seed {cell['seed']}", cell["reason"]))
            for score in cell.get("scores_by_length") or []:
                if score["failed"]:
                    found.append((name, f"{on}, seed {cell['seed']}, at length {score['length']}", score["failed"]))
        if (entry.get("streaming") or {}).get("failed"):
            found.append((name, on, entry["streaming"]["failed"]))
    return found


def _best(board: Board) -> float:
    """The far end of the score bars: a perfect answer, or the best seed where perfection is not 0 or 1."""
    task = board["task"]
    if task["metric"] in SHARES:
        return 1.0
    if not task["higher_is_better"]:
        return 0.0
    return max([s for r in leaderboard(board) for s in r.scores])


def _table(board: Board, safe: Any) -> dict[str, Any]:
    task, metric = board["task"], board["task"]["metric"]
    guides = [g for g in guides_of(board) if g.name == "baseline"]
    rows = []
    for row in leaderboard(board):
        of = len(row.cells)
        words = f"{row.name} {show_score(row.mean, metric)}"
        if row.kind == "layer":
            interval = f", 95 % interval {show_interval(row.interval, metric)}" if row.interval else ""
            words += interval + ", seeds " + ", ".join(show_score(s, metric) for s in row.scores)
        strip = charts.strip(
            row.scores, row.index if row.kind == "layer" else None, worst=task["chance"], best=_best(board),
            guides=guides, words=words, interval=row.interval,
        )  # fmt: skip
        cells = [
            ("parameters", row.parameters, show_count(row.parameters), ""),
            ("training tokens/s", row.tokens_per_second, show_count(row.tokens_per_second), ""),
            (
                "streaming step",
                row.latency,
                show_time(row.latency),
                f"p95 {show_time(row.latency_p95)}" if row.latency_p95 else "",
            ),
            ("state", row.state_bytes, show_bytes(row.state_bytes), ""),
            ("peak memory", row.peak_memory, show_bytes(row.peak_memory), ""),
            ("training time", row.seconds, show_time(row.seconds), ""),
        ]
        rows.append(
            {
                "kind": row.kind, "rank": row.rank, "name": row.name, "index": row.index, "mean": row.mean,
                "marker": safe(charts.marker(row.index, 0, 0, 6)),
                "note": f"{len(row.scores)} of {of} seeds" if row.kind == "layer" and len(row.scores) < of else "",
                "reason": "; ".join(row.reasons),
                "score": show_score(row.mean, metric), "spread": show_interval(row.interval, metric),
                "strip": safe(strip) if row.kind == "layer" else "",
                "cells": [(a, "" if b is None else b, c if row.kind == "layer" else "", d) for a, b, c, d in cells],
            }
        )  # fmt: skip
    runs = [
        {
            "layer": name_of(entry), "summary": entry.get("summary", ""), "paper": entry.get("paper", ""),
            "index": entry["index"], "marker": safe(charts.marker(entry["index"], 0, 0, 6)),
            "cells": [_cell_words(c, metric) for c in [*entry["cells"], *entry.get("others", [])]],
            "commands": list(dict.fromkeys(c.get("command") or entry["command"] for c in entry["cells"]))
            or [entry["command"]],
            "record": json.dumps(entry["record"], indent=2, ensure_ascii=False),
        }
        for entry in board["layers"]
    ]  # fmt: skip
    return {"rows": rows, "runs": runs}


def _cell_words(cell: dict[str, Any], metric: str) -> dict[str, Any]:
    """A run in words; one that failed or was stopped has what it got to."""
    ended = {"done": "all steps", "early": "stopped early"}.get(cell.get("stopped") or "", "")
    return {
        "seed": cell["seed"], "lr": f"{cell['lr']:g}", "key": cell["key"],
        "tried": ", ".join(f"{path} {value}" for path, value in (cell.get("tried") or {}).items()),
        "test": show_score(cell.get("score"), metric), "validation": show_score(cell.get("validation_score"), metric),
        "steps": cell.get("steps") or "–", "seconds": show_time(cell.get("seconds")),
        "tokens": show_count(cell.get("tokens_per_second")), "memory": show_bytes(cell.get("peak_memory")),
        "ended": ended if cell["status"] == "done" else cell["reason"],
    }  # fmt: skip


def _pictures(board: Board, safe: Any) -> dict[str, Any]:
    metric, guides = board["task"]["metric"], guides_of(board, " (test)")
    label = f"{metric} on validation"

    def show(value: float) -> str:
        return show_tick(value, metric)

    curve_charts = []
    for against, x_label, caption, show_x in (
        ("step", "training step", "By step: what each layer learns from the same examples.", show_count),
        (
            "seconds",
            "seconds of training",
            "By time: the same runs against the seconds of their training steps, the slow first ones too.",
            lambda v: f"{v:.4g}",
        ),
    ):
        lines = curves_of(board, against)
        if lines:
            svg = charts.curves(
                lines,
                guides,
                title=caption,
                x_label=x_label,
                y_label=label,
                show_x=show_x,
                show_y=show,
                stretch=metric in SHARES,
            )
            curve_charts.append({"svg": safe(svg), "caption": caption})
    return {
        "curve_charts": curve_charts,
        "cost_charts": _cost_charts(board, safe, show),
        **_examples(board, safe),
    }


COSTS = (  # of a row; what the axis says; what the choice says; the caption; how it is shown
    ("tokens_per_second", "training tokens/s", "Training speed", "Right is faster to train.", show_count),
    ("latency", "streaming, median time per step", "Streaming latency", "Left is faster to stream.", show_time),
    ("state_bytes", "state of one stream", "State", "Left carries less from step to step.", show_bytes),
    ("parameters", "parameters", "Parameters", "Left has fewer numbers to learn.", show_count),
    ("peak_memory", "peak memory", "Peak memory", "Left needs less memory to train.", show_bytes),
)


def _cost_charts(board: Board, safe: Any, show: charts.Show) -> list[dict[str, Any]]:
    rows = [r for r in leaderboard(board) if r.kind == "layer"]
    metric, found = board["task"]["metric"], []
    for cost, x_label, choice, caption, show_x in COSTS:
        dots = [
            Dot(r.name, r.index, float(getattr(r, cost)), r.mean, min(r.scores), max(r.scores))
            for r in rows
            if getattr(r, cost)
        ]
        if dots:
            svg = charts.plane(
                dots, guides_of(board), title=caption, x_label=x_label, y_label=f"{metric} on test", show_x=show_x,
                show_y=show, binary=show_x is show_bytes, most=1.0 if metric in SHARES else math.inf,
            )  # fmt: skip
            found.append({"svg": safe(svg), "caption": caption, "choice": choice})
    return found


def _examples(board: Board, safe: Any) -> dict[str, Any]:
    """Examples of the task as pictures: heat for many channels, lines for few, text for ids."""
    found, note = [], ""
    for i, e in enumerate(board["task"].get("examples", [])):
        shown: dict[str, Any] = {"image": "", "svg": "", "text": "", "alt": f"Example {i + 1}", "caption": e["answer"]}
        if "text" in e:
            shown["text"] = e["text"]
        elif len(e["rows"][0]) > 3:
            shown["image"] = drawing.heat(e["rows"])
            shown["alt"] = f"Example {i + 1}: {len(e['rows'])} steps of {len(e['rows'][0])} channels; {e['answer']}"
            note = (
                "Time runs to the right, one row per channel; orange is above zero, blue below, paler is nearer zero."
            )
        else:
            shown["svg"] = safe(_little_lines(e["rows"], e["answer"]))
            note = "Time runs to the right, one line per channel."
        found.append(shown)
    return {"examples": found, "example_note": note}


def _little_lines(rows: Sequence[Sequence[float]], words: str) -> str:
    width, height = 240, 90
    values = [v for row in rows for v in row]
    low, high = min(values), max(values)
    x = charts.Axis(0, max(len(rows) - 1, 1), 4, width - 4)
    y = charts.Axis(low, high if high > low else low + 1, height - 5, 5)
    lines = "".join(
        f'<polyline class="line s{c % 12}" points="{" ".join(f"{x(t)},{y(row[c])}" for t, row in enumerate(rows))}"/>'
        for c in range(len(rows[0]))
    )
    return charts.drawn(width, height, f"Example of {len(rows)} steps", words, [lines])
