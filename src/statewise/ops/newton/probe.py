"""Which numbers of the next state depend on which of this one, found by trying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core import leaves, tree_map
from .structure import Layout, Step, Structure, pushed

LARGEST = 1024  # state of which every number is tried; of a larger one so many are
SAME = 1e-9  # relative difference of two float64 Jacobians that counts as none


@dataclass(frozen=True)
class Probed:
    """What a step does to its state, as far as some random states and inputs show."""

    numbers: int  # in a state
    structure: Structure
    affine: bool  # the Jacobian does not depend on the state
    driven: bool  # the Jacobian depends on the input
    slope: float  # the largest number in a Jacobian

    def __str__(self) -> str:
        move = "affine in the state" if self.affine else "nonlinear in the state"
        gates = "which the input changes" if self.driven else "the same for every input"
        return f"{move}; Jacobian {self.structure.kind} ({self.numbers} numbers), {gates}"


def probe(step: Step, u: Any, states: Sequence[Any]) -> Probed | str:
    """u (P, ...) and several states of P rows, in float64: the Jacobian of every row and state, and their pattern.

    The last state must be the same in every row.

    Returns the reason where there is none to be had.
    """
    layout = Layout.of(states[0])
    numbers = layout.rows(states[0]).shape[1]
    tried = torch.arange(numbers)
    if numbers > LARGEST:
        tried = torch.randperm(numbers, generator=torch.Generator().manual_seed(0))[: LARGEST // 8].sort().values
    units = torch.nn.functional.one_hot(tried, numbers).to(layout.dtype)
    found: list[Tensor] = []
    for state in states:
        rows = layout.rows(state)
        try:
            with torch.no_grad():
                found.append(pushed(step, layout, u, rows, units.to(rows.device))[1].cpu())  # (columns, P, N)
        except (RuntimeError, NotImplementedError) as error:
            return f"no forward derivative: {' '.join(str(error).split())[:160]}"
    jacobians = torch.stack(found)  # (S, columns, P, N)
    if not jacobians.isfinite().all():
        return "a Jacobian at a random state is not finite"
    pattern = (jacobians != 0).flatten(0, 1).unflatten(0, (len(states), -1)).any(0).any(1)  # (columns, N)
    structure = _blocks(pattern) if numbers <= LARGEST else _sampled(pattern, tried)
    if structure is None:
        return f"a state of {numbers} numbers that depend on each other"
    size = float(jacobians.abs().max())
    bound = SAME * max(size, 1e-30)
    return Probed(
        numbers=numbers,
        structure=structure,
        affine=bool((jacobians - jacobians[:1]).abs().max() <= bound),
        driven=bool((jacobians[-1] - jacobians[-1, :, :1]).abs().max() > bound),
        slope=size,
    )


def _blocks(pattern: Tensor) -> Structure:
    """The connected parts, small ones put together until all are of one size."""
    numbers = len(pattern)
    linked = (pattern | pattern.T | torch.eye(numbers, dtype=torch.bool)).float()
    label = torch.arange(numbers)
    while True:  # the lowest label within reach, until none changes
        lower = torch.where(linked.bool(), label, numbers).amin(1)
        lower = lower[lower]
        if torch.equal(lower, label):
            break
        label = lower
    parts = [(label == one).nonzero()[:, 0].tolist() for one in label.unique()]
    parts.sort(key=len, reverse=True)
    size = len(parts[0]) if parts else 1
    groups: list[list[int]] = []
    for part in parts:
        home = next((g for g in reversed(groups) if len(g) + len(part) <= size), None)
        if home is None:
            groups.append(list(part))
        else:
            home += part
    if any(len(group) != size for group in groups):
        return Structure(numbers, numbers)
    return Structure.of(sorted(groups, key=min))


def _sampled(pattern: Tensor, tried: Tensor) -> Structure | None:
    """Diagonal if every number tried moves itself alone."""
    alone = torch.nn.functional.one_hot(tried, pattern.shape[1]).bool()
    return Structure(pattern.shape[1], 1) if not (pattern & ~alone).any() else None


def spread(state: Any, size: float, rng: torch.Generator) -> Any:
    """A state with random numbers of the given size added."""

    def moved(s: Tensor) -> Tensor:
        noise = torch.randn(s.shape, generator=rng, dtype=s.dtype).to(s.device)
        return s + size * noise

    return tree_map(moved, state)


def floating(state: Any) -> bool:
    return bool(leaves(state)) and all(s.is_floating_point() or s.is_complex() for s in leaves(state))
