"""A shuffle without memory: the place of one item, of any number of items."""

from __future__ import annotations

import hashlib

ROUNDS = 6


def permuted(index: int, count: int, *key: object) -> int:
    """Where `index` goes under the permutation of range(count) that the key names. Time and memory do not grow.

    A Feistel network on the next even number of bits; what falls outside of the range is sent through again, which ends
    because the network is a permutation (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    >>> sorted(permuted(i, 10, "any", 3) for i in range(10))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < count:
            return index


def _round_keys(key: tuple[object, ...]) -> list[int]:
    digest = hashlib.sha256(repr(key).encode()).digest() + hashlib.sha256(repr(("more", *key)).encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]


def _mix(value: int) -> int:
    """64 bits that depend on all bits of value (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
