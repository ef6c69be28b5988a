"""A scan over a sequence that is cut over ranks is the scan of the whole: outputs, last state, gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from several import in_ranks
from statewise.core import UsageError, layers, leaves, tree_map
from statewise.models import Stack
from statewise.ops import delta_scan, dplr_scan, linear_scan, outer_scan, selective_scan
from statewise.ops.across_ranks import Line, Rehearsal, across_ranks, hand_on, scan_across
from statewise.training.distributed import sum_gradients
from statewise.training.sequence_parallel import InTurns, own_chunk, sequence_parallel

# the layers that can be cut, all others are refused; docs/distributed.md names them
CUT = [
    "delta_net", "delta_product", "gated_delta_net", "gla", "hgrn2", "linear_attention", "lru", "mamba", "mamba2",
    "min_gru", "min_lstm", "s5", "short_conv",
]  # fmt: skip
STEPS, BATCH = 11, 3


def cut(t: Tensor | None) -> Tensor | None:
    return None if t is None else own_chunk(t)


def own_lengths(lengths: Tensor | None, steps: int) -> Tensor | None:
    if lengths is None:
        return None
    whole = own_chunk(torch.arange(steps)[None])[0]
    return (lengths - whole[0]).clamp(0, len(whole))


def close(got: Any, want: Any, dtype: torch.dtype, what: str) -> None:
    near = 1e-12 if dtype == torch.float64 else 1e-5 if what.startswith("gradient") else 1e-6
    for g, w in zip(leaves(got), leaves(want), strict=True):
        size = float(w.detach().abs().max()) if w.numel() else 0.0
        assert_close(g, w, rtol=0, atol=near * max(1.0, size), msg=lambda m: f"{what}: {m}")


def weigh(out: Any) -> Tensor:
    """A number that depends on every entry, differently."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves(out):
        real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        total = total + (real.double() * torch.arange(1, real[0].numel() + 1).view(real[0].shape).cos()).sum()
    return total


def check_layer(layer: Any, wrapped: Any, x: Tensor, state: Any, reset: Tensor | None, lengths: Tensor | None) -> None:
    """Both ways from the same inputs. The loss weighs every output and, on the last rank, the last state."""
    last = dist.get_rank() == dist.get_world_size() - 1
    dtype = x.dtype
    one, other = x.clone().requires_grad_(), cut(x).clone().requires_grad_()
    begun = [tree_map(lambda leaf: leaf.clone().requires_grad_(), state) for _ in range(2)]
    y, end = layer(one, begun[0], reset=reset, lengths=lengths)
    scale = torch.arange(1, y[0].numel() + 1).view(1, *y[0].shape).cos()
    ((y * scale).sum() + weigh(end)).backward()
    want = [None if p.grad is None else p.grad.clone() for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    own, after = wrapped(other, begun[1], reset=cut(reset), lengths=own_lengths(lengths, x.shape[1]))
    close(own, cut(y), dtype, "y")
    if last or not isinstance(wrapped, InTurns):
        close(after, end, dtype, "state")
    ((own * cut(scale)).sum() + (weigh(after) if last else 0)).backward()
    sum_gradients(layer.parameters())
    close(other.grad, cut(one.grad), dtype, "gradient of x")
    if dist.get_rank() == 0:
        got, asked = ([s.new_zeros(s.shape) if s.grad is None else s.grad for s in leaves(b)] for b in begun[::-1])
        close(got, asked, dtype, "gradient of the state")
    for (name, p), w in zip(layer.named_parameters(), want, strict=True):
        assert (p.grad is None) == (w is None), name
        if w is not None:
            close(p.grad, w, dtype, f"gradient of {name}")


def masks(kind: str) -> tuple[Tensor | None, Tensor | None]:
    if kind == "plain":
        return None, None
    reset = torch.rand(BATCH, STEPS) < 0.15
    return reset, torch.tensor([STEPS, 2, 7]) if kind == "ragged" else None


def check_layers(names: list[str], dtypes: list[torch.dtype]) -> None:
    for name, example in [(n, example) for n in names for example in layers[n].examples]:
        for dtype in dtypes:
            for kind in ("plain", "resets", "ragged"):
                torch.manual_seed(1)
                torch.set_default_dtype(dtype)
                layer = layers[name].cls(**example)
                x = torch.randn(BATCH, STEPS, layer.width)
                _, state = layer(torch.randn(BATCH, 5, layer.width))
                state = tree_map(Tensor.detach, state)
                try:
                    check_layer(layer, sequence_parallel(layer), x, state, *masks(kind))
                except Exception as error:
                    raise AssertionError(f"{name}, {example}, {dtype}, {kind}") from error
    torch.set_default_dtype(torch.float32)


def check_rest() -> None:
    check_ops()
    check_stack()
    check_in_turns()
    check_infinite()


def check_ops() -> None:
    """Every sample of the ops that is long enough, in float64."""
    count = 0
    for op in (linear_scan, outer_scan, selective_scan, delta_scan, dplr_scan):
        for call in op.samples("cpu", torch.float64):
            x = call.get("v", call.get("x"))
            steps, batch = x.shape[1], x.shape[0]
            if steps < dist.get_world_size() or not batch:
                continue
            along, mine, elsewhere = {"q", "k", "v", "beta", "x", "dt", "c", "reset"}, {}, False
            along |= {"a", "b"} if op is dplr_scan else {"b"} if op is selective_scan else set()
            for name, t in call.items():
                whole = x.ndim if op is linear_scan and name == "a" else 5 if name == "log_decay" else 0
                if isinstance(t, Tensor) and whole:  # may broadcast over time
                    elsewhere |= t.ndim == whole - 1 and t.shape[0] == steps
                    mine[name] = own_chunk(t) if t.ndim == whole and t.shape[1] == steps else t
                else:
                    mine[name] = own_chunk(t) if name in along and t is not None else t
            if elsewhere:
                continue
            if "lengths" in call:
                mine["lengths"] = own_lengths(call["lengths"], steps)
            y, end = op(**call)
            own, after = scan_across(op, Line(), **mine)
            close(own, own_chunk(y), torch.float64, f"{op.name} {[t.shape for t in leaves(tuple(call.values()))]}")
            close(after, end, torch.float64, op.name)
            count += 1
    assert count > 80, count


def check_stack() -> None:
    torch.manual_seed(2)
    model = Stack("mamba2,gla", width=16, depth=2).build(x_vocab=5, y_width=3)
    x = torch.randint(5, (2, STEPS))
    y, end = model(x)
    scale = torch.arange(1, y[0].numel() + 1).view(1, *y[0].shape).cos()
    (y * scale).sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own, after = sequence_parallel(model)(own_chunk(x))
    close(own, own_chunk(y), torch.float32, "y")
    close(after, end, torch.float32, "state")
    (own * own_chunk(scale)).sum().backward()
    sum_gradients(model.parameters())
    for name, p in model.named_parameters():
        if name in want:
            close(p.grad, want[name], torch.float32, f"gradient of {name}")


def check_in_turns() -> None:
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    for name in ("lstm", "lru"):
        layer = layers[name].cls(**layers[name].examples[0])
        _, state = layer(torch.randn(BATCH, 5, layer.width))
        x = torch.randn(BATCH, STEPS, layer.width)
        check_layer(layer, InTurns(layer), x, tree_map(Tensor.detach, state), *masks("resets"))
    torch.set_default_dtype(torch.float32)


def check_infinite() -> None:
    """An infinity in rank 0's chunk that a later reset clears is cleared; one that nothing clears goes on."""
    steps = 4 * dist.get_world_size()
    a, x, h0 = torch.full((2, steps, 1), 0.5), torch.zeros(2, steps, 1), torch.zeros(2, 1)
    x[:, 0] = torch.inf
    reset = torch.zeros(2, steps, dtype=torch.bool)
    reset[0, -2] = True
    with across_ranks(Line()):
        h, last = linear_scan(own_chunk(a), own_chunk(x), h0, reset=own_chunk(reset))
    assert last[0] == 0 and torch.isinf(last[1])
    if dist.get_rank() == dist.get_world_size() - 1:
        assert (h[0, -2:] == 0).all() and torch.isinf(h[1]).all()


def test_two_ranks():
    in_ranks(2, check_layers, ["lru", "gla", "mamba2", "gated_delta_net"], [torch.float64])


@pytest.mark.slow
def test_every_layer_in_both_precisions():
    in_ranks(2, check_layers, CUT, [torch.float64, torch.float32])


@pytest.mark.slow
def test_three_ranks():
    in_ranks(3, check_layers, CUT, [torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ops_models_turns_and_infinities(size):
    in_ranks(size, check_rest)


@pytest.mark.parametrize("name", [info.name for info in layers])
def test_a_state_that_goes_other_ways_is_refused(name):
    for example in layers[name].examples:
        layer = layers[name].cls(**example)
        with contextlib.nullcontext() if name in CUT else pytest.raises(UsageError, match="linear"):
            sequence_parallel(layer)


def test_composed_maps_are_the_map_of_the_whole():
    """Without processes: two ranks whose first did the same."""
    m, c = torch.rand(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    before, after = hand_on(Rehearsal(), torch.full((2, 3), torch.nan), m, c, dense=False)
    assert_close(before, c)
    assert_close(after, m * c + c)
