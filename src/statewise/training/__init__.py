from .checkpoint import load
from .data import data_hash
from .distil import soft_loss
from .distributed import RankLost, Ranks, joined, sum_gradients
from .evaluate import LengthScore, add_lengths, at_lengths, score_lengths
from .experiment import Experiment, Teacher, Train
from .fit import OtherData, Result, choose_device, fit, read_result
from .log import read_log
from .sequence_parallel import InTurns, SequenceParallel, own_chunk, sequence_parallel
from .signals import Stopped

__all__ = [
    "Experiment",
    "InTurns",
    "LengthScore",
    "OtherData",
    "RankLost",
    "Ranks",
    "Result",
    "SequenceParallel",
    "Stopped",
    "Teacher",
    "Train",
    "add_lengths",
    "at_lengths",
    "choose_device",
    "data_hash",
    "fit",
    "joined",
    "load",
    "own_chunk",
    "read_log",
    "read_result",
    "score_lengths",
    "sequence_parallel",
    "soft_loss",
    "sum_gradients",
]
