"""Lengths: a padded batch is each of its rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core import chunked, leaves, past_end, select, unroll
from ..check import check, no_resets
from ..sample import BATCH, STEPS, Layer, acts_alike, close, close_gradients, inputs, mask, same_bits, trainable, warm

ENDS = (STEPS, 0, 4)  # all of T, nothing, something


def ends() -> Tensor:
    return torch.tensor(ENDS)


@check("lengths")
def check_lengths_are_rows_alone(layer: Layer) -> None:
    """The outputs of a row are those of its steps run alone."""
    x, first = inputs(layer), warm(layer)
    y = layer(x, first, lengths=ends())[0]
    for row, end in enumerate(ENDS):
        alone = layer(x[row : row + 1, :end], select(first, torch.tensor([row])))[0]
        close(y[row : row + 1, :end], alone, f"a row of length {end} in a padded batch is not that row alone")


@check("lengths")
def check_lengths_end_the_state(layer: Layer) -> None:
    """The last state of a row is the one at its end."""
    x, first = inputs(layer), warm(layer)
    last = layer(x, first, lengths=ends())[1]
    for row, end in enumerate(ENDS):
        alone = layer(x[row : row + 1, :end], select(first, torch.tensor([row])))[1]
        what = f"the state of a row of length {end} in a padded batch is not the one at its end"
        acts_alike(layer, select(last, torch.tensor([row])), alone, what)


@check("lengths")
def check_lengths_in_training(layer: Layer) -> None:
    """In training mode too, lengths (0 among them) give finite outputs, zero past the end."""
    y, last = layer.train()(inputs(layer), lengths=ends())
    for row, end in enumerate(ENDS):
        assert y[row, :end].isfinite().all(), f"in training mode a row of length {end} has outputs that are not finite"
        assert (y[row, end:] == 0).all(), f"in training mode a row of length {end} has outputs past its end"
    assert all(s.isfinite().all() for s in leaves(last)), "in training mode lengths leave a state that is not finite"


@check("lengths")
def check_lengths_without_state(layer: Layer) -> None:
    """Lengths hold from the initial state too."""
    x = inputs(layer)
    (y, last), (want, after) = layer(x, lengths=ends()), unroll(layer, x, lengths=ends())
    close(y, want, "with lengths forward is not step repeated")
    acts_alike(layer, last, after, "with lengths forward and step leave different states")


@check("lengths")
def check_lengths_zero_past_end(layer: Layer) -> None:
    """Outputs past the end are zero."""
    y = layer(inputs(layer), warm(layer), lengths=ends())[0]
    for row, end in enumerate(ENDS):
        assert not y[row, end:].abs().any(), f"row {row} ends at step {end}, yet y is not zero after"


@check("lengths")
def check_lengths_ignore_padding(layer: Layer) -> None:
    """What the padding holds, NaN included, does not matter."""
    x, first = inputs(layer), warm(layer)
    y, last = layer(x, first, lengths=ends())
    ended = past_end(ends(), STEPS)
    for what in ("other ids",) if layer.vocab else ("other numbers", "NaN", "inf"):
        other = inputs(layer, seed=8)
        if what in ("NaN", "inf"):
            other = torch.full_like(other, float(what))
        padded = torch.where(ended if layer.vocab else ended[..., None], other, x)
        got, after = layer(padded, first, lengths=ends())
        close(got, y, f"{what} in the padding changes the output")
        acts_alike(layer, after, last, f"{what} in the padding changes the state")


@check("lengths")
def check_lengths_give_no_gradient_to_padding(layer: Layer) -> None:
    """The gradient to the padding is zero, and finite elsewhere whatever the padding holds."""
    if layer.vocab:
        return
    x = inputs(layer).masked_fill(past_end(ends(), STEPS)[..., None], torch.nan).requires_grad_()
    y, last = layer(x, lengths=ends())
    probe = layer(inputs(layer, 2, seed=6), last)[0]
    (grad,) = torch.autograd.grad(y.sin().sum() + probe.sum(), x)
    for row, end in enumerate(ENDS):
        assert not grad[row, end:].nan_to_num(1.0).any(), f"a gradient reaches the padding of row {row}"
    assert grad.isfinite().all(), "NaN in the padding reaches the gradient of real steps"
    for p in layer.parameters():
        if p.requires_grad:
            (g,) = torch.autograd.grad(layer(x, lengths=ends())[0].sum(), p, allow_unused=True)
            assert g is None or g.isfinite().all(), "NaN in the padding reaches the gradient of a parameter"


@check("lengths")
def check_lengths_full(layer: Layer) -> None:
    """Lengths of T change nothing."""
    x, first = inputs(layer), warm(layer)
    (y, last), (want, after) = layer(x, first, lengths=torch.full((BATCH,), STEPS)), layer(x, first)
    close(y, want, "lengths of T change the output")
    acts_alike(layer, last, after, "lengths of T change the state")


@check("lengths")
def check_lengths_all_zero(layer: Layer) -> None:
    """Lengths of 0 give zeros and leave the state as it was."""
    first = warm(layer)
    y, last = layer(inputs(layer), first, lengths=torch.zeros(BATCH, dtype=torch.int64))
    assert y.shape == (BATCH, STEPS, layer.out_width), f"lengths of 0 give y of shape {tuple(y.shape)}"
    assert not y.abs().any(), "lengths of 0 give outputs that are not zero"
    acts_alike(layer, last, first, "lengths of 0 change the state")


@check("lengths")
def check_lengths_of_no_steps(layer: Layer) -> None:
    """T = 0 with lengths is legal."""
    first = warm(layer)
    y, last = layer(inputs(layer, 0), first, lengths=torch.zeros(BATCH, dtype=torch.int64))
    assert y.shape == (BATCH, 0, layer.out_width), f"T = 0 with lengths gives y of shape {tuple(y.shape)}"
    same_bits(last, first, "T = 0 with lengths changes the state")


@check("lengths")
def check_lengths_int32(layer: Layer) -> None:
    """Lengths may be int32."""
    x = inputs(layer)
    close(layer(x, lengths=ends().int())[0], layer(x, lengths=ends())[0], "int32 lengths change the output")


@check("lengths")
def check_lengths_in_chunks(layer: Layer) -> None:
    """Rows may end in, before and after a chunk."""
    x, first = inputs(layer), warm(layer)
    y, last = layer(x, first, lengths=ends())
    for sizes in ([3, 4], [4, 3], [1] * STEPS, [0, 5, 2]):
        got, after = chunked(layer, x, sizes, first, lengths=ends())
        close(got, y, f"with lengths chunks {sizes} change the output")
        acts_alike(layer, after, last, f"with lengths chunks {sizes} change the state")


@check("lengths", why_not=no_resets)
def check_lengths_with_reset(layer: Layer) -> None:
    """Lengths and resets hold together; a reset past the end is none."""
    x, first, reset = inputs(layer), warm(layer), mask(STEPS, (0, 3), (1, 0), (1, 2), (2, 2), (2, 5))
    y, last = layer(x, first, reset=reset, lengths=ends())
    for row, end in enumerate(ENDS):
        one, span = slice(row, row + 1), slice(0, end)
        alone, after = layer(x[one, span], select(first, torch.tensor([row])), reset=reset[one, span])
        close(y[one, span], alone, f"with resets a row of length {end} is not that row alone")
        what = f"with resets the state of a row of length {end} is not the one at its end"
        acts_alike(layer, select(last, torch.tensor([row])), after, what)


@check("lengths")
def check_lengths_gradient_of_last_state(layer: Layer) -> None:
    """The last state of a short row carries the gradient of its own steps and of the given state."""
    first = trainable(warm(layer))
    wrt = [s for s in leaves(first) if s.requires_grad]

    def grads(run: Callable[[Tensor], Any]) -> tuple[Tensor | None, ...]:
        x = inputs(layer)
        if not layer.vocab:
            x.requires_grad_()
        loss = layer(inputs(layer, 2, seed=6), run(x))[0].sin().sum()
        over = [*wrt, *([] if layer.vocab else [x])]
        return torch.autograd.grad(loss, over, allow_unused=True) if loss.requires_grad and over else ()

    got = grads(lambda x: layer(x, first, lengths=ends())[1])
    want = grads(lambda x: unroll(layer, x, first, lengths=ends())[1])
    for g, w in zip(got, want, strict=True):
        what = "through the last state of padded rows the gradient is not that of step repeated"
        close_gradients(g, w, what)
