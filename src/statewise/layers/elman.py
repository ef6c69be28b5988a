"""The simple recurrent network (Elman 1990, doi:10.1207/s15516709cog1402_1); ReLU after Le et al. 2015."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..core import Cell, UsageError, register_layer, wide
from ..ops.gated_loop import elman_loop, elman_step
from ..ops.newton import Structure
from ..ops.opaque import is_traced
from .gated_cell import Parallel, by_gate, check_gated, heard, newton_scan, orthogonal_heads, through


@register_layer(
    "elman",
    paper="doi:10.1207/s15516709cog1402_1",
    examples=[
        {"width": 3, "hidden": 4},
        {"width": 2, "hidden": 3, "nonlinearity": "relu"},
        {"width": 3, "hidden": 4, "heads": 2, "parallel": "newton"},
    ],
    sized=lambda width: {"width": width, "hidden": width},
)
class Elman(Cell[Tensor]):
    """h_t = f(W x_t + R h_{t-1} + b), f tanh or relu; y_t = h_t.

    R starts orthogonal, so that early gradients neither vanish nor explode. heads: R has that many blocks on its
    diagonal, so that units hear those of their own head alone (arXiv:2412.07752); each block starts orthogonal.
    parallel "newton": all times at once by `statewise.ops.newton`, equal to the loop to 1e-5 in float32 and 1e-10 in
    float64. On a CPU the loop is faster at every size that was tried: docs/nonlinear_layers.md. The state is h (B, N).

    Raises UsageError for heads that do not divide hidden, an unknown nonlinearity or parallel.
    """

    multiplied = ("recurrent",)  # as for_streaming has it

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        heads: int = 1,
        parallel: Parallel = "loop",
    ):
        super().__init__()
        check_gated("Elman", width, hidden, heads, parallel)
        if nonlinearity not in ("tanh", "relu"):
            raise UsageError(f"Elman: nonlinearity {nonlinearity!r}; expected 'tanh' or 'relu'")
        self.width, self.out_width = width, hidden
        self.nonlinearity, self.heads, self.parallel = nonlinearity, heads, parallel
        self.inp = nn.Linear(width, hidden)
        self.recurrent = orthogonal_heads(1, hidden, heads)

    def initial_state(self, batch: int) -> Tensor:
        return self.recurrent.new_zeros(batch, self.out_width, dtype=wide(self.recurrent.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = elman_step(u, state, *self._weights(), nonlinearity=self.nonlinearity)
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.parallel == "newton" and not is_traced(u):
            return self._newton(u, state, reset, lengths)
        return elman_loop(u, state, *self._weights(), nonlinearity=self.nonlinearity, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o if o.dtype is x.dtype else o.to(x.dtype)  # a step notices the call

    def linearise(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """h_t and dh_t / dh_{t-1}, in blocks, from u = W x_t + b."""
        r = by_gate(self.recurrent.to(h.dtype), 1)
        pre = u.unflatten(-1, r.shape[1:3]) + heard(r, h)[0]
        relu = self.nonlinearity == "relu"
        new = pre.relu() if relu else pre.tanh()
        jacobian = through([(pre > 0).to(h.dtype) if relu else 1 - new * new], r)
        return new.flatten(1), jacobian if jacobian.shape[-1] > 1 else jacobian.flatten(1)

    def _newton(self, x: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        def step(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = elman_step(u, h, None, self.recurrent, nonlinearity=self.nonlinearity)
            return h, h

        structure = Structure(self.out_width, self.out_width // self.heads)
        given = x, state, self.inp.weight, self.inp.bias
        return newton_scan(step, self.linearise, structure, *given, reset=reset, lengths=lengths)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        inp = self.inp
        return inp.weight, self.recurrent, inp.bias
