"""Curves in rows and columns as one file that needs nothing beside it: an SVG picture, or an HTML page around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..core import UsageError
from . import charts
from .charts import Curve
from .picture import document
from .summary import show_count

KINDS = (".svg", ".html")
WIDE, TALL, GAP, TOP = 480, 320, 44, 84  # of a panel, between panels, and what stands above the first row


@dataclass(frozen=True)
class Panel:
    """One chart: what its height means, and its lines."""

    name: str
    lines: tuple[Curve, ...]


def check_panels(path: Path) -> None:
    """Raise UsageError unless the name of a file ends as that of a picture that can be written."""
    if path.suffix not in KINDS:
        raise UsageError(f"--out {str(path)!r}; expected a name that ends in {' or '.join(KINDS)}")


def write_panels(
    path: Path, rows: Sequence[Sequence[Panel]], *, title: str, note: str, x_label: str, mark: tuple[float, str]
) -> None:
    """Rows of panels with one meaning of x, and a vertical line at mark in each. Raises UsageError as check_panels."""
    check_panels(path)
    width = 24 + (WIDE + 24) * max(map(len, rows))
    parts = [
        f'<text class="h" x="24" y="36">{escape(title)}</text>',
        f'<text class="soft" x="24" y="60">{escape(note)}</text>',
    ]
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            x, y = 24 + (WIDE + 24) * j, TOP + (TALL + GAP) * i
            chart = charts.curves(
                panel.lines, (), title=f"{panel.name}.", x_label=x_label, y_label=panel.name, show_x=show_count,
                show_y=lambda v: f"{v:.3g}", mark=mark,
            )  # fmt: skip
            parts.append(f'<text class="b" x="{x}" y="{y + 16}">{escape(panel.name)}</text>')
            parts.append(chart.replace("<svg ", f'<svg x="{x}" y="{y + 24}" width="{WIDE}" height="{TALL}" ', 1))
    picture = document(width, TOP + (TALL + GAP) * len(rows) + 8, f"{title}. {note}", parts)
    if path.suffix == ".html":
        picture = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            "<style>body{margin:0;background:var(--card)}body>svg{display:block;margin:auto;max-width:100%;height:auto}"
            f"</style></head>\n<body>{picture}</body></html>\n"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture, encoding="utf-8")
