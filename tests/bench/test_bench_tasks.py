"""The bench of generators knows them all, and what is not one."""

import pytest

from statewise.bench import tasks as bench
from statewise.cli import main
from statewise.core import UsageError
from statewise.tasks import Generated, tasks


def test_every_generator_is_timed():
    rows = bench.run(size=4, repeats=1)
    assert [row["task"] for row in rows] == sorted(i.name for i in tasks if issubclass(i.cls, Generated))
    assert all(row["train"] > 0 and row["test"] > 0 and row["steps"] > 0 for row in rows)
    assert all(row["ratio"] == row["train"] / row["needed"] and row["needed"] > 0 for row in rows)


def test_only_generators_are_timed():
    with pytest.raises(UsageError, match="reads its data"):
        bench.run(("digits",))


def test_the_command_prints_tokens_a_second(capsys):
    assert main(["bench", "tasks", "--layers", "induction,tomita", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "induction" in out and "tomita" in out and "M tokens/s" in out
    assert "the fastest small model trains" in out and "below 10 times that: " in out


@pytest.mark.slow
def test_generation_is_never_the_bottleneck():
    """Near a million tokens a second or above, on a core that has nothing else to do; a fifth of it anywhere."""
    for row in bench.run():
        assert row["train"] > 2e5, row
