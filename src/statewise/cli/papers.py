"""statewise papers: every recipe, its claims, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OUTCOMES = ("holds", "does not hold", "not run", "stale")


@dataclass(frozen=True)
class Options:
    """Papers, their claims and places, the measured numbers beside baseline and chance, and whether each claim holds.

    Outcomes: holds, does not hold, not run, stale (measured with a configuration that is no longer the recipe's).
    """

    results: Path = Path("results")
    """Folder that `statewise reproduce` writes."""
    scale: Literal["largest", "smoke", "small", "paper"] = "largest"
    """Of each recipe the results at this scale; largest: the largest scale that has any."""
    write: Path | None = None
    """Write the table as a Markdown page to this file."""


def run(options: Options) -> int:
    from ..recipes import judge_all, page
    from ..recipes.write import measured
    from .show import table

    found = judge_all(options.results, None if options.scale == "largest" else options.scale)
    if options.write is not None:
        from ..core.files import replace_file

        replace_file(options.write, [page(found).encode()])
        print(f"written to {options.write}")
        return 0
    columns = ("claim", "measured, mean ± sd", "outcome")
    for name, (recipe, results, verdicts) in found.items():
        rows = [
            (f"{v.claim.says} ({v.claim.where})", "\n".join(measured(v, results)) or v.why or "–", v.outcome)
            for v in verdicts
        ]
        scale = f"scale {results.scale}" if results.runs else "not run"
        table(columns, rows, title=f"{name}: {recipe.paper.cite()}; {scale}")
        print()
    outcomes: list[str] = [verdict.outcome for _, _, verdicts in found.values() for verdict in verdicts]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in OUTCOMES)
    print(f"{len(found)} papers, {len(outcomes)} claims: {counts}")
    if not any(results.runs for _, results, _ in found.values()):
        print(f"nothing in {options.results}; statewise reproduce NAME fills it")
    return 0
