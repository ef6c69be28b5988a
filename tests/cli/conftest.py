"""Tiny trained runs, made once per session, and a way to call the command line in this process."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from statewise.cli import main

SMALL = ["--layer", "min_gru", "--width", "4", "--depth", "1", "--set", "train.steps=2", "--device", "cpu"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys, monkeypatch) -> Callable[..., Said]:
    """call("stream", "run", stdin=b"...") -> code, out, err."""

    def run(*argv: str, stdin: bytes = b"") -> Said:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Trained for two steps each: adding (numbers), copy (ids), text (bytes), classes (a CSV with labels),
    ahead (a CSV to forecast), targets (a CSV with targets)."""
    place = tmp_path_factory.mktemp("runs")
    text = place / "some.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    table = place / "some.csv"
    rows = [
        f"{i},{t},{i % 2 + t / 10},{i % 2 * 5 + 100},{'dog' if i % 2 else 'cat'}" for i in range(20) for t in range(6)
    ]
    table.write_text("series,time,a,b,label\n" + "\n".join(rows) + "\n")
    steps = [(20 + math.sin(t / 3) + t / 10, 500 * math.cos(t / 5)) for t in range(90)]
    for name, header in (("ahead", "a,b"), ("targets", "a,target")):
        (place / f"{name}.csv").write_text("\n".join([header, *(f"{a},{b}" for a, b in steps)]) + "\n")
    asked = {
        "adding": ["adding", "--set", "task.length=6"],
        "copy": ["copy", "--set", "task.length=4", "--set", "task.copied=2"],
        "text": ["text_file", "--data", str(text), "--set", "task.length=16"],
        "classes": ["series", "--data", str(table)],
        "ahead": ["series", "--data", str(place / "ahead.csv"), "--set", "task.horizon=2"],
        "targets": ["series", "--data", str(place / "targets.csv")],
    }
    for name, words in asked.items():
        assert main(["train", *words, *SMALL, "--run", str(place / name)]) == 0
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"0.5,1\n"))
    try:
        assert main(["stream", str(place / "adding"), "--save-state", str(place / "adding.state")]) == 0
    finally:
        sys.stdin = stdin
    return {name: place / name for name in asked} | {"files": place}
