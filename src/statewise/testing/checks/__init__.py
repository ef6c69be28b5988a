"""One file for each group of checks; importing this enters them all, in the order they are run and printed."""

from . import time  # noqa: I001
from . import lengths, state, batch, gradients, numbers, construction, traits, inputs, compilation

GROUPS = (time, lengths, state, batch, gradients, numbers, construction, traits, inputs, compilation)

__all__ = ["GROUPS"]
