"""Names to entries. A layer registers itself with its paper, its tiny examples and its size at a given width."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import Unknown, UsageError
from .layer import RecurrentLayer

T = TypeVar("T")


class Registry(Generic[T]):
    """Refuses duplicates; an unknown name says what was near it.

    A class that is defined anew, as in a cell of a notebook that is run again, takes the place of the old one.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        taken = self._entries.get(name)
        if taken is not None and _place(taken) != _place(entry):
            what = getattr(taken, "cls", taken)
            raise UsageError(f"{self.kind} {name!r} is already registered by {what!r}; choose another name")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise Unknown(f"unknown {self.kind} {name!r}; {near(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        return sorted(self._entries)


def _place(entry: Any) -> Any:
    """Where the class of an entry is written; an entry without one is a place of its own."""
    cls = getattr(entry, "cls", None)
    return (cls.__module__, cls.__qualname__) if cls is not None else object()


def near(name: str, known: Any) -> str:
    """'near: ...' with the closest names, or a dozen of those that there are."""
    close = difflib.get_close_matches(name, list(known), n=3)
    if close:
        return f"near: {', '.join(close)}"
    names = sorted(known)
    return f"known: {', '.join(names[:12])}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


@dataclass(frozen=True)
class LayerInfo:
    """What the registry knows of a layer class."""

    name: str
    cls: type
    paper: str
    examples: tuple[Mapping[str, Any], ...]
    sized: Callable[[int], dict[str, Any]]
    known_failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the class docstring: the recurrence."""
        return (self.cls.__doc__ or "").strip().split("\n")[0]


layers: Registry[LayerInfo] = Registry("layer")


def register_layer(
    name: str,
    *,
    paper: str,
    examples: list[dict[str, Any]],
    sized: Callable[[int], dict[str, Any]],
    known_failures: Mapping[str, str] | None = None,
) -> Callable[[type], type]:
    """Put a layer where the tests, the command line and the model builders find it.

    examples: constructor arguments of tiny instances for the conformance suite.
    sized: constructor arguments of an ordinary instance of a given width (in and out), for models and `compare`.
    known_failures: check name to reason; strict, so a check that passes after all fails the suite.

    Raises UsageError for the name of another class, for one that no pattern of layers could hold, and for what is no
    layer.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise UsageError(f"register_layer: name {name!r}; expected letters, digits and _, as in my_layer")

    def decorate(cls: type) -> type:
        if not (isinstance(cls, type) and issubclass(cls, RecurrentLayer)):
            raise UsageError(f"register_layer: {cls!r} is no layer; expected a subclass of statewise.RecurrentLayer")
        layers.add(name, LayerInfo(name, cls, paper, tuple(examples), sized, known_failures or {}))
        return cls

    return decorate
