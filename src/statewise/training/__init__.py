from .checkpoint import load
from .experiment import Experiment, Train
from .fit import Result, choose_device, fit, read_result
from .log import read_log
from .signals import Stopped

__all__ = [
    "Experiment",
    "Result",
    "Stopped",
    "Train",
    "choose_device",
    "fit",
    "load",
    "read_log",
    "read_result",
]
