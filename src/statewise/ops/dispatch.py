"""One operation, several backends.

The decorated function is the specification: its signature, its documentation and, by its body, the reference result.
Backends stand in order of preference, each with a probe that says why it cannot take these inputs.

Chosen is the backend named by `backend=`, else by `use_backend`, else by the environment variable STATEWISE_BACKEND,
else the first that is willing, else the reference. One that was asked for and cannot run raises with its reason.

Everything here is traced by torch.compile, which guards on plain globals and attributes but follows neither imports
nor context variables: those two stand in functions that it is told to call while tracing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import Unknown, UsageError, near

ops: dict[str, Op] = {}
Note = Callable[["Op", str, tuple[Any, ...], Mapping[str, Any]], None]
Route = Callable[["Op"], Callable[..., Any]]
_note: Note | None = None
_route: Route | None = None
_chosen: str | None = os.environ.get("STATEWISE_BACKEND") or None
_by_target: dict[str, Backend] = {}


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op runs on this backend, or on its reference where it has no backend of that name.

    None gives the choice back. Holds for all threads. Raises Unknown for a name that no op has.
    """
    global _chosen
    if name is not None and name not in _known():
        raise _unknown(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def asked_for() -> str | None:
    """The backend named by use_backend or STATEWISE_BACKEND."""
    return _chosen


@contextlib.contextmanager
def observe(note: Note) -> Iterator[None]:
    """Within the block every call of an op is told first: note(op, name of what runs, args, kwargs)."""
    global _note
    before, _note = _note, note
    try:
        yield
    finally:
        _note = before


@contextlib.contextmanager
def routed(route: Route | None) -> Iterator[None]:
    """Within the block route(op) runs in place of every op, as when a sequence is cut over ranks; None: the op itself.

    Holds for all threads.
    """
    global _route
    before, _route = _route, route
    try:
        yield
    finally:
        _route = before


def _while_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compiler.assume_constant_result does, without the seconds that importing the compiler takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Backend:
    """One implementation of an op.

    target: "module:function", imported at the first use, or the function itself.
    requires: packages without which it cannot run.
    limits: called as the op is; returns the reason why it cannot take these arguments, or None. Metadata only.
    """

    def __init__(
        self,
        name: str,
        target: str | Callable[..., Any],
        *,
        devices: tuple[str, ...],
        dtypes: tuple[torch.dtype, ...],
        requires: tuple[str, ...] = (),
        limits: Callable[..., str | None] | None = None,
    ):
        self.name, self.devices, self.dtypes, self.requires, self.limits = name, devices, dtypes, requires, limits
        self.target = target if isinstance(target, str) else f"{target.__module__}:{target.__name__}"
        self.function = None if isinstance(target, str) else target
        _by_target[self.target] = self

    def why_not(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """None if this backend can take these inputs, else the reason. Looks at metadata only."""
        missing = _first_missing(self.requires)
        if missing is not None:
            return f"{missing} is not installed"
        for t in (*args, *kwargs.values()):
            if isinstance(t, Tensor):
                if t.device.type not in self.devices:
                    return f"device {t.device.type} (takes {', '.join(self.devices)})"
                if t.dtype not in self.dtypes and (t.is_floating_point() or t.is_complex()):
                    return f"dtype {t.dtype} (takes {', '.join(str(d) for d in self.dtypes)})"
        return None if self.limits is None else self.limits(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _load(self.target)
        return self.function(*args, **kwargs)  # type: ignore[misc]


@_while_tracing
def _load(target: str) -> None:
    backend = _by_target[target]
    if backend.function is None:
        module, _, name = target.partition(":")
        backend.function = getattr(importlib.import_module(module), name)


@_while_tracing
def _first_missing(packages: tuple[str, ...]) -> str | None:
    return _find_missing(packages)


@functools.cache
def _find_missing(packages: tuple[str, ...]) -> str | None:
    return next((p for p in packages if importlib.util.find_spec(p) is None), None)


class Op:
    """A callable with the signature of its reference, plus `backend=`."""

    def __init__(
        self,
        reference: Callable[..., Any],
        backends: Iterable[Backend],
        samples: Callable[..., Iterable[dict[str, Any]]],
        check: Callable[..., None] | None,
    ):
        functools.update_wrapper(self, reference)
        self.name, self.reference, self.samples, self.check = reference.__name__, reference, samples, check
        self.backends = {b.name: b for b in backends}
        ops[self.name] = self

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if self.check is not None:
            self.check(*args, **kwargs)
        if _route is not None:
            return _route(self)(*args, **kwargs)
        function = self.choose(backend, args, kwargs)
        if _note is not None:
            _note(self, getattr(function, "name", "reference"), args, kwargs)
        return function(*args, **kwargs)

    def choose(self, name: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        """The function that a call with these arguments runs; name as in `backend=`.

        Raises UsageError if a backend was asked for that cannot run, Unknown if there is none of that name.
        """
        asked = name or _chosen
        if asked is None:
            for candidate in self.backends.values():
                if candidate.why_not(args, kwargs) is None:
                    return candidate
            return self.reference
        if asked not in self.backends:
            if asked not in _known():
                raise _unknown(asked)
            if name is not None and name != "reference":
                raise Unknown(f"{self.name} has no backend {name!r}; known: {', '.join([*self.backends, 'reference'])}")
            return self.reference
        reason = self.backends[asked].why_not(args, kwargs)
        if reason is not None:
            raise UsageError(f"{self.name}: backend {asked!r} was asked for but cannot run: {reason}")
        return self.backends[asked]

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Backend name to 'ok' or the reason it would be passed over, in order of preference; the reference is last."""
        return {b.name: b.why_not(args, kwargs) or "ok" for b in self.backends.values()} | {"reference": "ok"}

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(self.backends)}, reference>"


def op(
    *backends: Backend, samples: Callable[..., Iterable[dict[str, Any]]], check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Op]:
    """Make an Op of its reference.

    samples(device, dtype): keyword arguments of tiny calls, the nasty ones too; the tests cross them with backends.
    check: called as the op is; raises UsageError for arguments that no backend could take.
    """
    return lambda reference: Op(reference, backends, samples, check)


def _known() -> list[str]:
    return ["reference", *{name: None for o in ops.values() for name in o.backends}]


def _unknown(name: str) -> Unknown:
    return Unknown(f"no op has a backend {name!r}; {near(name, _known())}; one of: {', '.join(_known())}")
