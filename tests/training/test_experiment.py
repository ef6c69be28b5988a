"""Experiments: written down and read back equal; wrong values named with their field and what is allowed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from toys import Leaky, Trail, toy

from statewise.core import UsageError, grid, put
from statewise.models import Forecasting, LanguageModel, Stack
from statewise.tasks.base import tasks
from statewise.training import Experiment, Train
from statewise.training.experiment import differences


def through_json(experiment: Experiment) -> Experiment:
    return Experiment.from_record(json.loads(json.dumps(experiment.record(), allow_nan=False)))


MODELS = [
    Stack("gru", width=8, args={"a": 1, "b": [1, 2]}),
    Forecasting(Stack("lru", width=4)),
    LanguageModel("min_gru", depth=1, tied=False),
    Leaky(3, 0.5),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_record_and_back(model: Any) -> None:
    experiment = Experiment(tasks["adding"].cls(length=7), model, Train(lr=1, steps=3), seed=4)
    again = through_json(experiment)
    assert again == experiment and again.key == experiment.key and again.train.lr == 1.0


def test_every_task_without_required_fields_can_be_written_down() -> None:
    found = 0
    for info in tasks:
        if any(
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            for f in dataclasses.fields(info.cls)
        ):
            continue
        experiment = Experiment(info.cls(), Stack())
        assert through_json(experiment) == experiment
        found += 1
    assert found >= 5


def test_the_key_follows_the_configuration() -> None:
    base = toy()
    others = [
        *grid(base, {"train.lr": [1e-2, 1e-3], "seed": [1, 2]}),
        put(base, "model.hidden", 5),
        put(base, "task.length", 6),
    ]
    assert len({e.key for e in [base, *others]}) == 7
    assert put(base, "train.lr", 3e-3).key == base.key
    assert put(put(base, "train.clip", 2), "seed", 1).key == put(base, "train.clip", 2.0).key


BAD_VALUES = [
    ("train.lr", float("nan"), r"train\.lr is nan; expected a finite number above 0"),
    ("train.lr", float("inf"), r"train\.lr is inf"),
    ("train.lr", -1e-3, r"train\.lr is -0\.001"),
    ("train.lr", "1e-3 ", r"train\.lr is '1e-3 '; expected a finite number"),
    ("train.lr", True, r"train\.lr is True"),
    ("train.steps", 0, r"train\.steps is 0; expected a whole number from 1"),
    ("train.steps", 2.5, r"train\.steps is 2\.5"),
    ("train.batch", -1, r"train\.batch is -1"),
    ("train.accumulate", 0, r"train\.accumulate is 0"),
    ("train.warmup", -1, r"train\.warmup is -1; expected a whole number from 0"),
    ("train.clip", -1, r"train\.clip is -1"),
    ("train.ema", 1.0, r"train\.ema is 1\.0; expected a finite number from 0 \(none\) to below 1"),
    ("train.optimizer", "adamv", r"train\.optimizer is 'adamv'; takes adamw, adam, sgd \(near: adam"),
    ("train.precision", "float16", r"train\.precision is 'float16'; takes float32, bfloat16 \(near: "),
    ("train.schedule", "x", r"train\.schedule is 'x'; takes cosine, constant, linear$"),
    ("seed", -1, "seed is -1"),
    ("seed", "0", "seed is '0'"),
]


@pytest.mark.parametrize(("path", "value", "words"), BAD_VALUES, ids=str)
def test_wrong_values(path: str, value: Any, words: str) -> None:
    """Rows 23 and 24."""
    with pytest.raises(UsageError, match=words) as refused:
        put(toy(), path, value)
    assert refused.value.code == 2


BAD_RECORDS = [
    ({"trian": {}}, "experiment: unknown key 'trian'; near: train"),
    ({"train": {"learning_rte": 1}}, "train: unknown key 'learning_rte'"),
    ({"train": {"step": 1}}, "train: unknown key 'step'; near: steps"),
    ({"train": 3}, "train is 3; expected an object"),
    ({"task": {"name": "trial"}}, "unknown task 'trial'; near: trail"),
    ({"task": {"name": "os.system"}}, "unknown task 'os.system'"),
    ({"task": {}}, r"task\.name is null; expected the name of a registered task"),
    ({"task": {"name": "trail", "lenght": 3}}, "task: unknown key 'lenght'; near: length"),
    ({"model": {"type": "os:system"}}, r"model\.type: unknown model 'os:system'; .* never code"),
    ({"model": {"type": "leaky", "hiden": 3}}, "model: unknown key 'hiden'; near: hidden"),
    ({"model": {"type": ["leaky"]}}, r"model\.type is .*; expected the name"),
    ({"model": {"type": "forecasting", "stack": {"type": "x"}}}, r"model\.stack\.type: unknown model 'x'"),
    ({"format": 2}, "format is 2, this statewise reads up to 1; upgrade"),
    ({"format": "1"}, "format is '1'"),
]


@pytest.mark.parametrize(("change", "words"), BAD_RECORDS, ids=str)
def test_wrong_records(change: dict[str, Any], words: str) -> None:
    """Rows 19 and 22."""
    with pytest.raises(UsageError, match=words) as refused:
        Experiment.from_record({**toy().record(), **change})
    assert "\n" not in str(refused.value)


def test_what_is_no_description_is_refused() -> None:
    with pytest.raises(UsageError, match=r"experiment\.task is a str"):
        Experiment("adding", Leaky())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"experiment\.model is a str; expected a description"):
        Experiment(Trail(), "gru")
    with pytest.raises(UsageError, match=r"experiment\.train is a dict"):
        Experiment(Trail(), Leaky(), {})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"model\.dropout is nan; a record holds finite numbers"):
        Experiment(Trail(), Leaky(1, float("nan"))).record()
    with pytest.raises(UsageError, match=r"model\.hidden is a function"):
        Experiment(Trail(), Leaky(lambda: 3)).record()  # type: ignore[arg-type]


def test_differences_name_every_value() -> None:
    old, new = toy().record(), put(toy(), "train.lr", 0.01).record()
    assert list(differences(old, new)) == ["train.lr: 0.003 -> 0.01"]
    assert list(differences({"a": {"b": 1}}, {"a": {}, "c": None})) == ["a.b: 1 -> null", "c: null -> null"]
