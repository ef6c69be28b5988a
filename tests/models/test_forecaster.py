"""Forecasts as changes from the last value, and beyond the horizon."""

from __future__ import annotations

import pytest
import torch

from statewise.core import UsageError
from statewise.models import Forecaster, Forecasting, Stack, forecast


def make(width: int = 2, horizon: int = 3) -> Forecaster:
    model = Forecasting(Stack("min_gru", width=4, depth=1)).build(x_width=width, y_width=width * horizon)
    return model.double().eval()


def test_a_silent_model_repeats_the_last_value():
    model = make()
    for p in model.model.head.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    y, _ = model(x)
    assert torch.equal(y.unflatten(-1, (3, 2)), x[:, :, None].expand(-1, -1, 3, -1))
    assert torch.equal(forecast(model, x, 8), x[:, -1:].expand(-1, 8, -1))


def test_within_the_horizon_it_is_the_last_answer():
    model, x = make(), torch.randn(2, 6, 2, dtype=torch.float64)
    assert torch.equal(forecast(model, x, 2), model(x)[0][:, -1].unflatten(-1, (3, 2))[:, :2])
    assert forecast(model, x, 0).shape == (2, 0, 2)


def test_beyond_the_horizon_it_reads_its_own_forecasts():
    model, x = make(), torch.randn(2, 6, 2, dtype=torch.float64)
    history = x
    for _ in range(3):
        history = torch.cat([history, model(history)[0][:, -1].unflatten(-1, (3, 2))], 1)
    torch.testing.assert_close(forecast(model, x, 7), history[:, 6:13])
    _, state = model(x[:, :4])
    torch.testing.assert_close(forecast(model, x[:, 4:], 7, state), history[:, 6:13])


def test_what_can_not_be_forecast_is_refused():
    with pytest.raises(UsageError, match="multiple"):
        Forecasting().build(x_width=2, y_width=3)
    with pytest.raises(UsageError, match="not ids"):
        Forecasting().build(x_vocab=2, y_width=2)
    with pytest.raises(UsageError, match="empty"):
        forecast(make(), torch.zeros(1, 0, 2).double(), 3)
