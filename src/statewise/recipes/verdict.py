"""Whether a claim holds by the numbers that are there, and which numbers those were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core import UsageError, near
from .recipe import SCALES, SEEDS, Claim, Recipe, Scale, find, names
from .results import Results, Values, read_results

Outcome = Literal["holds", "does not hold", "not run", "stale"]


@dataclass(frozen=True)
class Verdict:
    """read: (run, number) to its values, in the order in which the claim asked for them. why: of what is not judged."""

    claim: Claim
    scale: Scale
    outcome: Outcome
    read: dict[tuple[str, str], Values]
    why: str = ""


class _Cannot(Exception):
    def __init__(self, outcome: Outcome, why: str):
        super().__init__(why)
        self.outcome, self.why = outcome, why


class Reader:
    """What a claim sees of the results; keeps what was read."""

    def __init__(self, recipe: Recipe, results: Results):
        self.results, self.keys = results, recipe.keys(results.scale)
        self.read: dict[tuple[str, str], Values] = {}

    def __call__(self, run: str, number: str | None = None) -> Values:
        """The values of a run's metric, or of another of its numbers, over the seeds."""
        entry = self._entry(run)
        number = number or entry["metric"]
        rows, wanted = self.results.rows(run), SEEDS[self.results.scale]
        failed = [row["failed"] for row in entry["seeds"].values() if "failed" in row]
        if len(rows) < wanted:
            raise _Cannot(
                "not run", f"{run} failed: {failed[0]}" if failed else f"{run}: {len(rows)} of {wanted} seeds"
            )
        known = rows[0]["numbers"]
        if number not in known:
            raise UsageError(f"{self.results.recipe}: run {run} has no number {number!r}; {near(number, known)}")
        self.read[run, number] = self.results.values(run, number)
        return self.read[run, number]

    def baseline(self, run: str) -> float:
        return self._fixed(run, "baseline")

    def chance(self, run: str) -> float:
        return self._fixed(run, "chance")

    def _fixed(self, run: str, name: str) -> float:
        self(run)
        found = self.results.fixed(run, name)
        if found is None:
            raise UsageError(f"{self.results.recipe}: run {run} has no {name}")
        return found

    def _entry(self, run: str) -> dict[str, Any]:
        if run not in self.keys:
            raise UsageError(f"{self.results.recipe}: a claim asks for run {run!r}; {near(run, self.keys)}")
        if run not in self.results.runs:
            raise _Cannot("not run", f"{run} has not been run")
        if self.results.runs[run]["key"] != self.keys[run]:
            raise _Cannot("stale", f"{run} was run with another configuration")
        return self.results.runs[run]


def judge(recipe: Recipe, results: Results) -> list[Verdict]:
    """Every claim of a recipe by the results of one scale."""
    return [_judge(claim, Reader(recipe, results)) for claim in recipe.claims]


def _judge(claim: Claim, reader: Reader) -> Verdict:
    try:
        outcome: Outcome = "holds" if claim.holds(reader) else "does not hold"
        why = ""
    except _Cannot as reason:
        outcome, why = reason.outcome, reason.why
    return Verdict(claim, reader.results.scale, outcome, reader.read, why)


def judge_all(folder: Path, scale: Scale | None = None) -> dict[str, tuple[Recipe, Results, list[Verdict]]]:
    """Every recipe by its results at a scale; without one, at the largest that has results."""
    found = {}
    for name in names():
        recipe = find(name)[1]
        tried = [read_results(folder, name, s) for s in ([scale] if scale else reversed(SCALES))]
        results = next((r for r in tried if r.runs), None) or read_results(folder, name, scale or "small")
        found[name] = (recipe, results, judge(recipe, results))
    return found
