"""The report from rows whose numbers are known: nothing from outside, nothing left out, nothing unescaped."""

from __future__ import annotations

import base64
import csv
import html
import itertools
import json
import math
import re
import statistics
import struct
import sys
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import LAYERS, comparison

from statewise.core import DataError, UsageError
from statewise.report import (
    leaderboard,
    read_comparison,
    show_bytes,
    show_count,
    show_score,
    show_time,
    write_csv,
    write_markdown,
    write_page,
    write_picture,
)
from statewise.report.charts import Axis, Curve, Guide, _apart, curves
from statewise.report.drawing import heat
from statewise.report.page import curves_of

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Balanced(HTMLParser):
    """Collects tags and attributes and insists that every element is closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(comparison(), path)
    return path.read_text(encoding="utf-8")


def test_nothing_comes_from_outside(page):
    assert not re.search(r"https?://|url\(|@import|<link[^>]+stylesheet|//[a-z0-9-]+\.[a-z]", page)
    for tag, attributes in Balanced(page).seen:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    policy = next(a["content"] for _, a in Balanced(page).seen if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_every_row_is_there(page):
    text = " ".join(" ".join(Balanced(page).words).split())
    for name in [*LAYERS, "chance", "baseline", "reservoir"]:
        assert re.search(rf"<th scope=\"row\"[^>]*>(<svg.*?</svg>)?{name}", page), name
    assert text.count("out of memory: wanted 12 GiB") >= 4  # the board, and each seed in the list of failures
    for row in leaderboard(comparison()):
        if row.kind == "layer":
            assert show_score(row.mean, "accuracy") in text
            for cell in row.cells:
                assert f"{cell['key']}" in text
    assert comparison()["command"] in html.unescape(page)


def test_guides_are_in_the_curves(page):
    charts = re.findall(r'<svg class="chart".*?</svg>', page, re.S)
    assert len(charts) == 7  # two learning curves, five costs
    for chart in charts[:2]:
        assert chart.count('class="guide') == 2
        assert set(LAYERS) <= set(re.findall(r'data-layer="([a-z0-9_]+)"', chart))
    assert all("chance 10 %" in chart and "baseline 62 %" in chart for chart in charts[2:])


def test_pictures_are_well_formed_and_described(page):
    found = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(found) > 20
    for text in found:
        root = ET.fromstring(text)
        assert root.get("aria-hidden") == "true" or (root.get("role") == "img" and len(root.get("aria-label", "")) > 5)
    images = [a for tag, a in Balanced(page).seen if tag == "img"]
    assert len(images) == 4 and all(a["alt"] for a in images)


@pytest.mark.parametrize(
    "hostile", ['"><script>alert(1)</script>', "' onload=alert(1) x='", "</pre></title><img src=x>", "{{ 7 * 7 }}"]
)
def test_text_is_escaped(tmp_path, hostile):
    plain, given = comparison(), comparison(hostile=hostile)
    for made, name in ((plain, "plain"), (given, "hostile")):
        made["layers"][0]["layer"] = "gru" if name == "plain" else f"gru{hostile}"
        write_page(made, tmp_path / f"{name}.html")
        write_picture(made, tmp_path / f"{name}.svg")
    tags = [[tag for tag, _ in Balanced((tmp_path / f"{n}.html").read_text()).seen] for n in ("plain", "hostile")]
    assert tags[0] == tags[1]  # no element was made or broken by the text
    attributes = [k for _, a in Balanced((tmp_path / "hostile.html").read_text()).seen for k in a]
    assert not [k for k in attributes if k.startswith("on")]
    assert ">49<" not in (tmp_path / "hostile.html").read_text()
    shapes = [[e.tag for e in ET.parse(tmp_path / f"{n}.svg").iter()] for n in ("plain", "hostile")]
    assert shapes[0] == shapes[1]


def test_the_board_is_in_order():
    rows = leaderboard(comparison())
    kinds = [r.kind for r in rows]
    assert kinds == ["layer"] * 5 + ["baseline", "chance", "failed"]
    assert [r.rank for r in rows if r.kind == "layer"] == [1, 2, 3, 4, 5]
    means = [r.mean for r in rows if r.scores]
    assert means == sorted(means, reverse=True)
    turned = comparison()
    turned["task"]["higher_is_better"] = False
    assert [r.kind for r in leaderboard(turned)][:2] == ["chance", "baseline"]
    assert leaderboard(turned)[-1].kind == "failed"


def test_partial_failures_keep_the_layer():
    made = comparison(broken=None)
    made["layers"][1]["cells"][0].update(status="failed", reason="timed out after 60 s at step 7")
    row = next(r for r in leaderboard(made) if r.name == "lstm")
    assert row.kind == "layer" and len(row.scores) == 2 and row.reasons == ("timed out after 60 s at step 7",)


def test_spread_is_of_the_seeds():
    for row in leaderboard(comparison(seeds=5)):
        if row.kind == "layer":
            assert row.sd == pytest.approx(np.std(row.scores, ddof=1))
            low, high = row.interval
            assert high - low == pytest.approx(2 * 2.776 * row.sd / math.sqrt(5))
    assert leaderboard(comparison(seeds=1))[0].sd is None


def test_csv_holds_every_run_in_full(tmp_path):
    made = comparison()
    write_csv(made, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 6 * 3
    assert [float(r["score"]) for r in rows[:2]] == [0.1, 0.62]
    cells = {c["key"]: c for e in made["layers"] for c in e["cells"]}
    for row in rows[2:]:
        cell = cells[row["key"]]
        assert row["status"] == cell["status"]
        assert row["status"] == "failed" or float(row["score"]) == cell["score"]  # to the last bit


def test_the_streaming_step_is_in_the_row_it_was_measured_on(tmp_path):
    made = comparison()
    write_csv(made, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        timed = [r for r in csv.DictReader(file) if r["latency_median_s"] or r["latency_p95_s"] or r["state_bytes"]]
    assert [r["key"] for r in timed] == [f"{name}0" for name in LAYERS]


def test_markdown_is_a_table(tmp_path):
    write_markdown(comparison(), tmp_path / "r.md")
    lines = (tmp_path / "r.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 7 and len({line.count("|") for line in table}) == 1
    assert any("**reservoir**: out of memory" in line for line in lines)


def test_picture_is_one_file(tmp_path):
    write_picture(comparison(), tmp_path / "new" / "compare.svg")
    text = (tmp_path / "new" / "compare.svg").read_text()
    root = ET.fromstring(text)
    assert set(re.findall(r"https?://[^\"']+", text)) == {"http://www.w3.org/2000/svg"}
    words = " ".join(t.text or "" for t in root.iter() if t.text)
    assert all(name in words for name in [*LAYERS, "chance", "baseline"])


def test_without_jinja2_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"pip install 'statewise\[plots\]'"):
        write_page(comparison(), tmp_path / "r.html")
    write_csv(comparison(), tmp_path / "r.csv")
    write_picture(comparison(), tmp_path / "r.svg")


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 99}', "{"])
def test_what_is_no_comparison_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(DataError, match=r"comparison\.json"):
        read_comparison(tmp_path)


def test_a_comparison_survives_its_file(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()))
    assert read_comparison(tmp_path) == comparison()


def test_nothing_finished(tmp_path):
    made = comparison(broken=None)
    for entry in made["layers"]:
        entry["streaming"] = None
        for cell in entry["cells"]:
            cell.update(status="failed", reason="killed", curve=[])
    write_page(made, tmp_path / "r.html")
    write_picture(made, tmp_path / "r.svg")
    write_markdown(made, tmp_path / "r.md")
    assert "No layer finished" in (tmp_path / "r.html").read_text()


def test_losses_read_the_right_way_round(tmp_path):
    made = comparison(broken=None)
    made["task"].update(metric="mse", higher_is_better=False, chance=1.2, baseline=0.9)
    for i, entry in enumerate(made["layers"]):
        for cell in entry["cells"]:
            cell["score"] = cell["validation_score"] = 10.0**-i
    write_page(made, tmp_path / "r.html")
    bars = re.findall(r'class="bar"[^>]* width="([\d.]+)"', (tmp_path / "r.html").read_text())
    assert len(bars) == 5 and [float(b) for b in bars] == sorted(map(float, bars), reverse=True)


@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=9), st.sampled_from(["log", "errors", "none"]))
def test_axes_keep_order_and_stay_inside(values, kind):
    axis = Axis(0.0005, 0.9995, 300, 10, log=kind == "log", errors=kind == "errors")
    places = [axis(v) for v in sorted(values)]
    assert places == sorted(places, reverse=True) and all(10 <= p <= 300 for p in places)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 12 and all(0.0005 <= t <= 0.9995 for t in ticks)


@given(st.floats(1e-6, 1e6), st.floats(1.5, 1e4), st.booleans())
def test_every_range_has_ticks(low, ratio, log):
    ticks = Axis(low, low * ratio, 0, 1, log=log).ticks(5)
    assert len(ticks) >= 2 and ticks == sorted(set(ticks))


@given(st.lists(st.floats(0, 200), min_size=1, max_size=10))
def test_labels_do_not_overlap(places):
    moved = sorted(_apart(places, 16, 0, 200))
    assert all(b - a >= 16 - 1e-6 for a, b in itertools.pairwise(moved))


def test_bands_span_the_seeds():
    points = ((0.0, 0.5, 0.4, 0.6), (10.0, 0.7, 0.6, 0.9))
    text = curves(
        [Curve("a", 0, points)], [Guide("chance", 0.1)], title="t", x_label="x", y_label="y", show_x=str, show_y=str
    )
    corners = re.search(r'class="band" points="([^"]+)"', text).group(1).split()
    line = re.search(r'class="line" points="([^"]+)"', text).group(1).split()
    assert len(corners) == 4
    for i in range(2):
        low, high = (float(c.split(",")[1]) for c in (corners[i], corners[-1 - i]))
        assert high < float(line[i].split(",")[1]) < low  # pixels grow downwards


def test_heat_is_a_png_of_the_numbers():
    rows = [[1.0, 0.0, -2.0], [0.5, -1.0, 2.0]]
    raw = base64.b64decode(heat(rows).removeprefix("data:image/png;base64,"))
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at : at + 8])
        body = raw[at + 8 : at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (2, 3)
    pixels = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(3, 1 + 2 * 4)[:, 1:].reshape(3, 2, 4)
    assert pixels[::-1, :, 3].tolist() == [[255, 128], [0, 255], [255, 255]]  # opacity: share of the channel's largest
    assert (pixels[0, 0, :3] != pixels[0, 1, :3]).any()  # the sign changes the hue


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (show_score(0.98765, "accuracy"), "98.8 %"), (show_score(0.012346, "mse"), "0.01235"),
        (show_score(math.nan, "mse"), "–"), (show_count(999), "999"), (show_count(12345), "12.3 k"),
        (show_count(2.5e9), "2.5 G"), (show_bytes(512), "512 B"), (show_bytes(1536), "1.5 KiB"),
        (show_bytes(1000 * 2**20), "1000 MiB"), (show_time(1.2e-4), "120 µs"), (show_time(0.0123), "12.3 ms"),
        (show_time(95), "1 min 35 s"), (show_time(7260), "2 h 1 min"), (show_time(None), "–"),
    ],
)  # fmt: skip
def test_numbers_as_words(shown, words):
    assert shown == words


def test_the_headline_says_when_nothing_beats_the_baseline(tmp_path):
    made = comparison()
    write_page(made, tmp_path / "a.html")
    made["task"]["baseline"] = 0.99
    write_page(made, tmp_path / "b.html")
    said = ["not better than the baseline" in (tmp_path / f"{n}.html").read_text() for n in "ab"]
    assert said == [False, True]


def test_the_page_says_what_its_numbers_are(tmp_path):
    made = comparison()
    made["environment"].update(workers=2, threads=4)
    write_page(made, tmp_path / "r.html")
    write_picture(made, tmp_path / "r.svg")
    page, picture = ((tmp_path / name).read_text() for name in ("r.html", "r.svg"))
    assert "2 × 4 threads" in page and "recurrent layers" not in page and "could reach" not in page
    for text in (*re.findall(r'<svg class="chart".*?</svg>', page, re.S)[:2], picture):
        assert {"chance (test)", "baseline (test)"} <= set(re.findall(r">([a-z]+ \(test\))<", text))


def test_curves_by_time_stand_at_the_seconds_of_the_log():
    made = comparison(seeds=2)
    for cell, pace in zip(made["layers"][0]["cells"], (1.0, 3.0)):
        for point in cell["curve"]:
            point["seconds"] = 100 + pace * point["step"]  # a slow start
    points = next(c for c in curves_of(made, "seconds") if c.name == made["layers"][0]["layer"]).points
    assert [p[0] for p in points] == [100 + 2 * step for step in range(50, 601, 50)]
    made["layers"][0]["cells"][0]["curve"][-1]["seconds"] = None  # not in the log
    found = [next(c for c in curves_of(made, by) if c.name == "gru").points for by in ("step", "seconds")]
    assert [len(points) for points in found] == [12, 11]


def test_no_tick_lies_above_a_perfect_score(tmp_path):
    made = comparison(broken=None)
    for entry in made["layers"]:
        for cell in entry["cells"]:
            cell["score"] = 1.0
            for point in cell["curve"]:
                point["score"] = 1.0
    write_page(made, tmp_path / "r.html")
    assert not re.search(r">1\d[1-9](\.\d)? %<|>10\d\.[1-9] %<", (tmp_path / "r.html").read_text())


def test_the_headline_says_when_the_first_the_first_two_overlap(tmp_path):
    made = comparison(broken=None)
    scores = {"gru": (0.97, 0.98), "lstm": (0.975, 0.96), "lru": (0.9, 0.91), "s5": (0.8, 0.8), "min_gru": (0.7, 0.7)}
    for entry in made["layers"]:
        for cell, score in zip(entry["cells"], (*scores[entry["layer"]], statistics.fmean(scores[entry["layer"]]))):
            cell["score"] = score
    write_page(made, tmp_path / "r.html")
    lead = re.search(r'<p class="lead">(.*?)</p>', Path(tmp_path / "r.html").read_text(), re.S).group(1)
    assert "cannot be told from <strong>lstm</strong>. " in lead


@pytest.mark.parametrize(("seeds", "told"), [(2, False), (5, True)])
def test_the_headline_reads_intervals_and_not_ranges(tmp_path, seeds, told):
    """Two seeds apart say little though their ranges do not meet; five of the same spread say more."""
    made = comparison(broken=None, seeds=seeds)
    made["layers"] = made["layers"][:2]
    for entry, centre in zip(made["layers"], (0.97, 0.95)):
        for cell in entry["cells"]:
            cell["score"] = centre + (0.004 if cell["seed"] % 2 else -0.004)
    write_page(made, tmp_path / "r.html")
    assert ("cannot be told from" not in (tmp_path / "r.html").read_text()) == told


def test_reports_are_made_again_from_a_folder(tmp_path, monkeypatch, capsys):
    from statewise.report.__main__ import main

    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--picture", str(tmp_path / "a.svg")])
    assert main() == 3 and capsys.readouterr().err.startswith("error[3]: ")
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()))
    assert main() == 0
    assert {p.name for p in tmp_path.iterdir()} >= {"a.svg", "report.html", "results.csv", "leaderboard.md"}
