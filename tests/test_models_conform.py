"""A model is a layer: every kind of model x every check that applies."""

from __future__ import annotations

import pytest
import torch

from statewise import models
from statewise.core import RecurrentLayer
from statewise.testing import Skipped, checks_for
from statewise.testing.sample import moved

EXAMPLES = dict(models.examples())


def build(name: str) -> RecurrentLayer:
    torch.default_generator.manual_seed(0)
    return moved(EXAMPLES[name]())


QUICK = {"stack_min_gru", "stack_window_attention"}  # whose compilation and gradcheck are among the fast tests
OTHERS = {"shared_attention_twice", "universal_gru"}  # nothing of which is: like one beside them
CASES = [
    pytest.param(
        name,
        check,
        id=f"{name}-{check.name}",
        marks=[pytest.mark.slow]
        * (
            check.slow
            or name in OTHERS
            or (name not in QUICK and (check.group == "compile" or "gradcheck" in check.name))
        ),
    )
    for name in EXAMPLES
    for check in checks_for(build(name))
]


@pytest.mark.parametrize("name, check", CASES)
def test_conforms(name, check):
    try:
        check(build(name))
    except Skipped as skip:
        pytest.skip(str(skip))


def test_every_kind_of_model_was_found():
    kinds = {type(build(name)) for name in EXAMPLES}
    assert kinds >= {models.Residual, models.Classifier, models.Forecaster, models.TokenModel}
    assert len(EXAMPLES) >= 10 and len(CASES) >= 10 * 105
