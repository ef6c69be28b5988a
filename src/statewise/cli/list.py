"""statewise list: what there is to use."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Literal

from .parse import Positional

if TYPE_CHECKING:
    from ..core.registry import LayerInfo


@dataclass(frozen=True)
class Options:
    """List layers, tasks, models and ops."""

    what: Positional[Literal["all", "layers", "tasks", "models", "ops"]] = "all"
    """Which of them."""
    out: str = ""
    """Of layers: a Markdown file that a table is written to, with what each costs."""


def run(options: Options) -> int:
    from ..core.files import check_writable, replace_file
    from .show import console

    if options.out:
        check_writable(options.out)
        replace_file(options.out, ["\n".join(layers_table()).encode() + b"\n"])
        print(f"written to {options.out}")
        return 0
    for name, show in SHOW.items():
        if options.what in (name, "all"):
            console().print(f"{name}\n" if options.what == "all" else "", end="")
            show()
            console().print()
    return 0


def layers() -> None:
    from ..core import layers, nbytes
    from ..report import show_bytes

    importlib.import_module("statewise.layers")
    print(f"{'name':<18}{'state at width 64':<19}paper")
    for info in sorted(layers, key=lambda info: info.name):
        state = info.cls(**info.sized(64)).initial_state(1)
        print(f"{info.name:<18}{show_bytes(nbytes(state)):<19}{info.paper}")
        print(textwrap.fill(info.summary, 78, initial_indent="    ", subsequent_indent="        "))


def layers_table(width: int = 64) -> Iterator[str]:
    """Markdown: every layer, what it is at an ordinary size, and what it costs there."""
    from ..core import layers
    from ..interpret import facts
    from ..report import show_bytes, show_count

    importlib.import_module("statewise.layers")
    yield f"""# Layers

What `statewise list layers --out FILE` writes: every registered layer at its ordinary size of width {width}, in
float32. Operations are additions and multiplications a token, counted: of `step`, and of forward and backward together
by the torch backends over 64 steps. `statewise explain NAME` says the same of one layer at any size.

| layer | recurrence | state | how the state moves | step | training | paper |
|---|---|---|---|---|---|---|"""
    for info in sorted(layers, key=lambda info: info.name):
        found = facts(info.cls(**info.sized(width)))
        state = show_bytes(found.state_bytes) + (", grows" if found.grows else "")
        counts = f"{show_count(found.stream)} | {show_count(found.train)}"
        yield f"| {info.name} | {layer_words(info)} | {state} | {found.transition} | {counts} | {info.paper} |"


def layer_words(info: LayerInfo) -> str:
    return info.summary.replace("|", "\\|")


def tasks() -> None:
    from ..report import show_score
    from ..tasks import tasks

    print(f"{'name':<22}{'kind':<16}{'metric':<15}{'chance':<10}data")
    for info in sorted(tasks, key=lambda info: info.name):
        cls, here = info.cls, on_this_machine(info.cls.data)
        own = "path" in {field.name for field in fields(cls)}  # type: ignore[arg-type]
        fixed = {True: "here", False: "not here", None: "your own" if own else "generated"}[here]
        chance = "" if own or here is False else show_score(cls().chance(), cls.metric)
        kind, metric = ("by your file", "") if " or " in cls.kind else (cls.kind, cls.metric)  # the data decides
        print(f"{info.name:<22}{kind:<16}{metric:<15}{chance:<10}{fixed}")
        if here is not None:
            print(textwrap.fill(cls.data, 78, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))


def on_this_machine(data: str) -> bool | None:
    """Whether the source that a task's line of data names can be read; None where it names none."""
    from ..tasks.sources import sources

    named = re.search(r"statewise data get (\w+)", data)
    return sources[named[1]].here() if named else None


def models() -> None:
    from .. import models
    from ..core import RecurrentLayer
    from .show import table

    rows = []
    for name in sorted(models.__all__):
        cls = getattr(models, name)
        if isinstance(cls, type) and (issubclass(cls, RecurrentLayer) or is_dataclass(cls)):
            kind = "layer" if issubclass(cls, RecurrentLayer) else "description"
            rows.append((name, kind, (cls.__doc__ or "").split("\n")[0]))
    table(("name", "is", "what"), rows)


def ops() -> None:
    from ..ops import ops
    from .show import table

    rows = []
    for name, op in sorted(ops.items()):
        doc = (op.reference.__doc__ or "").strip().split("\n")[0]
        rows.append((name, ", ".join([*op.backends, "reference"]), doc))
    table(("name", "backends, first choice first", "what"), rows)


SHOW: dict[str, Callable[[], None]] = {"layers": layers, "tasks": tasks, "models": models, "ops": ops}
