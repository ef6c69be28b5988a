"""What is run: a task, a model, how to train it and a seed; frozen, hashed, written down as JSON and read back.

A record names entries of registries and holds plain values. No value names a module, a class or a path to code.
"""

from __future__ import annotations

import hashlib
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from ..core import UsageError, near
from ..core.vary import LATER, recorded
from ..models import descriptions
from ..tasks.base import Task, tasks

FORMAT = 1

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "constant", "linear")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Train:
    """How to train. The gradient of a step is the mean over `accumulate` batches of `batch` rows.

    optimizer: "adamw"; "adam" (its weight decay is the L2 term); "sgd" (momentum 0.9). Norms, biases, other vectors and
    parameters marked `_no_weight_decay` never decay.
    schedule: the learning rate falls to zero as a half cosine or a line, or stays; before it, `warmup` steps of rise.
    clip: largest norm of the gradient; 0 for none. ema: decay of the averaged weights, which are then the ones
    evaluated and saved; 0 for none.
    evaluate_every: steps between evaluations on the validation split; 0 for one at the end.
    patience: stop after this many evaluations without a better score; 0 for never.
    checkpoint_every: steps between checkpoints beyond the one at each evaluation; 0 for those alone.
    recompute_blocks: keep only what enters each block of a stack and compute the rest again for the gradient
    (gradient checkpointing): the same numbers, less memory, about a third more time.
    compile: train through torch.compile, which takes its time first; the last bits differ from those without.

    Raises UsageError for a value out of range.
    """

    steps: int = 1000
    batch: int = 32
    lr: float = 3e-3
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    warmup: int = 0
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    evaluate_every: int = 100
    patience: int = 0
    checkpoint_every: int = 0
    recompute_blocks: bool = field(default=False, metadata=LATER)
    compile: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        _whole(self, "steps", 1, 10**9)
        _whole(self, "batch", 1, 1 << 20)
        _whole(self, "accumulate", 1, 1 << 20)
        for name in ("warmup", "evaluate_every", "patience", "checkpoint_every"):
            _whole(self, name, 0, 10**9)
        _real(self, "lr", "above 0, at most 1000", lambda v: 0 < v <= 1000)
        _real(self, "weight_decay", "from 0 to 1000", lambda v: 0 <= v <= 1000)
        _real(self, "clip", "0 (none) or more", lambda v: v >= 0)
        _real(self, "ema", "from 0 (none) to below 1", lambda v: 0 <= v < 1)
        _choice(self, "optimizer", OPTIMIZERS)
        _choice(self, "schedule", SCHEDULES)
        _choice(self, "precision", PRECISIONS)
        for name in ("recompute_blocks", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"train.{name} is {getattr(self, name)!r}; expected true or false")


@dataclass(frozen=True)
class Teacher:
    """A trained model to begin from and to learn from: distillation.

    loss = truth L + logits tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)) + hidden H + layers F,

    each a mean. L is the task's loss, z are the answers of teacher and student, tau is the temperature; for numbers in
    place of classes, the KL is a squared error. H compares what leaves each depth of the two, |h_S - h_T|^2 / |h_T|^2;
    F runs each new block of the student on what enters the teacher's (so no error of the blocks before it comes in) and
    compares with what that one adds. H and F need stacks of one depth and width.

    run: the directory of the teacher's run; empty for no teacher. inherit: what the student starts with, as in
    `statewise.models.inherit`: "all", "same" or "none". only_new: parameters copied from the teacher stay as they are.
    With logits, hidden and layers all 0 the teacher is only where the student starts.
    """

    run: str = ""
    truth: float = 1.0
    logits: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    layers: float = 0.0
    inherit: Literal["all", "same", "none"] = "all"
    only_new: bool = False

    def __post_init__(self) -> None:
        for name in ("truth", "logits", "hidden", "layers"):
            _real(self, name, "from 0 to 1e6", lambda v: 0 <= v <= 1e6)
        _real(self, "temperature", "above 0, at most 1000", lambda v: 0 < v <= 1000)
        _choice(self, "inherit", ("all", "same", "none"))
        if not isinstance(self.only_new, bool) or not isinstance(self.run, str):
            raise UsageError(f"teacher: run {self.run!r}, only_new {self.only_new!r}; expected a text, true or false")
        if not self.run and any(getattr(self, f.name) != f.default for f in fields(self)):
            raise UsageError("teacher.run is empty; expected the directory of the teacher's run")
        if not (self.truth or self.logits or self.hidden or self.layers):
            raise UsageError("teacher: truth, logits, hidden and layers are all 0; expected something to learn from")


@dataclass(frozen=True)
class Experiment:
    """A task, a model description, how to train, a seed, and a teacher where there is one.

    model: a frozen dataclass with `build(*, x_width, x_vocab, y_width) -> RecurrentLayer`, as `statewise.models.Stack`.
    """

    task: Task
    model: Any
    train: Train = field(default_factory=Train)
    seed: int = 0
    teacher: Teacher = field(default_factory=Teacher)

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise UsageError(
                f"experiment.task is a {type(self.task).__name__}; expected a Task such as Adding(length=50)"
            )
        if not (is_dataclass(self.model) and callable(getattr(self.model, "build", None))):
            raise UsageError(
                f"experiment.model is a {type(self.model).__name__}; expected a description such as Stack('gru')"
            )
        if not isinstance(self.train, Train):
            raise UsageError(f"experiment.train is a {type(self.train).__name__}; expected Train(...)")
        if not isinstance(self.teacher, Teacher):
            raise UsageError(f"experiment.teacher is a {type(self.teacher).__name__}; expected Teacher(run=...)")
        _whole(self, "seed", 0, (1 << 63) - 1)

    def record(self) -> dict[str, Any]:
        """Plain values from which `from_record` makes an equal experiment."""
        return {
            "format": FORMAT,
            "task": {"name": type(self.task).name, **_plain_fields(self.task, "task")},
            "model": _described(self.model, "model"),
            "train": recorded(self.train),
            "seed": self.seed,
            **({"teacher": recorded(self.teacher)} if self.teacher.run else {}),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Experiment:
        """The experiment that a record describes.

        Raises UsageError for a newer format, unknown keys (with the nearest), unknown names, values out of range.
        """
        _known(record, {"format", "task", "model", "train", "seed", "teacher"}, "experiment")
        version = record.get("format", FORMAT)
        if type(version) is not int or version > FORMAT:
            raise UsageError(
                f"experiment.format is {version!r}, this statewise reads up to {FORMAT}; upgrade statewise"
            )
        task = _section(record, "task", "name")
        return cls(
            _construct(tasks[task.pop("name")].cls, task, "task"),
            _rebuilt(_section(record, "model", "type"), "model"),
            _construct(Train, _section(record, "train"), "train"),
            record.get("seed", 0),
            _construct(Teacher, _section(record, "teacher"), "teacher"),
        )

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that stand for this configuration."""
        record = {name: part for name, part in self.record().items() if name != "format"}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """'train.lr: 0.003 -> 0.01' for every value in which two records differ."""
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b or (key in old) != (key in new):
            yield f"{prefix}{key}: {_word(a)} -> {_word(b)}"


def _word(value: Any) -> str:
    return json.dumps(value)[:80]


def _section(record: Mapping[str, Any], name: str, named: str | None = None) -> dict[str, Any]:
    found = record.get(name, {})
    if not isinstance(found, Mapping):
        raise UsageError(f"{name} is {_word(found)}; expected an object")
    if named and not isinstance(found.get(named), str):
        raise UsageError(f"{name}.{named} is {_word(found.get(named))}; expected the name of a registered {name}")
    return dict(found)


def _described(model: Any, where: str) -> dict[str, Any]:
    """A model description as its name in `statewise.models.descriptions` and its fields."""
    name = next((name for name, cls in descriptions.items() if type(model) is cls), None)
    if name is None:
        raise UsageError(
            f"{where} is a {type(model).__name__}; a record takes {', '.join(descriptions)}; "
            "put your own into statewise.models.descriptions"
        )
    return {"type": name, **_plain_fields(model, where)}


def _rebuilt(values: dict[str, Any], where: str) -> Any:
    name = str(values.pop("type"))
    if name not in descriptions:
        hint = near(name[:60], descriptions)
        raise UsageError(
            f"{where}.type: unknown model {name[:60]!a}; {hint}; a record names registered models, never code"
        )
    parts = {
        key: _rebuilt(dict(part), f"{where}.{key}") if isinstance(part, Mapping) and "type" in part else part
        for key, part in values.items()
    }
    return _construct(descriptions[name], parts, where)


def _construct(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain values, with lists as tuples and text as paths where the fields say so."""
    _known(values, {f.name for f in fields(cls) if f.init}, where)
    missing = [f.name for f in fields(cls) if f.init and _required(f) and f.name not in values]
    if missing:
        raise UsageError(f"{where}: {cls.__name__} needs {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{name: _shaped(value, hints.get(name)) for name, value in values.items()})
    except TypeError as error:
        raise UsageError(f"{where}: {cls.__name__} does not take these values: {error}") from error


def _required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _shaped(value: Any, hint: Any) -> Any:
    options = [hint, *typing.get_args(hint)] if not isinstance(hint, str) else []
    if isinstance(value, list) and any(typing.get_origin(h) is tuple or h is tuple for h in options):
        return tuple(_shaped(part, None) for part in value)
    if isinstance(value, str) and Path in options and str not in options:
        return Path(value)
    return value


def _known(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise UsageError(f"{where}: unknown key {str(name)[:60]!r}; {near(str(name), known)}")


def _plain_fields(config: Any, where: str) -> dict[str, Any]:
    return {name: _plain(value, f"{where}.{name}") for name, value in recorded(config).items()}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is {value}; a record holds finite numbers")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return _described(value, where)
    if isinstance(value, Mapping):
        return {str(key): _plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, Sequence):
        return [_plain(part, where) for part in value]
    raise UsageError(f"{where} is a {type(value).__name__}; a record holds numbers, text, lists and objects")


def _whole(config: Any, name: str, low: int, high: int) -> None:
    value = getattr(config, name)
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{_where(config)}{name} is {value!r}; expected a whole number from {low} to {high}")


def _real(config: Any, name: str, words: str, fits: Any) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise UsageError(f"{_where(config)}{name} is {value!r}; expected a finite number {words}")
    object.__setattr__(config, name, float(value))  # 1 and 1.0 are one configuration and must have one key


def _choice(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        hint = near(str(value), allowed)
        raise UsageError(
            f"{_where(config)}{name} is {value!r}; takes {', '.join(allowed)}" + f" ({hint})" * hint.startswith("near")
        )


def _where(config: Any) -> str:
    return {Train: "train.", Teacher: "teacher."}.get(type(config), "")
