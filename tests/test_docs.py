"""The code in README, CONTRIBUTING and docs runs: all python blocks of a page in one namespace, in order."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
FOUND = {page: BLOCK.findall(page.read_text()) for page in PAGES}
WITH_CODE = [page for page in PAGES if FOUND[page]]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    from statewise.core import layers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layers, "_entries", dict(layers._entries))  # a page may register a layer of its own
    space: dict = {"__name__": page.stem}
    line = 0
    for block in FOUND[page]:
        line = page.read_text().index(block)
        at = page.read_text()[:line].count("\n")
        exec(compile("\n" * at + block, str(page), "exec"), space)


def test_blocks_were_found():
    assert len(WITH_CODE) >= 6 and sum(map(len, FOUND.values())) >= 15


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
