from .block_linear import BlockLinear
from .decayed_max import decayed_max
from .feature_maps import POSITIVE, Feature, check_feature, features
from .gated import GLU, GatedMLP
from .heads import HeadNorm
from .initialisers import legs_normal, log_uniform, ring
from .norms import RMSNorm
from .rotary import rotate
from .segments import positions, tail
from .short_convolution import ShortConvolution
from .unit import unit

__all__ = [
    "BlockLinear", "Feature", "GLU", "GatedMLP", "HeadNorm", "POSITIVE", "RMSNorm", "ShortConvolution",
    "check_feature", "decayed_max", "features", "legs_normal", "log_uniform", "positions", "ring", "rotate", "tail",
    "unit",
]  # fmt: skip
