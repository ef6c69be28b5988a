"""Every registered layer x its examples x every check that applies."""

from __future__ import annotations

import pytest

import statewise.layers  # noqa: F401  registers them
from statewise.core import layers
from statewise.testing import Skipped, build, checks, checks_for, known_failures

# One layer for each way of walking through time. Of the others only forward with resets is compiled among the fast
# tests, with its gradients.
COMPILED = {"attention", "delta_net", "gru", "lru", "mamba2", "mlstm", "rwkv7", "slstm", "window_attention"}
CASES = [
    pytest.param(
        info.cls,
        example,
        check,
        id=f"{info.name}{i}-{check.name}",
        # the first example of a layer goes through everything, the second through what is quick, the others when asked
        marks=[pytest.mark.slow]
        * (
            check.slow
            or i > 1
            or (i == 1 and (check.group == "compile" or "gradcheck" in check.name))
            or (check.group == "compile" and check.name != "forward_compiles" and info.name not in COMPILED)
        )
        + [
            pytest.mark.xfail(reason=known_failures(info.cls)[c], strict=True)
            for c in [check.name]
            if c in known_failures(info.cls)
        ],
    )
    for info in layers
    for i, example in enumerate(info.examples)
    for check in checks_for(build(info.cls, example))
]


@pytest.mark.parametrize("cls, example, check", CASES)
def test_conforms(cls, example, check):
    try:
        check(build(cls, example))
    except Skipped as skip:
        pytest.skip(str(skip))


def test_everything_was_found():
    assert len(checks) >= 130 and len(layers) >= 12
    assert len(CASES) >= 12 * 110 and all(len(info.examples) >= 1 for info in layers)


@pytest.mark.parametrize("info", layers, ids=lambda info: info.name)
def test_known_failures_name_checks(info):
    assert [name for name in known_failures(info.cls) if name not in checks] == []
    assert all(len(reason) > 20 for reason in known_failures(info.cls).values()), "a known failure has a reason"


def test_known_failures_are_few():
    found = {f"{info.name}: {name}" for info in layers for name in known_failures(info.cls)}
    assert len(found) <= 10, found
