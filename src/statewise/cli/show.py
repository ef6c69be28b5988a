"""Tables for a terminal of 80 columns; plain text where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the error being handled; rich would exit with status 1


def console() -> Console:
    """Made anew at each use: it looks at sys.stdout, NO_COLOR and COLUMNS as they are now."""
    return _Console(highlight=False, emoji=False, markup=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[str] = (), title: str = "") -> None:
    """Print a table. right: the columns that hold numbers. Long cells go on in the next line."""
    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False, show_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    console().print(made)
