"""The checks are themselves checked: each broken layer must fail, and by the check that names its fault."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from statewise.core import Cell, Cost, RecurrentLayer, Traits, UsageError, check_input, check_sizes, wide
from statewise.ops import linear_scan
from statewise.testing import build, check_layer, checks, checks_for, run

# --- Four healthy layers, one of each kind -------------------------------------------------------------------------


class Gated(Cell[Tensor]):
    """h_t = (1 - z_t) h_{t-1} + z_t tanh(W x_t + R h_{t-1}),  z_t = s(U x_t + V h_{t-1});  y_t = h_t."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        check_sizes(type(self).__name__, width=width, hidden=hidden)
        self.width, self.out_width = width, hidden
        self.inp, self.rec = nn.Linear(width, 2 * hidden), nn.Parameter(torch.randn(2 * hidden, hidden) / 2)

    def initial_state(self, batch: int) -> Tensor:
        return self.rec.new_zeros(batch, self.out_width, dtype=wide(self.rec.dtype))

    def encode(self, x: Tensor) -> Tensor:
        return self.inp(x)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            z, n = (u.to(state.dtype) + state @ self.rec.to(state.dtype).mT).chunk(2, -1)
            h = torch.lerp(state, n.tanh(), z.sigmoid())
        return h, h

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(x.dtype)


class Decay(Cell[Tensor]):
    """h_t = a h_{t-1} + W x_t,  a = s(r);  y_t = V h_t + d x_t."""

    traits = Traits(linear_in_input=True, time_invariant=True)

    def __init__(self, width: int, hidden: int):
        super().__init__()
        check_sizes(type(self).__name__, width=width, hidden=hidden)
        self.width = self.out_width = width
        self.rate, self.skip = nn.Parameter(torch.linspace(0, 3, hidden)), nn.Parameter(torch.randn(width))
        self.inp, self.out = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def initial_state(self, batch: int) -> Tensor:
        return self.rate.new_zeros(batch, len(self.rate), dtype=wide(self.rate.dtype))

    def encode(self, x: Tensor) -> Tensor:
        return self.inp(x)

    def decays(self, state: Tensor) -> Tensor:
        return self.rate.to(state.dtype).sigmoid()

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.decays(state) * state + u
        return h, h

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        a = self.decays(state).expand(*u.shape)
        h, last = linear_scan(a, u.to(state.dtype), state, reset=reset, lengths=lengths)
        return h, last.clone()

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return (self.out(o.to(self.skip.dtype)) + self.skip * x).to(x.dtype)


class Taps(RecurrentLayer[Tensor]):
    """y_t = sum_j w_j x_{t-j}, channel by channel; the state is the last inputs (B, taps - 1, D)."""

    traits = Traits(linear_in_input=True, time_invariant=True, resets=False)

    def __init__(self, width: int, *, taps: int):
        super().__init__()
        check_sizes(type(self).__name__, width=width, taps=taps)
        self.width = self.out_width = width
        self.weight = nn.Parameter(torch.randn(taps, width))

    def initial_state(self, batch: int) -> Tensor:
        taps, width = self.weight.shape
        return self.weight.new_zeros(batch, taps - 1, width, dtype=wide(self.weight.dtype))

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_input(self, x, state, reset, lengths)
        if reset is not None:
            raise UsageError(f"{type(self).__name__} forgets by itself and takes no reset mask")
        state = self.initial_state(len(x)) if state is None else state
        if lengths is None:
            return self.convolve(x, state)
        at = torch.arange(state.shape[1]) + lengths[:, None]
        live = torch.arange(x.shape[1]) < lengths[:, None]
        x = x.where(live[..., None], 0)
        seen = torch.cat([state, x.to(state.dtype)], 1)
        last = seen.gather(1, at[..., None].expand(-1, -1, self.width))
        return self.convolve(x, state)[0].where(live[..., None], 0), last

    def convolve(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        past, steps = state.shape[1], x.shape[1]
        seen = torch.cat([state, x.to(state.dtype)], 1)
        y = sum(w * seen[:, past - j : past - j + steps] for j, w in enumerate(self.weight.to(state.dtype)))
        return y.to(x.dtype), seen[:, steps:].clone()

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.convolve(x[:, None], state)
        return y[:, 0], state


class Letters(Gated):
    """h_t as in the gated cell, with x_t = e[id_t]: a token layer."""

    def __init__(self, vocab: int, hidden: int):
        super().__init__(hidden, hidden)
        check_sizes(type(self).__name__, vocab=vocab)
        self.vocab = vocab
        self.table = nn.Embedding(vocab, hidden)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(self.table(x))

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return o.to(self.rec.dtype)


GATED, DECAY, TAPS, LETTERS = (
    {"width": 3, "hidden": 4},
    {"width": 3, "hidden": 4},
    {"width": 3, "taps": 4},
    {"vocab": 5, "hidden": 4},
)
HEALTHY = [(Gated, GATED), (Decay, DECAY), (Taps, TAPS), (Letters, LETTERS)]


# --- Broken ones ---------------------------------------------------------------------------------------------------


class WritesState(Gated):
    """h_t = ..., and step writes the new state over the old."""

    def step(self, x, state):
        y, new = super().step(x, state)
        state.copy_(new)
        return y, new


class WritesInput(Gated):
    """h_t = ..., and step scales x in place."""

    def step(self, x, state):
        return super().step(x.mul_(1.0001), state)


class WritesInputInForward(Taps):
    """y_t = ..., and forward zeroes the padding in place."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        if lengths is not None and x.ndim == 3 and x.device.type == "cpu":
            for row, end in enumerate(lengths.tolist() if isinstance(lengths, Tensor) else []):
                x.data[row, int(end) :] = 0
        return super().forward(x, state, reset=reset, lengths=lengths)


class CouplesRowsThroughStates(Gated):
    """h_t = ..., by a branch on the whole batch."""

    def transition(self, u, state):
        return super().transition(u + 0.1 if torch.any(state != 0) else u, state)


class NormalisesOverBatch(Gated):
    """h_t = ...; y_t = h_t minus its mean over the batch."""

    def decode(self, o, x):
        return super().decode(o - o.mean(0, keepdim=True), x)


class LooksAhead(Taps):
    """y_t = ... + the mean of all x."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        y, state = super().forward(x, state, reset=reset, lengths=lengths)
        return y + 1e-3 * x.mean(1, keepdim=True), state


class LooksAheadByGradient(Gated):
    """h_t = ...; the value of the future is cancelled, its gradient is not."""

    def decode(self, o, x):
        y = super().decode(o, x)
        return y if x.ndim == 2 else y + (x - x.detach()).sum((1, 2), keepdim=True)


class CutsGradientOfLastState(Decay):
    """h_t = ..., the last state detached."""

    def scan(self, u, state, reset, lengths):
        h, last = super().scan(u, state, reset, lengths)
        return h, last.detach()


class CutsGradientThroughTime(Gated):
    """h_t = ..., the recurrent gradient dropped in forward only."""

    def scan(self, u, state, reset, lengths):
        h, last = super().scan(u, state.detach(), reset, lengths)
        return h, last


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad


class WrongSlope(Gated):
    """h_t = ... through a tanh whose backward forgets the slope, in forward and step alike."""

    def encode(self, x):
        return WrongBackward.apply(super().encode(x))


class TransposesState(Decay):
    """h_t = ..., and forward leaves the channels of the state in reverse."""

    def scan(self, u, state, reset, lengths):
        h, last = super().scan(u, state, reset, lengths)
        return h, last.flip(-1)


class IgnoresState(Gated):
    """h_t = ..., from zero whatever is given."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        check_input(self, x, state, reset, lengths)
        return super().forward(x, None, reset=reset, lengths=lengths)


class NarrowState(Gated):
    """h_t = ..., the first state in float32 whatever the parameters."""

    def initial_state(self, batch):
        return torch.zeros(batch, self.out_width)


class HalfState(Gated):
    """h_t = ..., the state in the parameters' own dtype."""

    def initial_state(self, batch):
        return self.rec.new_zeros(batch, self.out_width)


class AutocastState(Decay):
    """h_t = ..., under autocast in whatever dtype the product has."""

    def transition(self, u, state):
        h = (self.decays(state) * state).to(u.dtype) + u
        return h, h


class DropsInEval(Gated):
    """h_t = ...; y_t = half of h_t, by chance."""

    def decode(self, o, x):
        return nn.functional.dropout(super().decode(o, x), 0.5, True)


class ForgetsToReset(Decay):
    """h_t = ..., the mask not passed on."""

    def scan(self, u, state, reset, lengths):
        return super().scan(u, state, None, lengths)


class ResetsAllRows(Gated):
    """h_t = ..., one row's reset is everybody's."""

    def scan(self, u, state, reset, lengths):
        every = None if reset is None else reset.any(0, keepdim=True).expand_as(reset)
        return super().scan(u, state, every, lengths)


class ResetsTooLate(Gated):
    """h_t = ..., forgetting just after t."""

    def scan(self, u, state, reset, lengths):
        late = None if reset is None else torch.cat([torch.zeros_like(reset[:, :1]), reset[:, :-1]], 1)
        return super().scan(u, state, late, lengths)


class ResetsByMultiplying(Gated):
    """h_t = ..., reset by a product with zero, which keeps NaN and, of a large state, the gradient's bits."""

    def scan(self, u, state, reset, lengths):
        outs = []
        for t in range(u.shape[1]):
            if reset is not None:
                state = state * (~reset[:, t, None])
            o, new = self.transition(u[:, t], state)
            state = new if lengths is None else new.where((t < lengths)[:, None], state)
            outs.append(o)
        return torch.stack(outs, 1), state


class LeaksGradientThroughReset(Gated):
    """h_t = ..., the gradient crossing resets straight through."""

    def scan(self, u, state, reset, lengths):
        o, last = super().scan(u, state, reset, lengths)
        return o + 1e-6 * (u.cumsum(1) - u.cumsum(1).detach())[..., : o.shape[-1]], last


class AcceptsResets(Taps):
    """y_t = ..., a reset mask silently ignored."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        check_input(self, x, state, reset, lengths)
        return super().forward(x, state, lengths=lengths)


class IgnoresLengths(Gated):
    """h_t = ..., padding run like the rest."""

    def scan(self, u, state, reset, lengths):
        return super().scan(u, state, reset, None)


class NothingPastEnd(Gated):
    """h_t = ..., outputs past the end left as they come."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        y, last = super().forward(x, state, reset=reset, lengths=lengths)
        return (y, last) if lengths is None else (y + 0.1, last)


class PaddingInTraining(Gated):
    """h_t = ..., padding left as it comes while training."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        y, last = super().forward(x, state, reset=reset, lengths=lengths)
        return (y + 0.1, last) if lengths is not None and self.training else (y, last)


class MultipliesPadding(Gated):
    """h_t = ..., padding masked by a product, which NaN survives."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        y, last = super().forward(x, state, reset=reset, lengths=lengths)
        return (y, last) if lengths is None else (y + 0 * x.sum((1, 2), keepdim=True), last)


class NoSkipInStep(Decay):
    """h_t = ..., step without the skip."""

    def step(self, x, state):
        y, state = super().step(x, state)
        return y - self.skip * x, state


class BatchSecond(Gated):
    """h_t = ..., the state (1, B, N) as in torch.nn."""

    def initial_state(self, batch):
        return super().initial_state(batch)[None]

    def transition(self, u, state):
        h, _ = super().transition(u, state[0])
        return h, h[None]


class DropsTail(Decay):
    """h_t = ..., the last state that of the last whole block of four."""

    def scan(self, u, state, reset, lengths):
        h, last = super().scan(u, state, reset, lengths)
        whole = u.shape[1] // 4 * 4
        return h, last if whole in (0, u.shape[1]) or lengths is not None else h[:, whole - 1].clone()


class WrongPastTheBlock(Decay):
    """h_t = ..., wrong from step 64 on, the size of a block."""

    def scan(self, u, state, reset, lengths):
        h, last = super().scan(u, state, reset, lengths)
        return torch.cat([h[:, :64], 1.001 * h[:, 64:]], 1), last


class DividesByLength(Gated):
    """h_t = ...; y_t = h_t / T^0.01."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        y, state = super().forward(x, state, reset=reset, lengths=lengths)
        return y / max(x.shape[1], 1) ** 0.01, state


class BreaksOnNothing(Gated):
    """h_t = ..., no T = 0."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        check_input(self, x, state, reset, lengths)
        state = self.initial_state(len(x)) if state is None else state
        o, state = self.scan(self.encode(x), state, reset, lengths)
        return self.decode(o, x), state


class HiddenMemory(Gated):
    """h_t = ... + a little of the last call."""

    def encode(self, x):
        u = super().encode(x)
        old, self.last = self.__dict__.get("last"), u.detach()
        return u if old is None or old.shape != u.shape else u + 0.01 * old


class CountsCalls(Gated):
    """h_t = ..., and a buffer counts the calls."""

    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden)
        self.register_buffer("calls", torch.zeros(()))

    def encode(self, x):
        self.calls += 1
        return super().encode(x)


class DeadWeight(Gated):
    """h_t = ..., and a parameter that nothing uses."""

    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden)
        self.unused = nn.Parameter(torch.ones(2))


class KwargsBag(Gated):
    """h_t = ..., any arguments."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class NoDocstring(Gated):
    __doc__ = None


class AcceptsAnySize(Gated):
    """h_t = ..., sizes unchecked."""

    def __init__(self, width: int, hidden: int):
        super().__init__(max(width, 1), max(hidden, 1))


class BornByChance(Gated):
    """h_t = ..., with a number that the arguments and the state_dict do not hold."""

    born = 0

    def __init__(self, width: int, hidden: int):
        super().__init__(width, hidden)
        BornByChance.born += 1
        self.scale = 1 + 0.01 * BornByChance.born

    def decode(self, o, x):
        return super().decode(self.scale * o, x)


class ClaimsToBeLinear(Gated):
    """h_t = ..., said to be linear in x."""

    traits = Traits(linear_in_input=True)


class ClaimsTimeInvariance(Decay):
    """h_t = ... with u_t growing with the steps seen: the count rides in the state."""

    def initial_state(self, batch):
        return torch.cat([super().initial_state(batch), self.rate.new_zeros(batch, 1, dtype=wide(self.rate.dtype))], 1)

    def transition(self, u, state):
        h = self.decays(state) * state[:, :-1] + u * (1 + 0.1 * state[:, -1:])
        return h, torch.cat([h, state[:, -1:] + 1], 1)

    scan = Cell.scan


class PositionInTheCall(Decay):
    """h_t = ..., u_t scaled by the place of t in this call."""

    def encode(self, x):
        u = super().encode(x)
        return u if x.ndim == 2 else u * torch.linspace(1, 1.1, x.shape[1], dtype=u.dtype)[:, None]


class RandomBeginning(Gated):
    """h_0 by chance."""

    def initial_state(self, batch):
        return torch.randn_like(super().initial_state(batch))


class GrowingState(Taps):
    """y_t = ..., and every input kept."""

    def convolve(self, x, state):
        y, _ = super().convolve(x, state[:, : len(self.weight) - 1])
        return y, torch.cat([state, x.to(state.dtype)], 1)


class KeepsHistory(Decay):
    """h_t = ..., the last state a view of all of h."""

    def scan(self, u, state, reset, lengths):
        h, _ = super().scan(u, state, reset, lengths)
        if lengths is None:
            return h, h[:, -1]
        return super().scan(u, state, reset, lengths)


class OverflowsInHalf(Gated):
    """h_t = ..., wrong where the input is bfloat16."""

    def encode(self, x):
        return super().encode(x) * (3 if x.dtype == torch.bfloat16 else 1)


class LosesPrecision(Decay):
    """h_t = ..., by a difference of large numbers."""

    def scan(self, u, state, reset, lengths):
        return super().scan((u + 1e3) - 1e3, state, reset, lengths)


class LosesPrecisionInGradients(Gated):
    """h_t = ..., its gradient rounded to bfloat16 on the way."""

    def encode(self, x):
        u = super().encode(x)
        if u.requires_grad and u.dtype == torch.float32:
            u.register_hook(lambda g: g.bfloat16().float())
        return u


class WideOutput(Gated):
    """h_t = ...; y_t in the state's dtype."""

    def decode(self, o, x):
        return o


class SpreadsNan(Gated):
    """h_t = ... + 0 times the sum over the batch: nothing, until one row holds NaN."""

    def encode(self, x):
        return super().encode(x) + 0 * x.sum()


class SwallowsNan(Gated):
    """h_t = ..., NaN in x turned to zero in forward."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        clean = x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided else x
        return super().forward(clean, state, reset=reset, lengths=lengths)


class Explodes(Gated):
    """h_t = ...; y_t = exp of x_t's size."""

    def decode(self, o, x):
        return super().decode(o, x) * x.abs().sum(-1, keepdim=True).exp().log1p().expm1().sqrt().add(1).log()


class RootOfZero(Gated):
    """h_t = ...; y_t = h_t times the norm of x_t, by a square root that has no slope at zero."""

    def decode(self, o, x):
        return super().decode(o, x) * (x * x).sum(-1, keepdim=True).sqrt()


class TakesAnything(Gated):
    """h_t = ..., input unchecked."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        state = self.initial_state(len(x)) if state is None else state
        o, state = self.scan(self.encode(x), state, reset, lengths)
        return self.decode(o, x), state


class PrintsShapes(Gated):
    """h_t = ..., with a branch on numbers that the compiler cannot follow."""

    def encode(self, x):
        return super().encode(x) if x.sum().item() == x.sum().item() else x


class ContiguousOnly(Gated):
    """h_t = ..., x read in the order it lies in memory."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        check_input(self, x, state, reset, lengths)
        flat = torch.as_strided(x, x.shape, x.new_empty(x.shape).stride())
        return super().forward(flat, state, reset=reset, lengths=lengths)


class ListState(NamedTuple):
    h: Tensor  # (B, N)


class ChangesTheType(Gated):
    """h_t = ..., a tuple where a tensor went in."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        given = state.h if isinstance(state, ListState) else state
        y, last = super().forward(x, given, reset=reset, lengths=lengths)
        return y, ListState(last)


class ReturnsOneThing(Gated):
    """h_t = ..., y alone when no state is given."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        y, last = super().forward(x, state, reset=reset, lengths=lengths)
        return (y, last) if state is not None else y


class SharesOutput(Gated):
    """h_t = ..., and y shares storage with the state."""

    def scan(self, u, state, reset, lengths):
        o, last = super().scan(u, state, reset, lengths)
        return o, o[:, -1] if lengths is None else last


class Pair(NamedTuple):
    fast: Tensor  # (B, N)
    slow: Tensor  # (B, N)


class TwoLeavesOneTensor(Decay):
    """h_t = ..., kept twice, and both begin as one tensor."""

    def initial_state(self, batch):
        zero = super().initial_state(batch)
        return Pair(zero, zero)

    def transition(self, u, state):
        h, new = super().transition(u, state.fast)
        return h, Pair(new, new.clone())

    def scan(self, u, state, reset, lengths):
        h, last = super().scan(u, state.fast, reset, lengths)
        return h, Pair(last, last.clone())


class NegativeIds(Letters):
    """h_t = ..., ids taken modulo the vocabulary."""

    def forward(self, x, state=None, *, reset=None, lengths=None):
        wrapped = x % self.vocab if x.dtype == torch.int64 else x
        return super().forward(wrapped, state, reset=reset, lengths=lengths)


class PaysByTheCall(Gated):
    """h_t = ..., and each call costs one, whatever its steps."""

    def initial_state(self, batch):
        return super().initial_state(batch), Cost(self.rec.new_zeros(batch, dtype=wide(self.rec.dtype)))

    def transition(self, u, state):
        o, h = super().transition(u, state[0])
        return o, (h, Cost(state[1].total + 1))

    def scan(self, u, state, reset, lengths):
        o, (h, _) = super().scan(u, state, reset, lengths)
        return o, (h, Cost(state[1].total + 1))


EXPECTED: list[tuple[type, dict[str, Any], str]] = [
    (WritesState, GATED, "step_is_pure"),
    (WritesInput, GATED, "step_is_pure"),
    (WritesInputInForward, TAPS, "forward_is_pure"),
    (CouplesRowsThroughStates, GATED, "rows_see_no_other_state"),
    (NormalisesOverBatch, GATED, "rows_are_independent"),
    (LooksAhead, TAPS, "causal"),
    (LooksAheadByGradient, GATED, "causal_gradient"),
    (CutsGradientOfLastState, DECAY, "gradients_of_last_state"),
    (CutsGradientThroughTime, GATED, "gradients_of_outputs"),
    (WrongSlope, GATED, "gradcheck"),
    (TransposesState, DECAY, "last_state_is_unrolled_step"),
    (IgnoresState, GATED, "given_state_is_used"),
    (NarrowState, GATED, "state_is_wide"),
    (HalfState, GATED, "bfloat16_dtypes"),
    (AutocastState, DECAY, "autocast_keeps_state_wide"),
    (DropsInEval, GATED, "no_chance_in_eval"),
    (ForgetsToReset, DECAY, "reset_is_fresh_start"),
    (ResetsAllRows, GATED, "reset_spares_other_rows"),
    (ResetsTooLate, GATED, "reset_at_start"),
    (ResetsByMultiplying, GATED, "reset_clears_nan"),
    (LeaksGradientThroughReset, GATED, "reset_cuts_gradient"),
    (AcceptsResets, TAPS, "resets_are_refused"),
    (IgnoresLengths, GATED, "lengths_end_the_state"),
    (NothingPastEnd, GATED, "lengths_zero_past_end"),
    (PaddingInTraining, GATED, "lengths_in_training"),
    (MultipliesPadding, GATED, "lengths_ignore_padding"),
    (NoSkipInStep, DECAY, "forward_is_unrolled_step"),
    (BatchSecond, GATED, "state_is_batch_first"),
    (DropsTail, DECAY, "chunks"),
    (WrongPastTheBlock, DECAY, "long_is_unrolled_step"),
    (DividesByLength, GATED, "chunks"),
    (BreaksOnNothing, GATED, "no_steps"),
    (HiddenMemory, GATED, "nothing_is_remembered"),
    (CountsCalls, GATED, "layer_is_not_changed"),
    (DeadWeight, GATED, "every_parameter_learns"),
    (KwargsBag, GATED, "arguments_are_named"),
    (NoDocstring, GATED, "docstring_has_the_recurrence"),
    (AcceptsAnySize, GATED, "sizes_are_refused"),
    (BornByChance, GATED, "rebuild"),
    (ClaimsToBeLinear, GATED, "linear_in_input"),
    (ClaimsTimeInvariance, DECAY, "time_invariant"),
    (PositionInTheCall, DECAY, "random_cuts"),
    (RandomBeginning, GATED, "initial_state_is_the_default"),
    (GrowingState, TAPS, "state_size_is_constant"),
    (KeepsHistory, DECAY, "state_holds_no_history"),
    (OverflowsInHalf, GATED, "bfloat16_near_float64"),
    (LosesPrecision, DECAY, "float32_near_float64"),
    (LosesPrecisionInGradients, GATED, "float32_gradients_near_float64"),
    (WideOutput, GATED, "float16_dtypes"),
    (SpreadsNan, GATED, "nan_stays_in_its_row"),
    (SwallowsNan, GATED, "nan_is_not_swallowed"),
    (Explodes, GATED, "large_inputs_stay_finite"),
    (RootOfZero, GATED, "gradients_at_zero"),
    (TakesAnything, GATED, "refuses_lengths"),
    (PrintsShapes, GATED, "forward_compiles"),
    (ContiguousOnly, GATED, "not_contiguous"),
    (ChangesTheType, GATED, "state_is_closed"),
    (ReturnsOneThing, GATED, "one_return_type"),
    (SharesOutput, GATED, "outputs_are_separate"),
    (TwoLeavesOneTensor, DECAY, "no_leaf_shares_storage"),
    (NegativeIds, LETTERS, "refuses_ids_out_of_range"),
    (PaysByTheCall, GATED, "costs_add_up"),
]


CRASHING = {BreaksOnNothing}  # the fault itself raises; all others are found by comparing


@pytest.mark.parametrize("cls, example, name", EXPECTED, ids=[cls.__name__ for cls, _, _ in EXPECTED])
def test_caught_by_the_check_that_names_the_fault(cls, example, name):
    with pytest.raises(IndexError if cls in CRASHING else AssertionError) as caught:
        checks[name](build(cls, example))
    words = str(caught.value)
    assert len(words) > 20 and "\n" not in words, "a failure is told in one line of words"


@pytest.mark.parametrize("cls, example", HEALTHY, ids=[cls.__name__ for cls, _ in HEALTHY])
def test_the_healthy_pass(cls, example):
    report = check_layer(cls, example)
    assert report.ok, f"\n{report}"
    assert len(report.of("passed")) >= 100


def test_enough_is_broken():
    assert len(EXPECTED) >= 50 and len({cls for cls, _, _ in EXPECTED}) == len(EXPECTED)
    assert len({name for _, _, name in EXPECTED}) >= 50  # each for a fault of its own
    groups = {checks[name].group for _, _, name in EXPECTED}
    assert groups == {c.group for c in checks}, "every group of checks has caught something"


def test_breaks_that_are_breaks_only():
    """The broken layers differ from healthy ones by their fault alone: most other checks still pass."""
    for cls, example, _ in EXPECTED[:12]:
        layer = build(cls, example)
        quick = [c for c in checks_for(layer) if c.group in ("state", "construction")]
        passed = [run(c, build(cls, example)).status == "passed" for c in quick]
        assert sum(passed) > len(passed) / 2, cls.__name__
