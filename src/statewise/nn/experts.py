"""Several gated maps, of which each time step takes a few (Shazeer et al. 2017, arXiv:1701.06538)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Load, UsageError, check_sizes, wide
from .gated import GatedMLP


class Experts(nn.Module):
    """y = sum_{e in the k largest of p} p_e W_e (silu(G_e x) * U_e x),  p = softmax(R x). x (..., D) -> (..., D).

    experts E of `hidden` channels each, active k; nobody is turned away, however many choose the same. normed: the k
    shares are divided by their sum. shared: a gated map of so many channels that every x takes, times sigmoid(s x),
    is added; 0 for none. The shares are computed in float32 or wider. up (E, 2 hidden, D) holds G over U.

    balance: what is paid for uneven use, `balance` E sum_e f_e P_e in the mean over steps, where f_e is how many of the
    steps take e, P_e the mean of p_e (Fedus et al. 2021, arXiv:2101.03961; least, `balance` k, where all are alike).
    `weighed` tells what it takes, and `models.Block` hands it to training; 0 for nothing.

    Only experts that some x takes are computed, or all of them where the graph is traced, which must not depend on x.
    Steps that share an expert go through it together, so the last bit of one may depend on which others do.
    Maps have no bias and start as in torch.nn.Linear. Raises UsageError for sizes below 1 and unless k <= E.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int,
        active: int,
        normed: bool = False,
        shared: int = 0,
        balance: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes("Experts", width=width, hidden=hidden, experts=experts, active=active)
        if active > experts:
            raise UsageError(f"Experts: active {active}; expected at most the number of experts, {experts}")
        if isinstance(balance, bool) or not 0 <= balance <= 1e6:
            raise UsageError(f"Experts: balance is {balance!r}; expected a number from 0 to 1e6")
        self.active, self.normed, self.balance = active, normed, balance
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, 2 * hidden, width).uniform_(-(width**-0.5), width**-0.5))
        self.out = nn.Parameter(torch.empty(experts, width, hidden).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.shared = GatedMLP(width, shared, bias=False) if shared else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        return self._mixed(x)[0]

    def weighed(self, x: Tensor) -> tuple[Tensor, Load]:
        """y, and what each x takes and owes, (..., E) twice: not summed over anything yet."""
        y, odds, taken = self._mixed(x)
        price = self.balance * len(self.up) * self.active  # `costs` shares out all that is taken: k times what f_e does
        found = (torch.zeros_like(odds).scatter(-1, taken, 1), price * odds)
        return y, Load(*(t.reshape(*x.shape[:-1], len(self.up)) for t in found))

    def _mixed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y; p (N, E) and which are taken (N, k), of all x in a row."""
        rows = x.reshape(-1, x.shape[-1])
        z = self.router(rows)
        odds = z.to(wide(z.dtype)).softmax(-1)  # (N, E)
        p, taken = odds.topk(self.active, -1)  # (N, k) twice
        if self.normed:
            p = p / p.sum(-1, keepdim=True)
        shares = torch.zeros(z.shape, dtype=p.dtype, device=p.device).scatter(-1, taken, p)  # (N, E)
        y = torch.zeros_like(rows)
        if torch.compiler.is_compiling():
            for e in range(len(self.up)):
                y = y + self._expert(e, rows, shares[:, e]).to(y.dtype)
        else:
            for e in taken.unique().tolist():
                (at,) = (taken == e).any(-1).nonzero(as_tuple=True)
                y = y.index_add(0, at, self._expert(e, rows[at], shares[at, e]).to(y.dtype))
        if self.shared is not None and self.shared_gate is not None:
            y = y + (self.shared_gate(rows).sigmoid() * self.shared(rows)).to(y.dtype)
        return y.reshape(x.shape), odds, taken

    def _expert(self, e: int, x: Tensor, share: Tensor) -> Tensor:
        gate, value = F.linear(x, self.up[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * value, self.out[e])
        return y * share[:, None].to(y.dtype)
