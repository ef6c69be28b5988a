"""Parts of the matrix memories: norms per head, block-diagonal maps, feature maps, the decaying maximum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise.core import UsageError
from statewise.nn import POSITIVE, BlockLinear, HeadNorm, check_feature, decayed_max, features


@pytest.mark.parametrize("centred", [True, False])
def test_a_head_norm_is_torchs_norm_of_each_head(centred):
    x = 3 + torch.randn(5, 2, 4, dtype=torch.float64)
    norm = HeadNorm(2, 4, centred=centred).double()
    torch.nn.init.normal_(norm.weight)
    each = F.layer_norm(x, (4,), eps=1e-6) if centred else F.rms_norm(x, (4,), eps=1e-6)
    torch.testing.assert_close(norm(x), each.flatten(-2) * norm.weight)
    if centred:
        torch.testing.assert_close(norm(x), F.group_norm(x.flatten(-2), 2, norm.weight, eps=1e-6))


def test_a_head_norm_is_computed_wide_and_given_in_the_dtype_of_its_weight():
    norm = HeadNorm(1, 64).half()
    assert norm(torch.full((1, 64), 1e6)).eq(1).all()  # 1e6 is infinite in half precision
    assert norm(torch.ones(1, 64).half()).dtype == torch.float16


def test_a_block_linear_map_is_its_block_diagonal_matrix():
    layer, x = BlockLinear(6, size=2).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ torch.block_diag(*layer.weight).mT)
    with pytest.raises(UsageError, match="6 is not a multiple of the block size 4"):
        BlockLinear(6, size=4)


def test_features_that_may_be_summed_are_positive_however_negative_the_input():
    x = torch.linspace(-80, 80, 2001)
    assert all((features(x, kind) >= 0).all() for kind in POSITIVE)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(features(x, "elu").double(), exact, rtol=1e-6, atol=0)
    assert (features(torch.tensor([-1.0]), "silu") < 0).all() and (features(torch.tensor([-1.0]), "identity") < 0).all()
    with pytest.raises(UsageError, match="Layer: feature 'gelu'; expected one of elu, "):
        check_feature("Layer", "gelu")


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_decayed_maximum_is_its_loop(steps, rate):
    torch.manual_seed(steps)
    decay, x = -torch.rand(3, steps, 2, dtype=torch.float64), 5 * torch.randn(3, steps, 2, dtype=torch.float64)
    decay[0, steps // 2] = -torch.inf
    m, reset = torch.randn(3, 2, dtype=torch.float64), torch.rand(3, steps) < rate
    got = decayed_max(decay, x, m, reset)
    for t in range(steps):
        m = torch.maximum(decay[:, t] + torch.where(reset[:, t, None], 0, m), x[:, t])
        torch.testing.assert_close(got[:, t], m)


def test_nan_in_the_decayed_maximum_lasts_until_a_reset():
    x, reset = torch.zeros(2, 9, 1), torch.zeros(2, 9, dtype=torch.bool)
    x[0, 2], reset[0, 6] = torch.nan, True
    got = decayed_max(-torch.ones_like(x), x, torch.zeros(2, 1), reset)[..., 0].isnan()
    assert got[0].tolist() == [False] * 2 + [True] * 4 + [False] * 3 and not got[1].any()
    bad, start = torch.full((2, 1), torch.nan), torch.ones(2, 9, dtype=torch.bool)
    assert not decayed_max(-torch.ones_like(x), torch.zeros_like(x), bad, start).isnan().any()
