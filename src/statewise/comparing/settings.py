"""How long and at which rate `statewise compare` trains on each task unless told otherwise, found on the validation
split so that the ordinary layers are well above the baseline in minutes on two cores."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "spoken_digits": {
        "train.steps": 300,
        "train.batch": 32,
        "train.lr": 4e-3,
        "train.warmup": 20,
        "train.evaluate_every": 30,
    },
}
