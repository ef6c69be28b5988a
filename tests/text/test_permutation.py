"""The shuffle without memory is a shuffle."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.text import permuted


@given(st.integers(1, 400), st.integers(0, 5), st.integers(0, 5))
def test_a_permutation(count, seed, epoch):
    assert sorted(permuted(i, count, seed, epoch) for i in range(count)) == list(range(count))


def test_keys_differ_and_are_kept():
    orders = {tuple(permuted(i, 50, seed, epoch) for i in range(50)) for seed in range(20) for epoch in range(5)}
    assert len(orders) == 100
    assert [permuted(i, 10**12, 3) for i in (0, 1)] == [permuted(i, 10**12, 3) for i in (0, 1)]


@pytest.mark.parametrize("count", [7, 64, 1000])
def test_every_place_is_as_likely(count):
    """Where the first item goes, over many keys: chi-square of uniform draws is its degrees of freedom, give or take
    five standard deviations."""
    draws, cells = 4000, 7
    found = [0] * cells
    for key in range(draws):
        found[permuted(0, count, key) * cells // count] += 1
    sizes = [sum(i * cells // count == c for i in range(count)) / count * draws for c in range(cells)]
    chi = sum((n - m) ** 2 / m for n, m in zip(found, sizes, strict=True))
    assert chi < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


def test_neighbours_are_torn_apart():
    at = [permuted(i, 10_000, "key") for i in range(10_000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(at)) < 20  # two are expected of a random order
