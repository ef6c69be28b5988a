"""Tasks and data sets, one file each. Importing this package registers them all; none is loaded before it is used."""

from .adding import Adding
from .base import SPLITS, Batch, Split, Task, TaskInfo, register_task, tasks
from .copy import Copy, SelectiveCopy
from .digits import Digits
from .parity import Parity
from .sources import sources

__all__ = [
    "SPLITS", "Adding", "Batch", "Copy", "Digits", "Parity", "SelectiveCopy", "Split", "Task", "TaskInfo",
    "register_task", "sources", "tasks",
]  # fmt: skip
