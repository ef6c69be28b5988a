"""Understanding what a layer does: the linear system that it is on given inputs, what it costs, and what its state does
far past the training length."""

from .attention import attention_matrices, attention_similarity, followers
from .capacity import Fit, fit_curve, forgetting_threshold, recall_length, state_size
from .dynamics import Dynamics, dynamics
from .facts import Facts, facts
from .mitigate import Clipped, Forgetful, Windowed, change
from .states import Collapse, Followed, bounds, follow_states

__all__ = [
    "Clipped", "Collapse", "Dynamics", "Facts", "Fit", "Followed", "Forgetful", "Windowed", "attention_matrices",
    "attention_similarity", "bounds", "change", "dynamics", "facts", "fit_curve", "follow_states", "followers",
    "forgetting_threshold", "recall_length", "state_size",
]  # fmt: skip
