"""Many experiments in processes of their own, measured alike: what `statewise compare` and recipes run on.

Plan -> cells -> run_cells -> rows; then the streaming step of each layer is timed on the quiet machine, and everything
that a report needs is put in one plain dict.
"""

from .collect import collect
from .describe import describe_task, environment
from .measure import measure_streaming
from .plan import Cell, Plan, split_names
from .pool import fitting_workers, locked, read_rows, run_cells
from .probe import probe
from .settings import SETTINGS

__all__ = [
    "SETTINGS", "Cell", "Plan", "collect", "describe_task", "environment", "fitting_workers", "locked",
    "measure_streaming", "probe", "read_rows", "run_cells", "split_names",
]  # fmt: skip
