from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from statewise.core import Unknown, UsageError
from statewise.ops import linear_scan, observe, use_backend

ONE = (torch.rand(1, 3, 2), torch.rand(1, 3, 2), torch.rand(1, 2))


def test_explain_says_why_not():
    table = linear_scan.explain(*(t.to("meta") for t in ONE))
    assert table["numba"] == "device meta (takes cpu)" and table["torch"] == "ok" and list(table)[-1] == "reference"
    table = linear_scan.explain(*ONE)
    assert table["numba"] == table["torch"] == table["reference"] == "ok"
    assert all(why == "ok" or name == "triton" for name, why in table.items())


def test_the_first_that_is_willing_runs():
    assert linear_scan.choose(None, ONE, {}) is linear_scan.backends["numba"]
    meta = tuple(t.to("meta") for t in ONE)
    assert linear_scan.choose(None, meta, {}) is linear_scan.backends["torch"]


def test_use_backend_holds_within_its_block():
    with use_backend("reference"):
        assert linear_scan.choose(None, ONE, {}) is linear_scan.reference
        with use_backend("torch"):
            assert linear_scan.choose(None, ONE, {}) is linear_scan.backends["torch"]
        assert linear_scan.choose(None, ONE, {}) is linear_scan.reference
        assert linear_scan.choose("torch", ONE, {}) is linear_scan.backends["torch"]
    assert linear_scan.choose(None, ONE, {}) is linear_scan.backends["numba"]


def test_observers_are_told_of_every_call_within_their_block():
    told: list[tuple[str, str]] = []
    with observe(lambda op, chosen, args, kwargs: told.append((op.name, chosen))):
        linear_scan(*ONE)
        with use_backend("reference"):
            linear_scan(*ONE)
        linear_scan(*ONE, backend="torch")
    linear_scan(*ONE)
    assert told == [("linear_scan", "numba"), ("linear_scan", "reference"), ("linear_scan", "torch")]


def test_unknown_names_say_what_is_known():
    with pytest.raises(Unknown, match=r"'nunba'.*near: numba"), use_backend("nunba"):
        pass
    with pytest.raises(KeyError, match="numba, torch"):
        linear_scan(*ONE, backend="fpga")


def test_asked_for_but_cannot():
    with pytest.raises(UsageError, match=r"linear_scan: backend 'numba' was asked for but cannot run: device meta"):
        linear_scan(*(t.to("meta") for t in ONE), backend="numba")


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


def test_the_environment_chooses():
    code = """
import sys, torch
from statewise.ops import linear_scan
assert not {"numba", "triton", "torch._dynamo"} & set(sys.modules), "imported too early"
x = torch.ones(1, 2, 1)
print(linear_scan.choose(None, (x, x, x[0]), {}) is linear_scan.backends["torch"])
linear_scan(x, x, x[0])
"""
    assert _python(code, STATEWISE_BACKEND="torch").stdout.strip() == "True"
    assert "no op has a backend 'fpga'" in _python(code, STATEWISE_BACKEND="fpga").stderr


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.rand(1, 3, 2, 1)}, "expected"),
        ({"a": torch.rand(1, 4, 2)}, "broadcasts"),
        ({"h0": torch.rand(2, 2)}, "expected"),
        ({"h0": torch.rand(1, 2, dtype=torch.float64)}, "expected h0"),
        ({"a": torch.rand(1, 3, 2, dtype=torch.complex64)}, "no wider"),
        ({"x": torch.ones(1, 3, 2, dtype=torch.int64)}, "expected h0"),
        ({"reset": torch.zeros(1, 3)}, "reset is torch.float32"),
        ({"reset": torch.zeros(1, 2, dtype=torch.bool)}, "reset"),
        ({"lengths": torch.tensor([1, 2])}, "lengths"),
        ({"lengths": torch.tensor([4])}, r"lengths\[0\] is 4; expected 0 to T = 3"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change, words):
    with pytest.raises(UsageError, match=words):
        linear_scan(**(dict(zip(("a", "x", "h0"), ONE)) | change))
