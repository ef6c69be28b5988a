"""Wrong input: one clear line, a UsageError, and the next good call answered as ever."""

from __future__ import annotations

import contextlib

import torch

from ...core import leaves, tree_map
from ..check import Skipped, check, no_numbers
from ..sample import BATCH, STEPS, Layer, inputs, refuses, same_bits


def no_ids(layer: Layer) -> str | None:
    return None if layer.vocab else "x holds numbers, not ids"


@check("input errors")
def check_refuses_rank(layer: Layer) -> None:
    """x with an axis too few or too many names its shape and the one that is due."""
    x, due = inputs(layer), "(B, T" + (")" if layer.vocab else ", D)")
    for bad in (x[0], x[None]):
        refuses(f"x of shape {tuple(bad.shape)}", [tuple(bad.shape), due], lambda bad=bad: layer(bad))  # type: ignore[misc]


@check("input errors", why_not=no_numbers)
def check_refuses_width(layer: Layer) -> None:
    """x of another width names the layer, the width that is due and the shape."""
    for width in (layer.width + 1, 0):
        x = torch.zeros(BATCH, STEPS, width, dtype=torch.float64)
        refuses(f"x of width {width}", [tuple(x.shape), layer.width], lambda x=x: layer(x))  # type: ignore[misc]


@check("input errors")
def check_refuses_state_batch(layer: Layer) -> None:
    """A state of another batch names both sizes."""
    if not leaves(layer.initial_state(1)):
        raise Skipped("the state has no leaves")
    refuses("a state of batch 4 with x of batch 3", [4, BATCH], lambda: layer(inputs(layer), layer.initial_state(4)))


@check("input errors")
def check_refuses_state_of_another_layer(layer: Layer) -> None:
    """A state of another structure, shape or dtype is refused and named."""
    x, first = inputs(layer), layer.initial_state(BATCH)
    refuses("a state with a leaf too many", ["leaves"], lambda: layer(x, (first, torch.zeros(BATCH, 1))))
    if not leaves(first):
        return
    longer = tree_map(lambda s: s.new_zeros(*s.shape, 2), first)
    refuses("a state with an axis too many", ["state"], lambda: layer(x, longer))
    narrow = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    other = tree_map(lambda s: s.to(narrow.get(s.dtype, torch.int8)), first)
    refuses("a state of another dtype", ["state"], lambda: layer(x, other))


@check("input errors", why_not=no_numbers)
def check_refuses_integers(layer: Layer) -> None:
    """Integers and bools where numbers are due are refused, and .float() proposed."""
    x = inputs(layer)
    for dtype in (torch.int64, torch.bool):
        refuses(f"x of dtype {dtype}", [dtype, ".float()"], lambda dtype=dtype: layer(x.to(dtype)))  # type: ignore[misc]


@check("input errors", why_not=no_numbers)
def check_refuses_complex(layer: Layer) -> None:
    """Complex numbers are refused rather than half dropped."""
    refuses("complex x", ["complex128"], lambda: layer(inputs(layer) + 0j))


@check("input errors", why_not=no_numbers)
def check_refuses_another_dtype(layer: Layer) -> None:
    """x in another precision than the parameters names both."""
    refuses("float32 x, float64 parameters", ["float32", "float64"], lambda: layer(inputs(layer).float()))


@check("input errors", why_not=no_ids)
def check_refuses_ids_out_of_range(layer: Layer) -> None:
    """An id below 0 or at the vocabulary's size names itself, its place and the range."""
    assert layer.vocab
    for bad in (-1, layer.vocab):
        x = inputs(layer)
        x[1, 4] = bad
        refuses(f"id {bad}", [bad, "row 1", "step 4", layer.vocab - 1], lambda x=x: layer(x))  # type: ignore[misc]


@check("input errors", why_not=no_ids)
def check_refuses_float_ids(layer: Layer) -> None:
    """Ids that are not integers are refused."""
    refuses("ids of dtype float32", ["float32"], lambda: layer(inputs(layer).float()))


@check("input errors")
def check_refuses_meta(layer: Layer) -> None:
    """x on the meta device is refused rather than answered with nothing."""
    refuses("x on the meta device", ["meta"], lambda: layer(inputs(layer).to("meta")))


@check("input errors")
def check_refuses_another_device(layer: Layer) -> None:
    """x on another device than the parameters names both."""
    if not torch.cuda.is_available():
        raise Skipped("one device only here")
    refuses("x on cuda, parameters on cpu", ["cuda", "cpu"], lambda: layer(inputs(layer).cuda()))


@check("input errors", why_not=no_numbers)
def check_refuses_sparse(layer: Layer) -> None:
    """Sparse x is refused, and to_dense() proposed."""
    refuses("sparse x", ["layout", "to_dense"], lambda: layer(inputs(layer).to_sparse()))


@check("input errors")
def check_refuses_what_is_no_tensor(layer: Layer) -> None:
    """Lists are refused where tensors are due."""
    x = inputs(layer)
    refuses("x as a list", ["list"], lambda: layer(x.tolist()))
    refuses("lengths as a list", ["lengths", "list"], lambda: layer(x, lengths=[STEPS, 0, 4]))


@check("input errors")
def check_refuses_lengths(layer: Layer) -> None:
    """Lengths beyond T, negative, fractional or of another batch name the row, or both shapes."""
    x = inputs(layer)
    for what, ends, parts in (
        ("beyond T", torch.tensor([STEPS, STEPS + 1, 0]), ["lengths[1]", STEPS + 1, STEPS]),
        ("negative", torch.tensor([STEPS, 0, -1]), ["lengths[2]", -1]),
        ("fractional", torch.tensor([1.0, 2.0, 3.0]), ["float32"]),
        ("of another batch", torch.tensor([STEPS, 0]), ["(2,)", f"({BATCH},)"]),
    ):
        refuses(f"lengths {what}", parts, lambda ends=ends: layer(x, lengths=ends))  # type: ignore[misc]


@check("input errors")
def check_refuses_reset_masks(layer: Layer) -> None:
    """A reset mask of another shape or dtype names both shapes."""
    x = inputs(layer)
    short, numbers = torch.zeros(BATCH, STEPS - 1, dtype=torch.bool), torch.zeros(BATCH, STEPS)
    parts = [tuple(short.shape), (BATCH, STEPS)] if layer.traits.resets else []
    refuses("a reset mask too short", parts, lambda: layer(x, reset=short))
    refuses("a reset mask of numbers", ["float32"] if layer.traits.resets else [], lambda: layer(x, reset=numbers))


@check("input errors")
def check_serves_after_an_error(layer: Layer) -> None:
    """After refused input the layer answers as before."""
    x = inputs(layer)
    want = layer(x)
    for bad in (lambda: layer(x[0]), lambda: layer(x, lengths=torch.tensor([-1, 0, 0])), lambda: layer(x.to("meta"))):
        with contextlib.suppress(Exception):  # whatever it raises: other checks look at that
            bad()
    same_bits(layer(x), want, "after refused input the layer gives another answer")
