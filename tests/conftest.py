"""One thread, one seed for each test, and the annotations of core checked as the tests run."""

from __future__ import annotations

import gc
import signal
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by a shell, in the background; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
# the same examples every day: a failure is of the change, not of the draw; and what a test takes is no reason to fail
hypothesis.settings.register_profile("any machine", derandomize=True, deadline=None)
hypothesis.settings.load_profile("any machine")
torch.set_num_threads(1)  # tiny recurrent steps: two threads on two busy cores only wait for each other

# Not layers, ops and models, where the wrappers would stand in the way of full-graph compilation; test_shapes.py wraps
# the small functions that those stand on.
CHECKED = ["statewise.core.registry", "statewise.core.running", "statewise.core.vary"]
CHECKED += ["statewise.testing.checks", "statewise.testing.sample"]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests tokenise does not stay in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATEWISE_CORPORA", str(tmp_path_factory.mktemp("corpora")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves the defaults as it found them."""
    dtype = torch.get_default_dtype()
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace for the GPUs: 0.7 ms for each test
    yield
    torch.set_default_dtype(dtype)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no collection of garbage looks at its millions of objects."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not tested here and why, so that nobody takes a skip for a pass."""
    reasons = Counter(_reason(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if count := reasons.pop("triton is not installed", 0):
        terminalreporter.write_line(
            f"triton is not installed: {count} interpreter tests skipped (python3 dev.py test --with triton)"
        )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


def _reason(longrepr: object) -> str:
    """Of a skip: (path, line, "Skipped: reason"), which other processes send as a list or a string."""
    words = longrepr[2] if isinstance(longrepr, tuple | list) else longrepr
    return str(words).removeprefix("Skipped: ")
