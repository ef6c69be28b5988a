from .checkpoint import load
from .data import data_hash
from .evaluate import LengthScore, add_lengths, at_lengths, score_lengths
from .experiment import Experiment, Train
from .fit import OtherData, Result, choose_device, fit, read_result
from .log import read_log
from .signals import Stopped

__all__ = [
    "Experiment",
    "LengthScore",
    "OtherData",
    "Result",
    "Stopped",
    "Train",
    "add_lengths",
    "at_lengths",
    "choose_device",
    "data_hash",
    "fit",
    "load",
    "read_log",
    "read_result",
    "score_lengths",
]
