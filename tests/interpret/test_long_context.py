"""Following states past the training length, the mitigations of their collapse, capacity and its fits."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import statewise.layers  # noqa: F401  registers them
from statewise.core import RecurrentLayer, UsageError, chunked, layers, leaves, names, select, unroll
from statewise.interpret import (
    Clipped,
    Followed,
    Forgetful,
    Windowed,
    bounds,
    change,
    fit_curve,
    follow_states,
    forgetting_threshold,
    recall_length,
    state_size,
)
from statewise.interpret.memory import by_heads, memory_leaf, memory_of, with_memory
from statewise.models import LanguageModel, Stack
from statewise.tasks import Passkey
from statewise.tasks.base import Batch
from statewise.testing import build


def _memories():
    for info in layers:
        for i, example in enumerate(info.examples):
            try:
                memory_of(build(info.cls, example))
            except UsageError:
                continue
            yield pytest.param(info.cls, example, id=f"{info.name}{i}")


CASES = list(_memories())


def made(cls, example):
    torch.manual_seed(1)
    layer = build(cls, example).double()
    x = torch.randn(2, 23, layer.width, dtype=torch.float64)
    return layer, x


def close(a, b):
    for one, other in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


def test_the_layers_with_a_linear_memory():
    found = {case.id.rstrip("01") for case in CASES}
    assert found >= {"delta_net", "gated_delta_net", "gla", "lru", "mamba", "mamba2", "min_gru", "retnet", "s5"}
    assert not found & {"gru", "lstm", "attention", "mlstm", "aaren", "lightnet", "s4d", "para_gru"}


@pytest.mark.parametrize("name, words", [("gru", "calls gru_loop"), ("attention", "no op"), ("mlstm", "as it is")])
def test_layers_without_one_are_refused(name, words):
    with pytest.raises(UsageError, match=words):
        Windowed(build(layers[name].cls, layers[name].examples[0]), window=4)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("cls, example", CASES)
def test_the_window_is_a_fresh_run_over_it(cls, example, every):
    """At each time the same answer, memory included, as from an empty memory that began `r` steps ago."""
    layer, x = made(cls, example)
    window = 6
    windowed, memory = Windowed(layer, window=window, every=every), memory_of(layer)
    _, state = windowed(x[:, :12])
    for t in range(12, 19):
        part = t % every  # of it this many steps have been written
        r = min(window - every + part, t)
        _, long_ago = layer(x[:, : t - r])
        start = with_memory(long_ago, memory, torch.zeros_like(memory_leaf(long_ago, memory)))
        y, fresh = layer(x[:, t - r : t + 1], start)
        y_t, state = windowed.step(x[:, t], state)
        torch.testing.assert_close(y_t, y[:, -1], atol=1e-10, rtol=1e-9)
        if part + 1 < every:  # else the part has ended, and the oldest is gone
            close(state.inner, fresh)
    if cls.__name__ != "DeltaProduct":  # which writes over all of so small a memory within the window
        full = layer(x[:, :19])[0][:, -1]
        assert not torch.allclose(full, y_t, atol=1e-6), "the window must have left something out"


def test_the_window_is_the_difference_of_two_states():
    """S_t - a^w S_{t-w}, in Mamba-2 with its decay read off the parameters."""
    layer, x = made(layers["mamba2"].cls, layers["mamba2"].examples[0])
    now, past = layer(x[:, :20])[1].memory, layer(x[:, :14])[1].memory
    log_decay = (-layer.a_log.exp() * layer.encode(x[:, 14:20]).dt).sum(1)[..., None, None]
    windowed = Windowed(layer, window=7, every=1)(x[:, :20])[1].inner.memory  # holds six once a step has gone
    torch.testing.assert_close(windowed, now - log_decay.exp() * past)


def wrapped(layer):
    yield Windowed(layer, window=6, every=3)
    yield Clipped(layer, bound=0.05, every=3)
    yield Forgetful(layer, insert=0.5)


@pytest.mark.parametrize("cls, example", CASES)
def test_a_changed_layer_is_a_layer(cls, example):
    """Steps, pieces, rows by themselves, lengths and resets give what one forward gives."""
    layer, x = made(cls, example)
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, 9] = reset[1, 14] = layer.traits.resets
    for changed in wrapped(layer):
        y, state = changed(x, reset=reset)
        for again in (unroll(changed, x, reset=reset), chunked(changed, x, [4, 0, 8, 11], reset=reset)):
            close((y, state), again)
        close(y[1:], changed(x[1:], reset=reset[1:])[0])
        lengths = torch.tensor([23, 10])
        z, ends = changed(x, reset=reset, lengths=lengths)
        close((z[1:, :10], select(ends, torch.tensor([1]))), changed(x[1:, :10], reset=reset[1:, :10]))
        close(
            changed(x, ends)[0], torch.cat([changed(x[i : i + 1], select(ends, torch.tensor([i])))[0] for i in (0, 1)])
        )
        assert changed(x[:, :0])[0].shape == (2, 0, layer.out_width)


@pytest.mark.parametrize("cls, example", CASES)
def test_a_change_of_nothing_changes_nothing(cls, example):
    layer, x = made(cls, example)
    y, state = layer(x)
    for same in (Forgetful(layer), Clipped(layer, bound=1e9), Windowed(layer, window=40, every=20)):
        z, after = same(x)
        close(y, z)
        close(state, after if isinstance(same, Forgetful) else after.inner)


@pytest.mark.parametrize("cls, example", CASES)
def test_inserting_less_scales_the_memory(cls, example):
    """A memory that begins empty is in proportion to what is written; a delta rule's is not, because beta fades too."""
    layer, x = made(cls, example)
    memory = memory_of(layer)
    if memory.op == "delta_scan":
        pytest.skip("beta is not linear")
    whole, half = (memory_leaf(m(x)[1], memory) for m in (layer, Forgetful(layer, insert=0.5)))
    torch.testing.assert_close(half, 0.5 * whole)


def test_forgetting_more_raises_the_decay_to_a_power():
    layer, x = made(layers["mamba2"].cls, layers["mamba2"].examples[0])
    other = copy.deepcopy(layer)
    other.a_log.data += math.log(3)
    close(Forgetful(layer, decay=3.0)(x), other(x))
    lru, x = made(layers["lru"].cls, layers["lru"].examples[0])
    steps = x[:, :2].clone()
    steps[:, 1] = 0
    first, (once, thrice) = lru(steps[:, :1])[1], [m(steps)[1] for m in (lru, Forgetful(lru, decay=3.0))]
    torch.testing.assert_close((thrice / first).abs(), (once / first).abs() ** 3)
    torch.testing.assert_close((thrice / first).angle(), (once / first).angle())


def test_a_clipped_norm_keeps_its_bound_and_its_direction():
    layer, x = made(layers["gla"].cls, layers["gla"].examples[0])
    free = by_heads(layer(x[:, :6])[1]).norm(dim=2).amin(0)
    bound = torch.tensor([0.25, 1e6]) * free
    state = Clipped(layer, bound=bound, every=6)(x[:, :6])[1].inner
    norms = by_heads(state).norm(dim=2)
    torch.testing.assert_close(norms[:, 0], bound[0].expand(2).double(), rtol=1e-6, atol=0)
    close(state[:, 1], layer(x[:, :6])[1][:, 1])
    torch.testing.assert_close(
        nn.functional.cosine_similarity(state[:, 0].flatten(1), layer(x[:, :6])[1][:, 0].flatten(1)),
        torch.ones(2, dtype=torch.float64),
    )


def test_wrong_numbers_are_refused():
    layer = build(layers["gla"].cls, layers["gla"].examples[0])
    for wrong in (
        lambda: Windowed(layer, window=7, every=2),
        lambda: Clipped(layer, bound=0.0),
        lambda: Clipped(layer, bound=torch.ones(3)),
        lambda: Clipped(layer, bound=1.0, every=0),
        lambda: Forgetful(layer, decay=0.0),
        lambda: Forgetful(build(layers["delta_net"].cls, layers["delta_net"].examples[0]), decay=2.0),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_a_hybrid_is_changed_where_it_has_memories():
    torch.manual_seed(0)
    model = LanguageModel("mamba2,window_attention(window=4)", width=8, depth=3).build(x_vocab=5, y_width=5).eval()
    changed = change(model, lambda layer: Windowed(layer, window=4))
    kinds = [type(block.layer).__name__ for block in changed.body.at_depths()]
    assert kinds == ["Windowed", "Attention", "Windowed"]
    assert type(model.body.at_depths()[0].layer).__name__ == "Mamba2", "the model itself stays as it was"
    ids = torch.randint(5, (2, 9))
    torch.testing.assert_close(changed(ids)[0], unroll(changed, ids)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="no layer to change"):
        change(Stack("gru", width=4).build(x_width=2, y_width=2), Forgetful)


class Stuffed(RecurrentLayer):
    """Logits that get worse by `rise` a step beyond `free` steps, and one of two heads that grows by `growth`."""

    width = out_width = vocab = 3

    def __init__(self, free: int, rise: float, growth: float):
        super().__init__()
        self.free, self.rise, self.growth = free, rise, growth

    def initial_state(self, batch):
        return torch.zeros(batch, 1, dtype=torch.int64), torch.ones(batch, 2, 2, 2)

    def forward(self, x, state=None, *, reset=None, lengths=None):
        seen, memory = state or self.initial_state(len(x))
        time = seen + torch.arange(1, x.shape[1] + 1)
        late = (time - self.free).clamp_min(0)
        y = 4 * nn.functional.one_hot(x, 3) * (1 - self.rise * late)[..., None]
        memory = torch.stack([memory[:, 0], torch.ones(len(x), 2, 2) * (1 + self.growth * late[:, -1:, None])], 1)
        return y, (time[:, -1:], memory)

    def step(self, x, state):
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state


def pieces(rows=4, steps=64, count=4):
    rng = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randint(3, (rows, steps), generator=rng)
        yield Batch(x, x, torch.ones(rows, steps))


@pytest.mark.parametrize(
    "rise, growth, collapsed", [(0.02, 0.05, True), (0.02, 0, False), (0, 0.05, False), (0, 0, False)]
)
def test_collapse_is_a_loss_that_rises_and_a_norm_that_grows(rise, growth, collapsed):
    found = follow_states(Stuffed(64, rise, growth), pieces(), every=16).collapse(64)
    assert found.collapsed is collapsed
    assert list(found.grown) == ([("1", 1)] if growth else []), "the head that grew, and no other"
    assert (found.rise > 1) == bool(rise)


def test_noise_is_no_rise():
    steps = torch.arange(1, 17) * 16
    loss = 1 + 0.4 * torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    loss[12:] += 0.06 - loss[12:].mean() + loss[2:4].mean()
    norm = {"0": torch.cat([torch.ones(4, 1), 9 * torch.ones(12, 1)])}
    found = Followed(steps, loss, norm, norm, norm).collapse(64)
    assert 0.05 < found.rise < 2 * found.error and found.grown and not found.collapsed
    assert Followed(steps, loss * torch.nan, norm, norm, norm).collapse(64).collapsed
    with pytest.raises(UsageError, match="to go on to"):
        Followed(steps, loss, norm, norm, norm).collapse(200)


def test_what_is_followed_does_not_depend_on_the_pieces():
    torch.manual_seed(0)
    model = Stack("mamba2", width=8, depth=2).build(x_vocab=3, y_width=3)
    batch = next(pieces(steps=96, count=1))
    cut = [Batch(*(t[:, i : i + 32] for t in batch[:3])) for i in (0, 32, 64)]
    model.train()
    whole, parts = follow_states(model, [batch], every=16), follow_states(model, cut, every=16)
    assert model.training and whole.steps.tolist() == [16, 32, 48, 64, 80, 96]
    torch.testing.assert_close(whole.loss, parts.loss)
    state = model.eval()(batch.x)[1]
    assert set(whole.norm) == set(names(state)) == {"0.taps", "0.memory", "1.taps", "1.memory"}
    memory = state[1].memory.double()
    torch.testing.assert_close(whole.norm["1.memory"][-1], memory.flatten(2).norm(dim=2).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.mean["1.memory"][-1], memory.mean((0, 2, 3)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(whole.variance["1.memory"][-1], memory.flatten(2).var(2, correction=0).mean(0),
                               rtol=1e-3, atol=1e-6)  # fmt: skip
    limits = bounds(model, whole, 32)
    assert len(limits) == 2
    torch.testing.assert_close(limits[1], whole.norm["1.memory"][:2].amax(0))


def test_pieces_that_do_not_fit_are_refused():
    model = Stack("gru", width=4).build(x_vocab=3, y_width=3)
    one, other = next(pieces(rows=2)), next(pieces(rows=3))
    for wrong in ([one, other], [], [one._replace(lengths=torch.tensor([64, 3]))]):
        with pytest.raises(UsageError):
            follow_states(model, wrong)


class Forgets(RecurrentLayer):
    """Knows the digits of a passkey where the whole is no longer than `longest`."""

    width = vocab = 28
    out_width = 10

    def __init__(self, longest: int):
        super().__init__()
        self.longest = longest

    def initial_state(self, batch):
        return torch.zeros(batch, 1, 2, 3, 4)

    def forward(self, x, state=None, *, reset=None, lengths=None):
        task = Passkey(length=x.shape[1] - 5)
        known = task.oracle(Batch(x, x, x))
        return (known if task.length <= self.longest else known.roll(1, -1)), self.initial_state(len(x))

    def step(self, x, state):
        raise NotImplementedError


def test_the_recall_length_is_where_recall_ends():
    reached, curve = recall_length(Forgets(40), Passkey(), [16, 64, 32], metric="sequence_accuracy")
    assert reached == 32 and [score.score for score in curve] == [1.0, 1.0, 0.0]
    assert recall_length(Forgets(8), Passkey(), [16])[0] == 0
    assert state_size(Forgets(1)) == 24


def test_the_forgetting_threshold():
    assert forgetting_threshold({32: True, 128: False, 64: False}) == 64
    assert forgetting_threshold({32: False, 64: True, 128: False}) == 128
    assert forgetting_threshold({32: False, 64: True}) is None


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_fit_finds_the_law_that_made_the_points(kind):
    rng = np.random.default_rng(0)
    x = np.repeat([1.0, 2, 4, 8], 3)
    clean, noise = 0.3 + 0.7 * x, 0.1 * rng.standard_normal(12)
    points = [(a, np.exp(b) if kind == "exponential" else b) for a, b in zip(x, clean)]
    exact = fit_curve(points, kind)
    assert exact.slope == pytest.approx(0.7) and exact.intercept == pytest.approx(0.3)
    assert exact.slope_interval == pytest.approx((0.7, 0.7)) and exact(3.0) == pytest.approx(points[0][1] * 0 + (
        np.exp(2.4) if kind == "exponential" else 2.4))  # fmt: skip
    noisy = fit_curve([(a, np.exp(b) if kind == "exponential" else b) for a, b in zip(x, clean + noise)], kind)
    low, high = noisy.slope_interval
    assert low < noisy.slope < high and 0 < high - low < 0.2
    single = fit_curve([(1, 1.0), (2, 2.1), (3, 2.9)], "linear")
    assert single.slope_interval[0] < single.slope_interval[1]


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(3)
    x, hits = np.repeat(np.arange(6.0), 8), 0
    for i in range(60):
        low, high = fit_curve(zip(x, 2 * x + rng.standard_normal(48)), "linear", draws=200, seed=i).slope_interval
        hits += low < 2 < high
    assert hits >= 50


@pytest.mark.parametrize("points", [[(1, 1), (2, 2)], [(1, 1), (1, 2), (1, 3)], [(1, 1), (2, -1), (3, 2)]])
def test_points_that_have_no_fit(points):
    with pytest.raises(UsageError):
        fit_curve(points, "exponential")


@pytest.mark.parametrize("pattern", ["attention(window=5,heads=3)", "gru,attention(window=4,heads=2)"])
def test_of_a_window_heads_are_followed_and_not_steps(pattern):
    echo = pattern.split(",", 1)[1] if pattern.startswith("gru") else pattern
    model = Stack(f"{pattern},{echo[:-1]},echo=true)", width=12, depth=2 + pattern.startswith("gru"))
    model = model.build(x_width=2, y_width=1)
    x = torch.randn(2, 8, 2)
    followed = follow_states(model, [Batch(x, torch.zeros(2, 8, 1), torch.ones(2, 8))], every=8)
    (*_, (k, v, _), echoed) = model(x)[1]
    depth = len(model.blocks)
    for name, leaf in ((f"{depth - 2}.k", k), (f"{depth - 2}.v", v), (f"{depth - 1}", echoed)):
        assert followed.norm[name].shape == (1, leaf.shape[2])
        want = torch.stack([head.flatten(1).double().norm(dim=1).mean() for head in leaf.unbind(2)])
        torch.testing.assert_close(followed.norm[name][0], want)
    assert followed.norm[f"{depth - 1}"].shape[1] in (2, 3)
