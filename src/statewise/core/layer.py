"""The protocol that every recurrent layer obeys, and the template that most of them use.

Letters, here and everywhere: B batch, T time, D width of the input, E width of the output, N state, H heads,
K/V key and value size, W window, P taps. Axis order: batch, time, heads, channels.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .errors import UsageError
from .state import join, leaves, names, select, tree_map, where

if TYPE_CHECKING:
    import jaxtyping

S = TypeVar("S")


@dataclass(frozen=True)
class Traits:
    """What is true of a layer beyond the protocol. Each flag is a claim that the conformance suite tries."""

    linear_in_input: bool = False  # from the zero state, y(u + v) = y(u) + y(v)
    time_invariant: bool = False  # from the zero state, delaying the input delays the output
    resets: bool = True  # honours the reset mask; a layer that does not must raise UsageError


class RecurrentLayer(nn.Module, abc.ABC, Generic[S]):
    """A causal map (x, state) -> (y, state). Batch is dim 0 of everything, time is dim 1 of x and y.

    A state is a tensor, None, tuple or NamedTuple of states: batch first in every leaf, float32 or wider where it is
    floating, and closed: the same shapes and dtypes go in and come out.
    """

    traits: Traits = Traits()
    width: int  # of x
    out_width: int  # of y
    vocab: int | None = None  # where set, x holds ids in [0, vocab) and has no width axis

    @abc.abstractmethod
    def initial_state(self, batch: int) -> S:
        """The state before the first step, on the parameters' device."""

    @abc.abstractmethod
    def forward(
        self, x: Tensor, state: S | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, S]:
        """x (B, T, D)  ->  y (B, T, E) and the state after the last step. T = 0 and B = 0 are legal.

        reset (B, T) bool: forget the past just before t. Past a row's end it means nothing.
        lengths (B,) int: row b ends after lengths[b] steps; y is zero from there on, the state is the one at the end.

        Raises UsageError for shapes, dtypes, devices, states or lengths that do not fit.
        """

    @abc.abstractmethod
    def step(self, x: Tensor, state: S) -> tuple[Tensor, S]:
        """x (B, D) -> y (B, E) and the next state. Pure: leaves both arguments as they were."""


WRONG_CALL = (RuntimeError, TypeError, IndexError, AttributeError, UsageError)  # what wrong arguments end in


class Cell(RecurrentLayer[S]):
    """The template: write `transition`, and encode and decode if they are wanted.

    encode and decode act on each time alone; transition is the recurrence; scan is the recurrence over T.
    forward and step share encode, transition and decode, so they can differ only where a subclass replaces
    scan by something faster, and the conformance suite compares the two.
    """

    def encode(self, x: Tensor) -> Any:
        """x (..., D) -> a tree of (..., *): what enters the recurrence."""
        return x

    @abc.abstractmethod
    def transition(self, u: Any, state: S) -> tuple[Any, S]:
        """One step: u at t and the state before t -> o at t and the state after t. Pure."""

    def decode(self, o: Any, x: Tensor) -> Tensor:
        """o (..., *) and the layer's input x (..., D) -> y (..., E)."""
        return o

    def scan(self, u: Any, state: S, reset: Tensor | None, lengths: Tensor | None) -> tuple[Any, S]:
        """transition over dim 1 of u, T >= 1. Override with an op call that gives the same, faster."""
        outs = []
        for t in range(_steps(u)):
            before = state if reset is None else where(reset[:, t], self.initial_state(len(reset)), state)
            o, new = _both(self, self.transition(tree_map(lambda leaf: leaf[:, t], u), before))  # noqa: B023
            if t == 0:
                _check_closed(self, before, new)
            state = new if lengths is None else where(t < lengths, new, state)
            outs.append(o)
        return tree_map(lambda *leaf: torch.stack(leaf, 1), *outs), state

    def forward(
        self, x: Tensor, state: S | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, S]:
        check_input(self, x, state, reset, lengths)
        state = self.initial_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return torch.zeros(x.shape[0], 0, self.out_width, dtype=y_dtype(self, x), device=x.device), state
        if lengths is None:
            o, state = self.scan(self.encode(x), state, reset, None)
            return self.decode(o, x), state
        lengths = lengths.to(x.device)
        x = clear_past_end(x, lengths)  # whatever the padding holds, no gradient meets it
        o, state = self.scan(self.encode(x), state, reset, lengths)
        return clear_past_end(self.decode(o, x), lengths), state

    def step(self, x: Tensor, state: S) -> tuple[Tensor, S]:
        try:
            o, after = _both(self, self.transition(self.encode(x), state))
            return self.decode(o, x), after
        except WRONG_CALL:
            check_step(self, x, state)
            raise


def ragged(
    run: Callable[[Tensor, S, Tensor | None], tuple[Tensor, S]],
    x: Tensor,
    state: S,
    reset: Tensor | None,
    lengths: Tensor,
) -> tuple[Tensor, S]:
    """lengths for a forward that knows of none: cut time at every length and let finished rows rest.

    run(x, state, reset) -> (y, state) must be a forward without lengths; it meets B = 0 and T = 0.
    Costs one call of run per distinct length, and reads the lengths on the host.
    """
    lengths = lengths.to(x.device)
    alive, pieces, start = torch.arange(x.shape[0], device=x.device), [], 0
    rows, states = [], []
    for end in sorted({0, *lengths.tolist(), x.shape[1]}):
        if end > start or x.shape[1] == 0:
            y, state = run(x[alive, start:end], state, None if reset is None else reset[alive, start:end])
            pieces.append(y.new_zeros(x.shape[0], *y.shape[1:]).index_copy(0, alive, y))
        done = lengths[alive] <= end
        rows.append(alive[done])
        states.append(select(state, done.nonzero()[:, 0]))
        state, alive, start = select(state, (~done).nonzero()[:, 0]), alive[~done], end
    return torch.cat(pieces, 1), select(join(states), torch.cat(rows).argsort())


def past_end(lengths: jaxtyping.Int[Tensor, " B"], steps: int) -> jaxtyping.Bool[Tensor, "B {steps}"]:
    """(B,) lengths -> (B, T) bool, True where the row has ended."""
    return torch.arange(steps, device=lengths.device) >= lengths[:, None]


def clear_past_end(
    y: jaxtyping.Shaped[Tensor, "B T *rest"], lengths: jaxtyping.Int[Tensor, " B"]
) -> jaxtyping.Shaped[Tensor, "B T *rest"]:
    """y (B, T, ...) with zeros where the row has ended."""
    ended = past_end(lengths, y.shape[1])
    return y.masked_fill(ended.view(*ended.shape, *[1] * (y.ndim - 2)), 0)


def weight_of(layer: nn.Module) -> Tensor | None:
    """The first floating parameter or buffer: it tells the dtype and the device that a layer works in."""
    both = itertools.chain(layer.parameters(), layer.buffers())
    return next((w for w in both if w.is_floating_point() or w.is_complex()), None)


def y_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of y: that of x where it is floating (autocast included), else that of the parameters."""
    weight = weight_of(layer)
    return x.dtype if weight is None or x.is_floating_point() else weight.dtype


def check_input(
    layer: RecurrentLayer[Any], x: Tensor, state: Any, reset: Tensor | None, lengths: Tensor | None
) -> None:
    """Refuse with one clear line what forward cannot take. Values are read only where metadata cannot tell."""
    name = type(layer).__name__
    for what, given in (("x", x), ("reset", reset), ("lengths", lengths)):
        if not (isinstance(given, Tensor) or (given is None and what != "x")):
            raise UsageError(f"{name}: {what} is a {type(given).__name__}; expected a tensor")
    if x.layout != torch.strided or x.is_quantized:
        raise UsageError(f"{name}: x has layout {x.layout}; expected a dense tensor: x.to_dense() or x.dequantize()")
    shape, looks = tuple(x.shape), "(B, T)" if layer.vocab else "(B, T, D)"
    if x.ndim != len(looks.split(",")):
        raise UsageError(f"{name}: x has shape {shape}; expected {looks}")
    if layer.vocab:
        _check_ids(name, x, layer.vocab)
    else:
        if x.shape[-1] != layer.width:
            raise UsageError(f"{name}: x has shape {shape}; expected a last dimension of {layer.width}")
        if not x.is_floating_point():
            hint = "the layer is real" if x.is_complex() else "convert with x.float()"
            raise UsageError(f"{name}: x has dtype {x.dtype}; expected floating point: {hint}")
    weight = weight_of(layer)
    if weight is not None:
        if x.is_meta and not weight.is_meta:
            raise UsageError(f"{name}: x is on the meta device and holds no values")
        if x.device != weight.device:
            raise UsageError(f"{name}: x is on {x.device}, the parameters on {weight.device}; move one of them")
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.is_floating_point() and x.dtype != weight.dtype and not (autocast or weight.is_complex()):
            raise UsageError(f"{name}: x has dtype {x.dtype}, the parameters {weight.dtype}; convert one of them")
    if state is not None:
        _check_state(name, layer, state, x.shape[0])
    if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        raise UsageError(f"{name}: reset is {reset.dtype} {tuple(reset.shape)}; expected bool {tuple(x.shape[:2])}")
    if reset is not None and reset.device != x.device:
        raise UsageError(f"{name}: reset is on {reset.device}, x on {x.device}; move one of them")
    if lengths is not None:
        _check_lengths(name, x, lengths)


def check_step(layer: RecurrentLayer[Any], x: Tensor, state: Any) -> None:
    """Refuse with one clear line what step could not take. Called where it failed: a check costs as much as a step."""
    name = type(layer).__name__
    if isinstance(x, Tensor) and x.ndim != (1 if layer.vocab else 2):
        looks = "(B,)" if layer.vocab else "(B, D)"
        raise UsageError(f"{name}: x has shape {tuple(x.shape)}; expected {looks}, one time of all rows")
    if state is None:
        raise UsageError(f"{name}: step needs a state; begin with initial_state({len(x)})")
    check_input(layer, x[:, None] if isinstance(x, Tensor) else x, state, None, None)


def _both(layer: RecurrentLayer[Any], made: Any) -> Any:
    """What transition returned, which a batch of two rows would be taken for."""
    if isinstance(made, Tensor):
        raise UsageError(f"{type(layer).__name__}: transition returns one tensor; expected two things, o and the state")
    return made


def _check_closed(layer: RecurrentLayer[Any], before: Any, after: Any) -> None:
    """Refuse a transition that changes the kind of the state: its leaves or their shapes."""
    was, now = ({n: tuple(t.shape) for n, t in zip(names(s), leaves(s), strict=True)} for s in (before, after))
    if was != now:
        raise UsageError(f"{type(layer).__name__}: transition makes a state of {now} out of one of {was}")


def _check_ids(name: str, x: Tensor, vocab: int) -> None:
    if x.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"{name}: ids have dtype {x.dtype}; expected int64 or int32")
    if torch.compiler.is_compiling() or x.is_meta or not x.numel():
        return
    if x.min() < 0 or x.max() >= vocab:
        row, t = ((x < 0) | (x >= vocab)).nonzero()[0].tolist()
        raise UsageError(f"{name}: id {int(x[row, t])} at row {row}, step {t}; expected 0 to {vocab - 1}")


def _check_state(name: str, layer: RecurrentLayer[Any], state: Any, batch: int) -> None:
    want = layer.initial_state(0)
    if names(state) != names(want):
        raise UsageError(f"{name}: the state has leaves {names(state)}; expected {names(want)}: it is another layer's")
    for leaf, like, got in zip(names(want), leaves(want), leaves(state), strict=True):
        if got.shape[1:] != like.shape[1:] or got.dtype != like.dtype:
            raise UsageError(
                f"{name}: state leaf {leaf!r} is {got.dtype} (B, {', '.join(map(str, got.shape[1:]))}); expected "
                f"{like.dtype} (B, {', '.join(map(str, like.shape[1:]))}): it is another layer's"
            )
        if got.shape[0] != batch:
            raise UsageError(f"{name}: state leaf {leaf!r} has batch {got.shape[0]}, x has batch {batch}")
        if got.device != like.device:
            raise UsageError(f"{name}: state leaf {leaf!r} is on {got.device}, the parameters on {like.device}")


def _check_lengths(name: str, x: Tensor, lengths: Tensor) -> None:
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != x.shape[:1]:
        shape = tuple(lengths.shape)
        raise UsageError(f"{name}: lengths is {lengths.dtype} {shape}; expected integers of shape ({x.shape[0]},)")
    if torch.compiler.is_compiling() or lengths.is_meta:
        return
    bad = ((lengths < 0) | (lengths > x.shape[1])).nonzero()[:, 0].tolist()
    if bad:
        raise UsageError(f"{name}: lengths[{bad[0]}] is {int(lengths[bad[0]])}; expected 0 to T = {x.shape[1]}")


def check_sizes(name: str, **sizes: int) -> None:
    """Refuse sizes below 1, for constructors. Raises UsageError with the argument and the value."""
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"{name}: {argument} is {size!r}; expected a whole number of at least 1")


def _steps(tree: Any) -> int:
    return int(leaves(tree)[0].shape[1])
