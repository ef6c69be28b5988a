"""Results for people: what each run measured, and the page of papers and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..report import show_score, show_time
from ..report.summary import show_spread
from .recipe import Recipe
from .results import Results, Values
from .verdict import Verdict

Found = Mapping[str, tuple[Recipe, Results, list[Verdict]]]

HEAD = """# Papers

Each paper below is a recipe: runs that stand for its experiments, and its claims as predicates over what was
measured. This page is written by `statewise papers --write docs/papers.md` from the files in `results/`; nothing on it
is typed by hand. A claim that does not hold stays, with the number. Numbers are mean ± sample standard deviation over
three seeds unless a row says otherwise. Scale `small` is a few minutes on one core, far from the size of the papers: it
asks whether the ordering holds, not whether the figures do.

    statewise reproduce NAME --scale small
    statewise papers
"""


def show_values(values: Values, number: str) -> str:
    """Mean ± spread; accuracies in per cent, everything else in a few figures."""
    metric = "accuracy" if "accuracy" in number else number
    shown = [show_score(values.mean, metric), show_spread(values.spread, metric)]
    return " ".join(shown if len(values) > 1 else [*shown[:1], "(1 seed)"])


def run_lines(results: Results, verdicts: Sequence[Verdict] = ()) -> list[tuple[str, ...]]:
    """(run, number, measured, baseline, chance, time a seed) of every run's metric and whatever a claim read."""
    lines: list[tuple[str, ...]] = []
    for run, entry in results.runs.items():
        rows = results.rows(run)
        also = [number for verdict in verdicts for name, number in verdict.read if name == run]
        for number in dict.fromkeys([entry["metric"], *also]):
            own = number == entry["metric"]
            failed = [row["failed"] for row in entry["seeds"].values() if "failed" in row]
            found = (
                f"failed: {failed[0]}" if failed else show_values(results.values(run, number), number) if rows else "–"
            )
            took = show_time(results.seconds_of(run)) if own and rows else ""
            lines.append((run, number, found, *beside(results, run, number), took))
    return lines


def beside(results: Results, run: str, number: str) -> tuple[str, str]:
    """Baseline and chance of a run where they are of this number."""
    metric = results.runs[run]["metric"]
    part = metric == "accuracy" and number.startswith("accuracy_")  # guessing scores the same on a part of the answers
    if number != metric and not part:
        return "", ""
    baseline, chance = (show_score(results.fixed(run, name), metric) for name in ("baseline", "chance"))
    return "" if part else baseline, chance


def measured(verdict: Verdict, results: Results) -> list[str]:
    """A line for each number that a claim read."""
    lines = []
    for (run, number), values in verdict.read.items():
        name = run if number in ("accuracy", "loss") else f"{run}, {number}"
        pairs = zip(("baseline", "chance"), beside(results, run, number), strict=True)
        given = ", ".join(f"{what} {text}" for what, text in pairs if text not in ("", "–"))
        lines.append(f"{name}: {show_values(values, number)}" + f" ({given})" * bool(given))
    return lines


def page(found: Found) -> str:
    """docs/papers.md."""
    verdicts = [verdict for _, _, some in found.values() for verdict in some]
    counts = [f"{sum(v.outcome == o for v in verdicts)} {o}" for o in ("holds", "does not hold", "not run", "stale")]
    parts = [HEAD, f"{len(found)} papers, {len(verdicts)} claims: {', '.join(counts)}."]
    for name, (recipe, results, some) in found.items():
        paper = recipe.paper
        title = f"## {name}\n\n{paper.authors} {paper.year}, [{paper.title}]({paper.link}), {paper.number}."
        rows = ["| claim | measured | outcome |", "|---|---|---|"]
        for verdict in some:
            numbers = "<br>".join(measured(verdict, results)) or "–"
            outcome = f"**{verdict.outcome}**" + (f": {verdict.why}" if verdict.why else "")
            rows.append(
                f"| {cell(f'{verdict.claim.says} ({verdict.claim.where})')} | {cell(numbers)} | {cell(outcome)} |"
            )
        parts += [title, "\n".join(rows)]
        if results.runs:
            lines = ["| run | number | measured | baseline | chance | time a seed |", "|---|---|---|---|---|---|"]
            lines += ["| " + " | ".join(map(cell, line)) + " |" for line in run_lines(results, some)]
            parts += ["\n".join(lines), f"Scale {results.scale}, key `{results.key}`, {machines(results)}."]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def machines(results: Results) -> str:
    """What the numbers were made on."""
    shown = [
        f"{e['cpu']}, {e['cores']} cores, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, "
        f"statewise {e['statewise']}"
        for e in results.environments
    ]
    return f"{show_time(results.seconds)} in all; {'; '.join(dict.fromkeys(shown))}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")
