"""A stream costs the same per token whatever came before it, and keeps nothing of it."""

import pytest

from statewise.bench import streaming


def test_a_stream_gains_no_tensors():
    """Of each of two thousand steps none stays; what other tests left in this process may come and go."""
    for row in streaming.run(("lru", "gru"), steps=12_000, blocks=3):
        assert row["tensors"] < 100, row
        assert row["early"] > 0 and row["late"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lru", "min_gru", "gru"])
def test_a_million_steps(name):
    for row in streaming.run((name,), steps=1_000_000):
        assert 0.9 <= row["ratio"] <= 1.1, row
        assert row["growth"] <= 2**20, row
        assert row["tensors"] <= 1, row
