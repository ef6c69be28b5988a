"""Routing attention sees the latest members of a query's cluster, whatever their age, and its clusters are learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statewise.core import UsageError, costs
from statewise.layers import RoutingAttention


def made(width: int = 8, **options: int) -> RoutingAttention:
    torch.manual_seed(0)
    return RoutingAttention(width, **{"heads": 2, "clusters": 3, "window": 4, **options}).double()  # type: ignore[arg-type]


def slowly(layer: RoutingAttention, x: Tensor) -> Tensor:
    """By the definition, one query after another."""
    q, k, v = layer._project(x)  # (B, T, H, K)
    mu = F.normalize(layer.centroids, dim=-1)
    y = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(layer.heads):
            goes, comes = (q[b, :, h] @ mu[h].mT).argmax(-1), (k[b, :, h] @ mu[h].mT).argmax(-1)
            for t in range(x.shape[1]):
                members = [s for s in range(t + 1) if comes[s] == goes[t]][-layer.window :]
                if members:
                    weights = (k[b, members, h] @ q[b, t, h]).softmax(0)
                    y[b, t, h] = weights @ v[b, members, h]
    return layer.out(y.flatten(2))


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("window", [1, 4, 64])
def test_it_is_its_definition(steps: int, window: int) -> None:
    layer = made(window=window)
    x = torch.randn(3, steps, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], slowly(layer, x))


def test_one_cluster_of_room_enough_is_attention() -> None:
    layer = made(clusters=1, window=20)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    q, k, v = (z.transpose(1, 2) for z in layer._project(x))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(layer(x)[0], layer.out(y.transpose(1, 2).flatten(2)))


def test_a_member_is_found_however_old_it_is() -> None:
    """Between two steps of one cluster stand a hundred of another; a window of four steps would have lost the first."""
    layer = made(width=4, heads=1, clusters=2, window=4)
    with torch.no_grad():
        layer.qkv.bias.zero_()
        layer.qkv.weight.copy_(torch.eye(4).repeat(3, 1))  # q = k = norm(x), v = x
        layer.out.weight.copy_(torch.eye(4))
        layer.out.bias.zero_()
        one, other = torch.tensor([3.0, 1, -1, -3]), torch.tensor([-3.0, 1, 1, 1])
        layer.centroids.copy_(torch.stack([one, other])[None])
    x = other.repeat(1, 102, 1).double()
    x[0, 0], x[0, -1] = 2 * one, one
    y = layer(x)[0][0, -1]
    close = {"rtol": 1e-5, "atol": 1e-5}  # the norm adds that much to a variance
    torch.testing.assert_close(y, 1.5 * one.double(), **close)  # the mean of both members' values: their keys are equal
    x[0, 1:6] = one  # five more, and the cluster is full: the first is forgotten
    torch.testing.assert_close(layer(x)[0][0, -1], one.double(), **close)


def test_centroids_go_to_their_members_and_members_to_them() -> None:
    layer = made()
    x = torch.randn(4, 30, 8, dtype=torch.float64)

    def cost() -> Tensor:
        return costs(layer(x)[1])[0].sum()

    for moved in ([layer.centroids], [layer.qkv.weight]):
        before = cost()
        for _ in range(20):
            grads = torch.autograd.grad(cost(), moved)
            with torch.no_grad():
                for p, g in zip(moved, grads, strict=True):
                    p -= 2.0 * g
        assert cost() < 0.95 * before


def test_padding_moves_no_centroid() -> None:
    layer, ends = made(), torch.tensor([3, 7])
    x = torch.randn(2, 7, 8, dtype=torch.float64)

    def pull(x: Tensor, **given: Tensor) -> Tensor:
        return torch.autograd.grad(costs(layer(x, **given)[1])[0].sum(), layer.centroids)[0]

    x[0, 3:] = 100.0
    torch.testing.assert_close(pull(x, lengths=ends), pull(x[:1, :3]) + pull(x[1:]))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"heads": 3}, "width 8, heads 3"),
        ({"heads": 8}, "2 or more whole channels"),
        ({"clusters": 0}, "clusters is 0"),
        ({"window": 1.5}, "window is 1.5"),
        ({"commitment": 0.0}, "commitment is 0.0"),
        ({"commitment": float("nan")}, "commitment is nan"),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(**options)
