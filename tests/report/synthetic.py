"""A comparison that no one trained: rows whose every number is known."""

from __future__ import annotations

import math
import random
from typing import Any

LAYERS = {"gru": 0.972, "lstm": 0.968, "lru": 0.954, "s5": 0.949, "min_gru": 0.961}


def comparison(broken: str | None = "reservoir", seeds: int = 3, hostile: str = "") -> dict[str, Any]:
    """Five layers over some seeds; one that failed; hostile: text put wherever a user's text can come in."""
    rng = random.Random(0)
    entries = [_entry(name, top, seeds, rng) for name, top in LAYERS.items()]
    if broken:
        entries.append(_entry(broken, 0.5, seeds, rng))
        for cell in entries[-1]["cells"]:
            cell.update(status="failed", reason=f"out of memory: wanted 12 GiB{hostile}", curve=[])
        entries[-1]["streaming"] = None
    return {
        "format": 1,
        "command": f"statewise compare spoken_digits --layers gru,lstm,lru,s5,min_gru --seeds 3{hostile}",
        "created": "2026-01-02 03:04 UTC",
        "seconds": 271.0,
        "task": {
            "name": "spoken_digits", "kind": "classification", "metric": "accuracy", "higher_is_better": True,
            "data": f"3,000 recordings as MFCC: statewise data get spoken_digits{hostile}",
            "doc": "A spoken digit as 13 coefficients per frame; which digit was it?\n\nx   ~~~~~~~~~\ny           7",
            "chance": 0.1, "baseline": 0.62, "baseline_is": "nearest class mean of the time average",
            "input": "13 numbers per step, 6 to 92 steps", "output": "one of 10 classes", "settings": {"size": 3000},
            "examples": [
                {"rows": _waves(d), "answer": f"answer: {d}{hostile}"}
                for d in range(4)
            ],
        },
        "train": {"steps": 600, "batch": 64, "lr": 3e-3},
        "environment": {
            "statewise": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "cpu": f"Example CPU{hostile}", "cores": 2,
            "workers": 2, "threads": 1,
        },
        "method": ["Each run trains in a process of its own with one thread."],
        "layers": entries,
    }  # fmt: skip


TASKS = {"parity": (0.5, 40), "copy": (0.125, 60), "adding": (0.33, 100)}  # chance; the length trained at


def several(lengths: tuple[int, ...] = (20, 40, 80, 160)) -> dict[str, Any]:
    """Three boards as `compare` writes them in format 2: scores by length, a grid, a pruned and a failed run."""
    whole = comparison(broken=None)
    boards = []
    for number, (name, (chance, trained)) in enumerate(TASKS.items()):
        board = comparison("reservoir" if name == "copy" else None)
        task = {**board["task"], "name": name, "chance": chance, "baseline": chance, "train_length": trained}
        loss = name == "adding"
        task |= {"metric": "loss", "higher_is_better": False, "baseline": 0.167} if loss else {}
        for place, entry in enumerate(board["layers"]):
            entry |= {"label": f"{entry['layer']} width=32", "overrides": {"model.width": 32}}
            for cell in entry["cells"]:
                cell |= {"label": entry["label"], "tried": {}, "command": f"{entry['command']} --seed {cell['seed']}"}
                if cell["status"] == "done":
                    turned = (cell["score"] * 7 + number * place) % 1
                    cell["score"] = turned * 0.1 if loss else 0.6 + 0.4 * turned
                    cell["scores_by_length"] = [score_at(n, cell["score"], trained, chance, task) for n in lengths]
        if name == "copy":
            board["layers"][1]["cells"][0]["scores_by_length"][-1] |= {"score": None, "failed": "out of memory: 9 GiB"}
        other = {**board["layers"][0]["cells"][0], "key": f"{name}pruned", "status": "pruned", "score": None,
                 "reason": "stopped at step 100 by successive halving", "stopped": None}  # fmt: skip
        board["layers"][0]["others"] = [other]
        boards.append({"name": f"{name} length={trained}", "task": task, "train": board["train"], "budget": {},
                       "method": [f"Score of {name}."], "layers": board["layers"]})  # fmt: skip
    keep = ("command", "created", "seconds", "environment", "method")
    return {"format": 2, **{k: whole[k] for k in keep}, "boards": boards}


def score_at(length: int, top: float, trained: int, chance: float, task: dict[str, Any]) -> dict[str, Any]:
    near = min(1.0, trained / length)
    return {"length": length, "steps": length + 1, "examples": 1024, "chance": chance, "baseline": task["baseline"],
            "score": chance + (top - chance) * near, "metrics": {}, "failed": None}  # fmt: skip


def _waves(d: int) -> list[list[float]]:
    return [[math.sin(t / 5 + c + d) * (1 + d) for c in range(13)] for t in range(40 + 9 * d)]


def _entry(name: str, top: float, seeds: int, rng: random.Random) -> dict[str, Any]:
    cells = []
    for seed in range(seeds):
        score = top + rng.uniform(-0.008, 0.008)
        speed = rng.uniform(2, 9) * 1e4
        curve = [
            {"step": s, "seconds": s * 2e3 / speed, "score": 0.1 + (score - 0.1) * (1 - math.exp(-s / 80))}
            for s in range(50, 601, 50)
        ]  # fmt: skip
        cells.append(
            {
                "key": f"{name}{seed}", "layer": name, "seed": seed, "lr": 3e-3, "status": "done", "reason": None,
                "score": score, "validation_score": score, "metrics": {}, "steps": 600, "stopped": "done",
                "parameters": rng.randrange(20_000, 90_000), "tokens_per_second": speed, "seconds": 1.2e6 / speed,
                "peak_memory": rng.randrange(300, 420) * 2**20, "curve": curve,
            }
        )  # fmt: skip
    median = rng.uniform(9e-5, 4e-4)
    return {
        "layer": name, "summary": f"h_t = f(h_t-1, x_t) of {name}", "paper": "arXiv:0000.00000", "lr": 3e-3,
        "cells": cells, "others": [], "command": f"statewise train spoken_digits --layer {name} --seed 0",
        "record": {"task": "spoken_digits", "model": {"layer": name, "width": 64}, "seed": 0},
        "streaming": {
            "key": f"{name}0",
            "median": median, "p95": 1.3 * median, "state_bytes": rng.choice([512, 1024, 2048, 4096]), "steps": 2000,
        },
    }  # fmt: skip
