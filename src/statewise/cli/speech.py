"""Where is speech? silero-vad on a WAV file or on raw samples, frame by frame, in constant memory."""

from __future__ import annotations

import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import DataError
from ..core.files import open_checked

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.silero import SileroVAD

NAME = "silero_vad"
RATE = 16_000  # samples a second
BYTES = 2  # of a sample: signed, little-endian


def detector() -> SileroVAD:
    """The published model. Raises DataError where its weights are not on this machine."""
    from ..models.silero import SileroVAD
    from ..tasks.sources import SILERO_VAD

    return SileroVAD.load(SILERO_VAD.paths()["silero_vad_16k.safetensors"])


def frames(audio: Path | None) -> Iterator[Tensor]:
    """(1, 512) frames in [-1, 1] of a 16 kHz mono WAV file, or of raw 16-bit samples on standard input."""
    import torch

    from ..models.silero import FRAME

    for block in _blocks(audio, FRAME):
        samples = torch.frombuffer(bytearray(block), dtype=torch.int16)
        yield torch.nn.functional.pad(samples / 32768, (0, FRAME - len(samples)))[None]


def _blocks(audio: Path | None, frame: int) -> Iterator[bytes]:
    """Blocks of 2 * frame bytes, the last one perhaps shorter."""
    if audio is None:
        while len(block := sys.stdin.buffer.read(BYTES * frame)) >= BYTES:
            yield block[: len(block) // BYTES * BYTES]
        return
    with open_checked(audio) as file:
        try:
            sound = wave.open(file)  # noqa: SIM115  holds nothing but the file, which is closed here
        except (wave.Error, EOFError) as error:
            raise DataError(f"{audio}: not a WAV file ({error}); convert it to 16 kHz mono 16-bit WAV") from None
        found = (sound.getframerate(), sound.getnchannels(), 8 * sound.getsampwidth())
        if found != (RATE, 1, 8 * BYTES):
            raise DataError(
                f"{audio}: {found[0]} Hz, {found[1]} channels, {found[2]} bits; expected 16000 Hz, 1, 16: convert it"
            )
        while block := sound.readframes(frame):
            yield block
