"""Charts as inline SVG text: no library, no script, no file beside the page; colours come from CSS variables.

A series carries the index of its layer; class `s<index>` gives it its colour and `marker` its shape, so that no chart
needs colour to be read. Every chart has role="img", a title and a description for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

SHAPES = 12  # colours and marker shapes before they repeat

Show = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """A map from values to pixels: linear, logarithmic, or logarithmic in the distance to one, for accuracies."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    bytes: bool = False  # ticks at powers of two
    most: float = math.inf  # no tick above it: 1 for accuracies
    errors: bool = False  # equal distances are equal ratios of 1 - value
    at: tuple[float, ...] = ()  # the ticks, where they are given

    def __call__(self, value: float) -> float:
        low, high, v = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, v = math.log(low), math.log(high), math.log(v)
        if self.errors:
            low, high, v = -math.log(1 - low), -math.log(1 - high), -math.log(1 - v)
        return round(self.start + (v - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, about: int) -> list[float]:
        if self.at:
            return list(self.at)
        if self.errors:
            return [v for v in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999) if self.low <= v <= self.high]
        if self.log:
            return _log_ticks(self.low, self.high, about, self.bytes)
        return [v for v in _ticks(self.low, self.high, about) if v <= self.most]


@dataclass(frozen=True)
class Curve:
    """A learning curve: (x, mean, low, high) over seeds at each evaluation."""

    name: str
    index: int
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Dot:
    """A layer in a plane of cost and score, with the range of its seeds."""

    name: str
    index: int
    x: float
    y: float
    low: float
    high: float
    hint: str = ""


@dataclass(frozen=True)
class Guide:
    """Chance or baseline: a horizontal line, or a line through points (x, y) where it depends on x."""

    name: str
    value: float
    note: str = ""
    points: tuple[tuple[float, float], ...] = ()


def curves(
    lines: Sequence[Curve],
    guides: Sequence[Guide],
    *,
    title: str,
    x_label: str,
    y_label: str,
    show_x: Show,
    show_y: Show,
    stretch: bool = False,
    at: Sequence[float] = (),
    mark: tuple[float, str] | None = None,
    most: float = math.inf,
) -> str:
    """Mean over seeds as a line, smallest to largest seed as a band, chance and baseline as dashed lines.

    stretch: for accuracies, give the last per cent before one the room of the first fifty. at: measured places, each
    with a tick and a marker, on a logarithmic axis. mark: a vertical line and what it says. most: no tick above it.
    """
    width, height, left, top, bottom = 480, max(320, 66 + 16 * len(lines)), 68, 14, 48  # 16 for each name
    right = 24 + min(max((len(c.name) for c in lines), default=0), 18) * 7.6  # room for the names at the line ends
    xs = [p[0] for c in lines for p in c.points]
    seen = [v for c in lines for p in c.points for v in p[1:]]
    marks = [v for g in guides for v in ([p[1] for p in g.points] or [g.value])]
    values = [v for v in [*seen, *marks] if math.isfinite(v)]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > 50
    x = Axis(min(xs, default=0), _above(xs), left, width - right)
    if at:
        places = [*at, mark[0]] if mark else at
        x = Axis(min(places) / 1.12, max(places) * 1.12, left, width - right, log=True, at=tuple(at))
    y = Axis(*_padded(values, log), height - bottom, top, log, most=most)
    if stretch and max(seen, default=0) > 0.9:
        y = Axis(1 - 1.2 * (1 - min(values)), 1 - max(1 - max(seen), 1e-3) / 1.25, height - bottom, top, errors=True)
    parts = [_frame(x, y, show_x, show_y, x_label, y_label, width, height, bottom)]
    parts += [_guide(g, x, y) for g in _merged(guides)]
    if mark:
        parts.append(
            f'<g class="guide"><line x1="{x(mark[0])}" x2="{x(mark[0])}" y1="{y.start}" y2="{y.end}"/>'
            f'<text x="{x(mark[0]) + 5:.1f}" y="{y.end + 10}">{escape(mark[1])}</text></g>'
        )
    for c in lines:
        band = [f"{x(p[0])},{y(p[2])}" for p in c.points] + [f"{x(p[0])},{y(p[3])}" for p in reversed(c.points)]
        path = " ".join(f"{x(p[0])},{y(p[1])}" for p in c.points)
        final = c.points[-1]
        parts.append(
            f'<g class="series s{c.index % SHAPES}" data-layer="{escape(c.name)}">'
            f'<polygon class="band" points="{" ".join(band)}"/>'
            f'<polyline class="line" points="{path}"/>'
            + "".join(marker(c.index, x(p[0]), y(p[1]), 5 if p is final else 4) for p in c.points if at or p is final)
            + f"<title>{escape(c.name)}: {escape(show_y(final[1]))}</title></g>"
        )
    ends = [(c, y(c.points[-1][1])) for c in lines]
    for (c, _), place in zip(ends, _apart([at for _, at in ends], 16, top + 4, height - bottom - 2)):
        parts.append(
            f'<text class="label s{c.index % SHAPES}" data-layer="{escape(c.name)}" x="{width - right + 10}" '
            f'y="{place + 4:.1f}">{escape(_short(c.name))}</text>'
        )
    finals = "; ".join(f"{c.name} ends at {show_y(c.points[-1][1])}" for c in lines)
    beside = ", ".join(f"{g.name}{g.note} {show_y(g.value)}" for g in guides)
    return drawn(width, height, title, f"{y_label} against {x_label}. {finals}. {beside}.", parts)


def plane(
    dots: Sequence[Dot],
    guides: Sequence[Guide],
    *,
    title: str,
    x_label: str,
    y_label: str,
    show_x: Show,
    show_y: Show,
    binary: bool = False,
    most: float = math.inf,
) -> str:
    """Score against a cost on a logarithmic axis; a guide outside the range of the scores is named at the edge."""
    width, height, left, right, top, bottom = 400, 310, 68, 16, 22, 48
    values = [v for d in dots for v in (d.low, d.high, d.y)]
    low, high = _padded(values, False)
    low -= (high - low) / 9 * any(g.value < low for g in guides)  # room for the words at the edge
    high += (high - low) / 9 * any(g.value > high for g in guides)
    x = Axis(*_widened([d.x for d in dots], 2.1 if binary else 1.35), left, width - right, log=True, bytes=binary)
    y = Axis(low, high, height - bottom, top, most=most)
    parts = [_frame(x, y, show_x, show_y, x_label, y_label, width, height, bottom)]
    inside = [g for g in guides if low <= g.value <= high]
    parts += [_guide(g, x, y) for g in _merged(inside)]
    for side, at, beyond in (("↓", height - bottom - 7, [g for g in guides if g.value < low]),
                             ("↑", top - 6, [g for g in guides if g.value > high])):  # fmt: skip
        if beyond:
            words = ", ".join(f"{g.name} {show_y(g.value)}" for g in sorted(beyond, key=lambda g: -g.value))
            parts.append(f'<text class="edge" x="{left + 8}" y="{at}">{side} {escape(words)}</text>')
    taken: list[tuple[float, float]] = []
    for d in sorted(dots, key=lambda d: y(d.y)):
        px, py = x(d.x), y(d.y)
        toward_left = px > width - right - 84
        label_y = py + 4
        while any(abs(label_y - v) < 14 and abs(px - u) < 90 for u, v in taken):
            label_y += 3
        taken.append((px, label_y))
        anchor, label_x = ("end", px - 11) if toward_left else ("start", px + 11)
        parts.append(
            f'<g class="series s{d.index % SHAPES}" data-layer="{escape(d.name)}">'
            f'<line class="range" x1="{px}" x2="{px}" y1="{y(d.low)}" y2="{y(d.high)}"/>{marker(d.index, px, py)}'
            f'<text class="label" text-anchor="{anchor}" x="{label_x:.1f}" y="{label_y:.1f}">'
            f"{escape(_short(d.name))}</text>"
            f"<title>{escape(d.name)}: {escape(show_y(d.y))} at {escape(show_x(d.x))} {escape(d.hint)}</title></g>"
        )
    said = "; ".join(f"{d.name} {show_y(d.y)} at {show_x(d.x)}" for d in dots)
    return drawn(width, height, title, f"{y_label} against {x_label}. {said}.", parts)


def strip(
    scores: Sequence[float],
    index: int | None,
    *,
    worst: float,
    best: float,
    guides: Sequence[Guide],
    words: str,
    interval: tuple[float, float] | None = None,
) -> str:
    """One line of the leaderboard: a bar from chance to the mean, a dot for each seed, a notch at every guide, and a
    whisker over the interval of the mean.
    """
    width, height, middle = 220, 22, 11
    place = Axis(min(worst, best), max(worst, best), 4, width - 6)

    def at(value: float) -> float:
        px = place(value)
        return round(width - 2 - px, 1) if worst > best else px

    parts = [f'<rect class="track" x="4" y="{middle - 4}" width="{width - 10}" height="8" rx="4"/>']
    if scores and index is not None:
        mean = sum(scores) / len(scores)
        whisker = ""
        if interval:
            low, high = sorted(map(at, interval))
            whisker = f'<path class="range" d="M{low} {middle}H{high}M{low} {middle - 5}v10M{high} {middle - 5}v10"/>'
        parts.append(
            f'<rect class="bar" x="4" y="{middle - 4}" width="{max(at(mean) - 4, 1):.1f}" height="8" rx="4"/>{whisker}'
            + "".join(f'<circle class="seed" cx="{at(s)}" cy="{middle}" r="3.4"/>' for s in scores)
        )
    parts += [f'<line class="notch" x1="{at(g.value)}" x2="{at(g.value)}" y1="2" y2="20"/>' for g in guides]
    colour = "" if index is None else f" s{index % SHAPES}"
    return (
        f'<svg class="strip{colour}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(words)}"><title>{escape(words)}</title>{"".join(parts)}</svg>'
    )


def marker(index: int, x: float, y: float, size: float = 5) -> str:
    """Circle, square, triangle, diamond, in turn."""
    x, y, s = round(x, 1), round(y, 1), size
    kind = index % 4
    if kind == 0:
        return f'<circle class="mark" cx="{x}" cy="{y}" r="{s}"/>'
    if kind == 1:
        return (
            f'<rect class="mark" x="{x - s + 0.5:.1f}" y="{y - s + 0.5:.1f}" width="{2 * s - 1}" height="{2 * s - 1}"/>'
        )
    if kind == 2:
        corners: tuple[tuple[float, float], ...] = ((0, -s - 1), (s + 0.6, s - 1), (-s - 0.6, s - 1))
    else:
        corners = ((0, -s - 1.4), (s + 1.4, 0), (0, s + 1.4), (-s - 1.4, 0))
    return f'<polygon class="mark" points="{" ".join(f"{x + u:.1f},{y + v:.1f}" for u, v in corners)}"/>'


def _frame(
    x: Axis, y: Axis, show_x: Show, show_y: Show, x_label: str, y_label: str, width: int, height: int, bottom: int
) -> str:
    parts = []
    for v in y.ticks(5):
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(v)}" y2="{y(v)}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{x.start - 8}" y="{y(v) + 4:.1f}">{escape(show_y(v))}</text>'
        )
    for v in x.ticks(4):
        parts.append(
            f'<line class="tickmark" x1="{x(v)}" x2="{x(v)}" y1="{height - bottom}" y2="{height - bottom + 4}"/>'
        )
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x(v)}" y="{height - bottom + 18}">{escape(show_x(v))}</text>'
        )
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{height - bottom}" y2="{height - bottom}"/>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text class="name" text-anchor="middle" x="{middle}" y="{height - 8}">{escape(x_label)}</text>')
    tall = (y.start + y.end) / 2
    parts.append(
        f'<text class="name" text-anchor="middle" transform="translate(12 {tall:.1f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _merged(guides: Sequence[Guide]) -> list[Guide]:
    """Those that lie on one another as one, so that their names do not."""
    found: dict[tuple[object, ...], Guide] = {}
    for g in guides:
        same = found.get((g.value, g.points))
        found[g.value, g.points] = replace(g, name=f"{same.name}, {g.name}") if same else g
    return list(found.values())


def _guide(guide: Guide, x: Axis, y: Axis) -> str:
    ends = guide.points or ((x.low, guide.value), (x.high, guide.value))
    at = y(ends[-1][1])
    above = at - 5 if at > y.end + 16 else at + 13
    path = " ".join(f"{x(u)},{y(v)}" for u, v in ends)
    return (
        f'<g class="guide"><polyline points="{path}"/>'
        f'<text x="{x.end - 4}" y="{above:.1f}" text-anchor="end">{escape(guide.name + guide.note)}</text></g>'
    )


def _short(name: str) -> str:
    """At most 18 letters, for which there is room beside a line."""
    return name if len(name) <= 18 else f"{name[:17]}…"


def drawn(width: int, height: int, title: str, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)} {escape(description)}">{"".join(parts)}</svg>'
    )


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The same places moved as little as needed to lie `gap` apart: labels at line ends."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    edge = low
    for i in order:
        moved[i] = max(moved[i], edge)
        edge = moved[i] + gap
    edge = high
    for i in reversed(order):
        moved[i] = min(moved[i], edge)
        edge = moved[i] - gap
    return moved


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if log:
        return low / 1.3, high * 1.15
    room = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return low - room if low < 0 or low - room > 0 else 0.0, high + room


def _widened(values: Sequence[float], least: float) -> tuple[float, float]:
    """A logarithmic range around positive values, `least` wider at both ends, and at least a factor of four."""
    low, high = min(values), max(values)
    room = max(least, 2 * math.sqrt(low / high))
    return low / room, high * room


def _above(xs: Sequence[float]) -> float:
    return max(xs) if xs and max(xs) > min(xs) else (max(xs, default=0) + 1)


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, about: int, binary: bool) -> list[float]:
    """Round numbers, not much more than `about` and not crowded."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [2.0**p for p in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)] if binary else []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(i / 4 for i in range(4, 40))):
        if len(found) >= 3:
            break
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
    gap, kept = (high / low) ** (1 / (about + 1.5)), found[:1]
    for v in found[1:]:
        if v >= kept[-1] * gap:
            kept.append(v)
    return kept
