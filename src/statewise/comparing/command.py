"""The command line that trains one run of a comparison alone."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from typing import Any

from ..training import Experiment, Train
from .settings import SETTINGS


def train_command(experiment: Experiment, device: str, threads: int) -> str:
    """The `statewise train` that trains this experiment alone: what differs from the defaults, spelled out."""
    record, model, task = experiment.record(), experiment.model, experiment.task
    own = SETTINGS.get(task.name, {})
    usual_train = {path.removeprefix("train."): value for path, value in own.items() if path.startswith("train.")}
    words = [
        "statewise",
        "train",
        task.name,
        "--layer",
        model.layer,
        "--width",
        str(model.width),
        "--depth",
        str(model.depth),
    ]
    words += ["--seed", str(experiment.seed), "--device", device, "--threads", str(threads)]
    sections: list[tuple[str, dict[str, Any], Any]] = [
        ("task", record["task"], _defaults(type(task))),
        ("model", record["model"], _defaults(type(model))),
        ("train", record["train"], asdict(Train()) | usual_train),
    ]
    for section, values, usual in sections:
        for name, value in values.items():
            if (section, name) in _SHOWN or name not in usual or value == usual[name]:
                continue
            if section == "task" and name == "path":
                words += ["--data", str(value)]
                continue
            inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, v in inner.items():
                words += ["--set", f"{section}.{key}={_text(v)}"]
    return shlex.join(words)


_SHOWN = {("model", "layer"), ("model", "width"), ("model", "depth")}


def _defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls) if f.init}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
