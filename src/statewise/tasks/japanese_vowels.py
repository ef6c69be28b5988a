"""Japanese vowels (Kudo, Toyama & Shimbo 1999): who of nine men speaks, the way it comes with aeon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core import DataError
from .base import Split, register_task
from .finite import Classify, Sequences, stratified, three
from .sources import JAPANESE_VOWELS


@register_task
@dataclass(frozen=True)
class JapaneseVowels(Classify):
    """x       12 coefficients of one frame, then the next frame, 7 to 29 frames
    answer                       4     which of nine speakers, asked at the utterance's last frame

    The set's own training part of 270 as 225 training and 45 validation utterances, and its own 370 test
    utterances. Coefficients standardised over the training frames. Chance about 0.1; baseline: a linear classifier
    on summaries of each utterance.
    """

    name = "japanese_vowels"
    data = JAPANESE_VOWELS.data
    x_width = 12
    y_width = 9

    def load(self) -> dict[Split, Sequences]:
        paths = JAPANESE_VOWELS.paths()
        rows, y = read_ts(paths["JapaneseVowels_TRAIN.ts"])
        parts = [Sequences.of([rows[i] for i in some], y[some]) for some in stratified(y, (225, 45), "japanese_vowels")]
        parts.append(Sequences.of(*read_ts(paths["JapaneseVowels_TEST.ts"])))
        return three([part.standardised(parts[0].values) for part in parts])


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
