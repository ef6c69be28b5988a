"""statewise check: the conformance suite on a layer of the user's own, or on a registered one."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .parse import Positional, Repeated


@dataclass(frozen=True)
class Options:
    """Check that a layer keeps the protocol: the same numbers whole, in chunks and step by step, and more.

    Runs code: MODULE is imported from the current directory.
    """

    layer: Positional[str]
    """module:Class of your own, or the name of a registered layer."""
    args: Repeated[str] = ()
    """NAME=VALUE for the constructor, once for each: --args width=4 --args hidden=8."""
    slow: bool = False
    """Also the checks that take long."""


def run(options: Options) -> int:
    from ..core import layers
    from ..testing import check_layer, examples_of
    from .settings import dict_once, free

    importlib.import_module("statewise.layers")
    given = {name: free(text) for name, text in dict_once(options.args).items()}
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
