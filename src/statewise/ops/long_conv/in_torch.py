"""Plain torch: tap by tap where there are few, else by the fast Fourier transform.

With resets a sequence is halved again and again: what the first half of a block adds to its second is one convolution,
of the inputs since the last reset of the first half, for the outputs up to the first reset of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import clear_past_end

FEW = 32  # taps that cost less one by one than by FFT; those results hold nothing of the future, to the last bit


def convolve(u: Tensor, kernel: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    if lengths is not None:
        u = clear_past_end(u, lengths.to(u.device))
    dtype, steps, shape = u.dtype, u.shape[1], torch.broadcast_shapes(u.shape[2:], kernel.shape[:-1])
    kernel = kernel[..., :steps]
    length = kernel.shape[-1]
    segment = None if reset is None else reset.cumsum(1).view(len(u), *[1] * (u.ndim - 2), steps)
    u = u.to(kernel.dtype).movedim(1, -1)  # (B, N..., T)
    if not u.numel() or not kernel.numel():
        y = (u[..., :0].sum() + kernel[..., :0].sum()).expand(len(u), *shape, steps)
    elif length <= FEW:
        y = _tap_by_tap(u, kernel, segment)
    else:
        bad = u.detach() * 0  # NaN where u is NaN or infinite
        spoilt, u = _spoilt(bad, length, segment), torch.where(bad == 0, u, 0)
        y = _by_fft(u, kernel) if segment is None else _by_halves(u, kernel, segment)
        y = y + spoilt
    y = y.movedim(-1, 1).to(dtype)
    return y if lengths is None else clear_past_end(y, lengths.to(y.device))


def _tap_by_tap(u: Tensor, kernel: Tensor, segment: Tensor | None) -> Tensor:
    steps = u.shape[-1]
    y = kernel[..., :1] * u
    for j in range(1, kernel.shape[-1]):
        past = u[..., : steps - j]
        if segment is not None:
            past = torch.where(segment[..., j:] == segment[..., : steps - j], past, 0)
        y = y + torch.nn.functional.pad(kernel[..., j : j + 1] * past, (j, 0))
    return y


def _by_fft(u: Tensor, kernel: Tensor) -> Tensor:
    steps, length = u.shape[-1], kernel.shape[-1]
    size = _smooth(steps + length - 1)  # room for both, so that the end does not come round to the beginning
    return _product(u, kernel, size)[..., :steps]


def _by_halves(u: Tensor, kernel: Tensor, segment: Tensor) -> Tensor:
    steps, size = u.shape[-1], FEW
    whole = FEW << max(0, ((steps - 1) // FEW).bit_length())
    u = torch.nn.functional.pad(u, (0, whole - steps))
    segment = torch.cat([segment, segment[..., -1:].expand(*segment.shape[:-1], whole - steps)], -1)
    y = _tap_by_tap(_blocks(u, size), kernel[..., None, :size], _blocks(segment, size)).flatten(-2)
    while size < whole:
        first = _blocks(u, size)[..., ::2, :]  # (B, N..., blocks, size)
        before, after = _blocks(segment, size).unflatten(-2, (-1, 2)).unbind(-2)
        at_border = before[..., -1:]
        since = torch.where(before == at_border, first, 0)
        # twice the size is room enough: what comes round ends before the second half begins
        more = _product(since, kernel[..., None, : 2 * size], 2 * size)[..., size:]
        more = torch.where(after == at_border, more, 0)
        y = y + torch.stack([torch.zeros_like(more), more], -2).flatten(-3)
        size *= 2
    return y[..., :steps]


def _blocks(t: Tensor, size: int) -> Tensor:
    return t.unflatten(-1, (-1, size))


def _product(u: Tensor, kernel: Tensor, size: int) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(kernel, size), size)


def _smooth(size: int) -> int:
    """The next 2^k or 3 2^k: the transform is fast there."""
    power = 1 << (size - 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= size else power


def _spoilt(bad: Tensor, length: int, segment: Tensor | None) -> Tensor:
    """NaN for outputs that a NaN in bad reaches, else 0: a transform would spread it over all times."""
    if length == bad.shape[-1] and segment is None:
        return bad.cumsum(-1)
    t = torch.arange(bad.shape[-1], device=bad.device)
    latest = torch.where(bad == 0, -1, t).cummax(-1).values
    first = (t - length).clamp(min=-1)
    if segment is not None:  # the first step of each segment
        begins = torch.diff(segment, dim=-1, prepend=segment.new_full((*segment.shape[:-1], 1), -1)) != 0
        first = torch.maximum(first, torch.where(begins, t, -1).cummax(-1).values - 1)
    return torch.where(latest > first, torch.nan, 0.0).to(bad.dtype)
