from .checkpoint import load
from .data import data_hash
from .experiment import Experiment, Train
from .fit import OtherData, Result, choose_device, fit, read_result
from .log import read_log
from .signals import Stopped

__all__ = [
    "Experiment",
    "OtherData",
    "Result",
    "Stopped",
    "Train",
    "choose_device",
    "data_hash",
    "fit",
    "load",
    "read_log",
    "read_result",
]
