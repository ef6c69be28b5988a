"""Tasks and data sets, one file each. Importing this package registers them all; none is loaded before it is used."""

from .adding import Adding
from .base import SPLITS, Batch, Split, Task, TaskInfo, register_task, tasks
from .chaos import Lorenz, MackeyGlass
from .chomsky_context_free import ModularBrackets, Reverse, SolveEquation, StackManipulation
from .chomsky_context_sensitive import (
    BinaryAddition,
    BinaryMultiplication,
    BucketSort,
    ComputeSqrt,
    Duplicate,
    MissingDuplicate,
    OddsFirst,
)
from .chomsky_regular import CycleNavigation, EvenPairs, ModularArithmetic
from .copy import Copy, SelectiveCopy
from .delay import Delay
from .digits import Digits
from .dyck import Dyck
from .elman import ElmanLetters, ElmanXor
from .events import Events
from .fashion_mnist import FashionMnistPixels, FashionMnistRows
from .forecast import Forecast
from .gene_families import GeneFamilies
from .generated import Generated
from .in_context_languages import InContextLanguages
from .list_ops import ListOps
from .look_up import Induction, NgramLookup, StringCopy
from .mnist import MnistPixels, MnistRows
from .mqar import Mqar
from .palindrome import Palindrome
from .parity import Parity
from .passkey import Passkey
from .pathfinder import Pathfinder
from .phone_book import PhoneBook
from .reber import EmbeddedReber, Reber
from .recall import Recall
from .selectiv_bench import SelectivBench, SelectivBenchNext
from .series import Series
from .smiles import Smiles
from .spoken_digits import SpokenDigits
from .text import Text
from .text_file import TextFile
from .tomita import Tomita
from .ucr import Ucr
from .voice import Voice
from .word_problem import WordProblem

__all__ = [
    "SPLITS", "Adding", "Batch", "BinaryAddition", "BinaryMultiplication", "BucketSort", "ComputeSqrt", "Copy",
    "CycleNavigation", "Delay", "Digits", "Duplicate", "Dyck", "ElmanLetters", "ElmanXor", "EmbeddedReber",
    "EvenPairs", "Events", "FashionMnistPixels", "FashionMnistRows", "Forecast", "GeneFamilies", "Generated",
    "InContextLanguages", "Induction", "ListOps", "Lorenz", "MackeyGlass", "MissingDuplicate", "MnistPixels",
    "MnistRows", "ModularArithmetic", "ModularBrackets", "Mqar", "NgramLookup", "OddsFirst", "Palindrome", "Parity",
    "Passkey", "Pathfinder", "PhoneBook", "Reber", "Recall", "Reverse", "SelectivBench", "SelectivBenchNext",
    "SelectiveCopy", "Series", "Smiles", "SolveEquation", "Split", "SpokenDigits", "StackManipulation", "StringCopy",
    "Task", "TaskInfo", "Text", "TextFile", "Tomita", "Ucr", "Voice", "WordProblem", "register_task", "tasks",
]  # fmt: skip
