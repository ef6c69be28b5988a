"""Little cells that nobody has published, for the tests of what runs anybody's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewise.core import Cell


class _Little(Cell[Any]):
    """width -> hidden by a linear map; what comes then is the subclass's."""

    def __init__(self, width: int = 3, hidden: int = 8):
        super().__init__()
        self.width, self.out_width = width, hidden
        self.inp = nn.Linear(width, hidden)
        self.r = nn.Parameter(0.8 * torch.randn(hidden, hidden) / hidden**0.5)
        self.b = nn.Parameter(torch.randn(hidden))

    def initial_state(self, batch: int) -> Any:
        return self.b.new_zeros(batch, self.out_width)

    def encode(self, x: Tensor) -> Any:
        return self.inp(x)


class Dense(_Little):
    """h_t = tanh(R h_{t-1} + u_t + b)."""

    def transition(self, u, h):
        h = torch.tanh(F.linear(h, self.r, self.b) + u)
        return h, h


class Swing(_Little):
    """h_t = g h_{t-1} + (1 - g) sin(u_t + b h_{t-1}),  g = s(b - h_{t-1}^2)."""

    def transition(self, u, h):
        g = torch.sigmoid(self.b - h * h)
        h = g * h + (1 - g) * torch.sin(u + self.b * h)
        return h, h


class Two(NamedTuple):
    h: Tensor  # (B, N)
    c: Tensor  # (B, N)


class Gates(_Little):
    """LSTM-like, two leaves, gates from one product cut in four; the output is neither leaf."""

    def __init__(self, width: int = 3, hidden: int = 8):
        super().__init__(width, hidden)
        self.gates = nn.Linear(hidden, 4 * hidden)

    def initial_state(self, batch: int) -> Two:
        return Two(self.b.new_zeros(batch, self.out_width), self.b.new_ones(batch, self.out_width))

    def transition(self, u, state):
        i, f, o, z = self.gates(state.h + u).chunk(4, -1)
        c = torch.sigmoid(f + 1) * state.c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        return 2 * h - 1, Two(h, c)


class Normed(_Little):
    """h_t = h_{t-1} / 2 + gelu(norm(R h_{t-1} + u_t))."""

    def __init__(self, width: int = 3, hidden: int = 8):
        super().__init__(width, hidden)
        self.norm = nn.LayerNorm(hidden)

    def transition(self, u, h):
        h = 0.5 * h + F.silu(self.norm(h @ self.r + u))
        return h, h


class Heads(_Little):
    """Heads of the state mixed by a softmax that the state makes."""

    def initial_state(self, batch: int) -> Tensor:
        return self.b.new_zeros(batch, 2, self.out_width // 2)

    def transition(self, u, s):
        s = s + u.unflatten(-1, (2, -1))
        w = torch.softmax((s * self.b.unflatten(-1, (2, -1))).sum(-1), -1)
        s = torch.tanh(s * w[..., None] + s.flip(1) * (1 - w[..., None]))
        return s.flatten(1), s


class Einsum(_Little):
    """Block-diagonal heads by an einsum."""

    def __init__(self, width: int = 3, hidden: int = 8):
        super().__init__(width, hidden)
        self.m = nn.Parameter(torch.randn(2, hidden // 2, hidden // 2) / 2)

    def transition(self, u, h):
        h = torch.tanh(torch.einsum("bhi,hij->bhj", h.unflatten(-1, (2, -1)), self.m).flatten(1) + u)
        return h, h


class Rational(_Little):
    """Division, exp, clamp, where and powers."""

    def transition(self, u, h):
        e = torch.exp(-h.abs()).clamp(0.1, 0.9)
        h = torch.where(u > 0, (u + h) / (1 + h**2), e * h - F.softplus(u)) + torch.sqrt(1 + h**2) - h.clamp(max=0.5)
        return h, 0.5 * h


class TwoInputs(_Little):
    """A tuple of inputs, one of them a number for each row; a tuple of outputs."""

    def encode(self, x: Tensor) -> Any:
        return self.inp(x), x[..., :1]

    def transition(self, u, h):
        u, more = u
        h = torch.tanh(u + torch.relu(more) * (h @ self.r.T))
        return (h, more * h.sum(-1, keepdim=True)), h

    def decode(self, o, x):
        return o[0] + o[1]


class Twice(_Little):
    """One matrix used twice, and a parameter made of another at each step."""

    def transition(self, u, h):
        h = torch.tanh(h @ self.r + u)
        h = torch.sigmoid(h @ self.r.T) * torch.exp(-F.softplus(self.b)) + 0.1 * h
        return h, h


class Buffered(_Little):
    """A fixed matrix and a learned start."""

    def __init__(self, width: int = 3, hidden: int = 8):
        super().__init__(width, hidden)
        self.register_buffer("fixed", torch.linalg.qr(torch.randn(hidden, hidden))[0])
        self.start = nn.Parameter(torch.randn(hidden))

    def initial_state(self, batch: int) -> Tensor:
        return self.start.expand(batch, -1)

    def transition(self, u, h):
        h = F.hardtanh(h @ self.fixed + u, -0.8, 0.8) + F.leaky_relu(self.b * h, 0.1) * 0.1
        return h, h


class Memory(_Little):
    """A matrix that the state holds, written to and read by products of what changes."""

    def initial_state(self, batch: int) -> Any:
        return Two(self.b.new_zeros(batch, self.out_width), self.b.new_zeros(batch, self.out_width, self.out_width))

    def transition(self, u, state):
        k = F.normalize(u + state.h @ self.r, dim=-1, eps=1e-3)
        read = torch.einsum("bk,bkv->bv", k, state.c)
        c = state.c + torch.sigmoid(self.b) * (k[:, :, None] * (u - read)[:, None, :])
        h = torch.tanh((c @ k[:, :, None])[..., 0])
        return h, Two(h, c)


class Stacked(_Little):
    """Parts cut and put together: cat, stack, slices, max, mean, minimum, cos, log."""

    def transition(self, u, h):
        a, b = h[:, ::2], h[:, 1::2]
        most = torch.stack([a, b], -1).mean(-1)
        mixed = torch.cat([torch.minimum(a, b) + most, torch.cos(a * b) * torch.log1p(b * b)], -1)
        h = torch.tanh(mixed + u) - 0.1 * h.roll(1, -1) - h.mean(-1, keepdim=True)
        return h[:, :], h


CELLS = [
    Dense, Swing, Gates, Normed, Heads, Einsum, Rational, TwoInputs, Twice, Buffered, Memory, Stacked,
]  # fmt: skip
