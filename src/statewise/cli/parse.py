"""Flags to Options by tyro, and its boxes of many lines to one line that names the nearest flag."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional as Positional

WIDTH = 80  # columns of --help
PLAIN = {  # words of Python and tyro in words for people
    r"^Error parsing ": "",
    r"invalid literal for int\(\) with base 10: ": "expected a whole number, got ",
    r"could not convert string to float: ": "expected a number, got ",
    r"Expected 1 values": "expected one",
    r"^Missing from statewise \w+: (\{.*?\}) .*": r"\1 is missing",
    r"^Missing from statewise \w+: ([A-Z]+) (.*?)\.?( \(required.*)?$": r"\1 is missing: \2",
}

O = TypeVar("O")
T = TypeVar("T")

Repeated = Annotated[tuple[T, ...], tyro.conf.UseAppendAction]  # --set a=1 --set b=2


class Wrong(Exception):
    """What is wrong with the arguments, in one line."""


def parse(verb: str, options: type[O], args: Sequence[str]) -> O | None:
    """Options from arguments; None where --help was asked for and has been printed. Raises Wrong."""
    if "--help" not in args and "-h" not in args:
        known = _flags(options)
        for arg in args:
            flag = arg.split("=")[0]
            if flag.startswith("--") and flag not in known:
                hint = f"; fields go in --set, as in --set train.{flag[2:]}=VALUE" if "--set" in known else ""
                raise Wrong(f"unknown flag {flag!r}; {nearest(flag, known)}{hint}")
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(
                options,
                prog=f"statewise {verb}",
                args=_spread([_dashes(arg) for arg in args], _flags(options, "Repeated")),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if end.code:
            raise Wrong(f"{_one_line(err.getvalue())}; see statewise {verb} --help") from None
    for line in out.getvalue().splitlines():
        indent = " " * 8 if line.startswith("usage:") else ""
        print(line if len(line) <= WIDTH else textwrap.fill(line, WIDTH, subsequent_indent=indent))
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """'near: ...' or all that is known. As core.near, which cannot be had without torch."""
    names = list(known)
    if not names:
        return "it takes none"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"near: {', '.join(close)}" if close else f"known: {', '.join(names)}"


def _flags(options: Any, kind: str = "") -> list[str]:
    """Every flag that Options takes, or those of one kind. A positional field takes none."""
    found = [f.name for f in fields(options) if "Positional" not in str(f.type) and kind in str(f.type)]
    return [f"--{name.replace('_', '-')}" for name in found]


def _spread(args: list[str], repeated: list[str]) -> list[str]:
    """--set a=1 b=2 as --set a=1 --set b=2."""
    found: list[str] = []
    last = ""
    for arg in args:
        if arg.startswith("--"):
            last = arg
        elif "=" in arg and last in repeated and found[-1] != last:
            found.append(last)
        found.append(arg)
    return found


def _dashes(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def _one_line(box: str) -> str:
    """The message in tyro's box: below the title, above the rule under which the help text stands."""
    kept: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        line = line.strip(" │|")
        if not line.strip("─-"):
            if kept:
                break
            continue
        kept.append(line)
    text = " ".join(" ".join(kept).split())[:300].rstrip(".")
    for theirs, ours in PLAIN.items():
        text = re.sub(theirs, ours, text)
    return text
