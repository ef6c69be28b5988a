"""Frozen dataclasses as configuration: change one field by its path, or lay out a grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from .errors import Unknown
from .registry import near

C = TypeVar("C")

# Metadata of a field that came after records were written: where it has its default it is left out of them, so that
# their keys stay what they were.
LATER = {"later": True}


def put(config: C, path: str, value: Any) -> C:
    """A copy of config with the field at a dotted path changed.

    >>> put({"a": {"b": 1}}, "a.b", 2)
    {'a': {'b': 2}}
    """
    head, _, rest = path.partition(".")
    if isinstance(config, Mapping):
        if rest and head not in config:
            raise Unknown(f"{path!r}: no entry {head!r}; {near(head, config)}")
        return {**config, head: put(config[head], rest, value) if rest else value}  # type: ignore[return-value]
    known = [f.name for f in fields(config)] if is_dataclass(config) else []
    if head not in known:
        raise Unknown(f"{type(config).__name__} has no field {head!r}; {near(head, known)}")
    return replace(config, **{head: put(getattr(config, head), rest, value) if rest else value})  # type: ignore[type-var]


def recorded(config: Any) -> dict[str, Any]:
    """Name to value of the fields of a dataclass that a record holds."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.init and not ("later" in f.metadata and getattr(config, f.name) == f.default)
    }


def grid(base: C, axes: Mapping[str, Iterable[Any]]) -> Iterator[C]:
    """The product of several values at several paths, the last path varying fastest.

    >>> [c["x"] + c["y"] for c in grid({"x": 0, "y": 0}, {"x": [10, 20], "y": [1, 2]})]
    [11, 12, 21, 22]
    """
    for values in itertools.product(*axes.values()):
        config = base
        for path, value in zip(axes, values, strict=True):
            config = put(config, path, value)
        yield config
