"""One sequence over several ranks: each holds a chunk of it and every layer hands its state on from rank to rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import RecurrentLayer, UsageError, leaves, names, tree_map
from ..core.layer import weight_of
from ..models import Residual
from ..nn import ShortConvolution
from ..ops.across_ranks import Line, Rehearsal, across_ranks, hand_on


class SequenceParallel(RecurrentLayer[Any]):
    """layer on the sequence whose chunks the ranks hold in order: (this rank's x, state) -> (this rank's y, state).

    For layers, and models of them, whose state goes through linear scans and short convolutions alone: all ranks work
    at the same time and exchange only what the scans carry, (M, c) of `ops.across_ranks`, and the convolutions' taps.
    state: the one before the whole sequence; that of rank 0 counts. The state that comes out is the one after the
    whole sequence, on every rank. reset and lengths are those of the chunk: a row that ended on an earlier rank has
    length 0. Chunks may differ in length, none may be empty.

    The loss of the whole is the sum of what the ranks take gradients of; each rank must call backward, and its
    parameters' gradients are its part: `sum_gradients` adds the parts. `step` is the layer's own, on one rank.

    Raises UsageError for a layer whose state does not go through linear scans alone (it is tried at once, on three
    steps: on any rank but the first the given state must make no difference), and for an empty chunk.
    """

    def __init__(self, layer: RecurrentLayer[Any], group: Any = None):
        super().__init__()
        self.layer, self.line = layer, Line(group)
        self.width, self.out_width, self.vocab, self.traits = layer.width, layer.out_width, layer.vocab, layer.traits
        _refuse_other_ways(layer)

    def initial_state(self, batch: int) -> Any:
        return self.layer.initial_state(batch)

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        if x.shape[1] == 0:
            raise UsageError("SequenceParallel: a chunk of no steps; give each rank one step at least")
        for part in self.layer.modules():
            if isinstance(part, Residual) and part.recompute:
                raise UsageError("SequenceParallel: blocks that are computed anew in backward would not hand on their "
                                 "state; set recompute to False")  # fmt: skip
        with across_ranks(self.line), _convolutions_across(self.layer, self.line):
            found: tuple[Tensor, Any] = self.layer(x, state, reset=reset, lengths=lengths)
        return found

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = self.layer.step(x, state)
        return found


class InTurns(RecurrentLayer[Any]):
    """The same map for any layer: rank r waits for the state from rank r - 1, runs its chunk, hands its state on.

    One rank works at a time, so nothing is faster than on one rank; what is kept for the gradient is spread over the
    ranks. The state that comes out is the one after this rank's chunk. As in `SequenceParallel` the state of rank 0
    counts, each rank must call backward, and parameters' gradients are parts.
    """

    def __init__(self, layer: RecurrentLayer[Any], group: Any = None):
        super().__init__()
        self.layer, self.line = layer, Line(group)
        self.width, self.out_width, self.vocab, self.traits = layer.width, layer.out_width, layer.vocab, layer.traits

    def initial_state(self, batch: int) -> Any:
        return self.layer.initial_state(batch)

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        state = self.initial_state(len(x)) if state is None else state
        grad = torch.is_grad_enabled()
        token = torch.zeros((), requires_grad=grad)
        arrived = iter(_Receive.apply(self.line, token, *leaves(state)))
        y, state = self.layer(x, tree_map(lambda _: next(arrived), state), reset=reset, lengths=lengths)
        y, *sent = _Send.apply(self.line, y, *leaves(state))
        rest = iter(sent)
        return y, tree_map(lambda _: next(rest), state)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = self.layer.step(x, state)
        return found


def sequence_parallel(layer: RecurrentLayer[Any], group: Any = None) -> SequenceParallel:
    """The layer or model for a sequence that is cut over the ranks of a process group (None: all). Shares weights."""
    return SequenceParallel(layer, group)


def own_chunk(t: Tensor, group: Any = None) -> Tensor:
    """This rank's part of dim 1, of as equal parts as there can be. Raises UsageError where there are too few steps."""
    line = Line(group)
    if t.shape[1] < line.size:
        raise UsageError(f"own_chunk: {t.shape[1]} steps over {line.size} ranks; each needs one at least")
    return t.tensor_split(line.size, 1)[line.rank]


def _refuse_other_ways(layer: RecurrentLayer[Any]) -> None:
    """Raise UsageError if what a rank but the first computes depends on the state that it is given."""
    weight, rehearsal = weight_of(layer), Rehearsal()
    device, dtype = (torch.device("cpu"), None) if weight is None else (weight.device, weight.real.dtype)
    training = layer.training
    layer.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), across_ranks(rehearsal):
            torch.manual_seed(0)
            if layer.vocab:
                x = torch.randint(layer.vocab, (1, 3), device=device)
            else:
                x = torch.randn(1, 3, layer.width, dtype=dtype, device=device)
            state = layer.initial_state(1)
            with _convolutions_across(layer, rehearsal):
                y, after = layer(x, state)
                other, moved = layer(x, tree_map(lambda leaf: leaf + 1 if leaf.dtype != torch.bool else ~leaf, state))
    finally:
        layer.train(training)
    parts = [("y", y, other), *zip(names(after), leaves(after), leaves(moved), strict=True)]
    for name, a, b in parts:
        if not torch.equal(a, b):
            what = "y depends on a state" if name == "y" else f"state leaf {name!r} goes ways"
            raise UsageError(
                f"sequence_parallel: {type(layer).__name__}: {what} beside linear scans and short convolutions, which "
                "cannot be handed on as an affine map; InTurns runs any layer, one rank after another"
            )


@contextlib.contextmanager
def _convolutions_across(model: nn.Module, line: Line) -> Iterator[None]:
    """Within the block the short convolutions of a model start from their left neighbour's last inputs."""
    ends: list[Tensor] = []

    def before(conv: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, state, reset, lengths = (*args, None, None)[:4]
        start = state if line.rank == 0 else torch.zeros_like(state)
        _, c = conv.forward(x, start, reset, lengths)
        first, after = hand_on(line, state, _moved(conv.taps - 1, x, state, reset, lengths), c, dense=True)
        ends.append(after)
        return x, first, reset, lengths

    def after(conv: nn.Module, args: tuple[Any, ...], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return found[0], ends.pop()

    hooks = []
    for part in model.modules():
        if isinstance(part, ShortConvolution) and part.taps > 1:
            hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _moved(past: int, x: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> Tensor:
    """(B, P-1, P-1): which of the taps before a chunk are left after it, and where. The taps of one-hot inputs."""
    with torch.random.fork_rng(devices=[]):  # it draws weights that are not looked at
        probe = ShortConvolution(past, taps=past + 1).to(state)
    one = torch.eye(past, dtype=state.dtype, device=state.device).expand(len(x), past, past)
    return probe(state.new_zeros(*x.shape[:2], past), one, reset, lengths)[1]


class _Receive(torch.autograd.Function):
    """The state from the left; backward sends its gradient there. token: so that there is one on every rank."""

    @staticmethod
    def forward(ctx: Any, line: Line, token: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.line, ctx.float = line, [t.is_floating_point() or t.is_complex() for t in state]
        found = [t.clone() for t in state]
        if line.rank:
            for t in found:
                dist.recv(_real(t), group=line.group, group_src=line.rank - 1)
        ctx.mark_non_differentiable(*(t for t, real in zip(found, ctx.float, strict=True) if not real))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.line.rank:
            for grad, real in zip(grads, ctx.float, strict=True):
                if real:
                    dist.send(_real(grad.contiguous()), group=ctx.line.group, group_dst=ctx.line.rank - 1)
            return (None,) * (2 + len(grads))
        return None, None, *(g if real else None for g, real in zip(grads, ctx.float, strict=True))


class _Send(torch.autograd.Function):
    """(y, state) -> the same, the state sent to the right; backward waits for the gradient from there."""

    @staticmethod
    def forward(ctx: Any, line: Line, y: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.line, ctx.float = line, [t.is_floating_point() or t.is_complex() for t in state]
        if line.rank < line.size - 1:
            for t in state:
                dist.send(_real(t.contiguous()), group=line.group, group_dst=line.rank + 1)
        found = [t.clone() for t in state]
        ctx.mark_non_differentiable(*(t for t, real in zip(found, ctx.float, strict=True) if not real))
        return y.clone(), *found

    @staticmethod
    def backward(ctx: Any, y: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        found: list[Tensor | None] = []
        for grad, real in zip(grads, ctx.float, strict=True):
            if real and ctx.line.rank < ctx.line.size - 1:
                right = torch.empty_like(grad, memory_format=torch.contiguous_format)
                dist.recv(_real(right), group=ctx.line.group, group_src=ctx.line.rank + 1)
                grad = grad + right
            found.append(grad if real else None)
        return None, y, *found


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t
