"""Short convolution against torch's, and taps that stop at a reset."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise.core import UsageError
from statewise.layers import ShortConv
from statewise.nn import ShortConvolution


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_it_is_conv1d(taps: int):
    layer, x = ShortConv(3, taps=taps).double(), torch.randn(2, 9, 3, dtype=torch.float64)
    want = F.conv1d(F.pad(x.mT, (taps - 1, 0)), layer.conv.weight.flip(0).mT[:, None], groups=3).mT
    torch.testing.assert_close(layer(x)[0], want)


def test_no_tap_reaches_across_a_reset_and_none_is_kept():
    layer, x = ShortConv(1, taps=4), torch.randn(1, 6, 1)
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 4] = True
    y, state = layer(x, reset=reset)
    assert torch.equal(y[:, 4:], layer(x[:, 4:])[0])
    assert torch.equal(state, torch.cat([torch.zeros(1, 1, 1), x[:, 4:]], 1))


def test_it_needs_a_tap():
    with pytest.raises(UsageError, match="at least 1"):
        ShortConv(3, taps=0)


def test_it_starts_with_the_variance_of_one_over_taps_and_no_bias():
    torch.manual_seed(0)
    conv = ShortConvolution(4000, taps=4, bias=True)
    assert conv.weight.var().item() == pytest.approx(1 / 4, rel=0.1) and not conv.bias.any()
