"""One step of the gated cells, in torch.nn's layout and gate order. Every backend of the loops must equal these.

x (B, D), h (B, N), w_ih (gates * N, D), biases (gates * N,) or None. w_ih None: x (B, gates * N) is the product.
w_hh is dense, (gates * N, N), or holds a block for each head, (H, gates * N/H, N/H): units of a head, which lie next
to each other in h, hear those of their head alone. Its rows are in the order of w_ih's within the head: gate by gate.

The step runs in the dtype of h, whatever the parameters' dtype and whatever autocast says: in bfloat16 a recurrence
drifts.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SLSTMState(NamedTuple):
    """What an sLSTM carries. What it remembers is c e^m and n e^m: only m may grow. Nothing seen: m lowest, else 0."""

    h: Tensor  # (B, N) what the gates hear
    c: Tensor  # (B, N) sum of what was written, each weighed by its gates
    n: Tensor  # (B, N) sum of the weights
    m: Tensor  # (B, N) log of the scale that c and n are kept in


def fresh_slstm(batch: int, hidden: int, *, like: Tensor) -> SLSTMState:
    """The state before the first step, in the dtype and on the device of `like`."""
    zero = like.new_zeros(batch, hidden)
    lowest = torch.full_like(zero, torch.finfo(like.dtype).min)  # finite: -inf minus -inf is no number
    return SLSTMState(zero, torch.zeros_like(zero), torch.zeros_like(zero), lowest)


def elman_step(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    leak: float = 1.0,
) -> Tensor:
    """h' = (1 - leak) h + leak tanh(W x + R h + b), or relu (Elman 1990; leak: Jaeger et al. 2007)."""
    with no_autocast(h):
        pre = _affine(x, w_ih, b_ih, h.dtype) + _recurrent(h, w_hh, b_hh)
    new = pre.relu() if nonlinearity == "relu" else pre.tanh()
    return new if leak == 1 else (1 - leak) * h + leak * new


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
    x: Tensor, h: Tensor, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """r, z = s(W x + R h + b);  n = tanh(W_n x + b_n + r (R_n h + c_n));  h' = (1 - z) n + z h.  Rows r, z, n."""
    with no_autocast(h):
        (xr, xz, xn), (hr, hz, hn) = (
            _affine(x, w_ih, b_ih, h.dtype).chunk(3, -1),
            _recurrent(h, w_hh, b_hh).chunk(3, -1),
        )
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return n + z * (h - n)


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """i, f, g, o = W x + R h + b;  c' = s(f) c + s(i) tanh(g);  h' = s(o) tanh(c').  Rows i, f, g, o.

    w_hr (P, N) projects: h' = W_hr s(o) tanh(c'); then h is (B, P) and w_hh (4N, P), without heads.
    """
    with no_autocast(h):
        gates = _affine(x, w_ih, b_ih, h.dtype) + _recurrent(h, w_hh, b_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if w_hr is None else _affine(h, w_hr, None, h.dtype)), c


def slstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    forget: str = "sigmoid",
) -> SLSTMState:
    """i, f, z, o = W x + R h + b;  l = log s(f), or f;  m' = max(l + m, i);  i' = e^(i - m');  f' = e^(l + m - m');
    c' = f' c + i' tanh(z);  n' = f' n + i';  h' = s(o) c' / n'.  Rows i, f, z, o.

    Where i = l + m the gradient of m' goes to l + m. Since a fresh state n' >= 1, so max(n', 1), as FlashRNN has it,
    is the same.
    """
    with no_autocast(h):
        i, f, z, o = (_affine(x, w_ih, b_ih, h.dtype) + _recurrent(h, w_hh, b_hh)).chunk(4, -1)
        kept = (F.logsigmoid(f) if forget == "sigmoid" else f) + m
        new = torch.where(i > kept, i, kept)
        write, keep = (i - new).exp(), (kept - new).exp()
        c, n = keep * c + write * z.tanh(), keep * n + write
        return SLSTMState(o.sigmoid() * c / n, c, n, new)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    if weight is None:
        return x.to(dtype) if bias is None else x.to(dtype) + bias
    return F.linear(x.to(dtype), weight.to(dtype), bias)


def _recurrent(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.ndim == 2:
        return _affine(h, weight, bias, h.dtype)
    heads, _, size = weight.shape
    blocks = torch.einsum("bhk,hrk->bhr", h.unflatten(1, (heads, size)), weight.to(h.dtype))
    return _affine(blocks.unflatten(2, (-1, size)).transpose(1, 2).flatten(1), None, bias, h.dtype)


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    device = like.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
