"""One file per recurrent layer; importing this registers them all."""

from .aaren import Aaren
from .attention import Attention, AttentionState, Sight
from .bidirectional import Bidirectional
from .cfc import CfC
from .delta_net import DeltaNet, DeltaState
from .delta_product import DeltaProduct
from .echo_attention import EchoAttention
from .elman import Elman
from .gated_delta_net import GatedDeltaNet
from .gla import GLA
from .gru import GRULayer
from .hgrn2 import HGRN2
from .jordan import Jordan
from .lightnet import LightNet, LightNetState
from .linear_attention import LinearAttention, LinearAttentionState
from .lmu import LMU
from .lru import LRU
from .lssl import LSSL
from .lstm import LSTMLayer, LSTMState
from .ltc import LTC
from .mamba import Mamba, MambaState
from .mamba2 import Mamba2, Mamba2State
from .min_gru import MinGRU
from .min_lstm import MinLSTM
from .mlstm import MLSTM, MatrixMemory, MLSTMLarge, MLSTMState
from .ngram_heads import NgramHeads, NgramHeadsState
from .para_gru import ParaGRU
from .para_lstm import ParaLSTM, ParaLSTMState
from .reservoir import Reservoir
from .retnet import RetNet, RetNetState
from .routing_attention import RoutingAttention, RoutingState
from .rwkv7 import RWKV7, RWKV7State
from .s4 import S4
from .s4d import S4D
from .s5 import S5
from .short_conv import ShortConv
from .slstm import SLSTM, ConvSLSTM, ConvSLSTMState

__all__ = [
    "Aaren",
    "Attention",
    "AttentionState",
    "Bidirectional",
    "CfC",
    "ConvSLSTM",
    "ConvSLSTMState",
    "DeltaNet",
    "DeltaProduct",
    "DeltaState",
    "EchoAttention",
    "Elman",
    "GLA",
    "GRULayer",
    "GatedDeltaNet",
    "HGRN2",
    "Jordan",
    "LMU",
    "LRU",
    "LSSL",
    "LSTMLayer",
    "LSTMState",
    "LTC",
    "LightNet",
    "LightNetState",
    "LinearAttention",
    "LinearAttentionState",
    "MLSTM",
    "MLSTMLarge",
    "MLSTMState",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "MatrixMemory",
    "MinGRU",
    "MinLSTM",
    "NgramHeads",
    "NgramHeadsState",
    "ParaGRU",
    "ParaLSTM",
    "ParaLSTMState",
    "RWKV7",
    "RWKV7State",
    "Reservoir",
    "RetNet",
    "RetNetState",
    "RoutingAttention",
    "RoutingState",
    "S4",
    "S4D",
    "S5",
    "SLSTM",
    "ShortConv",
    "Sight",
]
