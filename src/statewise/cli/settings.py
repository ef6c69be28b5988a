"""FIELD=VALUE on a command line, read as what the field holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from ..core import UsageError, near

C = TypeVar("C")

LETTERS = 200  # of a user's text repeated in an error
FORM = {
    "--set": "FIELD=VALUE, as in --set train.lr=1e-3",
    "--args": "NAME=VALUE, as in --args width=4",
    "--grid": "FIELD=VALUES, as in --grid train.lr=1e-3,3e-3",
    "--where": "COLUMN=VALUE, as in --where layer=gru",
}


def dict_once(settings: Iterable[str], flag: str = "--set") -> dict[str, str]:
    """NAME=VALUE texts as a dict; a name given twice is refused."""
    found: dict[str, str] = {}
    for text in settings:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise UsageError(f"{flag} {text[:LETTERS]!r}; expected {FORM[flag]}")
        if path in found:
            raise UsageError(f"{flag} {path}: given twice, as {found[path]!r} and as {value!r}")
        found[path] = value
    return found


def put_texts(config: C, texts: Mapping[str, str], inside: str = "") -> C:
    """A copy of config with the fields at dotted paths changed, all at once, each text read as what the field holds.

    Raises UsageError for a name that is not there and for a value that does not fit. inside: how the config is called.
    """
    here = {path: text for path, text in texts.items() if "." not in path}
    heads = dict.fromkeys(path.partition(".")[0] for path in texts)
    below = {h: {p.partition(".")[2]: t for p, t in texts.items() if p.startswith(f"{h}.")} for h in heads}
    changes: dict[str, Any] = {}
    for head in heads:
        now = _get(config, head, inside)
        if below[head]:
            changes[head] = put_texts(now, below[head], f"{inside}{head}.")
        if head in here:
            try:
                changes[head] = _typed(now, here[head])
            except UsageError as error:
                raise UsageError(f"--set {inside}{head}={here[head][:LETTERS]}: {error}") from None
    try:
        return {**config, **changes} if isinstance(config, Mapping) else replace(config, **changes)  # type: ignore
    except (ValueError, TypeError) as error:
        given = " ".join(f"{inside}{path}={text[:LETTERS]}" for path, text in here.items())
        raise UsageError(f"--set {given}: {error}" if given else str(error)) from None


def value_of(config: Any, path: str, text: str, flag: str) -> Any:
    """A text as what the field at a dotted path holds. Raises UsageError where it cannot be read so."""
    inside, found = "", config
    try:
        for name in path.split("."):
            found, inside = _get(found, name, inside), f"{inside}{name}."
        return _typed(found, text)
    except UsageError as error:
        words = str(error)
        raise UsageError(
            words.replace("--set", flag, 1) if "--set" in words else f"{flag} {path}={text}: {words}"
        ) from None


def lengths(text: str) -> tuple[int, ...]:
    """40,80,160 as numbers. Raises UsageError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if any(not part.isdecimal() or not 0 < int(part) <= 10**9 for part in parts):
        raise UsageError(f"--lengths {text[:LETTERS]!r}; expected whole numbers with commas, as in 40,80,160")
    return tuple(map(int, parts))


def free(text: str) -> Any:
    """A number, true, false, null or a list where the text reads as one, else the text itself."""
    try:
        value = json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value


def _get(config: Any, name: str, inside: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    known = [field.name for field in fields(config) if field.init] if is_dataclass(config) else []
    if name not in known:
        raise UsageError(f"--set: unknown field {inside}{name}; {near(name, known)}")
    return getattr(config, name)


def _typed(now: Any, text: str) -> Any:
    if isinstance(now, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError("expected true or false")
        return text.lower() == "true"
    if isinstance(now, int | float):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or text != text.strip():
            raise UsageError("expected a finite number")
        if isinstance(now, int) and number != int(number):
            raise UsageError("expected a whole number")
        return int(number) if isinstance(now, int) else number
    if isinstance(now, str):
        return text
    if isinstance(now, tuple):
        return tuple(free(part) for part in text.split(",") if part)
    if isinstance(now, Mapping):
        raise UsageError("it is a group; name an entry of it, .NAME=VALUE")
    return free(text)
