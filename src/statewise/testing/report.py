"""Run the suite on one layer and say what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from ..core import RecurrentLayer, UsageError, layers
from .check import Check, Skipped, checks
from .sample import Layer, build, examples_of, prepare

Status = Literal["passed", "failed", "skipped", "known failure"]


@dataclass(frozen=True)
class Outcome:
    """What came of one check. words: what failed and by how much, or why it was skipped; empty if it passed."""

    name: str
    group: str
    status: Status
    words: str
    seconds: float
    law: str

    def __str__(self) -> str:
        return f"{self.status:7} {self.group}: {self.name}" + (f": {self.words}" if self.words else "")


@dataclass(frozen=True)
class Report:
    """What came of all checks of one layer."""

    layer: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """No check failed; a known failure is none, a known failure that passes is one."""
        return not self.failed

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return self.of("failed")

    def of(self, status: Status) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.status == status)

    def lines(self) -> list[str]:
        """For people: what failed, what was skipped and why, the count of the rest by group."""
        found = [f"{self.layer}: {'conforms' if self.ok else 'does not conform'}"]
        for group in dict.fromkeys(o.group for o in self.outcomes):
            here = [o for o in self.outcomes if o.group == group and o.status != "skipped"]
            passed = sum(o.status == "passed" for o in here)
            found.append(f"  {group}: {passed} of {len(here)} passed")
            for o in here:
                if o.status == "failed":
                    found += [f"    FAILED {o.name}: {o.words}", f"      the law: {o.law}"]
                elif o.status == "known failure":
                    found.append(f"    known failure {o.name}: {o.words}")
        for reason in dict.fromkeys(o.words for o in self.of("skipped")):
            names = ", ".join(o.name for o in self.of("skipped") if o.words == reason)
            found.append(f"  skipped, {reason}: {names}")
        counts = ", ".join(f"{len(self.of(s))} {s}" for s in ("passed", "failed", "skipped") if self.of(s))
        known = f", {len(self.of('known failure'))} known failures" if self.of("known failure") else ""
        seconds = sum(o.seconds for o in self.outcomes)
        return [*found, f"  {len(self.outcomes)} checks in {seconds:.1f} s: {counts}{known}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def checks_for(layer: Layer) -> list[Check]:
    """The checks that apply to a layer, in order."""
    return [c for c in checks if c.why_not(layer) is None]


def known_failures(layer: Layer | type) -> dict[str, str]:
    """Check name to reason, from the layer's registration."""
    cls = layer if isinstance(layer, type) else type(layer)
    found = next((info.known_failures for info in layers if info.cls is cls), {})
    return {name.removeprefix("check_"): reason for name, reason in found.items()}


def check_layer(
    layer: RecurrentLayer[Any] | type,
    example: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    slow: bool = False,
) -> Report:
    """Try every law of the protocol on a layer, and report each in words.

    layer: an instance, of which a copy is checked; or a class, made with the constructor arguments `example`. Without
    them the first registered example is taken, else the first of the class's attribute `examples`, else small values
    for arguments named width, hidden, heads and the like.

    slow: also the checks that take long. Raises UsageError for what is no layer or cannot be made.

    >>> from statewise.layers import GRULayer
    >>> check_layer(GRULayer, dict(width=3, hidden=4)).ok
    True
    """
    if not isinstance(layer, RecurrentLayer) and not (isinstance(layer, type) and issubclass(layer, RecurrentLayer)):
        raise UsageError(f"{layer!r} is no layer; expected a subclass of statewise.RecurrentLayer, or an instance")

    def fresh() -> Layer:
        if isinstance(layer, RecurrentLayer):
            return _again(layer)
        return build(layer, arguments)

    cls = layer if isinstance(layer, type) else type(layer)
    arguments: Mapping[str, Any] = {}
    if isinstance(layer, type):
        arguments = example or examples_of(layer)[0]
        try:
            build(layer, arguments)
        except Exception as error:
            given = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            raise UsageError(f"{cls.__name__}({given}) cannot be made: {type(error).__name__}: {error}") from error
    known = known_failures(cls)
    outcomes = tuple(run(c, fresh(), known.get(c.name)) for c in checks if slow or not c.slow)
    return Report(name or cls.__name__, outcomes)


def _again(layer: Layer) -> Layer:
    copied = prepare(layer)
    if "example" in layer.__dict__:
        copied.__dict__["example"] = layer.__dict__["example"]
    return copied


def run(check: Check, layer: Layer, known: str | None = None) -> Outcome:
    """One check on a layer made for it alone: a check may change its layer."""
    start = perf_counter()

    def outcome(status: Status, words: str) -> Outcome:
        return Outcome(check.name, check.group, status, words, perf_counter() - start, check.law)

    reason = check.why_not(layer)
    if reason is not None:
        return outcome("skipped", reason)
    try:
        check(layer)
    except Skipped as skip:
        return outcome("skipped", str(skip))
    except AssertionError as error:
        return outcome("known failure", known) if known else outcome("failed", str(error) or check.law)
    except Exception as error:  # a layer under test may raise anything
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return outcome("known failure", known) if known else outcome("failed", words)
    return (
        outcome("failed", f"passes, though a known failure: {known}; strike it off") if known else outcome("passed", "")
    )
