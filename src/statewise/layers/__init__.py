"""One file per recurrent layer; importing this registers them all."""

from .aaren import Aaren
from .attention import Attention, AttentionState
from .bidirectional import Bidirectional
from .elman import Elman
from .gru import GRULayer
from .jordan import Jordan
from .lru import LRU
from .lstm import LSTMLayer, LSTMState
from .mamba import Mamba, MambaState
from .min_gru import MinGRU
from .min_lstm import MinLSTM
from .reservoir import Reservoir
from .s5 import S5
from .short_conv import ShortConv

__all__ = [
    "Aaren",
    "Attention",
    "AttentionState",
    "Bidirectional",
    "Elman",
    "GRULayer",
    "Jordan",
    "LRU",
    "LSTMLayer",
    "LSTMState",
    "Mamba",
    "MambaState",
    "MinGRU",
    "MinLSTM",
    "Reservoir",
    "S5",
    "ShortConv",
]
