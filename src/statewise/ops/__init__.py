"""Operations with several backends each; `ops` holds them by name."""

from .dispatch import Backend, Op, observe, op, ops, use_backend
from .gated_loop import elman_loop, gru_loop, jordan_loop, lstm_loop
from .linear_scan import linear_scan

__all__ = [
    "Backend", "Op", "elman_loop", "gru_loop", "jordan_loop", "linear_scan", "lstm_loop", "observe", "op", "ops",
    "use_backend",
]  # fmt: skip
