"""The code in README, CONTRIBUTING and docs runs: all python blocks of a page in one namespace, in order."""

import pathlib
import re
import sys
import types

import pytest

import statewise.layers  # noqa: F401  registers them
from copied import Copy
from statewise.cli.list import layer_words
from statewise.comparing import launch
from statewise.core import layers
from statewise.tasks import tasks

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
FOUND = {page: BLOCK.findall(page.read_text()) for page in PAGES}
WITH_CODE = [page for page in PAGES if FOUND[page]]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "spawn", Copy)
    for registry in (layers, tasks):  # a page may register a layer or a task of its own
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # torch.compile looks a class's module up
    for block in FOUND[page]:
        before = page.read_text()[: page.read_text().index(block)]
        exec(compile("\n" * before.count("\n") + block, str(page), "exec"), vars(module))  # noqa: S102


def test_blocks_were_found():
    assert len(WITH_CODE) >= 6 and sum(map(len, FOUND.values())) >= 15


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_table_of_layers_is_current():
    """Written by statewise list layers --out docs/layers.md."""
    lines = [
        line.split(" | ")
        for line in (ROOT / "docs" / "layers.md").read_text().splitlines()
        if "arXiv:" in line or "doi:" in line
    ]
    shown = {line[0].removeprefix("| "): line[1] for line in lines}
    assert shown == {info.name: layer_words(info) for info in layers}
