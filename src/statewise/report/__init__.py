"""What a comparison found, for people: leaderboards in the terminal, in Markdown and as CSV, one HTML page, a picture.

Everything here reads the plain dict that `statewise compare` writes to comparison.json, so a report can be made again
from a results folder without training anything.
"""

from .charts import Curve
from .page import write_page
from .panels import Panel, check_panels, write_panels
from .picture import write_picture
from .summary import (
    SHARES,
    Row,
    boards_of,
    leaderboard,
    read_comparison,
    show_bytes,
    show_count,
    show_score,
    show_time,
)  # fmt: skip
from .tables import write_all, write_csv, write_leaderboard_csv, write_markdown

__all__ = [
    "SHARES", "Curve", "Panel", "Row", "boards_of", "check_panels", "leaderboard", "read_comparison", "show_bytes",
    "show_count", "show_score", "show_time", "write_all", "write_csv", "write_leaderboard_csv", "write_markdown",
    "write_page", "write_panels", "write_picture",
]  # fmt: skip
