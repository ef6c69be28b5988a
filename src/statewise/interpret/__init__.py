"""Understanding what a layer does: the linear system that it is on given inputs, what it costs, and what its state does
far past the training length."""

from .capacity import Fit, fit_curve, forgetting_threshold, recall_length, state_size
from .dynamics import Dynamics, dynamics
from .facts import Facts, facts
from .mitigate import Clipped, Forgetful, Windowed, change
from .states import Collapse, Followed, bounds, follow_states

__all__ = [
    "Clipped", "Collapse", "Dynamics", "Facts", "Fit", "Followed", "Forgetful", "Windowed", "bounds", "change",
    "dynamics", "facts", "fit_curve", "follow_states", "forgetting_threshold", "recall_length", "state_size",
]  # fmt: skip
