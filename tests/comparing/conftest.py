"""Workers are copies of one process, unless a test asks for new ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import copied
from statewise.comparing import launch


@pytest.fixture(autouse=True, scope="module")
def copied_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "spawn", copied.Copy)
        yield


@pytest.fixture
def new_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have them."""
    monkeypatch.setattr(launch, "spawn", copied.new_process)
