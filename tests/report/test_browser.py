"""The report in a real browser, where there is one: no errors, no requests, no sideways scrolling."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic import comparison

from statewise.report import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")]

# appended to the page: what a person would see, written into the title of the document
PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter((e) =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, svg, .hidden, thead"));
  const head = document.querySelectorAll(".sortable thead th")[3];
  const column = () =>
    [...document.querySelectorAll(".sortable tbody tr")].map((r) => Number(r.cells[3]?.dataset.value || NaN));
  head.click();
  const down = column().slice(0, 5);
  head.click();
  const up = column().slice(0, 5);
  document.querySelector("tr[data-layer]").dispatchEvent(new Event("mouseenter"));
  document.title = JSON.stringify({
    requests: performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:")),
    wide: wide.map((e) => e.tagName + "." + e.getAttribute("class")),
    scroll: document.documentElement.scrollWidth - innerWidth,
    down: down.every((v, i) => i === 0 || v <= down[i - 1]), up: up.every((v, i) => i === 0 || v >= up[i - 1]),
    lit: document.querySelectorAll(".lit").length, dark: matchMedia("(prefers-color-scheme: dark)").matches,
  });
});</script>"""


def browse(page: Path, width: int, tmp_path: Path, *flags: str) -> tuple[str, str]:
    """The document after its scripts, and the browser's log."""
    assert CHROMIUM
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / f'profile{width}{len(flags)}'}", "--enable-logging=stderr", "--v=0",
         f"--window-size={width},1200", "--virtual-time-budget=4000", *flags, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=110, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("width", "flags"), [(1280, []), (500, []), (900, ["--blink-settings=preferredColorScheme=0"])]
)
def test_the_page_in_a_browser(tmp_path, width, flags):
    import html
    import json

    page = tmp_path / "report.html"
    write_page(comparison(), page)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    document, log = browse(page, width, tmp_path, *flags)
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    title = re.search(r"<title>(\{.*?\})</title>", document)
    assert title, "the script did not run"
    seen = json.loads(html.unescape(title.group(1)))
    assert seen["requests"] == [] and seen["wide"] == [] and seen["scroll"] <= 0
    assert seen["down"] and seen["up"] and seen["lit"] >= 7  # sorting works; a row lights up in every chart
    assert seen["dark"] == bool(flags)
