"""One file per recurrent layer; importing this registers them all."""

from .elman import Elman
from .gru import GRULayer
from .jordan import Jordan
from .lstm import LSTMLayer, LSTMState

__all__ = ["Elman", "GRULayer", "Jordan", "LSTMLayer", "LSTMState"]
