"""Products over all of time, as close to the exact ones as the library's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from statewise.ops.products import in_numba as products

SHAPES = [(1, 1, 1), (5, 3, 7), (97, 64, 64), (300, 33, 100), (700, 1500, 70), (257, 128, 256), (2000, 65, 130)]


@pytest.fixture
def always_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "FEW", 0)
    monkeypatch.setattr(products, "_pays", lambda *_: True)


def near(got: Tensor, exact: Tensor, library: Tensor, terms: int) -> None:
    own = (library.double() - exact).abs().max().item()
    assert got.dtype == library.dtype and got.shape == exact.shape
    scale = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert (got.double() - exact).abs().max().item() <= 4 * own + terms**0.5 * scale


@pytest.mark.usefixtures("always_compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("workers", [1, 3])
def test_products_are_the_library_s(dtype: torch.dtype, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.teams, "available", lambda: workers)
    rng = torch.Generator().manual_seed(0)
    for rows, depth, columns in SHAPES:
        wide = torch.randn(rows, depth + 3, generator=rng, dtype=dtype)
        for a, turned in itertools.product((wide[:, :depth].contiguous(), wide[:, 2:-1]), (False, True)):
            w = torch.randn(columns, depth, generator=rng, dtype=dtype).T
            w = w if turned else w.contiguous()
            near(products.by(a, w), a.double() @ w.double(), a @ w, depth)
            b, c = (torch.randn(rows, n, generator=rng, dtype=dtype) for n in (columns, 5))
            by_b, by_c, total = products.sums(a, b, c)
            near(by_b, a.double().T @ b.double(), a.T @ b, rows)
            near(by_c, a.double().T @ c.double(), a.T @ c, rows)
            near(total, a.double().sum(0), a.sum(0), rows)


def test_products_of_nothing_are_zero() -> None:
    a, w, b = torch.randn(4, 0), torch.randn(0, 3), torch.randn(4, 3)
    assert not products.by(a, w).any() and products.by(torch.randn(0, 2), torch.randn(2, 3)).shape == (0, 3)
    by_b, _, total = products.sums(torch.randn(0, 6), b[:0])
    assert by_b.shape == (6, 3) and not by_b.any() and not total.any()


@pytest.mark.usefixtures("always_compiled")
def test_a_number_that_is_none_stays_in_its_row() -> None:
    a, w = torch.randn(100, 70), torch.randn(70, 70)
    want = products.by(a, w)
    a[41, 3] = torch.nan
    got, keep = products.by(a, w), torch.arange(100) != 41
    assert torch.equal(got[keep], want[keep]) and got[41].isnan().all()
