"""GRU (Cho et al. 2014, arXiv:1406.1078), the reset gate applied after the product as cuDNN does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Cell, register_layer, wide
from ..ops.gated_loop import gru_loop, gru_step
from ..ops.newton import Structure
from ..ops.opaque import is_traced
from .gated_cell import Parallel, by_gate, check_gated, heard, newton_scan, orthogonal_heads, through


@register_layer(
    "gru",
    paper="arXiv:1406.1078",
    examples=[
        {"width": 3, "hidden": 4},
        {"width": 2, "hidden": 1},
        {"width": 3, "hidden": 4, "heads": 2, "parallel": "newton"},
    ],
    sized=lambda width: {"width": width, "hidden": width},
)
class GRULayer(Cell[Tensor]):
    """h_t = (1 - z) n + z h_{t-1};  r, z = s(W x_t + R h_{t-1}),  n = tanh(W_n x_t + r R_n h_{t-1});  y_t = h_t.

    W and R carry biases, R's inside the product with r. Gates in torch.nn.GRU's order r, z, n; each block of R starts
    orthogonal. heads and parallel as for `Elman`. The state is h (B, N).
    `statewise.GRU` is the drop-in for torch.nn.GRU.
    Raises UsageError for heads that do not divide hidden or an unknown parallel.
    """

    multiplied = ("recurrent",)  # as for_streaming has it

    def __init__(self, width: int, hidden: int, *, heads: int = 1, parallel: Parallel = "loop"):
        super().__init__()
        check_gated("GRULayer", width, hidden, heads, parallel)
        self.width, self.out_width = width, hidden
        self.heads, self.parallel = heads, parallel
        self.inp = nn.Linear(width, 3 * hidden)
        self.recurrent = orthogonal_heads(3, hidden, heads)
        self.recurrent_bias = nn.Parameter(torch.zeros(3 * hidden))

    def initial_state(self, batch: int) -> Tensor:
        return self.recurrent.new_zeros(batch, self.out_width, dtype=wide(self.recurrent.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = gru_step(u, state, *self._weights())
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.parallel == "newton" and not is_traced(u):
            return self._newton(u, state, reset, lengths)
        return gru_loop(u, state, *self._weights(), reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o if o.dtype is x.dtype else o.to(x.dtype)  # a step notices the call

    def linearise(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """h_t and dh_t / dh_{t-1}, in blocks, from u = W x_t + b."""
        r_mat = by_gate(self.recurrent.to(h.dtype), 3)
        xr, xz, xn = (part.unflatten(-1, r_mat.shape[1:3]) for part in u.chunk(3, -1))
        hr, hz, hn = heard(r_mat, h, self.recurrent_bias)
        before = h.unflatten(-1, r_mat.shape[1:3])
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        d_n = (1 - z) * (1 - n * n)
        jacobian = through([d_n * hn * r * (1 - r), (before - n) * z * (1 - z), d_n * r], r_mat)
        jacobian.diagonal(dim1=-2, dim2=-1).add_(z)
        new = n + z * (before - n)
        return new.flatten(1), jacobian if jacobian.shape[-1] > 1 else jacobian.flatten(1)

    def _newton(self, x: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        def step(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = gru_step(u, h, None, self.recurrent, None, self.recurrent_bias)
            return h, h

        structure = Structure(self.out_width, self.out_width // self.heads)
        given = x, state, self.inp.weight, self.inp.bias
        return newton_scan(step, self.linearise, structure, *given, reset=reset, lengths=lengths)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inp = self.inp
        return inp.weight, self.recurrent, inp.bias, self.recurrent_bias
