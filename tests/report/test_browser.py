"""The report in a real browser, where there is one: no errors, no requests, no sideways scrolling, charts that show."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from synthetic import comparison, several

from statewise.report import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DARK = "--blink-settings=preferredColorScheme=0"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")]

# appended to the page: what a person would see, handed to the page around it
PROBE = """<script>addEventListener("load", () => {
  const shown = (e) => e.getBoundingClientRect().width > 50 && e.getBoundingClientRect().height > 50;
  const wide = [...document.querySelectorAll("body *")].filter((e) =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, svg, .hidden, thead"));
  const table = document.querySelector("table.board"), head = table.tHead.rows[0].cells[3];
  const column = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[3]?.dataset.value || NaN)).slice(0, 5);
  head.click();
  const down = column();
  head.click();
  const up = column();
  document.querySelector("table.board tr[data-layer]").dispatchEvent(new Event("mouseenter"));
  const charts = [...document.querySelectorAll("svg.chart")].filter((c) => c.querySelector(".axis"));
  const costs = [...document.querySelector(".choose").querySelectorAll("figure")];
  const chosen = [];
  for (const label of document.querySelector(".choose").querySelectorAll("label")) {
    label.click();
    chosen.push(costs.map(shown));
  }
  parent.postMessage(JSON.stringify({
    requests: performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:")),
    wide: wide.map((e) => e.tagName + "." + e.getAttribute("class")), width: innerWidth,
    scroll: document.documentElement.scrollWidth - innerWidth,
    down: down.every((v, i) => i === 0 || v <= down[i - 1]), up: up.every((v, i) => i === 0 || v >= up[i - 1]),
    lit: document.querySelectorAll(".lit").length, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    charts: charts.map((c) => [c.querySelectorAll(".series .mark").length, c.querySelectorAll(".tick").length]),
    drawn: charts.filter((c) => !c.closest(".choose")).every(shown), chosen,
    ids: [...document.querySelectorAll("[id]")].map((e) => e.id),
    links: [...document.querySelectorAll("a[href]")].every((a) => document.getElementById(a.hash.slice(1))),
  }), "*");
});</script>"""

# a window of a browser is at least 500 pixels wide: the page stands in a frame as wide as a phone
FRAME = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>?</title>
<script>addEventListener("message", (e) => { document.title = e.data; });</script>
<body style="margin:0"><iframe src="report.html" style="border:0;width:WIDTHpx;height:3000px"></iframe></body>"""


def browse(found: dict[str, Any], width: int, tmp_path: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """What the probe saw, and the browser's log."""
    assert CHROMIUM
    page = tmp_path / "report.html"
    write_page(found, page)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
         f"--window-size={max(width, 500)},1200", "--virtual-time-budget=4000", *flags, "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=250, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, "the script did not run"
    return json.loads(html.unescape(title.group(1))), done.stderr


@pytest.mark.parametrize("flags", [[], [DARK]], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("made", [comparison, several], ids=["one", "several"])
def test_the_page_in_a_browser(tmp_path, made, width, flags):
    seen, log = browse(made(), width, tmp_path, *flags)
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    assert seen["width"] == width and seen["dark"] == bool(flags)
    assert seen["requests"] == [] and seen["wide"] == [] and seen["scroll"] <= 0
    assert seen["down"] and seen["up"] and seen["lit"] >= 7  # sorting works; a row lights up in every chart
    # two learning curves and five costs, with lengths one more on each of three boards; a mark for each of five layers
    assert len(seen["charts"]) == (7 if made is comparison else 3 * 8)
    assert all(marks >= 5 and ticks >= 4 for marks, ticks in seen["charts"]) and seen["drawn"]
    assert seen["chosen"][:-1] == [[i == j for j in range(5)] for i in range(5)] and seen["chosen"][-1] == [True] * 5
    assert len(set(seen["ids"])) == len(seen["ids"]) and seen["links"]
