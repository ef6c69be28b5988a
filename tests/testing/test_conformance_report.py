"""What check_layer says, and how a class gets its examples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from statewise.core import Cell, UsageError, layers, register_layer, wide
from statewise.layers import LRU
from statewise.ops import observe, ops
from statewise.testing import build, check_layer, checks, checks_for, examples_of, prepare, run


class Sum(Cell[Tensor]):
    """h_t = h_{t-1} + W x_t."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.width, self.out_width = width, hidden
        self.inp = nn.Linear(width, hidden)

    def initial_state(self, batch: int) -> Tensor:
        return self.inp.weight.new_zeros(batch, self.out_width, dtype=wide(self.inp.weight.dtype))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = state + self.inp(u)
        return h, h


class Noisy(Sum):
    """h_t = h_{t-1} + W x_t, and y_t = h_t + noise."""

    examples = [{"width": 2, "hidden": 3}]

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o + torch.randn_like(o)


class Odd(Sum):
    """h_t = h_{t-1} + W x_t."""

    def __init__(self, width: int, colour: str):
        super().__init__(width, width)


def test_examples_come_from_the_class_or_from_the_names_of_its_arguments():
    assert examples_of(Noisy) == [{"width": 2, "hidden": 3}]
    assert examples_of(Sum) == [{"width": 4, "hidden": 6}]
    with pytest.raises(UsageError, match="'colour'"):
        examples_of(Odd)


def test_examples_of_registered_layers_are_the_registered():
    assert examples_of(layers["gru"].cls) == [dict(example) for example in layers["gru"].examples]


def test_a_report_says_what_failed_and_why():
    report = check_layer(Noisy, name="noisy")
    text = str(report)
    assert not report.ok and text.startswith("noisy: does not conform")
    assert "FAILED equal_calls_are_equal: two equal calls of forward differ" in text
    assert "FAILED no_chance_in_eval: in eval mode a call draws random numbers" in text
    assert "skipped, x holds numbers, not ids: refuses_ids_out_of_range, refuses_float_ids" in text
    assert len(report.outcomes) == sum(not c.slow for c in checks)
    assert len(report.of("passed")) + len(report.failed) + len(report.of("skipped")) == len(report.outcomes)


def test_an_instance_is_checked_as_a_copy():
    layer = Noisy(2, 3)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    report = check_layer(layer)
    rebuild = next(o for o in report.outcomes if o.name == "rebuild")
    assert rebuild.status == "skipped" and "constructor arguments are not known" in rebuild.words
    assert layer.training and all(torch.equal(p, before[n]) for n, p in layer.named_parameters())


@pytest.mark.parametrize("what", [nn.LSTM(2, 3), nn.LSTM, "gru", 3])
def test_what_is_no_layer_is_refused(what):
    with pytest.raises(UsageError, match="is no layer"):
        check_layer(what)


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match=r"Sum\(size=3\) cannot be made: TypeError"):
        check_layer(Sum, {"size": 3})


def test_a_known_failure_is_told_and_strict():
    layer = build(Noisy, {"width": 2, "hidden": 3})
    failing, passing = checks["equal_calls_are_equal"], checks["state_is_closed"]
    assert run(failing, layer, "noise is the point").status == "known failure"
    outcome = run(passing, layer, "no reason any more")
    assert outcome.status == "failed" and "no reason any more" in outcome.words
    try:
        register_layer(
            "noisy_for_test", paper="none", examples=Noisy.examples, sized=lambda w: {"width": w, "hidden": w},
            known_failures={"check_no_chance_in_eval": "noise is the point"},
        )(Noisy)  # fmt: skip
        report = check_layer(Noisy)
        assert [o.name for o in report.of("known failure")] == ["no_chance_in_eval"]
        assert "known failure no_chance_in_eval: noise is the point" in str(report)
    finally:
        layers._entries.pop("noisy_for_test", None)


def test_a_crash_is_a_failure_in_words():
    class Crashes(Sum):
        """h_t = nothing."""

        def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            raise ZeroDivisionError("one\ntwo")

    outcome = run(checks["step_is_pure"], build(Crashes, {"width": 2, "hidden": 3}))
    assert outcome.status == "failed" and outcome.words == "ZeroDivisionError: one two"


def test_prepare_moves_parameters_away_from_birth():
    layer = Sum(2, 3)
    moved = prepare(layer)
    assert not moved.training and moved.inp.weight.dtype == torch.float64
    assert (moved.inp.weight - layer.inp.weight).abs().min() > 0


def test_every_check_tells_its_law():
    import statewise.testing

    for c in checks:
        assert c.function.__doc__ and c.law.endswith((".", "?")) and len(c.law) < 130, c.name
        assert c.function.__name__ == f"check_{c.name}" and getattr(statewise.testing, f"check_{c.name}") is c.function
    assert len(checks) >= 130 and len({c.group for c in checks}) == 10
    assert sum(c.slow for c in checks) <= 2


def test_backends_are_compared_or_the_check_is_skipped_with_reasons(monkeypatch):
    layer, backends = build(LRU, {"width": 2, "hidden": 3}), ops["linear_scan"].backends
    ran = []
    for backend in backends.values():
        monkeypatch.setattr(backend, "limits", lambda *args, **kwargs: "not today")
    for name in ("backends_agree", "backend_gradients_agree"):
        outcome = run(checks[name], layer)
        assert outcome.status == "skipped" and "torch: not today" in outcome.words, outcome
        assert run(checks[name], build(Sum, {"width": 2, "hidden": 3})).words.startswith("the layer calls no op")
    backends["torch"].limits = None
    with observe(lambda op, chosen, args, kwargs: ran.append(chosen)):
        assert run(checks["backends_agree"], layer).status == "passed"
    assert ran == ["torch"], "and what is willing is run"


def test_checks_for_leaves_out_what_does_not_apply():
    names = {c.name for c in checks_for(build(Sum, {"width": 2, "hidden": 3}))}
    assert "linear_in_input" not in names and "refuses_float_ids" not in names and "refuses_integers" in names
