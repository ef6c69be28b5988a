"""Against the collapse of states beyond the training length, at inference (Chen et al. 2024, arXiv:2410.07145):
forget more or insert less, hold the norm of the state, read a sliding window of it."""

from __future__ import annotations

import abc
import copy
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import RecurrentLayer, Traits, UsageError, check_input, join, select, where
from ..core.layer import ragged, y_dtype
from ..ops import Op
from .memory import by_heads, carried, intercept, memory_leaf, memory_of, scaled, with_memory

Layer = RecurrentLayer[Any]


class Forgetful(RecurrentLayer[Any]):
    """S_t = A_t^decay S_{t-1} + insert U_t, where the layer within has S_t = A_t S_{t-1} + U_t.

    decay multiplies the logarithm of the decay (above 1: forget more), insert what is written (below 1: insert less).
    Of a delta rule the written part is beta, which also says how much of the old value goes. The state is the layer's.
    Raises UsageError for a layer without a linear memory, decay on one without a decay, numbers that are not positive.
    """

    def __init__(self, inner: Layer, *, decay: float = 1.0, insert: float = 1.0):
        super().__init__()
        for name, value in (("decay", decay), ("insert", insert)):
            if not 0 < value < math.inf:
                raise UsageError(f"Forgetful: {name} is {value!r}; expected a number above 0")
        memory = memory_of(inner)
        if decay != 1 and not memory.decays:
            raise UsageError(f"Forgetful: {type(inner).__name__} has no decay to scale; scale what it inserts")
        self.width, self.out_width, self.traits = inner.width, inner.out_width, Traits(resets=inner.traits.resets)
        self.inner, self.decay, self.insert = inner, decay, insert

    def initial_state(self, batch: int) -> Any:
        return self.inner.initial_state(batch)

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        with intercept(lambda op, given: op(**scaled(op, given, decay=self.decay, insert=self.insert))):
            found: tuple[Tensor, Any] = self.inner(x, state, reset=reset, lengths=lengths)
        return found

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return _one(self, x, state)


class PartState(NamedTuple):
    """Of a layer whose time is cut into parts, counted from the first step of the stream."""

    inner: Any
    parts: Tensor | None  # (B, n, ...) what the last n parts wrote, the present one last
    phase: Tensor  # (B,) int64 steps since the present part began


class InParts(RecurrentLayer[PartState], abc.ABC):
    """A layer within, and something done to its memory after every `every` steps of a stream."""

    def __init__(self, inner: Layer, *, every: int):
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"{type(self).__name__}: every is {every!r}; expected a whole number of at least 1")
        self.width, self.out_width, self.traits = inner.width, inner.out_width, Traits(resets=inner.traits.resets)
        self.inner, self.every, self.memory = inner, every, memory_of(inner)

    @abc.abstractmethod
    def run(self, x: Tensor, state: PartState) -> tuple[Tensor, Any, Tensor | None]:
        """Steps within one part -> y, the state within, the parts."""

    @abc.abstractmethod
    def turn(self, inner: Any, parts: Tensor | None) -> tuple[Any, Tensor | None]:
        """What happens where a part ends."""

    def initial_state(self, batch: int) -> PartState:
        inner = self.inner.initial_state(batch)
        return PartState(
            inner, None, torch.zeros(batch, dtype=torch.int64, device=memory_leaf(inner, self.memory).device)
        )

    def forward(
        self, x: Tensor, state: PartState | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, PartState]:
        check_input(self, x, state, reset, lengths)
        state = self.initial_state(x.shape[0]) if state is None else state
        if lengths is not None:
            return ragged(lambda *given: self(*given[:2], reset=given[2]), x, state, reset, lengths)
        if x.shape[1] == 0 or x.shape[0] == 0:
            return torch.zeros(*x.shape[:2], self.out_width, dtype=y_dtype(self, x), device=x.device), state
        if reset is not None and reset.any():
            return self._fresh_at(x, state, reset)
        phases = state.phase.unique().tolist()
        if len(phases) == 1:
            return self._in_step(x, state, phases[0])
        rows = [(state.phase == phase).nonzero()[:, 0] for phase in phases]
        found = [self._in_step(x[r], select(state, r), phase) for r, phase in zip(rows, phases, strict=True)]
        back = torch.cat(rows).argsort()
        return torch.cat([y for y, _ in found])[back], select(join([after for _, after in found]), back)

    def _fresh_at(self, x: Tensor, state: PartState, reset: Tensor) -> tuple[Tensor, PartState]:
        """A row that forgets begins its parts anew: cut time wherever one does."""
        if not self.traits.resets:
            raise UsageError(f"{type(self.inner).__name__} cannot reset inside a sequence")
        cuts, ys = sorted({0, *reset.any(0).nonzero()[:, 0].tolist(), x.shape[1]}), []
        for start, end in itertools.pairwise(cuts):
            state = where(reset[:, start], self.initial_state(len(x)), state)
            y, state = self(x[:, start:end], state)
            ys.append(y)
        return torch.cat(ys, 1), state

    def _in_step(self, x: Tensor, state: PartState, phase: int) -> tuple[Tensor, PartState]:
        """All rows are equally far into the present part."""
        ys, start = [], 0
        while start < x.shape[1]:
            size = min(self.every - phase, x.shape[1] - start)
            y, inner, parts = self.run(x[:, start : start + size], state)
            ys.append(y)
            start, phase = start + size, (phase + size) % self.every
            if phase == 0:
                inner, parts = self.turn(inner, parts)
            state = PartState(inner, parts, torch.full_like(state.phase, phase))
        return torch.cat(ys, 1), state

    def step(self, x: Tensor, state: PartState) -> tuple[Tensor, PartState]:
        return _one(self, x, state)


class Clipped(InParts):
    """After every `every` steps S <- S min(1, bound / |S|), head by head (Frobenius norm).

    bound: one number or one for each head (H,). The recurrence is then no longer linear in its state.
    Raises UsageError for a layer without a linear memory, a bound that is not positive or not of its heads.
    """

    bound: Tensor

    def __init__(self, inner: Layer, *, bound: float | Tensor, every: int = 64):
        super().__init__(inner, every=every)
        bound = torch.as_tensor(bound, dtype=torch.float32, device=next(inner.parameters()).device)
        heads = self.memory.shape[0] if len(self.memory.shape) >= 3 else 1
        if bound.ndim > 1 or (bound.ndim and len(bound) != heads) or not bool((bound > 0).all()):
            raise UsageError(
                f"Clipped: bound {bound.tolist()}; expected one number above 0, or one for each of {heads}"
            )
        self.register_buffer("bound", bound)

    def run(self, x: Tensor, state: PartState) -> tuple[Tensor, Any, Tensor | None]:
        y, inner = self.inner(x, state.inner)
        return y, inner, None

    def turn(self, inner: Any, parts: Tensor | None) -> tuple[Any, Tensor | None]:
        memory = memory_leaf(inner, self.memory)
        size = torch.linalg.vector_norm(by_heads(memory), dim=2)  # (B, H)
        factor = (self.bound.to(size.dtype) / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1)
        return with_memory(inner, self.memory, memory * factor.view(*factor.shape, *[1] * (memory.ndim - 2))), None


class Windowed(InParts):
    """S_t - A_t ... A_{t-r+1} S_{t-r}: of a linear memory S_t = A_t S_{t-1} + U_t, what the last r steps wrote.

    r grows from window - every to window within each part of `every` steps, and falls back at its end: every = 1 is
    the exact window, at the price of window memories; every = window / 4 keeps four. Exact for every layer whose memory
    a linear op carries, matrix transitions included, and so equal to a run that starts `r` steps ago with an empty
    memory (a convolution's last inputs stay). Computed as the sum of what the parts wrote, each carried on by A_t: the
    difference of two large states would lose its digits.
    State: n = window / every memories beside the layer's own. An op call becomes n + 1.
    Raises UsageError for a layer without a linear memory, a window that is no multiple of `every`.
    """

    def __init__(self, inner: Layer, *, window: int, every: int | None = None):
        every = max(1, window // 4) if every is None else every
        super().__init__(inner, every=every)
        if window < 1 or window % every:
            raise UsageError(f"Windowed: window is {window}; expected a multiple of every = {every}")
        self.window, self.count = window, window // every

    def initial_state(self, batch: int) -> PartState:
        state = super().initial_state(batch)
        first = memory_leaf(state.inner, self.memory)[:, None]
        older = first.new_zeros(batch, self.count - 1, *first.shape[2:])
        return state._replace(parts=torch.cat([older, first], 1))

    def run(self, x: Tensor, state: PartState) -> tuple[Tensor, Any, Tensor | None]:
        assert state.parts is not None
        *older, newest = state.parts.unbind(1)
        parts: list[Tensor] = []

        def carry_all(op: Op, given: dict[str, Any]) -> Any:
            y, _ = op(**given)
            name = "h0" if "h0" in given else "state"
            parts.extend(carried(op, given, part) for part in older)
            parts.append(op(**{**given, name: newest})[1])
            return y, torch.stack(parts).sum(0)

        with intercept(carry_all):
            y, inner = self.inner(x, state.inner)
        return y, inner, torch.stack(parts, 1)

    def turn(self, inner: Any, parts: Tensor | None) -> tuple[Any, Tensor | None]:
        assert parts is not None
        parts = torch.cat([parts[:, 1:], torch.zeros_like(parts[:, :1])], 1)
        return with_memory(inner, self.memory, parts.sum(1)), parts


def change(model: nn.Module, make: Callable[[Layer], Layer]) -> Any:
    """A copy of a layer or model in which make(layer) stands for every layer with a linear memory.

    make: such as `lambda layer: Windowed(layer, window=512)`. Layers without such a memory, attention in a hybrid, say,
    stay as they are. Raises UsageError where no layer has one, with the reasons.
    """
    reasons: list[str] = []
    made = 0

    def visit(module: nn.Module) -> nn.Module:
        nonlocal made
        inside = any(isinstance(m, RecurrentLayer) for m in module.modules() if m is not module)
        if isinstance(module, RecurrentLayer) and not inside:
            try:
                memory_of(module)
            except UsageError as error:
                reasons.append(str(error))
                return module
            made += 1
            return make(module)
        for name, child in list(module.named_children()):
            setattr(module, name, visit(child))
        return module

    changed = visit(copy.deepcopy(model))
    if not made:
        raise UsageError(f"{type(model).__name__} has no layer to change: {'; '.join(dict.fromkeys(reasons))}")
    return changed


def _one(layer: RecurrentLayer[Any], x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """step by forward: interceptions reach ops, and a layer's own step calls none."""
    y, after = layer(x[:, None], state)
    return y[:, 0], after
