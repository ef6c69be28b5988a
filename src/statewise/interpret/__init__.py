"""Understanding what a layer does: the linear system that it is on given inputs, and what it costs."""

from .dynamics import Dynamics, dynamics
from .facts import Facts, facts

__all__ = ["Dynamics", "Facts", "dynamics", "facts"]
