"""Operations with several backends each; `ops` holds them by name."""

from .block_scan import block_scan
from .delta_scan import delta_scan, delta_step, dplr_scan, dplr_step
from .dispatch import Backend, Op, observe, op, ops, use_backend
from .gated_loop import elman_loop, gru_loop, jordan_loop, lstm_loop, slstm_loop
from .linear_scan import linear_scan
from .long_conv import long_conv
from .outer_scan import normalised_outer_scan, outer_scan, outer_step
from .selective_scan import selective_scan, selective_step
from .softmax_scan import SoftmaxState, log_sum_exp_scan, nothing_seen, softmax_scan, softmax_step

__all__ = [
    "Backend", "Op", "SoftmaxState", "block_scan", "delta_scan", "delta_step", "dplr_scan", "dplr_step", "elman_loop",
    "gru_loop", "jordan_loop", "linear_scan", "log_sum_exp_scan", "long_conv", "lstm_loop", "normalised_outer_scan",
    "nothing_seen", "observe", "op", "ops", "outer_scan", "outer_step", "selective_scan", "selective_step",
    "slstm_loop", "softmax_scan", "softmax_step", "use_backend",
]  # fmt: skip
