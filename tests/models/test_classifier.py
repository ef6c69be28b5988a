"""The running mean of a model's answers."""

from __future__ import annotations

import torch

from statewise.core import unroll
from statewise.models import Classifier, Stack


def test_each_answer_is_the_mean_of_those_so_far():
    model = Stack("gru", width=4, depth=1, pool="mean").build(x_width=3, y_width=2).double()
    assert isinstance(model, Classifier)
    x = torch.randn(3, 9, 3, dtype=torch.float64)
    inner, _ = model.model(x)
    want = inner.cumsum(1) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(model(x)[0], want)
    torch.testing.assert_close(unroll(model, x)[0], want)


def test_a_reset_starts_a_new_mean_and_lengths_end_it():
    model = Stack("gru", width=4, depth=1, pool="mean").build(x_width=3, y_width=2).double()
    x, reset = torch.randn(2, 9, 3, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True
    y, state = model(x, reset=reset, lengths=torch.tensor([9, 6]))
    torch.testing.assert_close(y[0, 4:], model(x[:1, 4:])[0][0])
    torch.testing.assert_close(state.mean[1], model(x[1:, :6])[0][0, -1])
    assert state.seen.tolist() == [5, 6]


def test_the_mean_of_a_long_stream_does_not_drift():
    model = Stack("short_conv", width=4, depth=1, pool="mean").build(x_width=1, y_width=1)
    with torch.no_grad():
        y, _ = model(torch.ones(1, 200_000, 1))
        inner, _ = model.model(torch.ones(1, 9, 1))
    torch.testing.assert_close(y[0, -1], inner[0, -1], rtol=1e-4, atol=1e-4)
