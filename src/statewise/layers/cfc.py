"""Closed-form continuous-time networks (Hasani et al. 2022, arXiv:2106.13898)."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, UsageError, check_sizes, register_layer, wide
from ..nn import Elapsed, check_elapsed, split_elapsed
from ..ops.recorded_loop import recorded_loop

Form = Literal["gated", "ungated", "solution"]


@register_layer(
    "cfc",
    paper="arXiv:2106.13898",
    examples=[
        dict(width=3, hidden=4, units=5, dt="input"),
        dict(width=2, hidden=3, units=4, backbone=2, form="ungated"),
        dict(width=2, hidden=3, backbone=0, form="solution", dt="input"),
    ],
    sized=lambda width: dict(width=width, hidden=width, units=width),
)
class CfC(Cell[Tensor]):
    """h_t = (1 - s) g + s k,  s = sigmoid(a dt_t + b),  g, k = tanh(W_gk z),  a, b = W_ab z,  z = f([x_t; h_{t-1}]).

    The closed form of a liquid time-constant network (`LTC`): instead of solving in small steps from h_{t-1}, one gate
    of the elapsed time dt_t moves between two states. f: `backbone` linear maps to `units` channels, each followed by
    1.7159 tanh(0.666 z), or none. All maps have biases. y_t = h_t; state h (B, N), float32 or wider.

    form "ungated": h_t = g + s k. "solution": h_t = A - A exp(-dt_t (|w| + |q|)) q, q = W_q z: the solution itself.
    dt: the time from each step to the next; or "input", where the last channel of x is the time since the step before,
    as for samples taken irregularly: `width` counts it, and below 0 it counts as 0.

    Linear maps start uniform (Glorot), A at one, w at zero. Raises UsageError for a form or dt that cannot be.
    """

    multiplied = ("recurrent",)  # as for_streaming has it

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        units: int = 128,
        backbone: int = 1,
        form: Form = "gated",
        dt: Elapsed = 1.0,
    ):
        super().__init__()
        check_sizes("CfC", width=width, hidden=hidden, units=units)
        if backbone < 0:
            raise UsageError(f"CfC: backbone {backbone}; expected 0 or more layers")
        if form not in get_args(Form):
            raise UsageError(f"CfC: form {form!r}; expected one of {', '.join(get_args(Form))}")
        self.width, self.out_width = width, hidden
        self.form, self.dt = form, dt
        features, heads = check_elapsed("CfC", dt, width), 1 if form == "solution" else 4
        sizes = [*[units] * backbone, heads * hidden]  # what each linear map makes; the first one meets x and h
        self.inp = nn.Linear(features, sizes[0])
        self.recurrent = nn.Parameter(torch.empty(sizes[0], hidden))
        maps = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.maps = nn.ModuleList(maps)
        if form == "solution":
            self.a, self.w = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        _glorot([self.inp.weight, self.recurrent], 1 if backbone else heads)
        for n, linear in enumerate(maps, 1):
            _glorot([linear.weight], heads if n == backbone else 1)

    def initial_state(self, batch: int) -> Tensor:
        return self.recurrent.new_zeros(batch, self.out_width, dtype=wide(self.recurrent.dtype))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, elapsed = split_elapsed(x, self.dt)
        with torch.autocast(x.device.type, enabled=False):
            return _linear(x, self.inp.weight, self.inp.bias), elapsed

    def transition(self, u: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        z, elapsed = u
        with torch.autocast(z.device.type, enabled=False):
            z = z + _linear(state, self.recurrent)
            for linear in self.maps:
                z = _linear(1.7159 * torch.tanh(0.666 * z), linear.weight, linear.bias)  # type: ignore[arg-type]
        h = self._solution(z, elapsed) if self.form == "solution" else self._between(z, elapsed)
        return h, h

    def scan(self, u: Any, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return recorded_loop(self, u, state, reset, lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)

    def _between(self, z: Tensor, elapsed: Tensor) -> Tensor:
        g, k, a, b = z.chunk(4, -1)
        g, k, s = torch.tanh(g), torch.tanh(k), torch.sigmoid(a * elapsed + b)
        return g + s * k if self.form == "ungated" else g + s * (k - g)

    def _solution(self, q: Tensor, elapsed: Tensor) -> Tensor:
        a, w = self.a.to(q.dtype), self.w.to(q.dtype)
        return a - a * torch.exp(-elapsed * (w.abs() + q.abs())) * q


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the dtype of x: in half precision a recurrence drifts."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _glorot(parts: list[Tensor], heads: int) -> None:
    """Uniform within sqrt(6 / (fan in + fan out)) of the map that these parts make side by side, head by head."""
    bound = math.sqrt(6 / (sum(w.shape[1] for w in parts) + len(parts[0]) // heads))
    for w in parts:
        nn.init.uniform_(w, -bound, bound)
