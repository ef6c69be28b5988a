"""h_t = A_t h_{t-1} + x_t with A_t in square blocks: the linear recurrence inside Newton's method in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import UsageError
from ..dispatch import Backend, op

_FLOATS = (torch.float32, torch.float64)


def _check(a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None) -> None:
    if x.ndim != 4 or a.shape != (*x.shape, x.shape[-1]) or h0.shape != (*x.shape[:1], *x.shape[2:]):
        shapes = f"a is {tuple(a.shape)}, x {tuple(x.shape)}, h0 {tuple(h0.shape)}"
        raise UsageError(f"block_scan: {shapes}; expected (B, T, G, N, N), (B, T, G, N) and (B, G, N)")
    if not a.dtype == x.dtype == h0.dtype:
        raise UsageError(f"block_scan: a is {a.dtype}, x {x.dtype}, h0 {h0.dtype}; expected one dtype")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        raise UsageError(f"block_scan: reset is {reset.dtype} {tuple(reset.shape)}; expected bool {tuple(x.shape[:2])}")


def _samples(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=torch.float64).to(dtype)

    def call(b: int, t: int, g: int, n: int, size: float = 0.5, **more: Tensor) -> dict[str, Any]:
        return {"a": size * normal(b, t, g, n, n), "x": normal(b, t, g, n), "h0": normal(b, g, n), **more}

    yield call(2, 5, 3, 4)  # no two sizes alike
    yield call(1, 1, 1, 1)
    yield call(2, 0, 3, 2)
    yield call(0, 4, 3, 2)
    yield call(2, 4, 0, 2)
    yield call(2, 13, 1, 5, 0.2)  # dense
    yield call(2, 6, 2, 3, 0.0)
    yield call(3, 33, 2, 2, 0.3, reset=torch.rand(3, 33, generator=rng, device=device) < 0.3)
    yield call(2, 9, 1, 9, 0.1, reset=torch.ones(2, 9, dtype=torch.bool, device=device))


@op(
    Backend("numba", "statewise.ops.block_scan.in_numba:scan", devices=("cpu",), dtypes=_FLOATS, requires=("numba",)),
    Backend(
        "torch",
        "statewise.ops.block_scan.in_torch:scan",
        devices=("cpu", "cuda", "mps", "xpu", "meta"),
        dtypes=_FLOATS,
    ),
    samples=_samples,
    check=_check,
)
def block_scan(a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve h_t = A_t h_{t-1} + x_t along dim 1, for G independent blocks of N numbers.

    a (B, T, G, N, N), x (B, T, G, N), h0 (B, G, N), all float32 or all float64. T = 0 and B = 0 are legal.
    reset (B, T) bool: where True, h_t = x_t, whatever h_{t-1} and A_t are, infinities included.

    Returns h (B, T, G, N) and the last state (B, G, N). Differentiable in a, x and h0 through both, once with a kernel,
    any number of times with the torch backend. Raises UsageError for shapes and dtypes that do not fit.

    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(1, 3, 1, 2, 2)
    >>> block_scan(turn, torch.zeros(1, 3, 1, 2), torch.tensor([[[1.0, 0.0]]]))[1].tolist()
    [[[0.0, -1.0]]]
    """
    h, hs = h0, []
    for t in range(x.shape[1]):
        new = torch.einsum("bgij,bgj->bgi", a[:, t], h) + x[:, t]
        h = new if reset is None else torch.where(reset[:, t, None, None], x[:, t], new)
        hs.append(h)
    return (torch.stack(hs, 1), h) if hs else (x, h0.clone())
