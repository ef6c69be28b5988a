"""The simulated cluster against what is known without it: list scheduling, one worker, bounds, expected losses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.bench.scaling import Cluster, Costs, as_markdown, draw, gpu, run_times, simulate
from statewise.core import DataError

FREE = Costs(0, 0, 0, 0, 0)
DOCS = Path(__file__).parents[2] / "docs"


def listed(times, workers):
    """Greedy list scheduling, one cell after another to whoever is free first; hours."""
    ends = [0.0] * workers
    for seconds in times:
        first = min(range(workers), key=lambda w: ends[w])
        ends[first] += seconds
    return max(ends) / 3600


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_without_costs_it_is_list_scheduling(times, workers):
    found = simulate(times, Cluster(workers), FREE)
    assert found.hours == pytest.approx(listed(times, workers), rel=1e-9)
    assert found.hours >= found.bound * (1 - 1e-9) and found.hours <= 2 * found.bound + 1e-12  # Graham
    assert found.efficiency == pytest.approx(sum(times) / 3600 / workers / found.hours)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 5))
def test_costs_add_up_with_one_worker_and_never_help(times, workers, together):
    costs = Costs(start=3, look=0.01, submit=0.02, row=0.1, tick=0.5)
    tasks = math.ceil(len(times) / together)
    one = simulate(times, Cluster(1, together=together), costs)
    least = sum(times) + tasks * (costs.start + costs.submit) + len(times) * costs.row
    assert least <= one.hours * 3600 <= least + tasks * 2 * (costs.tick + costs.look)
    some = simulate(times, Cluster(workers, together=together), costs)
    assert some.hours >= simulate(times, Cluster(workers, together=together), FREE).bound


def test_a_driver_that_takes_longer_than_the_work_is_the_bottleneck():
    found = simulate([1.0] * 2000, Cluster(1000), replace(FREE, submit=0.05, tick=0.01))
    assert found.hours * 3600 >= 2000 * 0.05 and found.driver > 0.9


def test_slow_workers_take_their_factor():
    assert simulate([10.0] * 8, Cluster(4, slow=1.0, factor=3.0), FREE).hours == pytest.approx(2 * 30 / 3600)


def test_longest_first_is_at_most_a_third_above_the_bound():
    times = draw(run_times(), 500, 20.0)
    for workers in (3, 17, 128):
        mixed, first = (simulate(times, Cluster(workers, longest_first=f), FREE) for f in (False, True))
        assert first.hours <= 4 / 3 * first.bound and first.hours <= mixed.hours


def test_deaths_cost_what_was_not_saved():
    """With a checkpoint each tenth the expected loss of a death is half a tenth and a start."""
    times, rate = [3600.0] * 4000, 0.5
    costs = replace(FREE, start=30.0)
    found = simulate(times, Cluster(1, deaths=rate, retries=10**6), costs)
    extra = found.hours - 4000 - 4000 * 30 / 3600
    assert found.failed == 0
    assert extra == pytest.approx(4000 * rate * (0.05 + 30 / 3600), rel=0.1)
    given_up = simulate(times, Cluster(1, deaths=rate, retries=0), FREE).failed
    assert given_up == pytest.approx(4000 * (1 - math.exp(-rate)), rel=0.1)


def test_the_same_arguments_give_the_same_numbers():
    times = draw(run_times(), 300, seed=3)
    how = Cluster(7, slow=0.3, deaths=2.0)
    assert simulate(times, how) == simulate(times, how) != simulate(times, how, seed=1)


def test_run_times_are_read_from_comparisons_and_recipes(tmp_path):
    with pytest.raises(DataError, match="no measured runs"):
        run_times(tmp_path)
    rows = [{"status": "done", "seconds": 7.5}, {"status": "failed", "seconds": 3.0}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_times(tmp_path) == [7.5]
    assert len(run_times(DOCS.parent / "results")) > 100 and len(run_times()) > 100


def test_a_gpu_is_worth_no_more_than_its_starts_allow():
    for row in gpu([10.0], Costs(start=2.0), start=8.0):
        if row["stretch"] == 1.0:
            assert row["cores"] < row["shared"] * (10 + 2) / 8
    assert gpu([10.0], FREE, start=0.0)[0]["cores"] == pytest.approx(2)


def test_the_page_has_the_tables_of_the_simulation():
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert as_markdown() in page
    assert len(re.findall(r"^\| as it is", page, re.M)) == 6
