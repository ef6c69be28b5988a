"""Results of comparisons as rows: read from folders, picked, grouped, sorted, written as CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core import DataError, UsageError, near
from ..training import read_log

Row = dict[str, Any]

RESULTS = "results.jsonl"

COLUMNS = (  # of a table, in this order, nothing nested: the rest of a row is in its JSON
    "task", "board", "layer", "label", "seed", "lr", "chosen", "status", "score", "validation_score", "metric",
    "higher_is_better", "chance", "baseline", "parameters", "steps", "tokens", "seconds", "tokens_per_second",
    "peak_memory", "latency", "latency_p95", "state_bytes", "trial", "stopped", "failure", "reason", "device",
    "threads", "workers", "engine", "version", "data", "ended", "key", "command",
)  # fmt: skip
SHOWN = ("board", "label", "seed", "lr", "status", "score", "validation_score", "parameters", "tokens", "seconds")
NESTED = ("overrides", "tried", "budget", "metrics", "curve", "scores_by_length", "record")


def read_rows(out: Path) -> dict[str, Row]:
    """The rows of a results folder by key, the last of each. A record without a status adds to the row before it.

    Torn and damaged lines do not count.
    """
    found: dict[str, Row] = {}
    for record in read_log(out / RESULTS)[0]:
        key = str(record.get("key"))
        if "status" in record:
            found[key] = record
        elif key in found:
            found[key] |= record
    return found


def read_results(folders: Iterable[Path]) -> list[Row]:
    """The rows of several folders, and of each whether it is `chosen`: see `choose`.

    Raises DataError for a folder without results.
    """
    rows: dict[str, Row] = {}
    for folder in folders:
        if not (folder / RESULTS).is_file():
            raise DataError(f"{str(folder)!r} holds no {RESULTS}; expected a folder made by statewise compare")
        rows |= read_rows(folder)
    return choose(rows.values())


def choose(rows: Iterable[Row]) -> list[Row]:
    """Each row with `chosen`: whether what was tried for its line of the leaderboard did best on validation, by the
    first seed. Where nothing was to be chosen it is true, and of what was tried and did not finish it is false.
    """
    kept = [dict(row) for row in rows]
    lines: dict[Any, list[Row]] = {}
    for row in kept:
        row["chosen"] = not row.get("tried")
        if row.get("tried"):
            lines.setdefault((row["board"], row["label"], _text(row.get("budget"))), []).append(row)
    for tried in lines.values():
        first = min(row["seed"] for row in tried)
        done = [row for row in tried if row["seed"] == first and row["status"] == "done"]
        if done:
            sign = 1 if done[0]["higher_is_better"] else -1
            best = max(done, key=lambda row: sign * row["validation_score"])
            for row in tried:
                row["chosen"] = row["tried"] == best["tried"]
    return kept


def value(row: Row, name: str) -> Any:
    """A column of a row, or what its overrides or its configuration say at a dotted path; None where nothing does."""
    if name in row:
        return row[name]
    if name in (row.get("overrides") or {}):
        return row["overrides"][name]
    found: Any = row.get("record") if "." in name else row
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def where(rows: Sequence[Row], conditions: Mapping[str, Sequence[str]]) -> list[Row]:
    """Rows whose column is one of the texts, for every condition. Numbers are compared as numbers.

    Raises UsageError for a column that no row has.
    """
    for name in conditions:
        check_columns([name], rows, "--where")
    return [row for row in rows if all(_is(value(row, name), texts) for name, texts in conditions.items())]


def _is(found: Any, texts: Sequence[str]) -> bool:
    if isinstance(found, bool) or found is None:
        return str(found).lower() in [text.lower() for text in texts]
    if isinstance(found, int | float):
        return any(_number(text) == found for text in texts)
    return str(found) in texts


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def grouped(rows: Sequence[Row], by: Sequence[str]) -> list[Row]:
    """One row for each different value of the columns: over the finished ones the mean score, its standard deviation,
    lowest and highest, and means of what else is a number; `runs` and `failed` count. Scores by different metrics have
    no mean, and the metric is then None.
    """
    check_columns(by, rows, "--group")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_text([value(row, name) for name in by]), []).append(row)
    found = []
    for members in groups.values():
        done = [row for row in members if row["status"] == "done"]
        same = len({(row["metric"], row["higher_is_better"]) for row in members}) == 1
        scores = [row["score"] for row in done] if same else []
        one: Row = {name: value(members[0], name) for name in by}
        one |= {name: members[0][name] if same else None for name in ("metric", "higher_is_better")}
        one |= {"runs": len(members), "failed": sum(row["status"] == "failed" for row in members)}
        one |= {
            "score": statistics.fmean(scores) if scores else None,
            "sd": statistics.stdev(scores) if len(scores) > 1 else None,
            "min": min(scores, default=None),
            "max": max(scores, default=None),
        }
        for name in ("validation_score", *_MEANS):
            some = done if same or name != "validation_score" else []
            values = [row[name] for row in some if row.get(name) is not None]
            one[name] = statistics.fmean(values) if values else None
        found.append(one)
    return found


_MEANS = ("parameters", "tokens", "seconds", "tokens_per_second", "peak_memory", "latency", "state_bytes")


def ordered(rows: Sequence[Row], by: str) -> list[Row]:
    """Sorted by a column: scores best first, all else with the smallest first, or the largest where it begins with a
    minus; what has no value comes last."""
    name, turned = by.lstrip("-"), by.startswith("-")
    check_columns([name], rows, "--sort")
    if name in ("score", "validation_score"):
        turned ^= any(row.get("higher_is_better", True) for row in rows)
    have = [row for row in rows if value(row, name) is not None]
    numbers = all(isinstance(value(row, name), int | float) for row in have)
    have.sort(key=lambda row: value(row, name) if numbers else _cell(value(row, name)), reverse=turned)
    return have + [row for row in rows if value(row, name) is None]


def check_columns(names: Sequence[str], rows: Sequence[Row], flag: str) -> None:
    """Raise UsageError for a name that is no column and that no row's configuration holds."""
    for name in names:
        if name not in COLUMNS + NESTED and rows and all(value(row, name) is None for row in rows):
            known = dict.fromkeys(
                [*COLUMNS, *NESTED, *(n for row in rows for n in [*row, *(row.get("overrides") or {})])]
            )
            hint = near(name, known)
            more = "" if "." in name else "; a dotted path, as model.width, is looked up in the configuration"
            raise UsageError(f"{flag} {name}: no row has it; {hint}{more}")


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Numbers in full; what is nested as JSON."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        table.writerow([_cell(value(row, name)) for name in columns])
    return file.getvalue()


def _cell(found: Any) -> str:
    if found is None:
        return ""
    return repr(found) if isinstance(found, float) else found if isinstance(found, str) else _text(found)


def to_json(rows: Sequence[Row], columns: Sequence[str]) -> str:
    return json.dumps([{name: value(row, name) for name in columns} for row in rows], indent=1, ensure_ascii=False)


def write_parquet(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """A Parquet file with one column for each name: numbers, texts and truth values as such, what is nested as JSON.

    Raises UsageError where pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'statewise[data]'") from None
    table = {}
    for name in columns:
        values = [value(row, name) for row in rows]
        kinds = {type(v) for v in values if v is not None}
        if kinds == {bool}:
            table[name] = pyarrow.array(values, pyarrow.bool_())
        elif kinds == {int}:
            table[name] = pyarrow.array(values, pyarrow.int64())
        elif kinds and kinds <= {int, float}:
            table[name] = pyarrow.array([None if v is None else float(v) for v in values], pyarrow.float64())
        else:
            texts = [v if isinstance(v, str) or v is None else _text(v) for v in values]
            table[name] = pyarrow.array(texts, pyarrow.string())
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), str(path))


def _text(found: Any) -> str:
    return json.dumps(found, sort_keys=True, ensure_ascii=False)
