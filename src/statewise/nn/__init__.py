from .block_linear import BlockLinear
from .decayed_max import decayed_max
from .elapsed import Elapsed, check_elapsed, split_elapsed
from .experts import Experts
from .feature_maps import POSITIVE, Feature, check_feature, features
from .gated import GLU, GatedMLP
from .heads import HeadNorm
from .hippo import bilinear, diagonal, hippo, legendre_memory, legs_dplr, legs_normal, zero_order_hold
from .initialisers import check_dt, inverse_softplus, log_uniform, ring
from .lti import LTI, Frozen, LinearSystem
from .norms import RMSNorm
from .rates import rate
from .rotary import rotate
from .segments import positions, stretches, tail
from .short_convolution import ShortConvolution
from .unit import unit

__all__ = [
    "BlockLinear", "Elapsed", "Experts", "Feature", "Frozen", "GLU", "GatedMLP", "HeadNorm", "LTI", "LinearSystem",
    "POSITIVE", "RMSNorm", "ShortConvolution", "bilinear", "check_dt", "check_elapsed", "check_feature", "decayed_max",
    "diagonal", "features", "hippo", "inverse_softplus", "legendre_memory", "legs_dplr", "legs_normal", "log_uniform",
    "positions", "rate", "ring", "rotate", "split_elapsed", "stretches", "tail", "unit", "zero_order_hold",
]  # fmt: skip
