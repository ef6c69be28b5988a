"""silero-vad 16 kHz, a published detector of speech (MIT licence), rebuilt on LSTMLayer to stream by the protocol.

Its weights ship in the PyPI package silero-vad as silero_vad_16k.safetensors: `statewise data get silero_vad`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import DataError, RecurrentLayer, check_input, clear_past_end, read_tensors, wide
from ..layers import LSTMLayer, LSTMState

FRAME = 512  # samples: 32 ms at 16 kHz
CONTEXT = 64  # samples of the frame before that are seen again
WINDOW, HOP = 256, 128  # of the short-time Fourier transform
BINS = WINDOW // 2 + 1
HIDDEN = 128


class SileroState(NamedTuple):
    context: Tensor  # (B, 64) the end of the frame before
    lstm: LSTMState  # (B, 128) twice


class SileroVAD(RecurrentLayer[SileroState]):
    """y_t = s(w relu(h_t) + b),  h_t = LSTM(conv(|STFT([x_{t-1}[-64:], x_t])|)): the probability of speech in a frame.

    x (B, T, 512): frames of 16 kHz audio in [-1, 1], one after the other; y (B, T, 1). `frames` cuts a signal.
    """

    width, out_width = FRAME, 1

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 2 * BINS, WINDOW, stride=HOP, bias=False)  # real parts, then imaginary parts
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(BINS, 128, 3, padding=1),
                nn.Conv1d(128, 64, 3, padding=1, stride=2),
                nn.Conv1d(64, 64, 3, padding=1, stride=2),
                nn.Conv1d(64, HIDDEN, 3, padding=1),
            ]
        )
        self.lstm = LSTMLayer(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SileroVAD:
        """The published weights. Raises DataError for a file that is not theirs."""
        tensors, _ = read_tensors(path)
        model = cls().eval()
        try:
            # torch.nn.LSTMCell keeps two biases, which only ever appear as their sum
            bias = tensors.pop("lstm_cell.bias_ih") + tensors.pop("lstm_cell.bias_hh")
            tensors["lstm.inp.bias"], tensors["head.weight"] = bias, tensors.pop("final_conv.weight").squeeze(-1)
            renamed = {_rename(name): value for name, value in tensors.items()}
            model.load_state_dict(renamed, strict=True)
        except (KeyError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise DataError(f"{os.fspath(path)}: not the weights of silero-vad 16 kHz ({reason})") from error
        return model

    def initial_state(self, batch: int) -> SileroState:
        weight = self.stft.weight
        return SileroState(weight.new_zeros(batch, CONTEXT, dtype=wide(weight.dtype)), self.lstm.initial_state(batch))

    def forward(
        self,
        x: Tensor,
        state: SileroState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, SileroState]:
        check_input(self, x, state, reset, lengths)
        state = self.initial_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], 0, 1), state
        if lengths is not None:
            lengths = lengths.to(x.device)
            x = clear_past_end(x, lengths)
        tails = torch.cat([state.context[:, None], x[:, :, -CONTEXT:].to(state.context.dtype)], 1)  # (B, T + 1, 64)
        before = tails[:, :-1] if reset is None else tails[:, :-1].masked_fill(reset[..., None], 0)
        features = self._features(before.to(x.dtype).flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2])
        h, lstm = self.lstm(features, state.lstm, reset=reset, lengths=lengths)
        y = self._answer(h)
        if lengths is None:
            return y, SileroState(tails[:, -1].clone(), lstm)  # a view would keep all frames in memory
        context = tails[torch.arange(x.shape[0], device=x.device), lengths]
        return clear_past_end(y, lengths), SileroState(context, lstm)

    def step(self, x: Tensor, state: SileroState) -> tuple[Tensor, SileroState]:
        h, lstm = self.lstm.step(self._features(state.context.to(x.dtype), x), state.lstm)
        return self._answer(h), SileroState(x[:, -CONTEXT:].to(state.context.dtype, copy=True), lstm)

    def _features(self, context: Tensor, x: Tensor) -> Tensor:
        """(N, 64) and (N, 512) -> (N, 128)."""
        signal = F.pad(torch.cat([context, x], 1)[:, None], (0, CONTEXT), mode="reflect")
        z = self.stft(signal).unflatten(1, (2, BINS)).norm(dim=1)  # (N, 129, 4): the norm has a gradient at silence
        for conv in self.convs:
            z = conv(z).relu()
        return z.squeeze(-1)

    def _answer(self, h: Tensor) -> Tensor:
        return self.head(h.relu()).sigmoid()


def frames(signal: Tensor) -> Tensor:
    """signal (B, samples) -> x (B, T, 512), the last frame filled with silence."""
    return F.pad(signal, (0, -signal.shape[-1] % FRAME)).unflatten(-1, (-1, FRAME))


def _rename(name: str) -> str:
    """The package's name of a tensor -> ours."""
    part, _, leaf = name.partition(".")
    if part.startswith("conv"):
        return f"convs.{int(part.removeprefix('conv')) - 1}.{leaf}"
    known = {
        "stft_conv.weight": "stft.weight",
        "lstm_cell.weight_ih": "lstm.inp.weight",
        "lstm_cell.weight_hh": "lstm.recurrent",
        "final_conv.bias": "head.bias",
    }
    return known.get(name, name)
