"""Time: one recurrence however it is run, nothing from the future, and nothing from before a reset."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch

from ...core import chunked, leaves, select, tree_map, unroll
from ..check import check, no_resets
from ..sample import BATCH, STEPS, Layer, acts_alike, close, inputs, mask, same_bits, trainable, warm


@check("time")
def check_forward_is_unrolled_step(layer: Layer) -> None:
    """forward gives the outputs of step, T times."""
    x = inputs(layer)
    close(layer(x)[0], unroll(layer, x)[0], "forward is not step repeated")


@check("time")
def check_last_state_is_unrolled_step(layer: Layer) -> None:
    """forward leaves the state that step, T times, leaves."""
    x = inputs(layer)
    acts_alike(layer, layer(x)[1], unroll(layer, x)[1], "forward and step leave different states")


@check("time")
def check_given_state_is_used(layer: Layer) -> None:
    """forward continues from the state it is given, as step does."""
    x, first = inputs(layer), warm(layer)
    (y, last), (want, after) = layer(x, first), unroll(layer, x, first)
    close(y, want, "from a given state forward is not step repeated")
    acts_alike(layer, last, after, "from a given state forward and step leave different states")


@check("time")
def check_long_is_unrolled_step(layer: Layer) -> None:
    """forward is step repeated over 130 steps too, past the usual block sizes."""
    x, first = inputs(layer, 130, 2), warm(layer, 2)
    with torch.no_grad():
        (y, last), (want, after) = layer(x, first), unroll(layer, x, first)
        close(y, want, "over 130 steps forward is not step repeated")
        acts_alike(layer, last, after, "after 130 steps forward and step leave different states")


@check("time")
def check_one_step(layer: Layer) -> None:
    """T = 1 is one step."""
    x, first = inputs(layer, 1), warm(layer)
    (y, last), (want, after) = layer(x, first), layer.step(x[:, 0], first)
    close(y[:, 0], want, "forward on one step is not step")
    acts_alike(layer, last, after, "forward on one step leaves another state than step")


@check("time")
def check_no_steps(layer: Layer) -> None:
    """T = 0 gives no outputs and the same bits of state."""
    first = warm(layer)
    y, last = layer(inputs(layer, 0), first)
    assert y.shape == (BATCH, 0, layer.out_width), f"T = 0 gives y of shape {tuple(y.shape)}"
    same_bits(last, first, "T = 0 changes the state")
    same_bits(layer(inputs(layer, 0))[1], layer.initial_state(BATCH), "T = 0 without a state is not the initial state")


@check("time")
def check_y_dtype(layer: Layer) -> None:
    """y has the same dtype at T = 0, at T > 0 and from step."""
    x = inputs(layer)
    dtypes = {"T = 0": layer(x[:, :0])[0].dtype, "T = 7": layer(x)[0].dtype}
    dtypes["step"] = layer.step(x[:, 0], layer.initial_state(BATCH))[0].dtype
    assert len(set(dtypes.values())) == 1, f"the dtype of y differs: {dtypes}"


@check("time")
def check_chunks(layer: Layer) -> None:
    """Cutting time into chunks changes neither outputs nor the last state."""
    x, first = inputs(layer, 11), warm(layer)
    y, last = layer(x, first)
    for sizes in ([1] * 11, [4, 4, 3], [1, 9, 1], [10, 1]):
        got, after = chunked(layer, x, sizes, first)
        close(got, y, f"chunks {sizes} change the output")
        acts_alike(layer, after, last, f"chunks {sizes} change the last state")


@check("time")
def check_empty_chunks(layer: Layer) -> None:
    """Chunks of no steps change nothing, wherever they stand."""
    x = inputs(layer, 11)
    y, last = layer(x)
    for sizes in ([0, 11], [11, 0], [0, 5, 0, 0, 6, 0]):
        got, after = chunked(layer, x, sizes)
        close(got, y, f"chunks {sizes} change the output")
        acts_alike(layer, after, last, f"chunks {sizes} change the last state")


@check("time")
def check_random_cuts(layer: Layer) -> None:
    """Any cut of time gives the same."""
    x, rng = inputs(layer, 40, 2), random.Random(0)
    with torch.no_grad():
        y, last = layer(x)
        for _ in range(5):
            cuts = sorted([0, 40, *rng.choices(range(41), k=rng.randint(1, 6))])
            sizes = [b - a for a, b in itertools.pairwise(cuts)]
            got, after = chunked(layer, x, sizes)
            close(got, y, f"chunks {sizes} change the output")
            acts_alike(layer, after, last, f"chunks {sizes} change the last state")


@check("time")
def check_prefill_then_steps(layer: Layer) -> None:
    """A prefix by forward, the rest by step: what decoding does."""
    x = inputs(layer)
    y, last = layer(x)
    head, state = layer(x[:, :4])
    tail, after = unroll(layer, x[:, 4:], state)
    close(torch.cat([head, tail], 1), y, "forward on a prefix, then step, is not forward")
    acts_alike(layer, after, last, "forward on a prefix, then step, leaves another state")


@check("time")
def check_causal(layer: Layer) -> None:
    """y at t does not depend on x after t."""
    x = inputs(layer)
    y = layer(x)[0]
    other = inputs(layer, seed=7) if layer.vocab else 1e3 * inputs(layer, seed=7)
    for t in range(1, STEPS):
        changed = torch.cat([x[:, :t], other[:, t:]], 1)
        close(layer(changed)[0][:, :t], y[:, :t], f"x from step {t} on reaches back to earlier outputs")


@check("time")
def check_causal_gradient(layer: Layer) -> None:
    """No gradient flows from y at t to x after t."""
    if layer.vocab:
        return
    x = inputs(layer).requires_grad_()
    y = layer(x)[0]
    for t in (1, 4, STEPS - 1):
        (grad,) = torch.autograd.grad(y[:, :t].sin().sum(), x, retain_graph=True)
        worst = grad[:, t:].abs().max().item()
        assert worst <= 1e-12, f"a gradient of {worst:.2g} flows from outputs before step {t} to inputs from it on"


@check("time", why_not=no_resets)
def check_reset_is_fresh_start(layer: Layer) -> None:
    """After a reset, outputs and state are those of a sequence that begins there."""
    x, first, cut = inputs(layer, 9), warm(layer), 4
    y, last = layer(x, first, reset=mask(9, (1, cut)))
    alone, after = layer(x[1:2, cut:])
    close(y[1:2, cut:], alone, "after a reset the outputs are not those of a fresh start")
    acts_alike(layer, select(last, torch.tensor([1])), after, "after a reset the state is not that of a fresh start")


@check("time", why_not=no_resets)
def check_reset_keeps_the_past_before_it(layer: Layer) -> None:
    """Outputs before a reset are as they would be without."""
    x, first = inputs(layer, 9), warm(layer)
    close(layer(x, first, reset=mask(9, (1, 4)))[0][1, :4], layer(x, first)[0][1, :4], "a reset reaches back in time")


@check("time", why_not=no_resets)
def check_reset_spares_other_rows(layer: Layer) -> None:
    """A reset in one row leaves the others alone."""
    x, first, keep = inputs(layer, 9), warm(layer), torch.tensor([0, 2])
    (y, last), (want, after) = layer(x, first, reset=mask(9, (1, 4))), layer(x, first)
    close(y[keep], want[keep], "a reset in row 1 changed another row's output")
    acts_alike(layer, select(last, keep), select(after, keep), "a reset in row 1 changed another row's state")


@check("time", why_not=no_resets)
def check_reset_at_start(layer: Layer) -> None:
    """A reset at the first step forgets the given state."""
    x, first = inputs(layer), warm(layer)
    y, last = layer(x, first, reset=mask(STEPS, (0, 0), (1, 0), (2, 0)))
    want, after = layer(x)
    close(y, want, "a reset at step 0 does not forget the given state")
    acts_alike(layer, last, after, "a reset at step 0 leaves another state than a fresh start")


@check("time", why_not=no_resets)
def check_reset_at_end(layer: Layer) -> None:
    """A reset at the last step leaves a state that has seen that step alone."""
    x, first = inputs(layer), warm(layer)
    _, last = layer(x, first, reset=mask(STEPS, *((row, STEPS - 1) for row in range(BATCH))))
    acts_alike(layer, last, layer(x[:, -1:])[1], "after a reset at the last step the past is still in the state")


@check("time", why_not=no_resets)
def check_resets_of_many_rows(layer: Layer) -> None:
    """Several resets, at different steps of different rows, are those of step repeated."""
    x, first = inputs(layer, 9), warm(layer)
    reset = mask(9, (0, 2), (0, 3), (0, 7), (1, 0), (2, 5), (2, 8))
    (y, last), (want, after) = layer(x, first, reset=reset), unroll(layer, x, first, reset=reset)
    close(y, want, "with resets forward is not step repeated")
    acts_alike(layer, last, after, "with resets forward and step leave different states")


@check("time", why_not=no_resets)
def check_reset_at_every_step(layer: Layer) -> None:
    """Reset everywhere, every step is a first step."""
    x = inputs(layer)
    y = layer(x, warm(layer), reset=torch.ones(BATCH, STEPS, dtype=torch.bool))[0]
    for t in range(STEPS):
        want = layer.step(x[:, t], layer.initial_state(BATCH))[0]
        close(y[:, t], want, f"reset at every step, step {t} is not a first step")


@check("time", why_not=no_resets)
def check_reset_nowhere(layer: Layer) -> None:
    """A mask that is nowhere True changes nothing."""
    x, first = inputs(layer), warm(layer)
    (y, last), (want, after) = layer(x, first, reset=mask(STEPS)), layer(x, first)
    close(y, want, "a mask without resets changes the output")
    acts_alike(layer, last, after, "a mask without resets changes the state")


@check("time", why_not=no_resets)
def check_reset_in_chunks(layer: Layer) -> None:
    """Resets at the first and last step of chunks are resets."""
    x, first, reset = inputs(layer, 9), warm(layer), mask(9, (0, 4), (1, 3), (2, 8))
    y, last = layer(x, first, reset=reset)
    for sizes in ([4, 5], [1] * 9, [0, 4, 0, 5]):
        got, after = chunked(layer, x, sizes, first, reset=reset)
        close(got, y, f"with resets chunks {sizes} change the output")
        acts_alike(layer, after, last, f"with resets chunks {sizes} change the state")


@check("time", why_not=no_resets)
def check_reset_cuts_gradient(layer: Layer) -> None:
    """No gradient crosses a reset: it is exactly zero to earlier inputs and to the given state."""
    cut, first = 4, trainable(warm(layer))
    x = inputs(layer, 9)
    wrt = [s for s in leaves(first) if s.requires_grad]
    if not layer.vocab:
        wrt.append(x.requires_grad_())
    if not wrt:
        return
    y, last = layer(x, first, reset=mask(9, *((row, cut) for row in range(BATCH))))
    loss = y[:, cut:].sin().sum() + layer(inputs(layer, 2, seed=6), last)[0].sum()
    if not loss.requires_grad:
        return
    for w, grad in zip(wrt, torch.autograd.grad(loss, wrt, allow_unused=True), strict=True):
        if grad is not None:
            past = grad[:, :cut] if w is x else grad
            assert not past.abs().any(), f"a gradient of {past.abs().max().item():.2g} crosses the reset"


@check("time", why_not=no_resets)
def check_reset_clears_nan(layer: Layer) -> None:
    """A state gone NaN does not survive a reset."""
    first = warm(layer)
    x = inputs(layer, 9)
    y, last = layer(x, _all_nan(first), reset=mask(9, *((row, 4) for row in range(BATCH))))
    want, after = layer(x, first, reset=mask(9, *((row, 4) for row in range(BATCH))))
    close(y[:, 4:], want[:, 4:], "NaN in the state survives a reset")
    acts_alike(layer, last, after, "NaN in the state survives a reset, inside the last state")


def _all_nan(state: Any) -> Any:
    return tree_map(lambda s: s * torch.nan if s.is_floating_point() or s.is_complex() else s, state)
