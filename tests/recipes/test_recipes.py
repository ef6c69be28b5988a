"""Every recipe runs at smoke scale and its claims are judged; results are kept, resumed, and known when stale."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import statewise.recipes
from statewise.core import DataError, NumericError, Unknown, UsageError
from statewise.core.paper import Paper
from statewise.models import Stack
from statewise.recipes import SCALES, SEEDS, Claim, Measure, Recipe, find, judge, judge_all, names, page, read_results
from statewise.recipes import reproduce as make
from statewise.recipes.recipe import digest
from statewise.tasks import Adding
from statewise.training import Experiment, Train, fit

ROOT = Path(__file__).parents[2]
NAMES = names()
COUNT = 22


def test_recipes_were_found() -> None:
    assert len(NAMES) == COUNT
    assert all(re.fullmatch(r"[a-z]+\d{4}_[a-z0-9_]+", name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_runs_at_smoke_scale(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    try:
        results = make(name, "smoke", results=tmp_path, runs=tmp_path / "runs")
    except DataError as error:
        pytest.skip(str(error))
    recipe = find(name)[1]
    assert set(results.runs) == set(recipe.runs("smoke"))
    for run, entry in results.runs.items():
        (row,) = entry["seeds"].values()
        assert entry["metric"] in row["numbers"], (run, row)
        assert row["seconds"] >= 0
        assert results.environments[row["environment"]]["threads"] == 1
    verdicts = judge(recipe, results)
    assert verdicts
    assert all(verdict.outcome in ("holds", "does not hold") and verdict.read for verdict in verdicts)
    again = read_results(tmp_path, name, "smoke")
    assert vars(again) == vars(results)
    assert [v.outcome for v in judge(recipe, again)] == [v.outcome for v in verdicts]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_written(name: str, scale: statewise.recipes.Scale) -> None:
    """Runs can be described and hashed at every scale, and no two of them are the same."""
    recipe = find(name)[1]
    keys = recipe.keys(scale)
    assert len(set(keys.values())) == len(keys) > 0
    for run in recipe.runs(scale).values():
        if isinstance(run, Experiment):
            assert Experiment.from_record(run.record()) == run


@pytest.mark.parametrize("name", NAMES)
def test_scales_differ(name: str) -> None:
    keys = [digest(find(name)[1].keys(scale)) for scale in SCALES]
    assert len(set(keys)) == len(SCALES)


@pytest.mark.parametrize("name", NAMES)
def test_defines_no_class(name: str) -> None:
    tree = ast.parse((ROOT / f"src/statewise/recipes/{name}.py").read_text())
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert re.match(r".+(arXiv:\d{4}\.\d{4,5}|doi:)", (ast.get_docstring(tree) or "").split("\n")[0])


def test_the_page_of_papers_is_current() -> None:
    found = judge_all(ROOT / "results")
    assert (ROOT / "docs/papers.md").read_text() == page(found), "run statewise papers --write docs/papers.md"


def test_committed_results_are_current() -> None:
    stale = {
        name: results.stale(recipe.keys(results.scale))
        for name, (recipe, results, _) in judge_all(ROOT / "results").items()
    }
    assert not any(stale.values()), f"{stale}: run statewise reproduce"


# ---- the machinery, by a recipe of its own

CALLS: list[tuple[int, int]] = []


def double(seed: int, *, of: int) -> dict[str, float]:
    CALLS.append((seed, of))
    if of < 0:
        raise NumericError("negative")
    return {"value": 2 * of + seed / 10, "twice": 4.0 * of, "chance": float(of), "baseline": 1.0}


def toy(of: int = 3, claims: tuple[Claim, ...] = ()) -> Recipe:
    train = Train(steps=2, batch=2)
    runs = {
        "double": Measure(double, "value", {"of": of}),
        "fixed": Measure(double, "value", {"of": 7}),
        "trained": Experiment(Adding(length=4), Stack("min_gru", width=2, depth=1), train),
    }
    return Recipe(Paper("Toys", "Toy", 2000, "arXiv:0000.00000"), lambda scale: runs, claims)


@pytest.fixture
def install(monkeypatch):
    """install(recipe): `find` finds it under the name toy2000_toy."""

    def put(recipe: Recipe) -> None:
        CALLS.clear()
        monkeypatch.setitem(sys.modules, "statewise.recipes.toy2000_toy", types.SimpleNamespace(RECIPE=recipe))
        monkeypatch.setattr("statewise.recipes.recipe.names", lambda: ["toy2000_toy"])

    return put


def rerun(folder: Path, **more):
    return make("toy2000_toy", "small", results=folder / "results", runs=folder / "runs", **more)


def test_three_seeds_their_mean_and_their_spread(install, tmp_path) -> None:
    install(toy())
    results = rerun(tmp_path)
    values = results.values("double", "value")
    assert list(values) == [6, 6.1, 6.2]
    assert values.mean == pytest.approx(6.1)
    assert values.spread == pytest.approx(0.1)
    assert (results.fixed("double", "chance"), results.fixed("double", "baseline")) == (3, 1)
    assert results.fixed("trained", "baseline") == pytest.approx(1 / 6)
    losses = list(results.values("trained", "loss"))
    assert losses[2] == fit(Experiment(Adding(length=4), Stack("min_gru", width=2, depth=1), Train(2, 2), 2)).score
    assert len(set(losses)) == SEEDS["small"] == 3


def test_finished_runs_are_kept_and_changed_ones_made_anew(install, tmp_path) -> None:
    install(toy())
    first = rerun(tmp_path)
    install(toy())
    events: list[dict] = []
    assert vars(rerun(tmp_path, on_event=events.append)) == vars(first)
    assert not CALLS
    assert {e["event"] for e in events} == {"kept"}
    install(toy(of=4))
    second = rerun(tmp_path)
    assert CALLS == [(0, 4), (1, 4), (2, 4)]
    assert second.key != first.key
    install(toy(of=4))
    rerun(tmp_path, again=True)
    assert len(CALLS) == 6


def test_an_interruption_keeps_what_was_finished(install, tmp_path) -> None:
    install(toy())

    def stop(event: dict) -> None:
        if event["event"] == "start" and event["seed"] == 1 and event["run"] == "trained":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rerun(tmp_path, on_event=stop)
    assert len(CALLS) == 4
    CALLS.clear()
    whole = rerun(tmp_path)
    assert CALLS == [(2, 3), (2, 7)]
    install(toy())
    other = make("toy2000_toy", "small", results=tmp_path / "other", runs=tmp_path / "other")
    for run in whole.runs:
        number = whole.runs[run]["metric"]
        assert list(whole.values(run, number)) == list(other.values(run, number))


def test_a_failed_run_is_noted_and_tried_again(install, tmp_path) -> None:
    claim = Claim("here", "it is large", lambda r: r("double").mean > 1)
    install(toy(of=-1, claims=(claim,)))
    results = rerun(tmp_path)
    assert all(row == {**row, "failed": "negative"} for row in results.runs["double"]["seeds"].values())
    (verdict,) = judge(toy(of=-1, claims=(claim,)), results)
    assert (verdict.outcome, verdict.why) == ("not run", "double failed: negative")
    assert len(results.values("fixed", "value")) == 3
    CALLS.clear()
    rerun(tmp_path)
    assert [of for _, of in CALLS] == [-1, -1, -1]


def test_outcomes(install, tmp_path) -> None:
    claims = (
        Claim("a", "large", lambda r: r("double").mean > 1),
        Claim("b", "small", lambda r: r("double").mean < 1 and r("fixed").mean < 1),
        Claim("c", "of what does not change", lambda r: min(r("fixed", "twice")) > r.baseline("fixed")),
    )
    install(recipe := toy(claims=claims))
    nothing = read_results(tmp_path / "results", "toy2000_toy", "small")
    assert [v.outcome for v in judge(recipe, nothing)] == ["not run"] * 3
    results = rerun(tmp_path)
    verdicts = judge(recipe, results)
    assert [v.outcome for v in verdicts] == ["holds", "does not hold", "holds"]
    read = {key: list(values) for key, values in verdicts[2].read.items()}
    assert read == {("fixed", "twice"): [28] * 3, ("fixed", "value"): [14, 14.1, 14.2]}
    changed = toy(of=5, claims=claims)
    assert [v.outcome for v in judge(changed, results)] == ["stale", "stale", "holds"]
    assert results.stale(changed.keys("small")) == ["double"]
    del results.runs["double"]["seeds"]["2"]
    assert [v.outcome for v in judge(recipe, results)] == ["not run", "not run", "holds"]


def test_a_claim_that_asks_for_nothing_known_is_a_mistake(install, tmp_path) -> None:
    install(toy())
    results = rerun(tmp_path)
    for holds, words in (
        (lambda r: r("doubel"), "near: double"),
        (lambda r: r("double", "valeu"), "near: value"),
    ):
        with pytest.raises(UsageError, match=words):
            judge(toy(claims=(Claim("a", "b", holds),)), results)


def test_a_newer_file_is_refused(tmp_path) -> None:
    (tmp_path / "gu2022_s4-small.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="format 99; expected"):
        read_results(tmp_path, "gu2022_s4", "small")


def test_names_and_near_misses() -> None:
    assert find("aaren")[0] == "feng2024_aaren"
    with pytest.raises(Unknown, match=r"near: .*aaren"):
        find("arren")
    with pytest.raises(UsageError, match="scale 'tiny'; expected one of smoke, small, paper"):
        make("aaren", "tiny")  # type: ignore[arg-type]


def test_a_measure_is_its_name_and_arguments() -> None:
    one = Measure(double, "value", {"of": 3})
    assert one.key == Measure(double, "value", {"of": 3}).key
    assert len({one.key, dataclasses.replace(one, seed=1).key, Measure(double, "value", {"of": 4}).key}) == 3
