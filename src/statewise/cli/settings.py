"""FIELD=VALUE on a command line, read as what the field holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..core import UsageError, put

LETTERS = 200  # of a user's text repeated in an error


def dict_once(settings: Iterable[str]) -> dict[str, str]:
    """FIELD=VALUE texts as a dict; a field given twice is refused."""
    found: dict[str, str] = {}
    for text in settings:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {text[:LETTERS]!r}; expected FIELD=VALUE, as in --set train.lr=1e-3")
        if path in found:
            raise UsageError(f"--set {path}: given twice, as {found[path]!r} and as {value!r}")
        found[path] = value
    return found


def put_text(config: Any, path: str, text: str, shown: str = "") -> Any:
    """put, with the text read as what the field holds now."""
    shown = shown or path
    try:
        return put(config, path, _typed(_get(config, path), shown, text))
    except UsageError as error:
        raise UsageError(f"--set {shown}={text[:LETTERS]}: {error}") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"--set {shown}={text[:LETTERS]}: {error}") from None


def free(text: str) -> Any:
    """A number, true, false, null or a list where the text reads as one, else the text itself."""
    try:
        value = json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value


def _get(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return config


def _typed(now: Any, path: str, text: str) -> Any:
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
        raise UsageError(f"is a group; name an entry: {path}.NAME=VALUE")
    return free(text)
