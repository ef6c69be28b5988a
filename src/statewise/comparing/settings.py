"""How long and at which rate `statewise compare` and `statewise train` train on each task unless told otherwise: so
that a comparison of five layers with three seeds takes some five minutes on two quiet cores, with ordinary layers well
above the baseline where the task allows it.

parity is hardly begun in this time by a GRU; give it more: --set train.steps=5000. The formal tasks have settings of
the same size, by which no scores were measured yet. The pixel tasks and the genes, of a thousand steps each, and the
user's own data have no settings here: they take the defaults of `Train`, and pixels take hours.
"""

from __future__ import annotations

from typing import Any


def quick(steps: int, batch: int = 32, lr: float = 4e-3, *, evaluations: int = 10) -> dict[str, Any]:
    """Settings as `--set` takes them: a short rise of the rate, `evaluations` looks at the validation split."""
    return {
        "train.steps": steps,
        "train.batch": batch,
        "train.lr": lr,
        "train.warmup": 20,
        "train.evaluate_every": steps // evaluations,
    }


FORMAL = (  # whose rows are some 20 to 130 steps long
    "binary_addition", "binary_multiplication", "bucket_sort", "compute_sqrt", "cycle_navigation", "duplicate", "dyck",
    "elman_letters", "elman_xor", "embedded_reber", "even_pairs", "in_context_languages", "induction",
    "missing_duplicate", "modular_arithmetic", "modular_brackets", "mqar", "ngram_lookup", "odds_first", "palindrome",
    "passkey", "phone_book", "reber", "reverse", "selectiv_bench", "selectiv_bench_next", "solve_equation",
    "stack_manipulation", "string_copy", "tomita",
)  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {  # beside each: a test score found with them, of width 64 and depth 2
    "adding": quick(500, batch=16, evaluations=5),  # gru 0.0003 (baseline 0.167)
    "copy": quick(600, evaluations=5),  # lru 1.00, gru 0.88 (0.125)
    "selective_copy": quick(600, evaluations=5),  # gru 1.00 (0.125)
    "parity": quick(600, evaluations=5),  # gru 0.53 (0.50)
    "digits": quick(600),  # lru 0.99 (0.94)
    "spoken_digits": quick(300),
    "ucr": quick(200),  # gru 0.962 (0.986)
    "mnist_rows": quick(500, evaluations=5),  # lru 0.955 (0.84)
    "fashion_mnist_rows": quick(500, evaluations=2),  # lru 0.84 (0.81)
    "forecast": quick(120, batch=16, lr=2e-3),  # gru 0.27 (0.59)
    "smiles": quick(150, batch=16, evaluations=3),  # gru 1.33 (2.35)
    "voice": quick(150, batch=16, evaluations=3),  # gru 4.86 (5.42)
    "text": quick(150, batch=16, evaluations=3),  # lru, 200 steps: 2.5 (3.4)
    **{name: quick(600, evaluations=5) for name in FORMAL},
    **{name: quick(600, evaluations=5) for name in ("delay", "events", "recall", "word_problem")},  # not measured yet
    "list_ops": quick(300, evaluations=3),
    "lorenz": quick(300, batch=16, evaluations=3),
    "mackey_glass": quick(300, batch=16, evaluations=3),
}
