"""A user's own cell, run in parallel: what its recurrence is like is found by trying, how to run it by measuring."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core import Cell, UsageError, leaves, tree_map
from ..core.layer import weight_of
from ..ops.newton import Diagnostics, Layout, Structure, by_tangents, default_tolerance, newton, watched
from ..ops.newton.probe import Probed, floating, probe, spread
from ..ops.recorded_loop import recorded_loop, why_not

Method = Literal["auto", "scan", "newton", "quasi", "recorded", "own", "loop"]
ROWS, STEPS = 3, 48  # of the random inputs that a cell is tried on
FEW = 8  # steps that the recorded loop is compared over: it rounds in its own way, which a chaotic cell multiplies
FAR = 64  # outputs may differ from the loop's by so many tolerances: decode may stretch what the states differ by


@dataclass(frozen=True)
class Cost:
    """Seconds of a call with B rows and T steps: fixed + step T + row B T, as measured on this machine."""

    fixed: float
    step: float
    row: float

    def __call__(self, batch: int, steps: int) -> float:
        return self.fixed + self.step * steps + self.row * batch * steps


@dataclass
class Plan:
    """How a cell is run, and why."""

    asked: str
    tolerance: float | None
    methods: dict[str, str]  # what could run it, and how
    refused: dict[str, str]  # what could not, and why
    probed: Probed | None
    checked: str = "not verified"
    costs: dict[tuple[str, bool], Cost] = field(default_factory=dict)


_measured: dict[Any, Cost] = {}  # costs of cells of one kind and size, for the life of the process


class Parallelized(Cell[Any]):
    """h_t = f(h_{t-1}, u_t) of a given cell, for all times at once; made by `parallelize`.

    Parameters, buffers, their names, the state and `step` are those of the cell, which it shares.
    """

    cell: Cell[Any]
    plan: Plan

    def __init__(
        self, cell: Cell[Any], *, method: Method = "auto", tolerance: float | None = None, verify: bool = True
    ):
        super().__init__()
        if not isinstance(cell, Cell):
            raise UsageError(f"parallelize: got a {type(cell).__name__}; expected a Cell: a class with a transition")
        if method not in get_args(Method):
            raise UsageError(f"parallelize: method {method!r}; expected one of {', '.join(get_args(Method))}")
        if cell.vocab:
            raise UsageError(f"parallelize: {type(cell).__name__} takes ids; wrap the cell behind its embedding")
        # the cell's own tables, so that names in the state_dict stay what they were
        self.__dict__["cell"] = cell
        self._parameters, self._buffers, self._modules = cell._parameters, cell._buffers, cell._modules
        self._non_persistent_buffers_set = cell._non_persistent_buffers_set
        self.training, self.traits = cell.training, cell.traits
        self.width, self.out_width = cell.width, cell.out_width
        self.__dict__["plan"] = _plan(cell, method, tolerance)
        if verify:
            self._verify()

    def initial_state(self, batch: int) -> Any:
        return self.cell.initial_state(batch)

    def encode(self, x: Tensor) -> Any:
        return self.cell.encode(x)

    def transition(self, u: Any, state: Any) -> tuple[Any, Any]:
        return self.cell.transition(u, state)

    def decode(self, o: Any, x: Tensor) -> Tensor:
        return self.cell.decode(o, x)

    def train(self, mode: bool = True) -> Parallelized:
        self.cell.train(mode)
        self.training = mode
        return self

    def scan(self, u: Any, state: Any, reset: Tensor | None, lengths: Tensor | None) -> tuple[Any, Any]:
        if self.plan.asked == "auto" and torch.compiler.is_compiling():
            return self._run("loop", u, state, reset, lengths)  # nothing can be timed in there
        batch, steps = leaves(u)[0].shape[:2]
        return self._run(self.choose(batch, steps), u, state, reset, lengths)

    def choose(self, batch: int, steps: int) -> str:
        """The method for inputs of this size: the cheapest by what was measured here."""
        if self.plan.asked != "auto":
            return self.plan.asked
        if len(self.plan.methods) == 1:
            return next(iter(self.plan.methods))
        seconds = self.predict(batch, steps)
        return min(seconds, key=lambda name: seconds[name])

    def predict(self, batch: int, steps: int) -> dict[str, float]:
        """Seconds that each method would take, backward included where gradients are on. Measures when first asked."""
        train = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        for name in self.plan.methods:
            if (name, train) not in self.plan.costs:
                key = (*self._kind(), name, train)
                if key not in _measured:
                    _measured[key] = self._measure(name, train)
                self.plan.costs[name, train] = _measured[key]
        return {name: self.plan.costs[name, train](batch, steps) for name in self.plan.methods}

    def explain(self, batch: int = 8, steps: int = 1024) -> str:
        """What the recurrence is like, which methods could run it, what they would cost, and which would be taken."""
        plan, cell = self.plan, self.cell
        lines = [f"{type(cell).__name__}: {plan.probed or 'a state that could not be tried'}"]
        with torch.enable_grad():
            chosen = self.choose(batch, steps)
            seconds = self.predict(batch, steps) if plan.asked == "auto" else {}
        for name, how in plan.methods.items():
            cost = f", {1e3 * seconds[name]:.3g} ms" if name in seconds else ""
            lines.append(f"  {name:<9}{how}{cost}{'  <- this one' if name == chosen else ''}")
        lines += [f"  {name:<9}no: {why}" for name, why in plan.refused.items()]
        if seconds:
            lines.append(f"  predicted for a training step of x ({batch}, {steps}, {self.width}) on this machine")
        elif plan.asked != "auto":
            lines.append(f"  {plan.asked} was asked for")
        lines.append(f"  {plan.checked}")
        return "\n".join(lines)

    def diagnose(self, x: Tensor, state: Any = None, **masks: Tensor) -> list[Diagnostics]:
        """What Newton's method did in one forward; empty where another method ran."""
        with watched() as found:
            self(x, state, **masks)
        return found

    def _run(
        self, method: str, u: Any, state: Any, reset: Tensor | None, lengths: Tensor | None, **more: Any
    ) -> tuple[Any, Any]:
        if method == "own":
            return self.cell.scan(u, state, reset, lengths)
        if method == "recorded":
            return recorded_loop(self.cell, u, state, reset, lengths)
        if method == "loop":
            return Cell.scan(self, u, state, reset, lengths)
        assert self.plan.probed is not None
        structure, numbers = self.plan.probed.structure, self.plan.probed.numbers
        if method == "quasi":
            structure = Structure(numbers, 1, exact=structure.size == 1)
        o, last, _ = newton(
            self.cell.transition, u, state, structure=structure, linearise=_analytic(self.cell, state, method),
            fresh=self.cell.initial_state(leaves(u)[0].shape[0]), reset=reset, lengths=lengths,
            tolerance=self.plan.tolerance, affine=method == "scan", **more,
        )  # fmt: skip
        return o, last

    def _kind(self) -> tuple[Any, ...]:
        weight = weight_of(self)
        shapes = tuple((n, tuple(p.shape)) for n, p in self.named_parameters())
        place = (weight.dtype, str(weight.device)) if weight is not None else ()
        return type(self.cell), shapes, self.width, place, torch.get_num_threads(), self.plan.tolerance

    def _inputs(self, batch: int, steps: int, seed: int = 0) -> Tensor:
        weight = weight_of(self)
        x = torch.randn(batch, steps, self.width, generator=torch.Generator().manual_seed(seed))
        return x if weight is None else x.to(weight.device, weight.dtype.to_real())

    def _measure(self, method: str, train: bool) -> Cost:
        """From calls of three sizes, the best of a few each."""
        few, many = (8, 24) if method in ("loop", "own") else (128, 512)
        alone = self._seconds(method, 1, few, train), self._seconds(method, 1, many, train)
        crowd = self._seconds(method, 9, many, train)
        row = max(0.0, (crowd - alone[1]) / (8 * many))
        step = max(0.0, (alone[1] - alone[0]) / (many - few) - row)
        return Cost(max(0.0, alone[0] - few * (step + row)), step, row)

    def _seconds(self, method: str, batch: int, steps: int, train: bool) -> float:
        x, best = self._inputs(batch, steps), float("inf")
        parameters = [p for p in self.parameters() if p.requires_grad]
        with torch.set_grad_enabled(train):
            for _ in range(4):
                begin = time.perf_counter()
                o, last = self._run(method, self.encode(x), self.initial_state(batch), None, None)
                if train:
                    total = sum(t.real.sum() for t in (*leaves(o), *leaves(last)) if t.requires_grad)
                    if isinstance(total, Tensor):
                        torch.autograd.grad(total, parameters, allow_unused=True)
                if x.is_cuda:
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - begin)
        return best

    def _verify(self) -> None:
        """Compare every parallel method with the loop on random input. Raises UsageError with the difference."""
        names = [n for n in self.plan.methods if n != "loop" and self.plan.asked in ("auto", n)]
        if not names:
            return
        x, told = self._inputs(ROWS, STEPS), []
        reset = torch.zeros(ROWS, STEPS, dtype=torch.bool, device=x.device)
        reset[1, STEPS // 2] = True
        given = reset if self.traits.resets else None
        with torch.no_grad():
            u, first = self.encode(x), self.initial_state(ROWS)
            want_o, want = self._run("loop", u, first, given, None)
            for name in names:
                with watched() as found:
                    o, last = self._run(name, u, first, given, None)
                pairs = zip((*leaves(o), *leaves(last)), (*leaves(want_o), *leaves(want)), strict=True)
                if name == "recorded":
                    pairs = zip(*([t[:, :FEW] for t in leaves(tree)] for tree in (o, want_o)), strict=True)
                error = max(_difference(a, b) for a, b in pairs)
                allowed = FAR * (self.plan.tolerance or default_tolerance(_real_dtype(first)))
                if not error <= allowed:
                    raise UsageError(
                        f"parallelize: {type(self.cell).__name__} by {name!r} differs from its loop by {error:.2g} "
                        f"(allowed {allowed:.2g}); a transition must be pure and treat each row by itself"
                    )
                more = f" in {sum(found[0].iterations)} iterations" if found and found[0].iterations else ""
                told.append(f"{name} differs from the loop by {error:.1g}{more}")
        self.plan.checked = f"verified over {STEPS} steps: {'; '.join(told)}"


def parallelize(
    cell: Cell[Any], method: Method = "auto", *, tolerance: float | None = None, verify: bool = True
) -> Parallelized:
    """The same layer, running in parallel over time.

    cell: any `Cell`: a class with a transition and no more. Its parameters are shared, under the same names. A method
    `jacobian(u, state)` of its own, (M, N) or (M, G, n, n) for the blocks found, saves deriving it.
    method: "scan" where the transition is affine in the state, one linear recurrence; "newton", see
    `statewise.ops.newton`; "quasi", Newton's method with the diagonal of the Jacobian; "recorded", the loop as one
    compiled call, see `statewise.ops.recorded_loop`; "own", the scan that the cell brings; "loop"; or "auto": for each
    size of input the one that is cheapest by what was measured here.
    tolerance: how near to the loop, 1e-6 in float32 and 1e-10 in float64 unless given. What does not converge is
    computed by the loop: no method returns anything else than the loop would.
    verify: compare with the loop once, on random input.

    Raises UsageError for what is no Cell, a method that cannot run this one, with the reason, or a difference.
    Since "auto" measures, runs that must repeat to the bit should name a method.
    """
    return Parallelized(cell, method=method, tolerance=tolerance, verify=verify)


def _plan(cell: Cell[Any], method: str, tolerance: float | None) -> Plan:
    found = _examine(cell)
    methods, refused = {}, {}
    if isinstance(found, Probed):
        kind = found.structure.kind
        if found.affine:
            methods["scan"] = f"one linear recurrence, {kind}"
        else:
            refused["scan"] = "the next state is not affine in this one"
        if not found.affine or method == "newton":
            methods["newton"] = f"Newton's method, Jacobian {kind}"
        if found.structure.size > 1 and method == "quasi":
            methods["quasi"] = f"Newton's method with the diagonal of the Jacobian, which is {kind}"
        elif method == "quasi":
            methods["quasi"] = "Newton's method: the Jacobian is diagonal"
    else:
        refused |= dict.fromkeys(("scan", "newton"), found)
    if type(cell).scan is not Cell.scan:
        methods["own"] = "the scan that the cell brings"
    else:
        refused["own"] = "the cell has no scan of its own"
    reason = _recordable(cell) if method in ("auto", "recorded") else "not tried"
    if reason is None:
        methods["recorded"] = "the loop, recorded and run as one compiled call"
    else:
        refused["recorded"] = reason
    methods["loop"] = "one step after another"
    if method not in ("auto", *methods):
        raise UsageError(f"parallelize: {type(cell).__name__} cannot run by {method!r}: {refused.get(method, found)}")
    return Plan(method, tolerance, methods, refused, found if isinstance(found, Probed) else None)


def _recordable(cell: Cell[Any]) -> str | None:
    """Why the recorded loop cannot run it, or None."""
    weight = weight_of(cell)
    x = torch.randn(ROWS, STEPS, cell.width, generator=torch.Generator().manual_seed(0))
    x = x if weight is None else x.to(weight.device, weight.dtype.to_real())
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        return why_not(cell, cell.encode(x), cell.initial_state(ROWS))


def _examine(cell: Cell[Any]) -> Probed | str:
    """What the transition does to its state, in float64; or the reason why only the loop can run it."""
    if not floating(cell.initial_state(1)):
        return "the state holds no numbers, or whole ones"
    rng, real = torch.Generator().manual_seed(0), copy.deepcopy(cell).double()
    weight = weight_of(real)
    x = torch.randn(ROWS, 4, cell.width, generator=rng, dtype=torch.float64)
    x = x if weight is None else x.to(weight.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        us = real.encode(x)
        warm = start = real.initial_state(ROWS)
        for t in range(3):
            _, warm = real.transition(tree_map(lambda leaf, t=t: leaf[:, t], us), warm)  # type: ignore[misc]
        u = tree_map(lambda leaf: leaf[:, 3], us)
        first, second = (leaves(real.transition(u, warm)[1]) for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return "two equal calls of transition differ: does it draw random numbers?"
        states = [start, warm, *(spread(warm, size, rng) for size in (0.3, 1.0, 4.0))]
        # rows of one state under several inputs, so that what the input does shows apart from what the state does
        states += [tree_map(lambda s: s[:1].expand_as(s).contiguous(), states[3])]
        found = probe(real.transition, u, states)
        if isinstance(found, Probed) and hasattr(real, "jacobian"):
            _check_jacobian(real, found, u, states[3])
        return found


def _check_jacobian(cell: Any, found: Probed, u: Any, state: Any) -> None:
    """Raises UsageError where the cell's own `jacobian` is not what differentiating its transition gives."""
    layout = Layout.of(state)
    _, want = by_tangents(cell.transition, layout, found.structure)(u, layout.rows(state))
    got = cell.jacobian(u, state)
    shape = tuple(want.shape) if found.structure.size > 1 else (len(want), found.numbers)
    if got.shape != shape:
        raise UsageError(
            f"parallelize: jacobian of {type(cell).__name__} is {tuple(got.shape)}; expected {shape}, "
            f"{found.structure.kind}"
        )
    error = float((got - want).abs().max())
    if not error <= 1e-6 * max(1.0, float(want.abs().max())):
        raise UsageError(f"parallelize: jacobian of {type(cell).__name__} is off by {error:.2g}")


def _analytic(cell: Cell[Any], state: Any, method: str) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None:
    """f and its Jacobian from the cell's own `jacobian`, where it has one."""
    given = getattr(cell, "jacobian", None)
    if given is None or method == "quasi":
        return None
    layout = Layout.of(state)

    def linearise(u: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        tree = layout.tree(h)
        return layout.rows(cell.transition(u, tree)[1]), given(u, tree)

    return linearise


def _difference(got: Tensor, want: Tensor) -> float:
    if not got.numel():
        return 0.0
    error = (got - want).abs() / (1 + want.abs())
    return float(torch.where(got == want, 0, error).max())


def _real_dtype(state: Any) -> torch.dtype:
    return leaves(state)[0].dtype.to_real()
