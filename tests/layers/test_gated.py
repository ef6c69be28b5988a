"""Elman, Jordan, LSTM, GRU and Bidirectional against torch.nn, each other and their limit cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from statewise.core import RecurrentLayer, UsageError
from statewise.layers import Bidirectional, Elman, GRULayer, Jordan, LSTMLayer, MinGRU

TWINS: dict[str, tuple[Any, Any]] = {
    "elman": (lambda: Elman(3, 4), lambda: nn.RNN(3, 4, batch_first=True)),
    "elman_relu": (
        lambda: Elman(3, 4, nonlinearity="relu"),
        lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
    ),
    "lstm": (lambda: LSTMLayer(3, 4), lambda: nn.LSTM(3, 4, batch_first=True)),
    "gru": (lambda: GRULayer(3, 4), lambda: nn.GRU(3, 4, batch_first=True)),
}


def copy(ours: Any, theirs: nn.Module, suffix: str = "_l0") -> None:
    """Give torch's module the weights of ours."""
    recurrent = getattr(ours, "recurrent_bias", torch.zeros_like(ours.inp.bias))
    values = {
        "weight_ih": ours.inp.weight, "weight_hh": ours.recurrent, "bias_ih": ours.inp.bias, "bias_hh": recurrent,
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            theirs.get_parameter(name + suffix).copy_(value)


@pytest.mark.parametrize("name", TWINS)
def test_equals_torch(name: str) -> None:
    ours, theirs = (make().double() for make in TWINS[name])
    for p in ours.parameters():
        nn.init.normal_(p, std=0.5)  # biases too: at birth some are zero
    copy(ours, theirs)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    y, state = ours(x)
    want, last = theirs(x)
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
    pairs = [(state, last)] if isinstance(last, Tensor) else zip(state, last, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layer", [Elman(3, 4), LSTMLayer(3, 4), GRULayer(3, 4)], ids=lambda m: type(m).__name__)
def test_recurrent_blocks_start_orthogonal(layer: Any) -> None:
    for block in layer.recurrent.split(4):
        torch.testing.assert_close(block @ block.T, torch.eye(4), atol=1e-5, rtol=0)


def test_forget_bias_alone_is_where_it_was_put() -> None:
    i, f, g, o = LSTMLayer(3, 4, forget_bias=2.5).inp.bias.detach().chunk(4)
    assert (f == 2.5).all() and not any((part == 2.5).any() for part in (i, g, o))


def test_an_open_forget_gate_carries_the_cell_for_a_thousand_steps() -> None:
    layer = LSTMLayer(1, 2, forget_bias=50.0).double()
    with torch.no_grad():
        layer.inp.bias[:2] = -50  # the input gate stays shut
    start = layer.initial_state(1)._replace(c=torch.tensor([[0.3, -2.0]], dtype=torch.float64))
    _, end = layer(torch.randn(1, 1000, 1, dtype=torch.float64), start)
    torch.testing.assert_close(end.c, start.c, atol=1e-12, rtol=0)


def test_jordan_without_decay_is_an_elman_of_low_rank() -> None:
    jordan = Jordan(3, 5, 2).double()
    with torch.no_grad():
        jordan.out.bias.zero_()
    elman = Elman(3, 5).double()
    with torch.no_grad():
        elman.inp.load_state_dict(jordan.inp.state_dict())
        elman.recurrent.copy_(jordan.feedback @ jordan.out.weight)
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(jordan(x)[0], elman(x)[0] @ jordan.out.weight.T, atol=1e-12, rtol=1e-12)


def test_jordan_context_is_a_decaying_sum_of_outputs() -> None:
    layer = Jordan(2, 3, 2, decay=0.5).double()
    y, state = layer(torch.randn(1, 4, 2, dtype=torch.float64))
    weights = torch.tensor([0.125, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(state, weights @ y[0] + torch.zeros_like(state), atol=1e-12, rtol=1e-12)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match="'relux'; expected 'tanh' or 'relu'"):
        Elman(3, 4, nonlinearity="relux")  # type: ignore[arg-type]
    layer = GRULayer(3, 4)
    with pytest.raises(UsageError, match="given twice"):
        Bidirectional(layer, layer)
    with pytest.raises(UsageError, match="width 3 and 2"):
        Bidirectional(layer, GRULayer(2, 4))


# Bidirectional


@pytest.mark.parametrize("name", TWINS)
def test_bidirectional_equals_torch_on_unequal_lengths(name: str) -> None:
    make, _ = TWINS[name]
    ours = Bidirectional(make(), make()).double()
    kind = {"elman": nn.RNN, "elman_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[name]
    more = {"nonlinearity": "relu"} if name == "elman_relu" else {}
    theirs = kind(3, 4, batch_first=True, bidirectional=True, dtype=torch.float64, **more)
    copy(ours.forward_layer, theirs), copy(ours.backward_layer, theirs, "_l0_reverse")
    x, lengths = torch.randn(3, 7, 3, dtype=torch.float64), torch.tensor([4, 7, 1])
    packed, last = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    want = pad_packed_sequence(packed, batch_first=True)[0]
    torch.testing.assert_close(ours(x, lengths=lengths), want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours(x), theirs(x)[0], atol=1e-12, rtol=1e-12)
    h = last[0] if isinstance(last, tuple) else last
    torch.testing.assert_close(ours.summary(x, lengths=lengths), torch.cat([h[0], h[1]], -1), atol=1e-12, rtol=1e-12)
    alone = ours(x[1:2])[0]
    torch.testing.assert_close(ours.summary(x)[1], torch.cat([alone[-1, :4], alone[0, 4:]]), atol=1e-12, rtol=1e-12)


def test_a_reset_parts_the_row_for_both_sides() -> None:
    layer = Bidirectional(MinGRU(3, 4), GRULayer(3, 2)).double()
    x, reset = torch.randn(1, 9, 3, dtype=torch.float64), torch.zeros(1, 9, dtype=torch.bool)
    reset[0, [0, 2, 3, 8]] = True
    parts = [layer(x[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 8), (8, 9))]
    torch.testing.assert_close(layer(x, reset=reset), torch.cat(parts, 1), atol=1e-12, rtol=1e-12)
    short = layer(x, reset=reset, lengths=torch.tensor([6]))
    want = torch.cat([parts[0], parts[1], layer(x[:, 3:6]), torch.zeros(1, 3, 6)], 1)
    torch.testing.assert_close(short, want, atol=1e-12, rtol=1e-12)


def test_padding_is_never_read() -> None:
    layer = Bidirectional(LSTMLayer(3, 4), LSTMLayer(3, 4)).double()
    x, lengths = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([3, 0])
    bad = x.clone()
    bad[0, 3:], bad[1] = torch.nan, torch.inf
    bad.requires_grad_()
    y = layer(bad, lengths=lengths)
    torch.testing.assert_close(y, layer(x, lengths=lengths))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in [bad, *layer.parameters()])


def test_ids_and_empty_batches_pass_through() -> None:
    class Ids(RecurrentLayer[Tensor]):
        """y_t = E[x_t] + h_{t-1}, h_t = y_t."""

        def __init__(self) -> None:
            super().__init__()
            self.width, self.out_width, self.vocab = 2, 2, 5
            self.table = nn.Embedding(5, 2)

        def initial_state(self, batch: int) -> Tensor:
            return self.table.weight.new_zeros(batch, 2)

        def forward(self, x: Tensor, state: Any = None, *, reset: Any = None, lengths: Any = None) -> Any:
            y = self.table(x).cumsum(1)
            return y, y[:, -1]

        def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            y = self.table(x) + state
            return y, y

    layer = Bidirectional(Ids(), Ids())
    ids = torch.tensor([[1, 2, 3]])
    y = layer(ids)
    torch.testing.assert_close(y[0, 0, 2:], layer.backward_layer.table(ids).sum(1)[0])
    plain = Bidirectional(GRULayer(3, 2), GRULayer(3, 2))
    assert plain(torch.randn(0, 4, 3)).shape == (0, 4, 4) and plain(torch.randn(2, 0, 3)).shape == (2, 0, 4)
    assert plain.summary(torch.randn(2, 0, 3)).shape == (2, 4)
