"""Operations of torch, recorded once and then run as one compiled call: see `program`."""

from .instructions import Unrecordable, Weights
from .program import Program
from .watch import Watch, watching

__all__ = ["Program", "Unrecordable", "Watch", "Weights", "watching"]
