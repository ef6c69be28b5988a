"""statewise.RNN, LSTM and GRU against torch.nn: keys, numbers, gradients, layouts, errors; and their streaming side."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import statewise
from statewise import chunked, unroll
from statewise.core import UsageError
from statewise.layers.drop_in import StackState, TorchLayer
from statewise.testing import check_layer

KINDS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}
SHAPES = [
    {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": first}
    for layers, both, bias, first in itertools.product((1, 2), (False, True), (True, False), (True, False))
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def pair(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same weights."""
    name, args = KINDS[kind]
    theirs = getattr(nn, name)(3, 4, dtype=dtype, **args, **more)
    ours = getattr(statewise, name)(3, 4, dtype=dtype, **args, **more)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def hidden(theirs: nn.Module, batch: int, dtype: torch.dtype) -> Any:
    """A first state in torch.nn's layout."""
    count = theirs.num_layers * (2 if theirs.bidirectional else 1)
    h = torch.randn(count, batch, theirs.proj_size or theirs.hidden_size, dtype=dtype)
    if not isinstance(theirs, nn.LSTM):
        return h
    return h, torch.randn(count, batch, theirs.hidden_size, dtype=dtype)


def flat(result: Any) -> list[Tensor]:
    """Every tensor of an answer."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in flat(part)]


def answers(module: nn.Module, x: Any, hx: Any) -> list[Tensor]:
    """Outputs, last states and the gradients of a loss on both: to x, hx and every parameter by name."""
    data = x.data if isinstance(x, PackedSequence) else x
    data = data.detach().clone().requires_grad_()
    x = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    first = [t.detach().clone().requires_grad_() for t in ([] if hx is None else flat(hx))]
    start = None if hx is None else first[0] if isinstance(hx, Tensor) else tuple(first)
    outs = flat(module(x, start))
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outs)
    names = sorted(n for n, _ in module.named_parameters())
    wanted = [data, *first, *(module.get_parameter(n) for n in names)]
    return [*outs, *torch.autograd.grad(loss, wanted)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_are_those_of_torch(kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        ours, theirs = pair(kind, dtype, **shape)
        x = torch.randn(2, 7, 3, dtype=dtype) if shape["batch_first"] else torch.randn(7, 2, 3, dtype=dtype)
        for hx in (None, hidden(theirs, 2, dtype)):
            assert_same(answers(ours, x, hx), answers(theirs, x, hx), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, dtype: torch.dtype) -> None:
    for both, sorted_already in itertools.product((False, True), repeat=2):
        ours, theirs = pair(kind, dtype, num_layers=2, bidirectional=both, batch_first=True)
        lengths = torch.tensor([7, 4, 1] if sorted_already else [4, 7, 1])
        x = torch.randn(3, 7, 3, dtype=dtype)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sorted_already)
        for hx in (None, hidden(theirs, 3, dtype)):
            assert_same(answers(ours, packed, hx), answers(theirs, packed, hx), dtype)
        out, like = ours(packed)[0], theirs(packed)[0]
        assert isinstance(out, PackedSequence)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            a, b = getattr(out, name), getattr(like, name)
            assert (a is None and b is None) or a.equal(b), name


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(kind: str) -> None:
    for first, both in itertools.product((False, True), repeat=2):
        ours, theirs = pair(kind, num_layers=2, batch_first=first, bidirectional=both)
        x = torch.randn(5, 3, dtype=torch.float64)
        state = hidden(theirs, 1, torch.float64)
        one = state.squeeze(1) if isinstance(state, Tensor) else tuple(s.squeeze(1) for s in state)
        for hx in (None, one):
            assert_same(answers(ours, x, hx), answers(theirs, x, hx), torch.float64)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_drops_the_same_units_from_the_same_seed(kind: str, packed: bool) -> None:
    for both in (False, True):
        ours, theirs = pair(kind, num_layers=3, dropout=0.4, batch_first=True, bidirectional=both)
        x: Any = torch.randn(3, 6, 3, dtype=torch.float64)
        if packed:
            x = pack_padded_sequence(x, torch.tensor([3, 6, 2]), batch_first=True, enforce_sorted=False)
        results = []
        for module in (ours, theirs):
            torch.manual_seed(5)
            results.append(flat(module(x)))
        assert_same(*results, torch.float64)
        assert not torch.equal(flat(ours(x))[0], results[0][0])  # it does drop
        ours.eval(), theirs.eval()
        assert_same(flat(ours(x)), flat(theirs(x)), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_shapes_and_first_weights(kind: str) -> None:
    name, args = KINDS[kind]
    modules = []
    for library in (nn, statewise):
        torch.manual_seed(3)
        modules.append(getattr(library, name)(3, 4, 2, bidirectional=True, **args))
    theirs, ours = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [[w.shape for w in group] for group in ours.all_weights] == [
        [w.shape for w in group] for group in theirs.all_weights
    ]
    assert repr(ours).startswith(repr(theirs)[:-1])  # and tells the nonlinearity too


def test_positional_arguments_stand_in_torchs_order() -> None:
    assert statewise.RNN(3, 4, 2, "relu", False).nonlinearity == "relu"
    assert statewise.GRU(3, 4, 2, False, True, 0.5, True).bidirectional
    assert statewise.LSTM(3, 4, 2, False, True, 0.5, True, 2).proj_size == 2


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_parameters(kind: str) -> None:
    ours, _ = pair(kind, torch.float32, num_layers=2)
    x = torch.randn(6, 2, 3)
    want = flat(ours(x))
    got = flat(ours.bfloat16()(x.bfloat16()))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, atol=0.05, rtol=0.05)


BAD = {
    "width": (lambda m: m(torch.randn(5, 2, 4)), "input_size. Expected 3, got 4"),
    "dimensions": (lambda m: m(torch.randn(3)), "2D or 3D, got 1D"),
    "dtype": (lambda m: m(torch.randn(5, 2, 3).double()), "float64"),
    "state batch": (lambda m: m(torch.randn(5, 2, 3), torch.zeros(1, 3, 4)), "Expected hidden size"),
    "state of a batch": (lambda m: m(torch.randn(5, 3), torch.zeros(1, 1, 4)), "Expected hidden size"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_torch_refuses_is_refused_in_one_line(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises((RuntimeError, ValueError)):
        call(nn.GRU(3, 4))
    with pytest.raises(UsageError, match=words) as caught:
        call(statewise.GRU(3, 4))
    assert isinstance(caught.value, RuntimeError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"input_size": 0}, ValueError), ({"hidden_size": -1}, ValueError), ({"num_layers": 0}, ValueError),
        ({"dropout": 2.0}, ValueError), ({"dropout": True}, ValueError), ({"hidden_size": 4.0}, TypeError),
        ({"bias": 1}, TypeError), ({"batch_first": 1}, TypeError), ({"proj_size": 4}, ValueError),
        ({"proj_size": -1}, ValueError),
    ],
)  # fmt: skip
def test_constructors_refuse_what_torchs_refuse(args: dict[str, Any], error: type[Exception]) -> None:
    for library in (nn, statewise):
        with pytest.raises(error):
            library.LSTM(**{"input_size": 3, "hidden_size": 4, **args})


@pytest.mark.parametrize("lengths", [[0, 5, 2], [0, 0, 0]])
def test_dropout_takes_rows_without_steps(lengths: list[int]) -> None:
    layer = statewise.LSTM(3, 4, num_layers=2, dropout=0.5).layer().train()
    y, last = layer(torch.randn(3, 5, 3), lengths=torch.tensor(lengths))
    for row, end in enumerate(lengths):
        assert bool(y[row, :end].ne(0).any()) == (end > 0) and not y[row, end:].any()
    assert not last.h[0].any() and not last.c[0].any()


def test_dropout_without_a_second_layer_warns_as_torch_does() -> None:
    for library in (nn, statewise):
        with pytest.warns(UserWarning, match="dropout"):
            library.GRU(3, 4, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statewise.GRU(3, 4, num_layers=2, dropout=0.5)


# The streaming side


@pytest.mark.parametrize("kind", KINDS)
def test_layer_shares_the_parameters_and_streams(kind: str) -> None:
    ours, theirs = pair(kind, num_layers=2, batch_first=True)
    layer = ours.layer()
    assert isinstance(layer, TorchLayer)
    assert {id(p) for p in layer.parameters()} == {id(p) for p in ours.parameters()}
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    hx = hidden(theirs, 2, torch.float64)
    want, last = theirs(x, hx)
    state = layer.from_torch(hx)
    for run in (layer, unroll, lambda *a: chunked(layer, a[0], [3, 0, 4], a[1])):
        y, end = run(layer, x, state) if run is unroll else run(x, state)
        torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
        for a, b in zip(flat(layer.to_torch(end)), flat(last), strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert isinstance(end, StackState) == isinstance(theirs, nn.LSTM)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_honours_resets_and_lengths(kind: str) -> None:
    ours, _ = pair(kind, num_layers=2)
    layer = ours.layer()
    x = torch.randn(3, 8, 3, dtype=torch.float64)
    reset, lengths = torch.rand(3, 8) < 0.3, torch.tensor([8, 0, 5])
    start = layer(x)[1]
    got, want = (run(x, start, reset=reset, lengths=lengths) for run in (layer, lambda *a, **k: unroll(layer, *a, **k)))
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_bidirectional_drop_in_has_no_stream() -> None:
    with pytest.raises(UsageError, match="cannot stream"):
        statewise.GRU(3, 4, bidirectional=True).layer()


@pytest.mark.parametrize("kind", KINDS)
def test_full_graph_compilation_works_where_torchs_modules_refuse_it(kind: str) -> None:
    ours, theirs = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, want = [torch.autograd.grad(flat(f(x))[0].square().sum(), list(ours.parameters())) for f in (compiled, ours)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    with pytest.raises(Exception):  # noqa: B017  (RuntimeError in some versions, a dynamo error in others)
        torch.compile(theirs, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("kind", [pytest.param("gru", marks=pytest.mark.slow), "lstm_proj"])
def test_layer_conforms(kind: str) -> None:
    name, args = KINDS[kind]
    report = check_layer(getattr(statewise, name)(3, 4, num_layers=2, dropout=0.4, **args).layer())
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_with_any_length_and_batch_where_torchs_modules_refuse(kind: str) -> None:
    ours, _ = pair(kind, num_layers=2, batch_first=True, bidirectional=True)
    dims = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("steps", min=2)},)
    program = torch.export.export(ours, (torch.randn(2, 5, 3, dtype=torch.float64),), dynamic_shapes=dims)
    x = torch.randn(4, 11, 3, dtype=torch.float64)
    for a, b in zip(flat(program.module()(x)), flat(ours(x)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_step_exports_with_any_batch() -> None:
    layer = statewise.LSTM(3, 4, num_layers=2).layer()

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, state = self.layer.step(x, StackState(h, c))
            return y, state.h, state.c

    batch = torch.export.Dim("batch", min=2)
    x, state = torch.randn(2, 3), layer.initial_state(2)
    program = torch.export.export(Step(), (x, *state), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    x, state = torch.randn(5, 3), StackState(torch.randn(5, 2, 4), torch.randn(5, 2, 4))
    got = program.module()(x, *state)
    y, after = layer.step(x, state)
    for a, b in zip(got, (y, *after), strict=True):
        torch.testing.assert_close(a, b)
