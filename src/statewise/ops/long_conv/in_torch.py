"""Plain torch: a matrix product where time is short, else the fast Fourier transform.

With resets a sequence is halved again and again: what the first half of a block adds to its second is one convolution,
of the inputs since the last reset of the first half, for the outputs up to the first reset of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...core import clear_past_end

SHORT = 64  # steps up to which a matrix product is as fast; it takes nothing from the future, to the last bit


def convolve(u: Tensor, kernel: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    if lengths is not None:
        u = clear_past_end(u, lengths.to(u.device))
    dtype, steps, shape = u.dtype, u.shape[1], torch.broadcast_shapes(u.shape[2:], kernel.shape[:-1])
    kernel = kernel[..., :steps]
    segment = None if reset is None else reset.cumsum(1).view(len(u), *[1] * (u.ndim - 2), steps)
    u = u.to(kernel.dtype).movedim(1, -1)  # (B, N..., T)
    if u.numel() and kernel.numel():
        reached = None
        if not _seen_to_be_finite(u):
            bad = u.detach() * 0  # NaN where u is NaN or infinite
            reached, u = _reached(bad, kernel.shape[-1], segment), torch.where(bad == 0, u, 0)
        with torch.autocast(u.device.type, enabled=False):
            y = _whole(u, kernel) if segment is None else _by_halves(u.contiguous(), kernel, segment)
        y = y if reached is None else y + reached
    else:
        y = (u[..., :0].sum() + kernel[..., :0].sum()).expand(len(u), *shape, steps)
    y = y.movedim(-1, 1).to(dtype)
    return y if lengths is None else clear_past_end(y, lengths.to(y.device))


def _seen_to_be_finite(u: Tensor) -> bool:
    """Whether a look at the numbers shows it: only where looking costs next to nothing, and nothing traces the code."""
    if u.device.type != "cpu" or torch.compiler.is_compiling() or type(u) not in (Tensor, nn.Parameter):
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    return bool(u.detach().sum().isfinite())


def _whole(u: Tensor, kernel: Tensor) -> Tensor:
    steps, length = u.shape[-1], kernel.shape[-1]
    if steps <= SHORT:
        return _by_matrix(u[..., None, :], pad(kernel, (steps - 1, steps - length))).squeeze(-2)
    return _by_fft(u, kernel, _smooth(steps + length - 1))[..., :steps]  # room for both: nothing comes round


def _by_halves(u: Tensor, kernel: Tensor, segment: Tensor) -> Tensor:
    steps, length, size = u.shape[-1], kernel.shape[-1], 1
    whole = 1 << (steps - 1).bit_length()
    u = pad(u, (0, whole - steps))
    segment = torch.cat([segment, segment[..., -1:].expand(*segment.shape[:-1], whole - steps)], -1)
    y = kernel[..., :1] * u
    while size < whole:
        before, after = segment.unflatten(-1, (-1, 2, size)).unbind(-2)  # (B, N..., blocks, size)
        at_border = before[..., -1:]
        since = torch.where(before == at_border, u.unflatten(-1, (-1, 2, size))[..., 0, :], 0)
        taps = pad(kernel[..., : 2 * size], (0, max(2 * size - length, 0)))
        if size <= SHORT // 2:
            more = _by_matrix(since, taps[..., 1:])
        else:  # twice the size is room enough: what comes round ends before the second half begins
            more = _by_fft(since, taps[..., None, :], 2 * size)[..., size:]
        more = torch.where(after == at_border, more, 0)
        y = y + pad(more, (size, 0)).flatten(-2)
        size *= 2
    return y[..., :steps]


def _by_matrix(u: Tensor, taps: Tensor) -> Tensor:
    """o_t = sum_s taps[n - 1 + t - s] u_s for s and t below n: u (B, N..., blocks, n), taps (N..., 2 n - 1)."""
    rows = taps.unfold(-1, u.shape[-1], 1).flip(-1)  # (N..., t, s)
    o = u.movedim(0, -3).flatten(-3, -2) @ rows.mT
    return o.unflatten(-2, (len(u), -1)).movedim(-3, 0)


def _by_fft(u: Tensor, kernel: Tensor, size: int) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(kernel, size), size)


def _smooth(size: int) -> int:
    """The next 2^k or 3 2^k: the transform is fast there."""
    power = 1 << (size - 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= size else power


def _reached(bad: Tensor, length: int, segment: Tensor | None) -> Tensor:
    """NaN for outputs that a NaN in bad reaches, else 0: products and transforms would spread it over all times."""
    if length == bad.shape[-1] and segment is None:
        return bad.cumsum(-1)
    t = torch.arange(bad.shape[-1], device=bad.device)
    latest = torch.where(bad == 0, -1, t).cummax(-1).values
    first = (t - length).clamp(min=-1)
    if segment is not None:  # the first step of each segment
        begins = torch.diff(segment, dim=-1, prepend=segment.new_full((*segment.shape[:-1], 1), -1)) != 0
        first = torch.maximum(first, torch.where(begins, t, -1).cummax(-1).values - 1)
    return torch.where(latest > first, torch.nan, 0.0).to(bad.dtype)
