"""What a comparison found, for people: a leaderboard in the terminal and in Markdown, a CSV, one HTML page, a picture.

Everything here reads the plain dict that `statewise compare` writes to comparison.json, so a report can be made again
from a results folder without training anything.
"""

from .page import write_page
from .picture import write_picture
from .summary import FORMAT, Row, leaderboard, read_comparison, show_bytes, show_count, show_score, show_time
from .tables import write_csv, write_markdown

__all__ = [
    "FORMAT", "Row", "leaderboard", "read_comparison", "show_bytes", "show_count", "show_score", "show_time",
    "write_csv", "write_markdown", "write_page", "write_picture",
]  # fmt: skip
