"""y_t = sum_j kernel_j u_{t-j}: the convolution that a time-invariant recurrence is, with a kernel of any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError, clear_past_end, wide
from ..dispatch import Backend, op
from ..given import check_time

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check(u: Tensor, kernel: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> None:
    pairs = zip(u.shape[2:], kernel.shape[:-1])
    if u.ndim < 2 or kernel.ndim != u.ndim - 1 or any(m != n and 1 not in (m, n) for m, n in pairs):
        raise UsageError(
            f"long_conv: u is {tuple(u.shape)} and kernel {tuple(kernel.shape)}; expected (B, T, N...) and (N..., L), "
            f"where the channels N... broadcast"
        )
    if u.dtype not in _DTYPES or kernel.dtype != wide(u.dtype):
        raise UsageError(
            f"long_conv: u is {u.dtype} and kernel {kernel.dtype}; expected real numbers, the kernel in float32 or "
            f"wider, as u is"
        )
    if u.device != kernel.device:
        raise UsageError(f"long_conv: u is on {u.device}, kernel on {kernel.device}; move them together")
    check_time("long_conv", u, reset, lengths)


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=torch.float64).to(dtype)

    def inputs(batch: int, steps: int, length: int, *n: int, **more: Tensor) -> dict[str, Any]:
        return {"u": normal(batch, steps, *n), "kernel": normal(*n, length, dtype=wide(dtype)), **more}

    def coin(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device) < 0.1

    def ends(*lengths: int) -> Tensor:
        return torch.tensor(lengths, device=device)

    yield inputs(2, 5, 5, 3)
    yield inputs(1, 1, 1, 1)
    yield inputs(2, 0, 4, 3)
    yield inputs(0, 40, 40, 3)
    yield inputs(2, 4, 4, 0)
    yield inputs(2, 6, 3)  # no channel axis
    yield inputs(2, 6, 0, 2)  # a kernel of no taps
    yield inputs(2, 3, 9, 2)  # a kernel longer than time
    yield inputs(2, 100, 7, 3)  # a short one
    yield inputs(2, 37, 37, 2, 3)  # two channel axes, no power of two
    yield inputs(1, 130, 130, 5)
    yield inputs(2, 50, 200, 3)
    yield inputs(2, 90, 45, 3)
    yield {"u": normal(2, 70, 3, 1), "kernel": normal(3, 4, 70, dtype=wide(dtype))}  # four outputs of each channel
    yield {"u": normal(2, 40, 3), "kernel": normal(1, 40, dtype=wide(dtype)).expand(3, 40)}
    yield {"u": normal(60, 2, 3).transpose(0, 1), "kernel": normal(60, 3, dtype=wide(dtype)).mT}
    yield {"u": normal(2, 80, 1).expand(2, 80, 3), "kernel": torch.ones(3, 80, dtype=wide(dtype), device=device)}
    yield inputs(4, 9, 9, 3, reset=coin(4, 9))
    yield inputs(4, 150, 150, 3, reset=coin(4, 150))
    yield inputs(2, 150, 40, 3, reset=coin(2, 150))
    yield inputs(2, 64, 64, 3, reset=torch.ones(2, 64, dtype=torch.bool, device=device))
    yield {"u": normal(2, 70, 3, 1), "kernel": normal(3, 2, 70, dtype=wide(dtype)), "reset": coin(2, 70)}
    yield inputs(4, 6, 6, 3, lengths=ends(0, 1, 5, 6))
    yield inputs(4, 70, 70, 3, lengths=ends(70, 0, 33, 1), reset=coin(4, 70))


@op(
    Backend(
        "torch",
        "statewise.ops.long_conv.in_torch:convolve",
        devices=("cpu", "cuda", "mps", "xpu", "meta"),
        dtypes=_DTYPES,
    ),
    samples=_samples,
    check=_check,
)
def long_conv(u: Tensor, kernel: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    """Solve y_t = sum_{j <= t} kernel_j u_{t-j} along dim 1 of u, channel by channel.

    u: (B, T, N...), real; float16 and bfloat16 are computed in float32. T = 0 and B = 0 are legal.
    kernel: (N..., L), float32 or wider, L shorter or longer than T. The channels of u and kernel broadcast, so u
        (B, T, D, 1) and kernel (D, M, L) give M outputs of each of D inputs.
    reset: (B, T) bool; where True, nothing from before t counts from t on, NaN and infinities included.
    lengths: (B,) integers; row b ends after lengths[b] steps, y is 0 from there on.

    Returns y (B, T, N...) in the dtype of u. Differentiable any number of times in u and kernel. A NaN or infinity in u
    stays in its row and channel and shows in the next L outputs alone, up to a reset. By FFT, rounding is of the size
    of eps times the largest of a row, wherever in the row that stands. Raises UsageError for shapes and dtypes that do
    not fit.

    Cost by FFT: T log T; with resets some log2(T) / 2 times that, wherever they stand.

    >>> long_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1.0, 10.0]])).flatten().tolist()
    [1.0, 12.0, 23.0]
    """
    if lengths is not None:
        u = clear_past_end(u, lengths.to(u.device))
    taps, past, ys = kernel.movedim(-1, 0), u.to(kernel.dtype), []
    for t in range(u.shape[1]):
        if reset is not None:
            cut = torch.cat([reset[:, t : t + 1].expand(-1, t), reset.new_zeros(len(u), u.shape[1] - t)], 1)
            past = past.masked_fill(cut.view(*cut.shape, *[1] * (u.ndim - 2)), 0)
        newest_first = past[:, max(t + 1 - len(taps), 0) : t + 1].flip(1)
        ys.append((taps[: t + 1] * newest_first).sum(1))
    shape = torch.broadcast_shapes(u.shape[2:], kernel.shape[:-1])
    y = torch.stack(ys, 1).to(u.dtype) if ys else u.expand(*u.shape[:2], *shape)
    return y if lengths is None else clear_past_end(y, lengths.to(u.device))
