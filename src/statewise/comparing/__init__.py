"""Many experiments in processes of their own, measured alike: what `statewise compare` and recipes run on.

Plan -> cells -> run_cells -> rows; then the streaming step of each layer is timed on the quiet machine, and everything
that a report needs is put in one plain dict. `compare` does all of it; `read_results` reads the rows.
"""

from .budget import Budget
from .collect import collect
from .command import train_command
from .compare import ENGINES, compare
from .describe import describe_task, environment
from .launch import Setup
from .measure import measure_streaming
from .plan import Cell, Plan, split_names
from .pool import locked, run_cells
from .rows import grouped, ordered, read_results, read_rows, where
from .search import Range, Search
from .settings import SETTINGS

__all__ = [
    "ENGINES", "SETTINGS", "Budget", "Cell", "Plan", "Range", "Search", "Setup", "collect", "compare", "describe_task",
    "environment", "grouped", "locked", "measure_streaming", "ordered", "read_results", "read_rows", "run_cells",
    "split_names", "train_command", "where",
]  # fmt: skip
