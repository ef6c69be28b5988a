"""Papers as runs and claims, one file per paper, named authorYEAR_word.py, which holds one `RECIPE`.

A recipe defines no class: a mechanism that it needs belongs in layers/, tasks/ or training/, where the suites see it.
"""

from .recipe import SCALES, SEEDS, Claim, Measure, Recipe, Run, Scale, find, names
from .reproduce import reproduce
from .results import Results, Values, read_results
from .verdict import Verdict, judge, judge_all
from .write import page

__all__ = [
    "SCALES", "SEEDS", "Claim", "Measure", "Recipe", "Results", "Run", "Scale", "Values", "Verdict", "find", "judge",
    "judge_all", "names", "page", "read_results", "reproduce",
]  # fmt: skip
