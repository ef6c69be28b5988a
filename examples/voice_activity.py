"""Where somebody speaks: silero-vad answers each 32 ms of a 16 kHz mono WAV file as it streams by.

statewise data get silero_vad
python examples/voice_activity.py speech.wav
"""

import sys
import wave

import torch

from statewise.models.silero import FRAME, SileroVAD
from statewise.tasks.sources import SILERO_VAD


def main(path: str) -> None:
    model = SileroVAD.load(SILERO_VAD.paths()["silero_vad_16k.safetensors"])
    state = model.initial_state(1)
    with wave.open(path) as file, torch.no_grad():
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (16000, 1, 2):
            sys.exit(f"{path}: expected 16 kHz, one channel, 16 bits")
        for frame in range(file.getnframes() // FRAME):
            samples = torch.frombuffer(bytearray(file.readframes(FRAME)), dtype=torch.int16)
            y, state = model.step(samples[None] / 32768, state)
            print(f"{frame * FRAME / 16000:7.3f} s  {y.item():.3f}  {'#' * round(40 * y.item())}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} speech.wav")
    main(sys.argv[1])
