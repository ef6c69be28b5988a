"""What a layer is and what it costs: its equation, its state, how the state moves, operations a token."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..core import RecurrentLayer, UsageError, leaves, names, nbytes, tree_map
from ..ops import observe, use_backend
from ..ops.newton import watched
from .dynamics import SYSTEMS, as_leaf, dynamics, real


@dataclass(frozen=True)
class Facts:
    """Read off a layer by running it on a few inputs."""

    equation: str
    state: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # leaf to dtype and shape without the batch
    state_bytes: int  # of one stream
    grows: bool  # the state holds more after more steps: a cache
    transition: str  # in words
    stream: int  # operations of one step of one row
    forward: int  # operations a token over `steps` tokens of one row, by the torch backends
    train: int  # the same with the backward pass
    steps: int


def facts(layer: RecurrentLayer[Any], *, steps: int = 64) -> Facts:
    """Facts of a layer, from one row of `steps` steps. An operation is one addition or one multiplication."""
    state = layer.initial_state(1)
    x = _input(layer, steps)
    with counted() as count, torch.no_grad():
        _, after = layer.step(x[:, 0], state)
    stream = count[0]
    with counted() as count, torch.no_grad():
        layer(x)
    forward = count[0]
    with counted() as count:
        layer(x)[0].float().sum().backward()
    layer.zero_grad(set_to_none=True)
    shapes = {n: (leaf.dtype, tuple(leaf.shape[1:])) for n, leaf in zip(names(state), leaves(state), strict=True)}
    return Facts(
        equation=(inspect.getdoc(layer) or "").split("\n\n")[0],
        state=shapes,
        state_bytes=nbytes(state),
        grows=nbytes(after) > nbytes(state),
        transition=transition(layer, x[:, :8]),
        stream=stream,
        forward=forward // steps,
        train=count[0] // steps,
        steps=steps,
    )


def transition(layer: RecurrentLayer[Any], x: Tensor) -> str:
    """How h_t depends on h_{t-1}, in words, from what the layer computes on x."""
    if layer.traits.linear_in_input and layer.traits.time_invariant:
        states, fed = reach(layer)
        kind = {1: "diagonal", states: "dense"}.get(fed, f"each state feeds at most {fed}")
        return f"constant in time, {kind}; {states} real states"
    try:
        found = dynamics(layer, x)
    except UsageError:
        called: list[str] = []
        noted = observe(lambda op, *_: called.append(op.name))
        with noted, use_backend("reference"), watched() as solved, torch.no_grad():
            layer(x)
        if solved:  # what the linear scans within solve is not linear
            return "not linear in the state (newton)"
        linear = [name for name in called if name in SYSTEMS]
        if linear:
            return f"several recurrences: {', '.join(linear)}"
        return f"not linear in the state{f' ({called[0]})' if called else ''}"
    _, _, heads, states = found.transition.shape[:4]
    channels = found.x.shape[-1]
    if not found.diagonal:
        most = found.eigenvalues().real.median(-1).values  # of a multiple of the identity plus a low rank, the multiple
        rest = found.transition - most[..., None, None] * torch.eye(states, dtype=found.transition.dtype)
        rank = int(torch.linalg.matrix_rank(rest, atol=1e-9).max())
        if 2 * rank < states:
            kind = f"a multiple of the identity plus rank {rank}"
        else:
            kind = "diagonal plus rank 1" if found.op == "dplr_scan" else "dense"
    elif bool((found.transition == 1).all()):
        kind = "the identity: nothing is forgotten"
    elif states > 1 and bool((found.transition == found.transition[..., :1]).all()):
        kind = "one decay for all states of a system"
    else:
        kind = f"diagonal, {'complex' if found.transition.is_complex() else 'real'}"
    fixed = bool((found.transition == found.transition[:, :1]).all())
    return (
        f"{'constant in time' if fixed else 'chosen by the input'}, {kind}; {heads} system{'s' * (heads > 1)} of "
        f"{states} state{'s' * (states > 1)}{f', {channels} copies of each' if channels > 1 else ''} ({found.op})"
    )


def reach(layer: RecurrentLayer[Any], *, most: int = 64) -> tuple[int, int]:
    """How many real states there are, and how many of them one feeds in a step, itself included: the most over
    `most` states spread over all."""
    state = tree_map(real, layer.initial_state(1))
    sizes = [leaf.numel() for leaf in leaves(state)]
    tried = torch.linspace(0, sum(sizes) - 1, min(most, sum(sizes))).long()
    units = torch.zeros(len(tried), sum(sizes)).index_put((torch.arange(len(tried)), tried), torch.tensor(1.0))
    parts = iter(units.split(sizes, 1))
    like = layer.initial_state(len(tried))
    with torch.no_grad():
        x = torch.zeros(len(tried), layer.width, dtype=next(layer.parameters()).dtype)
        _, after = layer.step(x, tree_map(lambda leaf: as_leaf(leaf, next(parts)), like))
    fed = torch.cat([real(leaf).flatten(1) for leaf in leaves(after)], 1) != 0
    others = fed.scatter(1, tried[:, None], True)  # a state that only moves on, as in a window, feeds one and is it not
    return sum(sizes), int(others.sum(1).max())


def _input(layer: RecurrentLayer[Any], steps: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    weight = next(iter(layer.parameters()), torch.empty(0))
    if layer.vocab:
        return torch.randint(layer.vocab, (1, steps), generator=rng).to(weight.device)
    return torch.randn(1, steps, layer.width, generator=rng).to(weight.device, weight.dtype)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Count the operations of what runs within, by the torch backends: one number, in a list that grows."""
    count = [0]

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            count[0] += _operations(func, args, kwargs or {}, out)
            return out

    with use_backend("torch"), Counter():
        yield count


# Operations in units of n^3: a factorisation takes 2/3, an inverse 2, an exponential some ten products.
DENSE = {"linalg_inv": 2, "linalg_solve": 2 / 3, "lu_factor": 2 / 3, "matrix_exp": 20, "eigh": 9}


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func.overloadpacket in flop_registry:
        return int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not given or not made:
        return 0
    dense = next((times for word, times in DENSE.items() if word in func.__name__), 0)
    if dense:
        return int(dense * given[0].shape[-1] * given[0].numel())  # times n^3 for each matrix
    if "fft" in func.__name__:
        sizes = max((t for t in (*given, *made)), key=Tensor.numel)
        return int(2.5 * sizes.numel() * math.log2(max(2, sizes.shape[-1])))
    if torch.Tag.pointwise in func.tags:
        return sum(t.numel() * (2 if t.is_complex() else 1) for t in made)
    if any(word in func.__name__ for word in ("sum", "mean", "cumsum", "cummax", "max", "norm", "prod")):
        return given[0].numel()
    return 0
