"""DeltaProduct (Siems et al. 2025, arXiv:2502.10297): several corrections a step, eigenvalues down to -1, and which
groups of permutations a recurrent layer can then follow."""

from __future__ import annotations

from ..core.paper import Paper
from ..models import Stack
from ..tasks import WordProblem
from ..training import Experiment, Train
from .recipe import Claim, Recipe, Run, Scale
from .verdict import Reader

# group, corrections a step, whether eigenvalues may be negative
CASES: dict[str, tuple[str, int, bool]] = {
    "parity_positive": ("Z2", 1, False),
    "parity": ("Z2", 1, True),
    "s3_positive": ("S3", 2, False),
    "s3_one": ("S3", 1, True),
    "s3_two": ("S3", 2, True),
    "s4_one": ("S4", 1, True),
    "s4_two": ("S4", 2, True),
    "a5_one": ("A5", 1, True),
    "a5_two": ("A5", 2, True),
    "s5_one": ("S5", 1, True),
    "s5_four": ("S5", 4, True),
}
STEPS = {"Z2": 500, "S3": 800, "S4": 600, "A5": 600, "S5": 1000}  # at small scale


def runs(scale: Scale) -> dict[str, Run]:
    """One layer, without convolution, forget gate or output gate, as in the paper's experiments on groups.

    At small scale only parity and S3 draw from all elements: S4, A5 and S5 take more words than there is time for, and
    draw from three that generate them. Short words are then few enough to be remembered, so what counts is long ones.
    """
    return {name: experiment(scale, *case) for name, case in CASES.items()}


def experiment(scale: Scale, group: str, corrections: int, negative: bool) -> Experiment:
    length, beyond = {"smoke": (4, 8), "small": (12, 48), "paper": (128, 512)}[scale]
    width, heads = {"smoke": (8, 1), "small": (64, 2), "paper": (128, 4)}[scale]
    key = width // heads
    args = {"heads": heads, "key": key, "value": key, "corrections": corrections, "taps": None, "negative": negative}
    train = {
        "smoke": Train(steps=2, batch=4),
        "small": Train(steps=STEPS[group], batch=64, lr=3e-3, warmup=20, evaluate_every=STEPS[group] // 4),
        "paper": Train(steps=5000, batch=2048, lr=1e-3, weight_decay=1e-6, warmup=100, evaluate_every=500),
    }[scale]
    moves = "all" if scale == "paper" or group in ("Z2", "S3") else "few"
    task = WordProblem(group, length=length, test_length=beyond, moves=moves)  # type: ignore[arg-type]
    return Experiment(task, Stack("delta_product", width=width, depth=1, args=args), train)


def parity_needs_negative(r: Reader) -> bool:
    positive, negative = r("parity_positive", "accuracy_beyond"), r("parity", "accuracy_beyond")
    return negative.mean > 0.8 and positive.mean < 0.65


def s3_needs_negative(r: Reader) -> bool:
    positive, negative = r("s3_positive", "accuracy_trained"), r("s3_two", "accuracy_trained")
    return negative.mean > 0.9 and positive.mean < 0.7


def s3_needs_two(r: Reader) -> bool:
    one, two = r("s3_one", "accuracy_trained"), r("s3_two", "accuracy_trained")
    return two.mean > 0.9 and one.mean < 0.75


def s3_extrapolates(r: Reader) -> bool:
    near, far = r("s3_two", "accuracy_trained"), r("s3_two", "accuracy_beyond")
    return far.mean > 0.9 * near.mean > 0.9 * 0.9


def solves(run: str, less: str) -> Claim:
    group, corrections = CASES[run][:2]

    def holds(r: Reader) -> bool:
        few, enough = r(less, "accuracy_beyond"), r(run, "accuracy_beyond")
        return enough.mean > 0.8 and few.mean < 0.5

    return Claim(
        "sec. 5, state tracking",
        f"{corrections} corrections a step follow {group} where {CASES[less][1]} cannot",
        holds,
    )


def more_is_better(r: Reader) -> bool:
    pairs = (("s3_one", "s3_two"), ("s4_one", "s4_two"), ("a5_one", "a5_two"), ("s5_one", "s5_four"))
    found = [(r(few, "accuracy_beyond"), r(many, "accuracy_beyond")) for few, many in pairs]
    return all(many.mean > few.mean for few, many in found)


TITLE = "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products"
RECIPE = Recipe(
    paper=Paper(TITLE, "Siems et al.", 2025, "arXiv:2502.10297"),
    runs=runs,
    claims=(
        Claim(
            "after Grazzi et al. 2025",
            "parity takes a negative eigenvalue: with eigenvalues in [0, 1] it is not learned",
            parity_needs_negative,
        ),
        Claim("sec. 5, state tracking", "S3 takes eigenvalues in [-1, 1] even with two corrections", s3_needs_negative),
        Claim("sec. 5, state tracking", "S3 takes two corrections a step", s3_needs_two),
        Claim(
            "sec. 5, state tracking",
            "what was learned on short words holds on words four times as long",
            s3_extrapolates,
        ),
        solves("s4_two", "s4_one"),
        solves("a5_two", "a5_one"),
        solves("s5_four", "s5_one"),
        Claim("sec. 5, state tracking", "more corrections a step follow every group better", more_is_better),
    ),
)
