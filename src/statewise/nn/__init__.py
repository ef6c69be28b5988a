from .gated import GLU, GatedMLP
from .initialisers import legs_normal, log_uniform, ring
from .norms import RMSNorm
from .rotary import rotate
from .segments import positions, tail
from .short_convolution import ShortConvolution

__all__ = [
    "GLU", "GatedMLP", "RMSNorm", "ShortConvolution", "legs_normal", "log_uniform", "positions", "ring", "rotate",
    "tail",
]  # fmt: skip
