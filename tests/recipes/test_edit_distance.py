"""What the recipe of diverse beam search measures by: the distance of two texts, and how many n-grams are different."""

from functools import cache

import pytest
import torch

from statewise.recipes.vijayakumar2018_diverse_beams import distinct, edit_distance, scores


def by_definition(a: list[int], b: list[int]) -> int:
    @cache
    def least(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(least(i - 1, j) + 1, least(i, j - 1) + 1, least(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return least(len(a), len(b))


@pytest.mark.parametrize("n, m", [(7, 7), (4, 9), (9, 4), (1, 5), (0, 3), (3, 0)])
def test_distance_is_the_least_number_of_edits(n: int, m: int) -> None:
    rng = torch.Generator().manual_seed(n + 10 * m)
    a, b = (torch.randint(3, (40, k), generator=rng) for k in (n, m))
    wanted = [by_definition(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert edit_distance(a, b).tolist() == wanted
    assert len(set(wanted)) > 1 or not min(n, m)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_counts_over_all_ways(n: int) -> None:
    ids = torch.randint(250, 253, (20, 3, 6), generator=torch.Generator().manual_seed(n))
    for row, found in zip(ids.tolist(), distinct(ids, n).tolist(), strict=True):
        grams = [tuple(way[i : i + n]) for way in row for i in range(len(way) - n + 1)]
        assert found == pytest.approx(len(set(grams)) / len(grams))


def test_the_oracle_takes_the_nearest_and_the_search_the_likeliest() -> None:
    truth = torch.tensor([list(b"abcd")])
    ids = torch.tensor([[list(b"wxyz"), list(b"abcd"), list(b"abxx")]])
    found = scores(ids, torch.tensor([[-3.0, -2.0, -1.0]]), truth)
    assert (found["oracle"], found["top"]) == (1.0, 0.5)
