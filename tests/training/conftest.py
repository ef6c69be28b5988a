from __future__ import annotations

import pytest
from toys import Leaky, Trail

from statewise import models
from statewise.tasks.base import TaskInfo, tasks


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys have names only while these tests run: other tests count what is registered."""
    monkeypatch.setitem(tasks._entries, "trail", TaskInfo("trail", Trail))
    monkeypatch.setitem(models.descriptions, "leaky", Leaky)
