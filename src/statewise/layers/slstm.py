"""sLSTM, the scalar memory of xLSTM (Beck et al. 2024, arXiv:2405.04517)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..nn import BlockLinear, HeadNorm, ShortConvolution
from ..ops.gated_loop import SLSTMState, fresh_slstm, slstm_loop, slstm_step
from .outer_cell import usual_heads

Forget = Literal["sigmoid", "exp"]


def check_slstm(name: str, hidden: int, heads: int, forget: str, place: float) -> None:
    if hidden % heads:
        raise UsageError(f"{name}: {hidden} channels are not a multiple of heads {heads}")
    if forget not in get_args(Forget):
        raise UsageError(f"{name}: forget {forget!r}; expected 'sigmoid' or 'exp'")
    if not 0 <= place <= 1:
        raise UsageError(f"{name}: place {place}; expected 0 to 1")


def recurrent_zeros(hidden: int, heads: int) -> nn.Parameter:
    """R, (4N, N), or a block for each head, (H, 4 N/H, N/H)."""
    size = hidden // heads
    return nn.Parameter(torch.zeros(4 * size, size) if heads == 1 else torch.zeros(heads, 4 * size, size))


def forget_bias(hidden: int, heads: int, place: float) -> Tensor:
    """5 - 12 r^(0.3 + 1.3 place) with r from 0 to 1 over the units of a head: from long memory to short."""
    return (5 - 12 * torch.linspace(0, 1, hidden // heads) ** (0.3 + 1.3 * place)).repeat(heads)


@register_layer(
    "slstm",
    paper="arXiv:2405.04517",
    examples=[
        dict(width=3, hidden=4),
        dict(width=2, hidden=4, heads=2, forget="exp"),
        dict(width=2, hidden=3, heads=3, place=1.0),
    ],
    sized=lambda width: dict(width=width, hidden=width, heads=usual_heads(width)),
)
class SLSTM(Cell[SLSTMState]):
    """c_t = f c_{t-1} + i tanh(z),  n_t = f n_{t-1} + i,  h_t = s(o) c_t / n_t;  i = e^i',  f = s(f') or e^f',

    with i', f', z, o = W x_t + R h_{t-1} + b and y_t = h_t. What is held is an average of what was written, weighted by
    gates that may grow: a later input can outweigh all earlier ones. heads: R has that many blocks on its diagonal, so
    that units hear those of their own head alone. forget: "sigmoid" or "exp", the forget gate.

    c and n are kept divided by e^m, m_t = max(log f + m_{t-1}, i'), so that no gate overflows. State h, c, n, m (B, N),
    float32 or wider; at the start m is the lowest number, the others 0. n is never below 1 in that scale.

    At birth R = 0, W as in torch.nn.Linear, b = 0 but for the forget gates': 5 - 12 r^(0.3 + 1.3 place), r from 0 to 1
    over each head; place: where in a stack the layer stands, 0 to 1. Raises UsageError if heads do not divide hidden,
    for an unknown forget, or a place that is none. With a convolution and norm, as in a block of xLSTM: `ConvSLSTM`.
    """

    def __init__(self, width: int, hidden: int, *, heads: int = 1, forget: Forget = "sigmoid", place: float = 0.0):
        super().__init__()
        check_sizes("SLSTM", width=width, hidden=hidden, heads=heads)
        check_slstm("SLSTM", hidden, heads, forget, place)
        self.width, self.out_width = width, hidden
        self.forget = forget
        self.inp = nn.Linear(width, 4 * hidden)
        self.recurrent = recurrent_zeros(hidden, heads)
        with torch.no_grad():
            self.inp.bias.zero_()
            self.inp.bias[hidden : 2 * hidden] = forget_bias(hidden, heads, place)

    def initial_state(self, batch: int) -> SLSTMState:
        return nothing_yet(self.recurrent, batch, self.out_width)

    def transition(self, u: Tensor, state: SLSTMState) -> tuple[Tensor, SLSTMState]:
        new = slstm_step(u, *state, *self._weights(), forget=self.forget)
        return new.h, new

    def scan(
        self, u: Tensor, state: SLSTMState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, SLSTMState]:
        y, *last = slstm_loop(u, *state, *self._weights(), forget=self.forget, reset=reset, lengths=lengths)
        return y, SLSTMState(*last)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inp.weight, self.recurrent, self.inp.bias


def nothing_yet(weight: Tensor, batch: int, hidden: int) -> SLSTMState:
    """The state before the first step, where `weight` is, in float32 or wider."""
    return fresh_slstm(batch, hidden, like=weight.new_empty(0, dtype=wide(weight.dtype)))


class ConvSLSTMState(NamedTuple):
    conv: Tensor  # (B, P-1, N) last inputs of the convolution
    cell: SLSTMState


@register_layer(
    "conv_slstm",
    paper="arXiv:2405.04517",
    examples=[dict(width=6, heads=2, taps=3), dict(width=3, heads=1, taps=1, forget="exp", place=0.5)],
    sized=lambda width: dict(width=width, heads=usual_heads(width)),
)
class ConvSLSTM(Cell[ConvSLSTMState]):
    """y_t = norm(h_t), h_t of an sLSTM with i' = W_i a + R_i h_{t-1} + b_i, f' likewise,  a_t = silu(conv(x)_t),

    and z = W_z x + R_z h_{t-1} + b_z, o likewise: what goes into a block of xLSTM. conv is causal over `taps` steps,
    all W and R have a block for each head, and norm is a layer norm per head. The rest is as for `SLSTM`.

    W start uniform within 1 / sqrt(D / H). State (last inputs of conv, (h, c, n, m)), float32 or wider. Raises
    UsageError if heads do not divide width, for an unknown forget, or a place that is none.
    """

    def __init__(self, width: int, *, heads: int, taps: int = 4, forget: Forget = "sigmoid", place: float = 0.0):
        super().__init__()
        check_sizes("ConvSLSTM", width=width, heads=heads, taps=taps)
        check_slstm("ConvSLSTM", width, heads, forget, place)
        self.width = self.out_width = width
        self.heads, self.forget = heads, forget
        self.conv = ShortConvolution(width, taps=taps, bias=True)
        self.i, self.f, self.z, self.o = (BlockLinear(width, size=width // heads) for _ in range(4))
        self.recurrent = recurrent_zeros(width, heads)
        self.bias = nn.Parameter(torch.zeros(4 * width))
        with torch.no_grad():
            self.bias[width : 2 * width] = forget_bias(width, heads, place)
        self.norm = HeadNorm(heads, width // heads, centred=True, eps=1e-5)

    def initial_state(self, batch: int) -> ConvSLSTMState:
        return ConvSLSTMState(self.conv.initial_state(batch), nothing_yet(self.recurrent, batch, self.width))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, self.z(x), self.o(x)

    def transition(self, u: tuple[Tensor, ...], state: ConvSLSTMState) -> tuple[Tensor, ConvSLSTMState]:
        a, conv = self.conv.step(u[0], state.conv)
        new = slstm_step(self._gates(a, *u[1:]), *state.cell, None, self.recurrent, self.bias, forget=self.forget)
        return new.h, ConvSLSTMState(conv, new)

    def scan(
        self, u: tuple[Tensor, ...], state: ConvSLSTMState, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, ConvSLSTMState]:
        a, conv = self.conv(u[0], state.conv, reset, lengths)
        h, *last = slstm_loop(
            self._gates(a, *u[1:]), *state.cell, None, self.recurrent, self.bias,
            forget=self.forget, reset=reset, lengths=lengths,
        )  # fmt: skip
        return h, ConvSLSTMState(conv, SLSTMState(*last))

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o.unflatten(-1, (self.heads, -1))).to(x.dtype)

    def _gates(self, a: Tensor, z: Tensor, o: Tensor) -> Tensor:
        """What the gates get from the input, (..., 4N), in float32 or wider."""
        a = F.silu(a).to(self.bias.dtype)
        return torch.cat([self.i(a), self.f(a), z, o], -1).to(wide(self.bias.dtype))
