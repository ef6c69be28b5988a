"""A model is a layer: every kind of model x every check that applies."""

from __future__ import annotations

import pytest
import torch

from statewise import models
from statewise.core import RecurrentLayer
from statewise.testing import Skipped, checks_for, prepare

EXAMPLES = dict(models.examples())


def build(name: str) -> RecurrentLayer:
    torch.default_generator.manual_seed(0)
    return prepare(EXAMPLES[name]())


QUICK = 4  # models whose compilation and gradcheck are among the fast tests
CASES = [
    pytest.param(
        name,
        check,
        id=f"{name}-{check.name}",
        marks=[pytest.mark.slow]
        * (check.slow or (i >= QUICK and (check.group == "compile" or "gradcheck" in check.name))),
    )
    for i, name in enumerate(EXAMPLES)
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
