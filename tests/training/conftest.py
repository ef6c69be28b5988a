from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from toys import Leaky, Trail

from statewise import models
from statewise.tasks.base import TaskInfo, tasks
from statewise.training.log import TensorBoard


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys have names only while these tests run: other tests count what is registered."""
    monkeypatch.setitem(tasks._entries, "trail", TaskInfo("trail", Trail))
    monkeypatch.setitem(models.descriptions, "leaky", Leaky)


@pytest.fixture(autouse=True)
def board(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """TensorBoard takes a third of the time of so small a run: off, but for the test that asks for it."""
    write = TensorBoard.write
    monkeypatch.setattr(TensorBoard, "write", lambda self, record: None)
    return lambda: monkeypatch.setattr(TensorBoard, "write", write)
