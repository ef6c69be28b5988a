"""A voice, sample by sample: announcements of a telephone exchange that come with Debian."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core import DataError
from .base import Split, Task, register_task
from .sources import VOICE
from .text import Bytes

HELD_OUT: dict[Split, str] = {"validation": "demo-moreinfo.wav", "test": "vm-msginstruct.wav"}
LEVELS = 255


@register_task
@dataclass(frozen=True)
class Voice(Bytes):
    """x       127 128 131 140 139 ...     8000 samples a second, each one of 256 levels
    answer     128 131 140 139 120 ...     the next sample, asked at every step

    4.1 minutes of one woman's speech are training, two other announcements of 15 s validation and test; none has a
    stretch of another's samples. Levels are the logarithms of G.711 (mu = 255): 0 is loudest below, 128 silence, 255
    loudest above. Rows carry their state over `length` steps and further, as in `text`.

    Scored in bits per sample: chance 8, a table of pairs of samples about 5.4.
    """

    name = "voice"
    data = VOICE.data
    keep = Task.keep  # a run of it is not one of text
    readable = Task.readable

    def read(self) -> dict[Split, np.ndarray]:
        clips = {name: mu_law(samples(path)) for name, path in VOICE.paths().items()}
        held_out = {split: clips.pop(name) for split, name in HELD_OUT.items()}
        return {"train": np.concatenate(list(clips.values())), **held_out}


def samples(path: Path) -> np.ndarray:
    """(N,) int16 of a WAV file of one channel and 8000 samples a second."""
    try:
        with wave.open(str(path)) as file:
            form, frames = file.getparams()[:3], file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path}: not a WAV file ({error})") from None
    if form != (1, 2, 8000):
        raise DataError(f"{path}: channels, bytes and rate are {form}; expected 1, 2, 8000")
    return np.frombuffer(frames, "<i2")


def mu_law(sound: np.ndarray) -> np.ndarray:
    """Samples of 16 bits to levels 0 .. 255, in steps of equal ratio but for the quietest (ITU-T G.711's curve)."""
    loud = np.log1p(LEVELS * np.abs(sound / 32768)) / np.log1p(LEVELS)
    return np.rint((np.sign(sound) * loud + 1) / 2 * LEVELS).astype(np.uint8)


def from_mu_law(levels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Levels 0 .. 255 to samples of 16 bits, to be written into a WAV file."""
    signed = np.asarray(levels) / LEVELS * 2 - 1
    sound = np.sign(signed) * np.expm1(np.abs(signed) * np.log1p(LEVELS)) / LEVELS
    return np.clip(np.rint(sound * 32768), -32768, 32767).astype("<i2")
