"""Operations with several backends each; `ops` holds them by name."""

from .dispatch import Backend, Op, op, ops, use_backend
from .linear_scan import linear_scan

__all__ = ["Backend", "Op", "linear_scan", "op", "ops", "use_backend"]
