"""The conformance suite: every law of the protocol, tried on any layer, yours included.

>>> from statewise.layers import GRULayer
>>> report = check_layer(GRULayer)
>>> report.ok
True
"""

from . import checks as _groups  # noqa: F401
from .check import Check, Skipped, checks
from .report import Outcome, Report, check_layer, checks_for, known_failures, run
from .sample import build, examples_of, prepare

# Every check_NAME is a plain function of a layer, importable from here.
for _check in checks:
    globals()[_check.function.__name__] = _check.function

__all__ = [
    "Check", "Outcome", "Report", "Skipped", "build", "check_layer", "checks", "checks_for", "examples_of",
    "known_failures", "prepare", "run",
]  # fmt: skip
