"""Echo state network of leaky units (Jaeger et al. 2007, doi:10.1016/j.neunet.2007.04.016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Cell, NumericError, UsageError, check_sizes, clear_past_end, past_end, register_layer, wide
from ..ops.gated_loop import elman_loop, elman_step


@register_layer(
    "reservoir",
    paper="doi:10.1016/j.neunet.2007.04.016",
    examples=[
        dict(width=3, hidden=6, out=2, density=0.5, seed=0),
        dict(width=2, hidden=5, out=3, leak=0.3, spectral_radius=1.1, seed=1),
    ],
    sized=lambda width: dict(width=width, hidden=4 * width, out=width),
)
class Reservoir(Cell[Tensor]):
    """h_t = (1 - leak) h_{t-1} + leak tanh(W_in [1; x_t] + W h_{t-1}),  y_t = W_out [1; x_t; h_t].

    W and W_in are drawn once and never trained: they are buffers. W is Gaussian on a random `density` of its entries,
    and on one random cycle through all units so that it is never nilpotent, scaled to `spectral_radius`; W_in is
    uniform in +-input_scale. With a seed they are the same for everyone, else they come from torch's generator.

    W_out is trained by gradient like any parameter, or in closed form by `fit_readout`. Radii above 1 are legal:
    whether the echo dies out depends on the input too. State h (B, N), float32 or wider.
    """

    w: Tensor  # (N, N)
    w_in: Tensor  # (N, 1 + D)

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int,
        *,
        spectral_radius: float = 0.9,
        leak: float = 1.0,
        density: float = 0.1,
        input_scale: float = 0.1,
        seed: int | None = None,
    ):
        super().__init__()
        check_sizes("Reservoir", width=width, hidden=hidden, out=out)
        if not 0 < leak <= 1:
            raise UsageError(f"Reservoir: leak {leak}; expected more than 0 and at most 1")
        if not 0 <= density <= 1:
            raise UsageError(f"Reservoir: density {density}; expected 0 to 1")
        if spectral_radius < 0:
            raise UsageError(f"Reservoir: spectral_radius {spectral_radius}; expected 0 or more")
        self.width, self.out_width = width, out
        self.leak = leak
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        dtype = torch.get_default_dtype()
        inp = input_scale * (2 * torch.rand(hidden, width + 1, generator=rng, dtype=torch.float64) - 1)
        self.register_buffer("w_in", inp.to(dtype))
        self.register_buffer("w", _recurrent(hidden, density, spectral_radius, rng).to(dtype))
        self.readout = nn.Linear(width + hidden, out)

    def initial_state(self, batch: int) -> Tensor:
        return self.w.new_zeros(batch, len(self.w), dtype=wide(self.w.dtype))

    def encode(self, x: Tensor) -> Tensor:
        high = wide(self.w.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(high), self.w_in[:, 1:].to(high), self.w_in[:, 0].to(high))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = elman_step(u, state, None, self.w, leak=self.leak)
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return elman_loop(u, state, None, self.w, leak=self.leak, reset=reset, lengths=lengths)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.readout(torch.cat([x, o.to(x.dtype)], -1)).to(x.dtype)

    @torch.no_grad()
    def fit_readout(
        self, x: Tensor, y: Tensor, *, washout: int = 100, ridge: float = 1e-6, lengths: Tensor | None = None
    ) -> nn.Linear:
        """Set W_out = Y Z^T (Z Z^T + ridge I)^-1, Z = [1; x; h], in float64, and return it.

        x (B, T, D), y (B, T, E); the first `washout` steps of each row are not fitted, nor those past its length.
        Raises UsageError for shapes that do not fit or nothing left to fit, NumericError if the answer is not finite.
        """
        if y.shape != (*x.shape[:2], self.out_width):
            raise UsageError(f"fit_readout: y is {tuple(y.shape)}; expected {(*x.shape[:2], self.out_width)}")
        if not ridge > 0:
            raise UsageError(f"fit_readout: ridge {ridge}; expected more than 0")
        if not 0 <= washout < x.shape[1]:
            raise UsageError(f"fit_readout: washout {washout}; expected 0 to T - 1 = {x.shape[1] - 1}")
        asked = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) >= washout
        if lengths is not None:
            lengths = lengths.to(x.device)
            asked, x = asked & ~past_end(lengths, x.shape[1]), clear_past_end(x, lengths)
        if not asked.any():
            raise UsageError(f"fit_readout: washout {washout} leaves no step to fit in rows that long")
        h, _ = self.scan(self.encode(x), self.initial_state(x.shape[0]), None, lengths)
        z = torch.cat([x.new_ones(*x.shape[:2], 1), x, h.to(x.dtype)], -1)[asked].double()  # (steps, 1 + D + N)
        gram = z.mT @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        w = torch.linalg.solve(gram, z.mT @ y[asked].double()).mT  # (E, 1 + D + N)
        if not w.isfinite().all():
            raise NumericError("fit_readout: the readout is not finite; check x and y for NaN, or raise ridge")
        self.readout.bias.copy_(w[:, 0])
        self.readout.weight.copy_(w[:, 1:])
        return self.readout


def _recurrent(hidden: int, density: float, radius: float, rng: torch.Generator) -> Tensor:
    w = torch.randn(hidden, hidden, generator=rng, dtype=torch.float64)
    keep = torch.rand(hidden, hidden, generator=rng, dtype=torch.float64) < density
    order = torch.randperm(hidden, generator=rng)
    keep[order, order.roll(1)] = True
    w = w * keep
    return w * (radius / torch.linalg.eigvals(w).abs().max())
