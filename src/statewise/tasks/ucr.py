"""Labelled series of the UCR (Dau et al. 2019, arXiv:1810.07758) and UEA (Bagnall et al. 2018, arXiv:1811.00075)
archives, the way they come with aeon and sktime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..core import DataError, UsageError
from .base import Split, register_task
from .finite import Classify, Sequences, stratified, three
from .sources import PLAID, UCR

Problem = Literal[
    "ACSF1", "ArrowHead", "BasicMotions", "GunPoint", "ItalyPowerDemand", "JapaneseVowels", "OSULeaf",
    "PickupGestureWiimoteZ", "PLAID",
]  # fmt: skip
CHANNELS = {"BasicMotions": 6, "JapaneseVowels": 12}  # the others have one
CLASSES = dict(zip(get_args(Problem), (10, 3, 4, 2, 2, 9, 6, 10, 11)))


@register_task
@dataclass(frozen=True)
class Ucr(Classify):
    """x       12 coefficients of one frame of speech, then the next frame, 7 to 29 frames
    answer                                 4      which of nine speakers, asked at the last frame

    That is problem="JapaneseVowels". All of them, with the archive's own training part, a sixth of it held out for
    validation in equal shares of the classes, and the archive's own test part:

    ACSF1                    84 + 16 / 100 loads of household appliances, 1460 steps, 10 kinds
    ArrowHead                30 + 6 / 175  outlines of arrowheads, 251 steps, 3 shapes
    BasicMotions             34 + 6 / 40   wrist sensors, 6 channels, 100 steps, 4 motions
    GunPoint                 42 + 8 / 150  a hand that draws a gun or points, 150 steps
    ItalyPowerDemand         56 + 11 / 1029 a day of power demand, 24 steps, winter or summer
    JapaneseVowels           225 + 45 / 370 utterances, 12 channels, 7 to 29 steps, 9 speakers
    OSULeaf                  167 + 33 / 242 outlines of leaves, 427 steps, 6 trees
    PickupGestureWiimoteZ    42 + 8 / 50   a shaken controller, 29 to 361 steps, 10 gestures
    PLAID                    444 + 88 / 537 currents of appliances, 100 to 1344 steps, 11 kinds; 5 training series
                             that are also in the test are left out

    Channels standardised over the training steps. Chance: the commonest training class; baseline: a linear classifier
    on all steps, or on summaries of each series. Most sets are small: one test series is up to 0.025 of the score.
    """

    problem: Problem = "JapaneseVowels"
    name = "ucr"
    data = f"{UCR.data} (plaid for problem=PLAID)"

    def __post_init__(self) -> None:
        if self.problem not in CLASSES:
            raise UsageError(f"ucr: problem is {self.problem!r}; expected one of {', '.join(CLASSES)}")

    @property
    def x_width(self) -> int:  # type: ignore[override]
        return CHANNELS.get(self.problem, 1)

    @property
    def y_width(self) -> int:  # type: ignore[override]
        return CLASSES[self.problem]

    def load(self) -> dict[Split, Sequences]:
        paths = (PLAID if self.problem == "PLAID" else UCR).paths()
        (rows, y), test = (read_ts(paths[f"{self.problem}_{part}.ts"]) for part in ("TRAIN", "TEST"))
        asked = {row.tobytes() for row in test[0]}
        own = [i for i, row in enumerate(rows) if row.tobytes() not in asked]
        held_out = len(own) // 6
        parts = [
            Sequences.of([rows[own[i]] for i in some], y[own][some])
            for some in stratified(y[own], (len(own) - held_out, held_out), f"ucr {self.problem}")
        ]
        return three([part.standardised(parts[0].values) for part in (*parts, Sequences.of(*test))])


def read_ts(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """A labelled .ts file: channels apart by colons, values by commas, the label last. Rows (T, D), class ids (N,)."""
    labels: list[str] = []
    rows, y = [], []
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), 1):
        if line.startswith("@classLabel"):
            labels = line.split()[2:]
        if not line.strip() or line[0] in "#@":
            continue
        *channels, label = line.strip().split(":")
        try:
            rows.append(np.array([channel.split(",") for channel in channels], dtype=np.float32).T)
            y.append(labels.index(label))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a line of a .ts file ({error})") from None
    return rows, np.array(y)
