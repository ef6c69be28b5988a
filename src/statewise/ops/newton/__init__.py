"""Nonlinear recurrences for all times at once (Danieli et al. 2025, arXiv:2510.21450; Lim et al. 2024, 2309.12252).

h_t = f(h_{t-1}, u_t) for t = 1..T is one equation in the whole trajectory. With z_t = f(h_{t-1}, u_t) at a guess and
J_t = df/dh_{t-1} there, Newton's update is a linear recurrence:

    d_t = J_t d_{t-1} + z_t - h_t,    h_t <- h_t + d_t.

What can go wrong, and what is done about it. The updates fall quadratically only near the solution, and where products
of J grow they may fall late or never: a row that stops gaining steps is finished one step at a time from its first
unconverged step. Where the recurrence amplifies rounding errors beyond the tolerance no two ways to compute it agree:
a row in which it would is computed by the loop from its first step. An update that is not finite is replaced by
f itself. Before anything is returned, h_t is compared with f(h_{t-1}, u_t) at every step.

All decisions are taken row by row and from the past alone, so that a NaN changes no other row and no earlier step. The
one exception is a row that turns out to amplify rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core import NumericError, UsageError, leaves, past_end, tree_map, where
from ..block_scan import block_scan
from ..linear_scan import linear_scan
from ..opaque import is_traced
from .structure import Layout, Linear, Step, Structure, by_tangents

__all__ = ["Diagnostics", "Layout", "Structure", "by_tangents", "default_tolerance", "newton", "watched"]

PATIENCE = 10  # iterations before a row must gain steps; more where they contract only linearly
GAIN = 32  # it must gain a 32nd of its segment in each iteration: about what an iteration costs in steps
SEGMENT = 1 << 18  # numbers in the Jacobians of a segment: what a processor's caches hold
SHORTEST, LONGEST = 64, 4096
ROUNDED = 0.1  # size of the terms that a number near zero is the sum of
WRONG = 0.05  # relative error that says a Jacobian is another function's: half precision in a step may cost 0.01
MARGIN = 64  # how much closer the last update must be where the Jacobian is approximate


@dataclass(frozen=True)
class Diagnostics:
    """What one call did."""

    rows: int
    steps: int
    tolerance: float
    iterations: tuple[int, ...]  # of each segment that was tried
    residual: float  # the largest |h_t - f(h_{t-1}, u_t)| / (1 + |h_t|) of what the iterations gave
    sequential: tuple[int, ...]  # of each row, steps taken one at a time
    stalled: int  # rows whose iterations stopped gaining
    amplified: int  # rows that amplify rounding beyond the tolerance

    def __str__(self) -> str:
        parts = [
            f"{sum(self.iterations)} iterations over {len(self.iterations)} segments",
            f"residual {self.residual:.1g}",
        ]
        if any(self.sequential):
            count = sum(s > 0 for s in self.sequential)
            parts.append(f"{count} of {self.rows} rows finished step by step, {max(self.sequential)} steps at most")
        if self.stalled:
            parts.append(f"{self.stalled} stopped converging")
        if self.amplified:
            parts.append(f"{self.amplified} amplify rounding beyond the tolerance {self.tolerance:.1g}")
        return "; ".join(parts)


_watchers: list[list[Diagnostics]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[Diagnostics]]:
    """Within the block the diagnostics of every call of `newton` are appended to the list that this yields."""
    found: list[Diagnostics] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers[:] = [w for w in _watchers if w is not found]


def default_tolerance(dtype: torch.dtype) -> float:
    """1e-10 in float64, 1e-6 in float32."""
    return 1e-10 if dtype == torch.float64 else 1e-6


def newton(
    step: Step,
    u: Any,
    state: Any,
    *,
    structure: Structure,
    linearise: Linear | None = None,
    fresh: Any = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int = 64,
    segment: int | None = None,
    damping: float = 0.0,
    affine: bool = False,
) -> tuple[Any, Any, Diagnostics]:
    """The loop o_t, s_t = step(u_t, s_{t-1}) over dim 1 of u, for all t at once.

    step: a pure function of u (M, ...) and a state with M rows, for any M, each row by itself; one step of a `Cell`.
    u: a tree of (B, T, ...). state: a tree of (B, ...), floating or complex.
    structure: the blocks of d s_t / d s_{t-1}. linearise(u, h) -> f (M, N) and these blocks, (M, N) or (M, G, n, n); by
    forward derivatives of step where it is not given.
    reset (B, T) bool: the state before t is `fresh`. lengths (B,): row b ends after lengths[b] steps; what o holds past
    the end is finite where step is, and nothing there reaches anything else.
    tolerance: the result equals the loop's to tolerance (1 + |s|); 1e-6 in float32, 1e-10 in float64 unless given. At
        1e-6 in float32 that is a few roundings: how these add up is estimated, not bounded.
    max_iterations: of each segment. segment: steps solved at once, from the true state before them.
    damping: 0 for Newton's method; the Jacobian is scaled by 1 - damping, so that 1 is fixed-point iteration.
    affine: step is affine in the state, so that the first iteration solves it; the residual is checked all the same.

    Returns o and the last state, as the loop would, and Diagnostics. Whatever has not converged was computed one step
    at a time. Differentiable once in u, state, fresh and all that step closes over, by the implicit function theorem:
    lam_t = g_t + J_{t+1}^T lam_{t+1} is one linear recurrence backwards in time. A second derivative raises.
    Raises UsageError for states that are not floating and for tolerances that the dtype cannot hold.

    >>> def leak(u, h):
    ...     return h, torch.tanh(u - h)
    >>> u = torch.linspace(-1, 1, 100).view(1, 100, 1)
    >>> _, last, told = newton(leak, u, torch.zeros(1, 1), structure=Structure(1, 1))
    >>> sum(told.iterations) < 8, max(told.sequential)
    (True, 0)
    """
    batch, steps = leaves(u)[0].shape[:2]
    lengths = None if lengths is None else lengths.to(leaves(u)[0].device)
    if steps > 0 and is_traced(leaves(u)[0]):  # a tracer cannot follow the iterations: it sees the loop
        return *_loop(step, u, state, fresh, reset, lengths), _nothing(batch, steps, 0.0)
    layout = Layout.of(state)
    first, tolerance = layout.rows(state), default_tolerance(layout.dtype) if tolerance is None else tolerance
    _check(layout, structure, first.shape[1], tolerance, damping, max_iterations)
    if batch * steps == 0:
        rows = batch * steps
        o, _ = step(tree_map(lambda leaf: leaf.flatten(0, 1), u), layout.tree(first.new_zeros(rows, first.shape[1])))
        o = tree_map(lambda leaf: leaf.unflatten(0, (batch, steps)), o)
        return o, tree_map(Tensor.clone, state), _nothing(batch, steps, tolerance)
    if steps == 1:
        return *_loop(step, u, state, fresh, reset, lengths), _nothing(batch, steps, tolerance)

    cut, ended = reset, None
    if lengths is not None:  # past its end every step of a row is a fresh start, which leads nowhere
        ended = past_end(lengths, steps)
        cut = ended if reset is None else reset | ended
    start = None if cut is None else layout.rows(fresh) if fresh is not None else torch.zeros_like(first)
    if segment is None:
        segment = min(LONGEST, max(SHORTEST, SEGMENT // (batch * structure.numbers * structure.size)))
    run = _Run(
        step, linearise or by_tangents(step, layout, structure), layout, structure, u, first, start, cut, ended,
        tolerance, max_iterations, damping, affine, segment,
    )  # fmt: skip
    o, s, told = run.answer()
    for watcher in _watchers:
        watcher.append(told)
    last = _last(s, first, lengths)
    return tree_map(lambda leaf: leaf.unflatten(0, (batch, steps)), o), _separate(layout.tree(last)), told


def _check(
    layout: Layout, structure: Structure, numbers: int, tolerance: float, damping: float, max_iterations: int
) -> None:
    if not tolerance >= 4 * torch.finfo(layout.dtype).eps:
        raise UsageError(f"newton: tolerance {tolerance}; expected at least 4 eps of {layout.dtype}")
    if not 0 <= damping <= 1 or max_iterations < 1:
        raise UsageError(f"newton: damping {damping}, max_iterations {max_iterations}; expected 0 to 1, at least 1")
    if structure.numbers != numbers:
        raise UsageError(f"newton: the structure is of {structure.numbers} numbers, the state of {numbers}")


def _last(s: Tensor, first: Tensor, lengths: Tensor | None) -> Tensor:
    """Of the states s (B, T, N), those at the rows' ends; the first one where a row is empty."""
    if lengths is None:
        return s[:, -1].clone()  # a view would keep all of time in memory
    last = s[torch.arange(len(s), device=s.device), (lengths - 1).clamp(min=0)]
    return torch.where((lengths == 0)[:, None], first, last)


def _separate(state: Any) -> Any:
    """Leaves that were cut from one row of numbers, each with storage of its own."""
    return tree_map(Tensor.clone, state) if len(leaves(state)) > 1 else state


def _nothing(batch: int, steps: int, tolerance: float) -> Diagnostics:
    return Diagnostics(batch, steps, tolerance, (), 0.0, (0,) * batch, 0, 0)


def _loop(step: Step, u: Any, state: Any, fresh: Any, reset: Tensor | None, lengths: Tensor | None) -> tuple[Any, Any]:
    """What is solved, as it is defined."""
    fresh = tree_map(torch.zeros_like, state) if fresh is None else fresh
    outs = []
    for t in range(leaves(u)[0].shape[1]):
        before = state if reset is None else where(reset[:, t], fresh, state)
        o, new = step(tree_map(lambda leaf, t=t: leaf[:, t], u), before)  # type: ignore[misc]
        state = new if lengths is None else where(t < lengths, new, state)
        outs.append(o)
    return tree_map(lambda *leaf: torch.stack(leaf, 1), *outs), state


@dataclass
class _Run:
    """One call: the equation, how it is to be solved, and what was found out about it."""

    step: Step
    linearise: Linear
    layout: Layout
    structure: Structure
    u: Any
    first: Tensor  # (B, N), the state before the first step
    fresh: Tensor | None  # the one that a cut leaves
    cut: Tensor | None  # (B, T)
    ended: Tensor | None  # (B, T)
    tolerance: float
    max_iterations: int
    damping: float
    affine: bool
    segment: int

    iterations: list[int] = field(default_factory=list)
    stalled: int = 0
    amplified: int = 0
    new: Any = None  # the states that step made of the solution
    adjoint_of_before: Tensor | None = None

    def __post_init__(self) -> None:
        self.batch, self.steps = leaves(self.u)[0].shape[:2]

    def answer(self) -> tuple[Any, Tensor, Diagnostics]:
        """o and the states (B, T, N), both with their gradients, and what was done."""
        train = torch.is_grad_enabled()
        with torch.no_grad():
            h, jacobian, begin = self.solve(keep=train)
        o, z, residual, begin = self.evaluate(h, begin)
        if begin.min() < self.steps:
            with torch.no_grad():
                h, jacobian, begin = self.finish(h, begin)
            o, z, _, _ = self.evaluate(h, None)
        s = self.with_gradients(z, h, jacobian) if z.requires_grad else h
        o = self.outputs(o, s)
        self.new = None  # its graph leads back to self
        return o, s, self.told(residual, begin)

    # solving

    def solve(self, keep: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """h (B, T, N); the Jacobians if they are to be kept and are all there; each row's first unconverged step."""
        h = self.first.new_empty(self.batch, self.steps, self.first.shape[1])
        begin = torch.full((self.batch,), self.steps)
        carry, noise, kept = self.first, torch.zeros_like(self.first), []
        for low in range(0, self.steps, self.segment):
            high = min(low + self.segment, self.steps)
            found, jacobian, converged = self.newton(low, high, carry, begin < low)
            h[:, low:high] = found
            stalled = (begin >= low) & (converged < high - low)
            begin = torch.where(stalled, low + converged, begin)
            self.stalled += int(stalled.sum())
            carry = found[:, -1]
            if not self.affine:
                spread = self.scan(jacobian, self.rounding(found), noise, low, high)
                noise = spread[:, -1]
                worse = self.beyond(spread, found) & (begin > low)
                self.amplified += int(worse.sum())
                begin = torch.where(worse, 0, begin)
            if begin.max() < high:
                h[:, high:] = 0
                break
            if keep:
                kept.append(jacobian)
        whole = torch.cat(kept, 1) if keep and begin.min() == self.steps else None
        return h, whole, begin

    def newton(self, low: int, high: int, carry: Tensor, lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One segment: h, the Jacobians, and how many of each row's first steps have converged."""
        steps = high - low
        exact = self.structure.exact and self.damping == 0
        bound = self.tolerance if exact else self.tolerance / MARGIN
        bound = max(bound, 4 * torch.finfo(carry.dtype).eps)
        u, times = self.inputs(low, high), torch.arange(steps, device=carry.device)
        never = None if self.ended is None else self.ended[:, low:high]
        h = carry[:, None].expand(-1, steps, -1).contiguous()
        gave_up, done = lost.clone(), torch.where(lost, steps, 0)
        history, zero = [done], torch.zeros_like(carry)
        for count in range(1, self.max_iterations + 1):
            z, jacobian = self.linear(u, h, carry, low, high)
            frozen = (times < done.to(h.device)[:, None])[..., None]
            r = torch.where(frozen, 0, z - h) if count > 1 else z - h
            d = self.scan(jacobian if self.damping == 0 else (1 - self.damping) * jacobian, r, zero, low, high)
            size = d.abs()
            new = torch.where(size < torch.inf, h + d, z)
            small = (size < torch.inf if self.affine else size <= bound * (1 + new.abs())).all(-1)
            h = torch.where(frozen, h, new) if count > 1 else new
            small = small if never is None else small | (never & (count > 1))
            run = torch.where(gave_up, steps, small.cummin(1).values.sum(1).cpu())
            done = torch.maximum(done, run)
            history.append(done)
            if count >= (PATIENCE if exact else 3 * PATIENCE):
                slow = (done < steps) & (done - history[-4] < 3 * steps / GAIN)
                gave_up |= slow
            if bool((gave_up | (done >= steps)).all()):
                break
        self.iterations.append(count)
        return h, jacobian, torch.where(lost, steps, done)

    def linear(self, u: Any, h: Tensor, carry: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        before = self.before(h, carry, low, high)
        z, jacobian = self.linearise(u, before.flatten(0, 1))
        return z.unflatten(0, before.shape[:2]), jacobian.unflatten(0, before.shape[:2])

    def scan(self, jacobian: Tensor, r: Tensor, start: Tensor, low: int, high: int) -> Tensor:
        """d_t = J_t d_{t-1} + r_t."""
        return solve_linear(jacobian, r, start, None if self.cut is None else self.cut[:, low:high], self.structure)

    def rounding(self, h: Tensor) -> Tensor:
        """An error at every step of twice the usual rounding, of random sign, the same in every call.

        Within a block small numbers are sums of large ones, and as uncertain.
        """
        rng = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, h.shape[1:], generator=rng, dtype=torch.int8).to(h.device, h.dtype) * 2 - 1
        size = h.abs()
        if self.structure.size > 1:
            blocks = self.structure.split(size)
            size = self.structure.join(blocks.amax(-1, keepdim=True).expand_as(blocks))
        return signs * (torch.finfo(h.dtype).eps / 2) * (ROUNDED + size)

    # the recurrence at given states

    def inputs(self, low: int, high: int) -> Any:
        return tree_map(lambda leaf: leaf[:, low:high].flatten(0, 1), self.u)

    def before(self, h: Tensor, carry: Tensor, low: int, high: int) -> Tensor:
        """The states before each step, of h (B, t, N)."""
        before = torch.cat([carry[:, None], h[:, :-1]], 1)
        if self.cut is None or self.fresh is None:
            return before
        return torch.where(self.cut[:, low:high, None], self.fresh[:, None], before)

    def evaluate(self, h: Tensor, begin: Tensor | None) -> tuple[Any, Tensor, float, Tensor]:
        """o and f at the states found, recorded for gradients; the residual; each row's first step that fails it."""
        before = self.before(h, self.first, 0, self.steps)
        if torch.is_grad_enabled():
            before = _Checked.apply(before, before.new_zeros((), requires_grad=True), self)
        o, new = self.step(self.inputs(0, self.steps), self.layout.tree(before.flatten(0, 1)))
        self.new = new
        z = self.layout.rows(new).unflatten(0, h.shape[:2])
        if begin is None:
            return o, z, 0.0, torch.empty(0)
        with torch.no_grad():
            error = ((z - h).abs() / (1 + h.abs())).amax(-1) if h.shape[-1] else h.new_zeros(h.shape[:2])
            times = torch.arange(self.steps, device=h.device)
            tried = times < begin.to(h.device)[:, None]
            tried = tried if self.ended is None else tried & ~self.ended
            good = (error <= self.tolerance / 2) | ~tried
            converged = good.cummin(1).values.sum(1).cpu()
            residual = float(torch.where(tried & good, error, 0).max())
        late = converged < begin
        self.stalled += int((late & (begin == self.steps)).sum())
        return o, z, residual, torch.where(late, converged, begin)

    def jacobian(self, h: Tensor) -> Tensor:
        parts = []
        for low in range(0, self.steps, self.segment):
            high = min(low + self.segment, self.steps)
            carry = h[:, low - 1] if low else self.first
            parts.append(self.linear(self.inputs(low, high), h[:, low:high], carry, low, high)[1])
        return torch.cat(parts, 1)

    def outputs(self, o: Any, s: Tensor) -> Any:
        """o as a function of the states s. Where o is made of leaves of the new state, it is those of s."""
        pairs = list(zip(leaves(self.new), leaves(self.layout.tree(s.flatten(0, 1))), strict=True))
        if all(any(part is new for new, _ in pairs) for part in leaves(o)):
            return tree_map(lambda part: next(solved for new, solved in pairs if part is new), o)
        if not s.requires_grad:
            return o
        before = self.before(s, self.first, 0, self.steps)
        return self.step(self.inputs(0, self.steps), self.layout.tree(before.flatten(0, 1)))[0]

    def finish(self, h: Tensor, begin: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The loop from each row's first unconverged step on; from the first step where little had converged."""
        begin = torch.where(4 * begin < self.steps, 0, begin)
        h = self.loop(h, begin)
        partly = (begin > 0) & (begin < self.steps)
        if not partly.any():
            return h, None, begin
        # what the iterations left of error in the first steps may have grown in those after them
        jacobian, times = self.jacobian(h), torch.arange(self.steps, device=h.device)
        error = self.rounding(h) * (times < begin.to(h.device)[:, None])[..., None]
        worse = partly & self.beyond(self.scan(jacobian, error, torch.zeros_like(self.first), 0, self.steps), h)
        if not worse.any():
            return h, jacobian, begin
        self.amplified += int(worse.sum())
        return self.loop(h, torch.where(worse, 0, self.steps)), None, torch.where(worse, 0, begin)

    def beyond(self, error: Tensor, h: Tensor) -> Tensor:
        """Rows in which an error is beyond half the tolerance somewhere: the loop makes errors of its own."""
        return (error.abs() > self.tolerance / 2 * (1 + h.abs())).flatten(1).any(1).cpu()

    def loop(self, h: Tensor, begin: Tensor) -> Tensor:
        """h with every row's steps from `begin` on computed one after another."""
        h, begin, low = h.clone(), begin.to(h.device), int(begin.min())
        together = bool((begin == low).all())
        now = h[:, low - 1] if low else self.first
        for t in range(low, self.steps):
            if not together and t > low:
                now = torch.where((begin >= t)[:, None], h[:, t - 1], now)
            if self.cut is not None and self.fresh is not None:
                now = torch.where(self.cut[:, t, None], self.fresh, now)
            u_t = tree_map(lambda leaf, t=t: leaf[:, t], self.u)  # type: ignore[misc]
            now = self.layout.rows(self.step(u_t, self.layout.tree(now))[1])
            h[:, t] = now if together else torch.where((begin <= t)[:, None], now, h[:, t])
        return h

    def told(self, residual: float, begin: Tensor) -> Diagnostics:
        return Diagnostics(
            rows=self.batch,
            steps=self.steps,
            tolerance=self.tolerance,
            iterations=tuple(self.iterations),
            residual=residual,
            sequential=tuple((self.steps - begin).tolist()),
            stalled=self.stalled,
            amplified=self.amplified,
        )

    # gradients

    def with_gradients(self, z: Tensor, h: Tensor, jacobian: Tensor | None) -> Tensor:
        """h as the solution of h = f; z: f at h. The Jacobians are made where they are wanted and not kept."""
        with torch.no_grad():
            jacobian = self.jacobian(h) if jacobian is None and self.structure.exact else jacobian
        return _Implicit.apply(z, h, jacobian if self.structure.exact else None, self)

    def adjoint(self, g: Tensor, h: Tensor, jacobian: Tensor | None) -> Tensor:
        """lam_t = g_t + J_{t+1}^T lam_{t+1}, a recurrence in reversed time.

        Where the iterations went by a part of the Jacobian, all of it is made here, piece by piece.
        """
        if jacobian is not None:
            return self.adjoint_of(g, jacobian, self.structure, torch.zeros_like(g[:, 0]), 0, self.steps)
        full = Structure(self.structure.numbers, self.structure.numbers)
        linearise = by_tangents(self.step, self.layout, full)
        size = max(1, SEGMENT // (self.batch * full.numbers**2))
        lam, carry = [], torch.zeros_like(g[:, 0])
        for low in reversed(range(0, self.steps, size)):
            high = min(low + size, self.steps)
            before = self.before(h[:, low:high], h[:, low - 1] if low else self.first, low, high)
            j = linearise(self.inputs(low, high), before.flatten(0, 1).detach())[1].unflatten(0, before.shape[:2])
            piece = self.adjoint_of(g[:, low:high], j, full, carry, low, high)
            lam.append(piece)
            carry = torch.einsum("bji,bj->bi", j[:, 0, 0], piece[:, 0])
            if self.cut is not None:
                carry = torch.where(self.cut[:, low, None], 0, carry)
        return torch.cat(lam[::-1], 1)

    def adjoint_of(
        self, g: Tensor, jacobian: Tensor, structure: Structure, carry: Tensor, low: int, high: int
    ) -> Tensor:
        """carry: J^T lam of the step at `high`."""
        j = jacobian if structure.size == 1 else jacobian.mT
        g = torch.cat([g[:, :-1], (g[:, -1] + carry)[:, None]], 1)
        ahead = torch.cat([torch.zeros_like(j[:, :1]), j[:, 1:].flip(1)], 1)  # J_{t+1} in reversed time; 0 at the end
        cut = None
        if self.cut is not None:
            cut = self.cut[:, low:high]
            cut = torch.cat([torch.zeros_like(cut[:, :1]), cut[:, 1:].flip(1)], 1)
        return solve_linear(ahead, g.flip(1), torch.zeros_like(carry), cut, structure).flip(1)

    def check_adjoint(self, g: Tensor) -> None:
        """Raises NumericError where the Jacobian is not what differentiating f gives."""
        told, self.adjoint_of_before = self.adjoint_of_before, None
        if told is None:
            return
        found = g[:, 1:]
        if self.cut is not None:
            found = torch.where(self.cut[:, 1:, None], 0, found)
        error, size = (found - told).abs().nan_to_num(0, 0), torch.maximum(found.abs(), told.abs()).nan_to_num(0, 0)
        if self.steps > 1 and error.max() > WRONG * size.max():
            raise NumericError(
                f"newton: the Jacobian ({self.structure.kind}) is not the step's: off by {float(error.max()):.2g} of "
                f"{float(size.max()):.2g}, gradients would be wrong; give the structure and `linearise` that it has"
            )


def solve_linear(jacobian: Tensor, r: Tensor, start: Tensor, cut: Tensor | None, structure: Structure) -> Tensor:
    """d_t = J_t d_{t-1} + r_t in the blocks of the structure. r (B, T, N), start (B, N)."""
    if structure.size == 1:
        return linear_scan(jacobian, r, start, reset=cut)[0]
    split = structure.split
    return structure.join(block_scan(jacobian.contiguous(), split(r), split(start), reset=cut)[0])


class _Implicit(torch.autograd.Function):
    """The solution h of h_t = f(h_{t-1}, u_t), given z_t = f at the solution with its h_{t-1} held fixed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, jacobian: Tensor | None, run: _Run) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(z, h, jacobian)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, h, jacobian = ctx.saved_tensors
        with torch.no_grad():
            lam = ctx.run.adjoint(g, h, jacobian)
            ctx.run.adjoint_of_before = (lam - g)[:, :-1]  # what J_t^T lam_t is, says the Jacobian that was used
        return (_Once.apply(lam, g, z) if torch.is_grad_enabled() else lam), None, None, None


class _Once(torch.autograd.Function):
    """lam, which depends on g and z in ways that are not recorded. `once_differentiable` raises only where it is asked
    for the gradient of everything, not where a path to one input is."""

    @staticmethod
    def forward(ctx: Any, lam: Tensor, g: Tensor, z: Tensor) -> Tensor:
        return lam.view_as(lam)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        raise RuntimeError("newton is differentiable once: a second derivative needs the loop (method='loop')")


class _Checked(torch.autograd.Function):
    """h_{t-1} on its way into f. What arrives in backward is J_t^T lam_t by automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, anchor: Tensor, run: _Run) -> Tensor:
        ctx.run = run
        return before.view_as(before)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.run.check_adjoint(g.detach())
        return g, None, None
