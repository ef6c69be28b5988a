"""A recorded step gives the numbers of the step, or it is not taken."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewise.core import RecurrentLayer, UsageError, layers, leaves, stream
from statewise.models import LanguageModel
from statewise.ops.recorded import Program
from statewise.serving import for_streaming

NOT_RECORDED = {"ngram_heads"}
STRANGE = [
    0.0,
    -0.0,
    1e-30,
    -1e-6,
    0.3,
    -0.7,
    3.0,
    -20.0,
    50.0,
    -86.0,
    88.0,
    120.0,
    -1e4,
    math.inf,
    -math.inf,
    math.nan,
]


class Mapped(RecurrentLayer[Tensor]):
    """y = f(x, w), h' = h + 1."""

    def __init__(self, width: int, f):
        super().__init__()
        self.width = self.out_width = width
        self.f, self.w = f, nn.Parameter(torch.linspace(-2, 3, width))

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1)

    def forward(self, x, state=None, *, reset=None, lengths=None):
        raise NotImplementedError

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x, self.w), state + 1


def language_model(name: str, **fields):
    torch.manual_seed(0)
    return LanguageModel(name, width=40, depth=2, **fields).build(x_vocab=57, y_width=57).eval()


def programs(model) -> list[Program | str]:
    return list(model.step.programs.values())


def as_it_was(model, x: Tensor, state):
    return type(model).step(model, x, state)


def together(model, ids: Tensor):
    """The step and its record, each going on from the record's states."""
    state = model.initial_state(len(ids))
    with torch.no_grad():
        for x in ids.unbind(1):
            want, (y, state) = as_it_was(model, x, state), model.step(x, state)
            yield want, (y, state)


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("name", sorted(layers.names()))
def test_every_layer(name, weights):
    model = for_streaming(language_model(name), weights=weights)
    for batch in (1, 3):
        for (y, after), (got, state) in together(model, torch.randint(57, (batch, 7))):
            for result, want in zip((got, *leaves(state)), (y, *leaves(after)), strict=True):
                scale = float(want.abs().max()) if want.numel() else 0.0
                torch.testing.assert_close(result, want, rtol=0, atol=3e-5 * scale)
    assert len(programs(model)) == 2


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("name", sorted(layers.names()))
def test_all_but_few_are_recorded(name, weights):
    model = for_streaming(language_model(name), weights=weights)
    model.step(torch.tensor([1]), model.initial_state(1))
    assert [type(p) for p in programs(model)] == [str if name in NOT_RECORDED else Program], programs(model)


def shuffled(x: Tensor, w: Tensor) -> Tensor:
    """Views of views, a sum over the middle, rows put together, a product with itself."""
    cube = torch.cat([x, x * w], 1).view(len(x), 2, -1)
    turned = (cube.transpose(1, 2)[:, :, None] * cube.transpose(1, 2)[:, None, :2]).sum(2)
    return turned.transpose(1, 2).reshape(len(x), -1)[:, : x.shape[1]].clone()


MAPS = {
    "exp": lambda x, w: x.exp(),
    "expm1": lambda x, w: torch.expm1(x),
    "sigmoid": lambda x, w: x.sigmoid(),
    "silu": lambda x, w: F.silu(x),
    "tanh": lambda x, w: x.tanh(),
    "softplus": lambda x, w: F.softplus(x),
    "logsigmoid": lambda x, w: F.logsigmoid(x),
    "logaddexp": lambda x, w: torch.logaddexp(x, w),
    "rsqrt": lambda x, w: torch.rsqrt(x),
    "powers": lambda x, w: x**2 + x**-1 - x**0.5,
    "products": lambda x, w: (1 - x) * w / 3,
    "differences": lambda x, w: torch.sub(x, w, alpha=2) - x / (w + 4),
    "addcmul": lambda x, w: torch.addcmul(x, x, w, value=0.5),
    "clamps": lambda x, w: x.clamp(-1, 2) + x.clamp_min(-3) + x.relu(),
    "maximum": lambda x, w: torch.maximum(x, w),
    "where": lambda x, w: torch.where(x > w, x, w) + torch.where(x > 0.5, w, -x).abs(),
    "compared": lambda x, w: torch.where(x >= w, torch.where(x < 1, w, x), torch.where(x <= w - 1, x * 2, -w)),
    "means": lambda x, w: x - x.mean(-1, keepdim=True) + x.sum(0) + x.amax(1, keepdim=True),
    "shuffled": shuffled,
    "gelu": lambda x, w: F.gelu(x.clamp(-1e30, 1e30)),  # of infinity torch has more than one
    "glu": lambda x, w: F.glu(torch.cat([x, w - x], 1)),
    "softmax": lambda x, w: (x / 4).softmax(-1) * w,
    "flips": lambda x, w: x.flip(1) - x.flip(0, 1),
    "truth": lambda x, w: torch.where(((x > 0) & (x != 3)) | ~(x == w), x, x.masked_fill((x <= 1).logical_not(), 2)),
    "changing": lambda x, w: (x @ (x * w).mT) @ x / 100 + (x[:, :, None] @ x[:, None, :1])[..., 0],
    "complex": lambda x, w: complex_numbers(x, w),
    "whole": lambda x, w: whole_numbers(x, w),
}
FAR = {"changing": 1e-4, "complex": 1e-4}  # sums that cancel: how far off, of the largest


def complex_numbers(x: Tensor, w: Tensor) -> Tensor:
    z, c = torch.complex(x, x * w), torch.complex(w, 1 - w)
    z = (c * z - 2 * z + 1) / (w + 5) + z.conj() * c.conj() - torch.where(x > 0, z, -z)
    return z.real + z.imag - torch.view_as_real(z).sum(-1) + torch.view_as_complex(torch.stack([x, w * x], -1)).imag


def whole_numbers(x: Tensor, w: Tensor) -> Tensor:
    """Which is the largest of three, and an angle by it."""
    three = torch.stack([x, w.expand_as(x), -x], -1)
    most = three.argmax(-1)
    angle = torch.where(most >= 1, (2 - most).clamp(max=1), 3 * most).double() * 0.7
    return angle.cos().to(x.dtype) + three.gather(2, most[..., None])[..., 0] * (most == 1)


@pytest.mark.parametrize("width", [1, 16, 37, 2100])
@pytest.mark.parametrize("name", MAPS)
def test_operations(name, width):
    f = MAPS[name]
    torch.manual_seed(0)
    x = torch.randn(3, width) * 4
    for given in (x, torch.tensor(STRANGE).repeat(width)[: 2 * width].view(2, width)):
        model = for_streaming(Mapped(width, f).eval())
        if given is x and name in ("rsqrt", "powers"):
            given = given.abs() + 0.1
        with torch.no_grad():
            for _ in range(2):
                y, state = model.step(given, torch.ones(len(given), 1))
            want = f(given.double(), model.w.double())
        assert [type(p) for p in programs(model)] == [Program], programs(model)
        assert torch.equal(state, torch.full((len(given), 1), 2.0))
        large = want.abs() > 1e38  # float32 ends there
        y, want = y.masked_fill(large, 0), want.masked_fill(large, 0).float()
        atol = FAR[name] * float(want.nan_to_num(0, 0, 0).abs().max()) if name in FAR else 2e-6
        torch.testing.assert_close(y, want, rtol=4e-6, atol=atol, equal_nan=True)


outside = torch.ones(1)
REFUSED = {
    "random": lambda x, w: x + torch.rand_like(x),
    "number": lambda x, w: x * 2 if x.sum() > 0 else x,
    "in place": lambda x, w: (x * 2).add_(1),
    "outside": lambda x, w: x * outside,
    "unknown": lambda x, w: torch.special.bessel_j0(x),
    "a number cut to a whole one": lambda x, w: x.long() * x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_recorded_runs_as_it_is(name):
    model = for_streaming(Mapped(5, REFUSED[name]).eval())
    one, two = torch.ones(1, 5), -torch.ones(1, 5)
    with torch.no_grad():
        for x in (one, two, one):
            y, _ = model.step(x, torch.ones(1, 1))
            if name != "random":
                assert torch.equal(y, REFUSED[name](x, model.w))
    assert all(isinstance(p, str) and p for p in programs(model)) and programs(model)


@pytest.mark.parametrize("name", ["mamba", "gated_delta_net", "window_attention", "s5"])
def test_a_step_is_pure(name):
    model = for_streaming(language_model(name))
    state, kept = model.initial_state(2), []
    with torch.no_grad():
        for t in range(5):
            before = [leaf.clone() for leaf in leaves(state)]
            y, after = model.step(torch.tensor([t, t + 9]), state)
            assert all(map(torch.equal, leaves(state), before))
            kept.append((y, y.clone(), leaves(after), [leaf.clone() for leaf in leaves(after)]))
            state = after
        again = [y for y, _ in stream(model, (torch.arange(5)[:, None] + torch.tensor([0, 9])).unbind())]
    for (y, then, now, at_the_time), same in zip(kept, again, strict=True):
        assert torch.equal(y, then) and all(map(torch.equal, now, at_the_time)) and torch.equal(y, same)


def test_threads_change_nothing():
    model, found = for_streaming(LanguageModel("mamba", width=640, depth=2).build(x_vocab=90, y_width=90)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(torch.stack([y for y, _ in stream(model, torch.arange(9)[:, None].unbind())]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_several_callers_at_once():
    model, found = for_streaming(language_model("mamba")), {}

    def write(first: int) -> None:
        with torch.no_grad():
            found[first] = torch.stack([y for y, _ in stream(model, (torch.arange(60) * first % 57)[:, None].unbind())])

    write(1), write(2)
    alone = dict(found)
    callers = [threading.Thread(target=write, args=(i,)) for i in (1, 2)]
    [c.start() for c in callers]
    [c.join() for c in callers]
    assert all(torch.equal(found[i], alone[i]) for i in (1, 2))


def test_changed_parameters_are_seen():
    model = language_model("mamba")
    fast, ids = for_streaming(model), torch.tensor([3])
    with torch.no_grad():
        _, state = fast.step(ids, fast.initial_state(1))
        first, _ = fast.step(ids, state)
        for name in ("a_log", "d"):  # one that the record made something of, one that it reads
            for module in model.modules():
                if hasattr(module, name):
                    getattr(module, name).add_(0.7)
            y, _ = fast.step(ids, state)
            torch.testing.assert_close(y, model.step(ids, state)[0], rtol=1e-4, atol=1e-5)
            assert (y - first).abs().max() > 1e-5
            first = y


def test_ids_out_of_range_are_refused_before_and_after():
    model = for_streaming(language_model("min_gru"))
    state = model.initial_state(1)
    for _ in range(2):
        for wrong in (-1, 57):
            with pytest.raises(UsageError, match=f"id {wrong} at row 0"):
                model.step(torch.tensor([wrong]), state)
        model.step(torch.tensor([56], dtype=torch.int32), state)
        _, state = model.step(torch.tensor([56]), state)


def test_gradients_of_inputs_pass_through():
    model = for_streaming(language_model("min_gru"))
    ids, state = torch.tensor([1]), model.initial_state(1)
    _, state = model.step(ids, state)
    wanted = tuple(leaf.requires_grad_() for leaf in leaves(state))
    y, _ = model.step(ids, wanted)
    y.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in wanted)


def test_nan_stays_in_its_row():
    model = for_streaming(language_model("mamba"))
    ids = torch.tensor([1, 2, 3])
    with torch.no_grad():
        _, state = model.step(ids, model.initial_state(3))
        want, _ = model.step(ids, state)
        leaves(state)[1][1, 5] = torch.nan
        y, _ = model.step(ids, state)
    assert y[1].isnan().any() and torch.equal(y[[0, 2]], want[[0, 2]])


def test_a_copy_has_a_record_of_its_own():
    model, ids = for_streaming(language_model("mamba")), torch.tensor([4])
    with torch.no_grad():
        y, state = model.step(ids, model.initial_state(1))
        other = copy.deepcopy(model)
        assert other.step.model is other and not programs(other)
        assert torch.equal(other.step(ids, other.initial_state(1))[0], y) and programs(other)
        model.train()
        assert torch.allclose(model.step(ids, state)[0], other.step(ids, state)[0], atol=1e-5)


def norms(x: Tensor, w: Tensor) -> Tensor:
    y = F.layer_norm(x, x.shape[1:], w, w + 1) + F.layer_norm(x.view(len(x), 4, -1), (w.numel() // 4,)).flatten(1)
    return y + F.group_norm(x, 4, w, -w) + F.group_norm(x.view(len(x), 4, -1), 2).flatten(1) + F.normalize(x, dim=-1)


@pytest.mark.parametrize("width", [16, 48, 2100])
def test_norms(width):
    x = torch.randn(3, width) * 4 + 1
    model = for_streaming(Mapped(width, norms).eval())
    with torch.no_grad():
        y, _ = model.step(x, torch.ones(3, 1))
        torch.testing.assert_close(y, norms(x.double(), model.w.double()).float(), rtol=1e-5, atol=1e-5)
    assert [type(p) for p in programs(model)] == [Program], programs(model)


WINDOWS = {
    "one head of no whole vectors": ("attention(window=5,heads=1)", 24),
    "whole vectors": ("attention(window=19,heads=2)", 64),
    "grouped, gated, normed, half turned": (
        "attention(window=40,heads=4,kv_heads=2,gate=true,norm_eps=1e-3,rotary=4)", 64,
    ),
    "nothing but the present": ("attention(window=1)", 40),
    "of several lengths": ("attention(window=3),attention(window=70),attention(window=19)", 48),
    "a hybrid": ("attention(window=9),mamba,gla", 32),
    "echoes": ("attention(window=9),attention(window=9,echo=true)*2", 32),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name, batch):
    """A hundred steps, past every window and its room, with a fork; what was a state stays what it was."""
    torch.manual_seed(0)
    layer, width = WINDOWS[name]
    model = for_streaming(LanguageModel(layer, width=width, depth=3).build(x_vocab=57, y_width=57).eval())
    ids, kept = torch.randint(57, (batch, 100)), []
    with torch.no_grad():
        expected = model(ids)[0].unbind(1)
        for t, ((want, after), (y, state)) in enumerate(together(model, ids)):
            for result, other in zip((y, *leaves(state)), (want, *leaves(after)), strict=True):
                scale = float(other.abs().max()) if other.numel() else 0.0
                torch.testing.assert_close(result, other, rtol=0, atol=3e-5 * scale)
            torch.testing.assert_close(y, expected[t], rtol=1e-4, atol=1e-4)
            if t % 30 == 10:
                kept.append((t, state, [leaf.clone() for leaf in leaves(state)]))
        for t, state, before in kept[::-1]:
            assert all(map(torch.equal, leaves(state), before))
            for other in (ids[:, t + 1], ids[:, 0], ids[:, t + 1]):  # the same state goes on in several ways
                y, _ = model.step(other, state)
                torch.testing.assert_close(y, as_it_was(model, other, state)[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(model.step(ids[:, t + 1], state)[0], y)
            assert all(map(torch.equal, leaves(state), before))
    assert [type(p) for p in programs(model)] == [Program], programs(model)


@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("leaf", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_a_window_is_seen_as_long_as_it_stands_there(value, leaf, width):
    torch.manual_seed(0)
    model = LanguageModel("attention(window=6,heads=2)", width=width, depth=1).build(x_vocab=57, y_width=57)
    model, ids = for_streaming(model.eval()), torch.randint(57, (3, 20))
    seen = []
    with torch.no_grad():
        _, state = model(ids[:, :9])
        leaves(state)[leaf][1, 2, 0, 3] = value
        leaves(state)[2][2] = 2  # this row began late
        leaves(state)[leaf][2, 0] = value  # before its beginning
        for t in range(9, 16):
            want, _ = as_it_was(model, ids[:, t], state)
            y, state = model.step(ids[:, t], state)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5, equal_nan=True)
            seen.append(y.isnan().any(1).tolist())
    assert seen == [[False, t < 3, False] for t in range(7)]


def test_streams_of_windows_in_turn_and_dropped_states():
    model = for_streaming(language_model("window_attention"))
    states, alone = [model.initial_state(1) for _ in range(3)], model.initial_state(1)
    with torch.no_grad():
        for t in range(9):
            y, alone = model.step(torch.tensor([t]), alone)
            for i, state in enumerate(states):
                other, states[i] = model.step(torch.tensor([t]), state)
                assert torch.equal(y, other)
    rooms = programs(model)[0].rooms
    del state
    assert len(rooms._latest) == 4
    del states, alone
    model.step.last = None
    assert not rooms._latest
