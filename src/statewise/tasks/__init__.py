from .base import SPLITS, Batch, Split, Task, TaskInfo, register_task, tasks
