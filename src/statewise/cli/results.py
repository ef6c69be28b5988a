"""statewise results: ask the rows of comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .parse import Positional, Repeated


@dataclass(frozen=True)
class Options:
    """Pick, group and sort the runs in folders made by `statewise compare`; print them or write them to a file."""

    folders: Positional[tuple[Path, ...]] = ()
    """One or more results folders."""
    where: Repeated[str] = ()
    """COLUMN=VALUE, or several with commas, of which one must hold: task=parity layer=gru,lru status=done."""
    group: str = ""
    """Columns with commas: one line for each of their values, with mean and spread of the score over finished runs."""
    columns: str = ""
    """Columns with commas, or all. A dotted path, as model.width, is looked up in the configuration."""
    sort: str = ""
    """A column; score and validation_score with the best first, others ascending; -COLUMN turns it round."""
    format: Literal["auto", "table", "csv", "json", "parquet"] = "auto"
    """auto: by the ending of --out, else table. Parquet needs --out and the data extra."""
    out: Path | None = None
    """File to write to, beside which nothing is printed."""


def run(options: Options) -> int:
    from ..comparing import ordered, read_results, where
    from ..comparing.rows import grouped

    kind = _format(options)
    if not options.folders:
        from ..core import UsageError

        raise UsageError("which folder? statewise results runs/compare-TASK")
    rows = where(read_results(options.folders), _conditions(options.where))
    if options.group:
        rows = grouped(rows, _names(options.group))
    if options.sort:
        rows = ordered(rows, options.sort)
    columns = _columns(options, rows, everything=kind == "parquet")
    if kind == "table" and options.out is None:
        _print(rows, columns)
    else:
        _write(kind, rows, columns, options.out)
    return 0


def _format(options: Options) -> str:
    from ..core import UsageError

    ending = options.out.suffix.removeprefix(".") if options.out else ""
    kind = options.format if options.format != "auto" else ending if ending in ("csv", "json", "parquet") else "table"
    if kind == "parquet" and options.out is None:
        raise UsageError("--format parquet: a binary file; name it with --out FILE")
    if kind == "table" and options.out is not None:
        raise UsageError(
            f"--out {str(options.out)!r}: a table is for the screen; expected --format csv, json or parquet"
        )
    return kind


def _conditions(texts: tuple[str, ...]) -> dict[str, list[str]]:
    from .settings import dict_once

    return {name: text.split(",") for name, text in dict_once(texts, "--where").items()}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _columns(options: Options, rows: list[dict[str, Any]], *, everything: bool) -> list[str]:
    """Those asked for; all of them for a file that other programs read; what fits a screen for a table."""
    from ..comparing.rows import COLUMNS, NESTED, SHOWN, check_columns

    names = _names(options.columns)
    if options.group and not names:
        return [name for name in rows[0] if name != "higher_is_better"] if rows else _names(options.group)
    if names == ["all"] or (everything and not names):
        return [*COLUMNS, *NESTED]
    check_columns(names, rows, "--columns")
    return names or list(SHOWN)


def _print(rows: list[dict[str, Any]], columns: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..comparing.rows import value
    from .show import console

    screen = console()
    if not screen.is_terminal:  # a pipe has no width
        screen = Console(highlight=False, emoji=False, markup=False, width=10_000)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for name in columns:
        numbers = all(isinstance(value(row, name), int | float) or value(row, name) is None for row in rows)
        made.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_word(value(row, name)) for name in columns))
    screen.print(made)
    print(f"{len(rows)} {'row' if len(rows) == 1 else 'rows'}")


def _word(found: Any) -> str:
    import json

    if found is None:
        return ""
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, float):
        return f"{found:.6g}"
    if isinstance(found, int | str):
        return str(found)
    text = json.dumps(found)
    return text if len(text) <= 60 else text[:59] + "…"  # a table is for the eye; csv and json have it all


def _write(kind: str, rows: list[dict[str, Any]], columns: list[str], out: Path | None) -> None:
    from ..comparing.rows import to_csv, to_json, write_parquet
    from ..core.files import replace_file

    if kind == "parquet" and out is not None:
        write_parquet(rows, columns, out)
    else:
        text = to_csv(rows, columns) if kind == "csv" else to_json(rows, columns) + "\n"
        if out is None:
            print(text, end="")
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, [text.encode()])
    print(f"{len(rows)} rows written to {out}")
