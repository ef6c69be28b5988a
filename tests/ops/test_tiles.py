"""Products of small matrices in compiled loops, against torch's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from statewise.ops import delta_scan, dplr_scan, outer_scan
from statewise.ops.compiled import in_numba as compiled

tiles = importlib.import_module("statewise.ops.tiles.in_numba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products(dtype: torch.dtype):
    like = np.zeros((), torch.empty(0, dtype=dtype).numpy().dtype)[()]
    options = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-13, atol=1e-13)
    start = torch.randn(32, 48, dtype=dtype)

    def check(multiply, want: Tensor, *inputs: Tensor, more: tuple[int, ...] = (), signs=(0, 1, -1)) -> None:
        for sign in signs:
            out = start[: len(want)].clone()
            multiply(like, sign, out.numpy(), *(t.numpy() for t in inputs), *more)
            torch.testing.assert_close(out, start[: len(want)] * abs(sign) + (sign or 1) * want, **options)

    a, b = torch.randn(32, 64, dtype=dtype), torch.randn(64, 48, dtype=dtype)
    check(tiles.product, a @ b, a, b)
    check(tiles.turned_product, a @ b, a.mT.contiguous(), b)
    for each in (1, 2):
        queries = torch.arange(32 // each)[:, None]
        seen = torch.randn(32 // each, 32, dtype=dtype) * (torch.arange(32) < (queries + 1) * each)
        rows, columns = torch.randn(32, 48, dtype=dtype), torch.randn(32 // each, 48, dtype=dtype)
        check(tiles.lower_product, seen @ rows, seen, rows, more=(each,))
        check(tiles.turned_lower_product, seen.mT @ columns, seen, columns, more=(each,))
        out, x = torch.zeros(32 // each, 32, dtype=dtype), torch.randn(64, 32, dtype=dtype)
        tiles.lower(like, out.numpy(), a[: 32 // each].numpy(), x.numpy(), each)
        within = torch.arange(32) < (queries + 1) * each
        torch.testing.assert_close(out * within, (a[: 32 // each] @ x) * within, **options)
    turned = torch.empty(48, 64, dtype=dtype)
    tiles.turn(like, turned.numpy(), b.numpy())
    assert torch.equal(turned, b.mT)


@pytest.mark.parametrize("name", ["none", "head", "key", "delta", "dplr"])
def test_a_gradient_that_is_not_finite_stays_in_its_row_and_head(name: str):
    """Sizes below a tile's: what fills it up is handed from head to head."""
    batch, steps, heads, size = 2, 5, 2, 3
    torch.manual_seed(0)
    q, k, v, a, b = (torch.randn(batch, steps, heads, size) / 2 for _ in range(5))
    state, beta = torch.randn(batch, heads, size, size), torch.rand(batch, steps, heads)
    g = {"head": -torch.rand(heads, 1, 1), "key": -torch.rand(heads, size, 1)}.get(name)
    inputs = {"delta": (q, k, v, beta, state), "dplr": (q, k, v, a, b, state)}.get(name, (q, k, v, state))
    op = {"delta": delta_scan, "dplr": dplr_scan}.get(name, outer_scan)
    inputs = tuple(t.requires_grad_() for t in inputs)
    out, last = op(*inputs, log_decay=g, backend="numba")
    given = torch.ones_like(out)
    given[0, :, 0] = torch.nan
    for x, grad in zip(inputs, torch.autograd.grad((out, last), inputs, (given, torch.ones_like(last))), strict=True):
        rows = grad if x is state else grad.transpose(1, 2)  # (B, H, ...)
        assert rows[0, 1].isfinite().all() and rows[1].isfinite().all()


def test_no_step_leaves_a_state_that_is_not_finite():
    q, state = torch.zeros(2, 0, 2, 3), torch.full((2, 2, 3, 3), torch.nan)
    assert outer_scan(q, q, q, state, backend="numba")[1].isnan().all()
    assert outer_scan(q, q, q, state, backend="torch")[1].isnan().all()


def test_compiled_code_is_not_kept_beyond_a_change_in_what_it_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    head = "from statewise.ops.compiled.in_numba import function\n"
    (tmp_path / "last_in_numba.py").write_text(f"{head}@function\ndef number():\n    return 1\n")
    (tmp_path / "second_in_numba.py").write_text("from last_in_numba import number\n")
    code = "import second_in_numba\nnumber = second_in_numba.number\n"
    (tmp_path / "first_in_numba.py").write_text(f"{head}{code}@function\ndef call():\n    return number()\n")

    def anew() -> int:
        compiled._stamp.cache_clear()
        for name in ("first", "second", "last"):
            sys.modules.pop(f"{name}_in_numba", None)
        return importlib.import_module("first_in_numba").call()

    assert anew() == 1 and list((tmp_path / "__pycache__").glob("first_in_numba.call*.nbi"))
    assert anew() == 1
    (tmp_path / "last_in_numba.py").write_text(f"{head}@function\ndef number():\n    return 1 + 1\n")
    assert anew() == 2
