"""The picture for a README: scores and learning curves of a comparison as one SVG file, light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from . import charts
from .page import HERE, curves_of, guides_of
from .summary import (
    SHARES,
    Comparison,
    boards_of,
    leaderboard,
    show_bytes,
    show_count,
    show_score,
    show_spread,
    show_tick,
    show_time,
)  # fmt: skip

_STYLE = """
svg{background:var(--card);font:13px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
text{fill:var(--ink)}.soft,.soft text{fill:var(--soft)}.b{font-weight:650}.h{font-size:17px;font-weight:650}
.board-rule{stroke:var(--rule)}
"""


def write_picture(comparison: Comparison, path: Path) -> None:
    """Of the first board: scores, parameters, streaming step and state at the left, learning curves at the right."""
    board = boards_of(comparison)[0]
    task, metric = board["task"], board["task"]["metric"]
    rows = [r for r in leaderboard(board) if r.kind != "failed"]
    top, left = 84, 24
    pitch = min(44, max(32, (420 - top - 20) // len(rows)))
    height = max(top + pitch * len(rows) + 20, 420)
    columns = (("parameters", 338), ("train tokens/s", 428), ("step, streaming", 524), ("state", 588))
    seeds = max((len(r.scores) for r in rows), default=0)
    over = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    parts = [
        f'<text class="h" x="{left}" y="36">{escape(task["name"])}: test {escape(metric)}, {over}</text>',
        *(f'<text class="soft" text-anchor="end" font-size="11.5" x="{x}" y="66">{name}</text>' for name, x in columns),
    ]
    for i, row in enumerate(rows):
        y = top + pitch * i + 14
        parts.append(f'<line class="board-rule" x1="{left}" x2="588" y1="{y - 21}" y2="{y - 21}"/>')
        if row.kind != "layer":
            parts.append(f'<g class="soft" font-style="italic"><text x="{left + 20}" y="{y}">{row.name}</text>')
            parts.append(f'<text x="{left + 124}" y="{y}">{show_score(row.mean, metric)}</text></g>')
            continue
        parts.append(
            f'<g class="s{row.index % charts.SHAPES}">{charts.marker(row.index, left + 6, y - 4.5)}'
            f'<text class="b" x="{left + 20}" y="{y}">{escape(row.name)}</text></g>'
            f'<text x="{left + 124}" y="{y}"><tspan class="b">{show_score(row.mean, metric)}</tspan>'
            f'<tspan class="soft" dx="6">{show_spread(row.sd, metric)}</tspan></text>'
        )
        texts = (
            show_count(row.parameters),
            show_count(row.tokens_per_second),
            show_time(row.latency),
            show_bytes(row.state_bytes),
        )
        parts += [f'<text text-anchor="end" x="{x}" y="{y}">{t}</text>' for t, (_, x) in zip(texts, columns)]
    chart = charts.curves(
        curves_of(board, "step"), guides_of(board, " (test)"), title="Learning curves",
        x_label="training step",
        y_label=f"{metric} on validation", show_x=show_count, show_y=lambda v: show_tick(v, metric),
        stretch=metric in SHARES,
    )  # fmt: skip
    chart = chart.replace("<svg ", f'<svg x="616" y="44" width="560" height="{560 * 320 / 480:.0f}" ', 1)
    names = ", ".join(f"{r.name} {show_score(r.mean, metric)}" for r in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(1190, height, f"{task['name']}: {names}", [*parts, chart]), encoding="utf-8")


def document(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """The text of an SVG file with the colours of the page, light and dark. label: what it shows, in words."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label)}"><style>{_variables()}{_STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="var(--card)"/>{"".join(parts)}</svg>\n'
    )


def _variables() -> str:
    """The colours and the chart rules of the page's style sheet, which the picture shares."""
    css = (HERE / "page.css").read_text(encoding="utf-8")
    colours = css[: css.index("@media print")]
    rules = re.findall(
        r"^(?:\.s\d.*|\.mark.*|\.chart .*|line\.grid.*|\.line\{.*|\.band\{.*|\.guide.*)$", css, re.MULTILINE
    )
    return colours + "\n".join(rules)
