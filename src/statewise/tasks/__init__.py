"""Tasks and data sets, one file each. Importing this package registers them all; none is loaded before it is used."""

from .adding import Adding
from .base import SPLITS, Batch, Split, Task, TaskInfo, register_task, tasks
from .copy import Copy, SelectiveCopy
from .delay import Delay
from .digits import Digits
from .events import Events
from .fashion_mnist import FashionMnistPixels, FashionMnistRows
from .forecast import Forecast
from .generated import Generated
from .japanese_vowels import JapaneseVowels
from .mnist import MnistPixels, MnistRows
from .parity import Parity
from .recall import Recall
from .series import Series
from .spoken_digits import SpokenDigits
from .text import Text
from .text_file import TextFile
from .word_problem import WordProblem

__all__ = [
    "SPLITS", "Adding", "Batch", "Copy", "Delay", "Digits", "Events", "FashionMnistPixels", "FashionMnistRows",
    "Forecast", "Generated", "JapaneseVowels", "MnistPixels", "MnistRows", "Parity", "Recall", "SelectiveCopy",
    "Series", "Split", "SpokenDigits", "Task", "TaskInfo", "Text", "TextFile", "WordProblem", "register_task", "tasks",
]  # fmt: skip
