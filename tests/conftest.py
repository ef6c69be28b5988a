"""One thread, one seed for each test, and the annotations of core checked as the tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)  # tiny recurrent steps: two threads on two busy cores only wait for each other

# Not layers, ops and models, where the wrappers would stand in the way of full-graph compilation, nor functions that
# users call, whose own refusals are tested.
CHECKED = ["statewise.core.registry", "statewise.core.vary", "statewise.testing.checks", "statewise.testing.sample"]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves the defaults as it found them."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
