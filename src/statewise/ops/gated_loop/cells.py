"""One step of the gated cells, in torch.nn's layout and gate order. Every backend of the loops must equal these.

x (B, D), h (B, N), weights (gates * N, D) and (gates * N, N), biases (gates * N,) or None. The step runs in the dtype
of h, whatever the parameters' dtype and whatever autocast says: in bfloat16 a recurrence drifts.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F


def elman_step(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """h' = tanh(W x + R h + b), or relu (Elman 1990)."""
    with no_autocast(h):
        pre = _affine(x, w_ih, b_ih, h.dtype) + _affine(h, w_hh, b_hh, h.dtype)
    return pre.relu() if nonlinearity == "relu" else pre.tanh()


def jordan_step(
    x: Tensor,
    s: Tensor,
    w_ih: Tensor,
    w_sh: Tensor,
    w_hy: Tensor,
    b_ih: Tensor | None = None,
    b_hy: Tensor | None = None,
) -> Tensor:
    """y = V tanh(W x + U s + a) + b with the context s (B, E), U (N, E), V (E, N) (Jordan 1986)."""
    with no_autocast(s):
        return _affine(elman_step(x, s, w_ih, w_sh, b_ih), w_hy, b_hy, s.dtype)


def gru_step(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """r, z = s(W x + R h + b);  n = tanh(W_n x + b_n + r (R_n h + c_n));  h' = (1 - z) n + z h.  Rows r, z, n."""
    with no_autocast(h):
        (xr, xz, xn), (hr, hz, hn) = (
            _affine(x, w_ih, b_ih, h.dtype).chunk(3, -1),
            _affine(h, w_hh, b_hh, h.dtype).chunk(3, -1),
        )
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return n + z * (h - n)


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """i, f, g, o = W x + R h + b;  c' = s(f) c + s(i) tanh(g);  h' = s(o) tanh(c').  Rows i, f, g, o.

    w_hr (P, N) projects: h' = W_hr s(o) tanh(c'); then h is (B, P) and w_hh (4N, P).
    """
    with no_autocast(h):
        gates = _affine(x, w_ih, b_ih, h.dtype) + _affine(h, w_hh, b_hh, h.dtype)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if w_hr is None else _affine(h, w_hr, None, h.dtype)), c


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    device = like.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
