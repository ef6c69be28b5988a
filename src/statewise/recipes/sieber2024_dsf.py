"""The Dynamical Systems Framework (Sieber et al. 2024, arXiv:2405.15731): attention, state spaces and recurrent
networks as one system h_t = Lambda_t h_{t-1} + B_t u_t, y_t = C_t h_t, and when two of them are the same."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..core import layers
from ..core.paper import Paper
from ..interpret import dynamics
from ..layers import Aaren, LinearAttention
from ..ops import linear_scan, selective_scan
from .generation import difference
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader

FAMILY = ("linear_attention", "gla", "mamba", "mamba2", "lru", "aaren", "delta_net")
EPS = 1e-6  # beside the sum that divides, in LinearAttention


@torch.no_grad()
def coincide(seed: int, *, length: int, width: int) -> dict[str, float]:
    """Attentions and the selective state spaces made to equal them, in float64: the largest relative differences.

    plain: attention without a normaliser is a selective space that never forgets: a = 0 and dt = 1, b and c its keys
    and queries. key_query: divided by eta_t = phi(q_t) . sum phi(k_s), it has Lambda_t = eta_{t-1} / eta_t and B_t =
    phi(k_t) / eta_t. fixed_query: with one query for all times that decay is below 1 for certain, and the zero-order
    hold of a = -1 with dt_t = log(u_t / u_{t-1}) gives it. forgetting: the plain one with a = -0.01, which must differ.
    """
    x = torch.randn(2, length, width, dtype=torch.float64)
    attention = LinearAttention(width, heads=1, key=width, value=width, normaliser="none").double()
    system = dynamics(attention, x)
    b, c, v = system.write[:, :, 0, :, 0], system.read[:, :, 0, 0], system.x[:, :, 0, 0]
    one, never, empty = torch.ones_like(v), x.new_zeros(width, width), x.new_zeros(2, width, width)
    plain, forgetting = (
        difference(selective_scan(v, one, a, b, c, empty)[0], system.y[:, :, 0, 0]) for a in (never, never - 0.01)
    )
    errors = {"plain": plain, "key_query": key_query(x), "fixed_query": fixed_query(x)}
    return {"error": max(errors.values()), **errors, "forgetting": forgetting}


def key_query(x: Tensor) -> float:
    """Normalised linear attention beside a diagonal recurrence, whose decay may exceed 1."""
    layer = LinearAttention(x.shape[2], heads=1, key=x.shape[2], value=x.shape[2]).double()
    u = layer.encode(x)
    q, k, v = u.q[:, :, 0], u.k[:, :, 0], u.v[:, :, 0]  # (B, T, K) and (B, T, V)
    eta = (q * k.cumsum(1)).sum(-1) + EPS
    decay = torch.cat([torch.zeros_like(eta[:, :1]), eta[:, :-1] / eta[:, 1:]], 1)[..., None, None]
    write = (k / eta[..., None])[..., None] * v[..., None, :]  # (B, T, K, V)
    h, _ = linear_scan(decay, write, torch.zeros_like(write[:, 0]))
    attended, _ = layer.scan(u, layer.initial_state(len(x)), None, None)
    return difference((q[..., None] * h).sum(-2), attended[:, :, 0])


def fixed_query(x: Tensor) -> float:
    """Aaren beside a selective space by zero-order hold."""
    layer = Aaren(x.shape[2], heads=1).double()
    u = layer.encode(x)
    total = u.score[..., 0].logcumsumexp(1)  # (B, T)
    dt = torch.cat([torch.full_like(total[:, :1], 60.0), total.diff(dim=1)], 1)  # e^-60: nothing is before the first
    v, b = u.v[:, :, 0], (-torch.expm1(-dt) / dt)[..., None]
    a, empty = -x.new_ones(v.shape[2], 1), x.new_zeros(len(x), v.shape[2], 1)
    h, _ = selective_scan(v, dt[..., None].expand_as(v).contiguous(), a, b, torch.ones_like(b), empty)
    attended, _ = layer.scan(u, layer.initial_state(len(x)), None, None)
    return difference(h, attended[:, :, 0])


@torch.no_grad()
def one_form(seed: int, *, length: int, width: int) -> dict[str, float]:
    """y = M x for every layer of FAMILY, M from its (Lambda, B, C): the largest relative difference of all."""
    x = torch.randn(1, length, width, dtype=torch.float64)
    errors = {}
    for name in FAMILY:
        info = layers[name]
        found = dynamics(info.cls(**info.sized(width)).double(), x)
        steps = found.matrix @ found.x.permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, H, T E, T R) @ (B, H, T R, V)
        errors[f"{name}_error"] = difference(steps, found.y.permute(0, 2, 1, 3, 4).flatten(2, 3))
    return {"error": max(errors.values()), **errors}


@torch.no_grad()
def expansion(seed: int, *, length: int, width: int, orders: list[int]) -> dict[str, float]:
    """Softmax attention beside linear attention whose features are all monomials of q and k up to an order."""
    q, k, v = torch.randn(3, 1, length, width, dtype=torch.float64)
    score = q @ k.mT / math.sqrt(width)
    causal = torch.ones(length, length, dtype=torch.float64).tril()

    def attend(weights: Tensor) -> Tensor:
        weights = weights * causal
        return weights @ v / weights.sum(-1, keepdim=True)

    wanted, numbers = attend(score.exp()), {}
    for order in orders:
        series = sum(score**p / math.factorial(p) for p in range(order + 1))
        numbers[f"order_{order}"] = difference(attend(torch.as_tensor(series)), wanted)
    return {"error": numbers[f"order_{orders[-1]}"], **numbers}


def runs(scale: Scale) -> dict[str, Run]:
    """Constructions alone. The paper's trainings on associative recall give linear attention positions and the state
    spaces a convolution, which `Stack` cannot add to a layer; without them linear attention sees a set of tokens."""
    length, width = {"smoke": (12, 4), "small": (64, 16), "paper": (512, 64)}[scale]
    size = {"length": length, "width": width}
    return {
        "coincide": Measure(coincide, "error", size, higher_is_better=False),
        "one_form": Measure(one_form, "error", {**size, "width": 2 * width}, higher_is_better=False),
        "expansion": Measure(expansion, "error", {**size, "orders": [2, 4, 8, 16]}, higher_is_better=False),
    }


def equal(r: Reader) -> bool:
    return max(r("coincide")) < 1e-10 < 1e-3 < min(r("coincide", "forgetting"))


def infinite(r: Reader) -> bool:
    errors = [r("expansion", f"order_{order}") for order in (2, 4, 8, 16)]
    return all(max(b) < min(a) for a, b in pairwise(errors)) and errors[0].mean > 1e-3


TITLE = (
    "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks"
)
RECIPE = Recipe(
    paper=Paper(TITLE, "Sieber et al.", 2024, "arXiv:2405.15731"),
    runs=runs,
    claims=(
        Claim(
            "sec. 3",
            "attention, state spaces and recurrent networks are one form: y = M x by (Lambda, B, C)",
            lambda r: max(r("one_form")) < 1e-10,
        ),
        Claim("sec. 3.2", "a linear attention and a selective state space can be made to coincide", equal),
        Claim(
            "sec. 3.2", "softmax attention takes infinitely many states: the error falls with their number", infinite
        ),
    ),
)
