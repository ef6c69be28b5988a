"""statewise check: the conformance suite on a layer of the user's own, or on a registered one; or its precision."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parse import Positional, Repeated

if TYPE_CHECKING:
    from ..testing.parity import Row


@dataclass(frozen=True)
class Options:
    """Check that a layer keeps the protocol: the same numbers whole, in chunks and step by step, and more.

    Runs code: MODULE is imported from the current directory.
    """

    layer: Positional[str] = ""
    """module:Class of your own, or the name of a registered layer; with --parity also an op, or nothing for all."""
    args: Repeated[str] = ()
    """NAME=VALUE for the constructor, once for each: --args width=4 --args hidden=8."""
    slow: bool = False
    """Also the checks that take long."""
    parity: bool = False
    """Instead: how far each execution is from the float64 loop, for every op and decay and for layers."""
    steps: int = 4096
    """Of --parity: the length of the sequences."""
    out: str = ""
    """Of --parity: a Markdown file that the table is written to."""


def run(options: Options) -> int:
    from ..core import UsageError, layers
    from ..testing import check_layer, examples_of
    from .settings import dict_once, free

    importlib.import_module("statewise.layers")
    if options.parity:
        return parity(options)
    if not options.layer:
        raise UsageError("check needs a layer: module:Class, or a registered one; or --parity")
    given = {name: free(text) for name, text in dict_once(options.args, "--args").items()}
    if ":" in options.layer:
        cls = load(options.layer)
    else:
        cls = layers[options.layer].cls
    ok = True
    for example in [given] if given else examples_of(cls):
        check_arguments(options.layer, cls, example)
        shown = ", ".join(f"{name}={value!r}" for name, value in example.items())
        report = check_layer(cls, example, name=f"{options.layer}({shown})", slow=options.slow)
        print(report, flush=True)
        ok = ok and report.ok
    return 0 if ok else 1


def parity(options: Options) -> int:
    """Print the table, row by row as it is measured, and write it where it is wanted. 1 if a row is past its limit."""
    from ..core import UsageError, layers, near
    from ..core.files import check_writable
    from ..testing import build
    from ..testing.parity import CALLS, of_layer, of_ops

    if options.out:
        check_writable(options.out)
    if options.steps < 1:
        raise UsageError(f"--steps {options.steps}; expected at least 1")
    calls = [name for name in CALLS if name.split(" ")[0] == options.layer or not options.layer]
    infos = [info for info in layers if info.name == options.layer or not options.layer]
    if options.layer and not calls and not infos:
        known = [*(name.split(" ")[0] for name in CALLS), *layers.names()]
        raise UsageError(f"no op or layer {options.layer!r}; {near(options.layer, known)}")
    rows: list[Row] = []
    print(f"float32 against the float64 loop, T = {options.steps}: error in rms, limit, largest error", flush=True)

    def note(row: Row) -> None:
        rows.append(row)
        decay = "" if row.decay is None else f" decay {row.decay:.7g}"
        verdict = "" if row.ok else "   PAST THE LIMIT"
        print(
            f"{row.what}{decay}, {row.execution}: {row.rms:.1e} of {row.limit:.0e}, {row.worst:.1e}{verdict}",
            flush=True,
        )

    for row in of_ops(options.steps, only=calls) if calls else ():
        note(row)
    for info in infos:
        for row in of_layer(info.name, build(info.cls, info.examples[0]), options.steps):
            note(row)
    if options.out:
        Path(options.out).write_text(as_markdown(rows), encoding="utf-8")
        print(f"written to {options.out}")
    late = sum(not row.ok for row in rows)
    print(f"{len(rows) - late} of {len(rows)} within their limits")
    return 1 if late else 0


def as_markdown(rows: list[Row]) -> str:
    """One table for the ops, a column for each decay, and one for the layers, a column for each execution."""
    lines = [
        "# How exact every execution is",
        "",
        f"Error in float32 against the float64 loop on the same numbers, T = {rows[0].steps}: root mean square of ",
        "the error over that of the result; random inputs, decays as given, a layer's own decays. Limits: 1e-5",
        "for parallel forms up to 4,096 steps and 5e-5 beyond, 5e-6 and 1e-4 for the loop of an op, 1e-5 and 1e-4 for",
        "the steps of a layer, which works out its decays in float32 too. Bold is past its limit.",
        f"Written by `statewise check --parity --steps {rows[0].steps} --out FILE`.",
        "",
    ]
    for title, decided in (("Ops, by decay", True), ("Ops without a decay, and layers", False)):
        chosen = [row for row in rows if (row.decay is not None) == decided]
        columns = list(dict.fromkeys(_column(row) for row in chosen))
        found = {(_label(row), _column(row)): row for row in chosen}
        if not chosen:
            continue
        lines += [f"## {title}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for label in dict.fromkeys(_label(row) for row in chosen):
            cells = [found.get((label, column)) for column in columns]
            shown = ("" if c is None else f"{c.rms:.0e}" if c.ok else f"**{c.rms:.0e}**" for c in cells)
            lines.append(f"| {label} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def _label(row: Row) -> str:
    return row.what if row.decay is None else f"{row.what}, {row.execution}"


def _column(row: Row) -> str:
    return row.execution if row.decay is None else f"{row.decay:.7g}"


def check_arguments(name: str, cls: type, given: Mapping[str, Any]) -> None:
    """Raise UsageError where the constructor would not take them."""
    from ..core import UsageError, near

    known = inspect.signature(cls).parameters
    for argument in given:
        if argument not in known:
            raise UsageError(f"{name} has no argument {argument!r}; {near(argument, known)}")
    try:
        inspect.signature(cls).bind(**given)
    except TypeError as error:
        raise UsageError(f"{name}: {error}; give it with --args NAME=VALUE") from None


def load(place: str) -> type:
    """The class at module:Class, looked for from the current directory as `python -m` would."""
    from ..core import RecurrentLayer, UsageError, near

    module_name, _, name = place.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise UsageError(f"{place!r}: expected module:Class, as Python imports it from here: {dotted}:{name}")
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.util.find_spec(module_name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{module_name!r}: {error}") from None
    if found is None:
        raise UsageError(f"no module {module_name!r} here; expected module:Class with module.py in the current folder")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, RecurrentLayer)}
    if name not in classes:
        what = f"is not a RecurrentLayer: {vars(module)[name]!r}" if name in vars(module) else "is not there"
        own = [n for n, c in classes.items() if c.__module__ == module.__name__]
        raise UsageError(f"{place!r}: {name!r} {what}; {near(name, own) if own else 'the module has no layers'}")
    return classes[name]
