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
    return put_all(config, {path: value})


def put_all(config: C, values: Mapping[str, Any]) -> C:
    """A copy of config with the fields at several dotted paths changed, all at once: some only fit together.

    >>> put_all({"a": {"b": 1, "c": 2}}, {"a.b": 3, "a.c": 4})
    {'a': {'b': 3, 'c': 4}}
    """
    changes = {path: value for path, value in values.items() if "." not in path}
    below: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        head, dot, rest = path.partition(".")
        if dot:
            below.setdefault(head, {})[rest] = value
    known = config if isinstance(config, Mapping) else [f.name for f in fields(config)] if is_dataclass(config) else []
    for head in [*changes, *below]:
        if head in known or (isinstance(config, Mapping) and head in changes):
            continue
        if isinstance(config, Mapping):
            raise Unknown(f"{next(p for p in values if p.startswith(head))!r}: no entry {head!r}; {near(head, known)}")
        raise Unknown(f"{type(config).__name__} has no field {head!r}; {near(head, known)}")
    for head, inner in below.items():
        changes[head] = put_all(config[head] if isinstance(config, Mapping) else getattr(config, head), inner)
    return {**config, **changes} if isinstance(config, Mapping) else replace(config, **changes)  # type: ignore


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
        yield put_all(base, dict(zip(axes, values, strict=True)))
