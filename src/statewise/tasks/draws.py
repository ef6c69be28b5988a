"""Random choices for many rows at once."""

from __future__ import annotations

import numpy as np


def distinct(size: int, count: int, among: int, rng: np.random.Generator) -> np.ndarray:
    """(size, count) numbers below `among`, no two in a row the same, in random order."""
    if count * count > among:
        return rng.random((size, among)).argsort(1)[:, :count]
    found = rng.integers(0, among, (size, count))
    while True:  # a row with a repeat is drawn anew, which leaves all others equally likely
        ordered = np.sort(found, 1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not again.any():
            return found
        found[again] = rng.integers(0, among, (int(again.sum()), count))


def by_weight(size: int, count: int, logs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(size, count) different places drawn one after another with odds exp(logs), in the order drawn.

    The largest of log odds plus Gumbel noise are such a draw.
    """
    keys = logs - np.log(rng.standard_exponential((size, len(logs))))
    most = np.argpartition(-keys, count - 1, 1)[:, :count]
    order = np.take_along_axis(-keys, most, 1).argsort(1)
    return np.take_along_axis(most, order, 1)
