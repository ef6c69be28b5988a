"""statewise explain: what a layer is and costs, which backend would run, and why not the others."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parse import Positional, Repeated

if TYPE_CHECKING:
    import torch

    from ..core import RecurrentLayer
    from ..core.registry import LayerInfo
    from ..ops import Op


@dataclass(frozen=True)
class Options:
    """Say what a layer is and costs, which backend it or an op would take for given shapes, and why not the others."""

    what: Positional[str]
    """An op (linear_scan), a registered layer (lru), module:Class: a cell of your own and what runs it fastest; or,
    with --states, a run."""
    shape: str = ""
    """B,T,N of an op's x; B,T,H,K of the queries of one with heads; B,T,D of a layer's, or of a gated loop's, whose
    hidden width is then D too. If empty, 8,2048,512 or 4,2048,8,64."""
    dtype: str = "float32"
    """Of x, and of the layer's parameters."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""
    args: Repeated[str] = ()
    """NAME=VALUE for the layer's constructor, instead of an ordinary layer of width D."""
    states: bool = False
    """Follow the state and the loss of a run past its training length, and say whether they collapse."""
    length: int = 0
    """Of --states: how many steps; 0 for 16 times the training length."""
    out: Path | None = None
    """Of --states: draw what was followed, FILE.svg or FILE.html."""


@dataclass
class Call:
    """One kind of call that a layer makes to an op."""

    op: str
    chosen: str
    reasons: dict[str, str]
    shapes: str
    times: int


def run(options: Options) -> int:
    from ..core import ResourceError, UsageError, layers, near
    from ..core.machine import free_memory
    from ..ops import ops
    from ..report import show_bytes
    from ..training import choose_device

    if options.states:
        from .states import show_states

        show_states(options.what, options.length, options.out)
        return 0
    if options.out is not None:
        raise UsageError("--out: draws what --states follows; give both, or neither")
    importlib.import_module("statewise.layers")
    dtype, device = read_dtype(options.dtype), choose_device(options.device)
    heads = options.what in ops and len(first_shape(ops[options.what], dtype)) == 4
    text = options.shape or ("4,2048,8,64" if heads else "8,2048,512")
    shape = read_shape(text)
    need, have = 8 * math.prod(shape) * dtype.itemsize, free_memory()  # inputs, a gate, outputs and some more
    if have is not None and need > have:
        raise ResourceError(f"--shape {text} takes {show_bytes(need)}; {show_bytes(have)} are free: try less")
    if options.what in ops:
        show_op(ops[options.what], arguments_for(ops[options.what], shape, dtype, device))
        return 0
    if ":" in options.what:
        show_cell(options, shape, dtype, device)
        return 0
    if options.what not in layers:
        known = [*ops, *layers.names()]
        raise UsageError(f"no op or layer {options.what!r}; {near(options.what, known)}")
    show_layer(layers[options.what], options, shape, dtype, device)
    return 0


def read_shape(text: str) -> tuple[int, ...]:
    from ..core import UsageError

    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) < 3 or min(shape) < 0:
        raise UsageError(f"--shape {text!r}; expected at least three whole numbers, batch, time, width: 8,2048,512")
    return shape


def read_dtype(name: str) -> torch.dtype:
    import torch

    from ..core import UsageError, near

    known = ("float32", "float64", "bfloat16", "float16", "complex64", "complex128")
    if name not in known:
        raise UsageError(f"--dtype {name!r}; {near(name, known)}; one of: {', '.join(known)}")
    return getattr(torch, name)


def first_shape(op: Op, dtype: torch.dtype) -> tuple[int, ...]:
    """That of the first tensor with three dimensions or more in the op's first sample call."""
    sample = next(iter(op.samples("cpu", dtype)))
    return next(tuple(t.shape) for t in leaves(tuple(sample.values())) if t.ndim >= 3)


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors among values and tuples of values."""
    import torch

    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for part in tree for t in leaves(part)] if isinstance(tree, tuple) else []


def arguments_for(op: Op, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The op's first sample call with its batch, time and widths stretched to `shape`. Holds memory, no values.

    A size that x has not is a hidden width, or so many gates of one each: it becomes as wide as x, or so many times.
    """
    import torch

    from ..core import UsageError

    sample = next(iter(op.samples(str(device), dtype)))
    small = first_shape(op, dtype)
    if len(shape) != len(small):
        raise UsageError(f"--shape {shape}: {op.name} takes {len(small)} dimensions, as in {small}")
    sizes = {n for value in leaves(tuple(sample.values())) for n in value.shape}
    hidden = sorted(sizes - {1, *small})
    to = {n: shape[-1] * (1 if n % hidden[0] else n // hidden[0]) for n in hidden} | dict(zip(small, shape))

    def stretch(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(stretch, value))
        if not isinstance(value, torch.Tensor):
            return value
        return value.new_empty([to.get(n, n) for n in value.shape])

    return {name: stretch(value) for name, value in sample.items()}


def show_op(op: Op, arguments: dict[str, Any]) -> None:
    import torch

    from .show import table

    print(f"{op.name}: {(op.reference.__doc__ or '').strip().splitlines()[0]}")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            print(f"  {name:<6} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}")
    print()
    chosen = chosen_backend(op, (), arguments)
    table(("backend", "would it run?"), [(n, told(n, chosen, why)) for n, why in op.explain(**arguments).items()])


def chosen_backend(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    found = op.choose(None, args, kwargs)
    return getattr(found, "name", "reference")


def told(name: str, chosen: str, reason: str) -> str:
    if name == chosen:
        return "yes: this one"
    return "could, but stands behind" if reason == "ok" else f"no: {reason}"


def show_layer(
    info: LayerInfo, options: Options, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """The layer's facts, then every kind of op call that one forward makes."""
    import torch

    from ..core import UsageError
    from .check import check_arguments
    from .settings import dict_once, free

    given = {name: free(text) for name, text in dict_once(options.args, "--args").items()} or info.sized(shape[-1])
    check_arguments(info.name, info.cls, given)
    try:
        layer: RecurrentLayer[Any] = info.cls(**given).to(device=device, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{info.name}: {error}") from None
    show_facts(info, given, layer)
    if layer.vocab:
        x = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    else:
        x = torch.zeros(*shape[:2], layer.width, dtype=dtype, device=device)
    with recorded() as calls, torch.no_grad():
        layer(x)
    print(f"  one forward of x {tuple(x.shape)} {options.dtype} on {device} calls:")
    for call in calls.values():
        print(f"\n{call.op} {call.shapes}{f', {call.times} times' if call.times > 1 else ''}")
        for name, reason in call.reasons.items():
            print(f"  {name:<10} {told(name, call.chosen, reason)}")
    if not calls:
        print(f"\nno op with backends: {told_of_loop(layer, x)}")


def told_of_loop(layer: RecurrentLayer[Any], x: torch.Tensor) -> str:
    """How what calls no op with backends runs."""
    from ..core import Cell
    from ..ops.recorded_loop import why_not

    if not isinstance(layer, Cell) or loops(layer):
        return "plain torch operations" + (", one step at a time" if loops(layer) else "")
    reason = why_not(layer, layer.encode(x), layer.initial_state(len(x)))
    if reason is None:
        return "its loop, recorded and run as one compiled call"
    return f"plain torch operations (its loop is not run as one compiled call: {reason})"


def show_cell(options: Options, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """What the recurrence of a cell is like, what could run it, at which cost, and which would be taken."""
    from ..core import Cell, UsageError
    from ..layers.parallelized import parallelize
    from ..testing import examples_of
    from .check import check_arguments, load
    from .settings import dict_once, free

    cls = load(options.what)
    if not issubclass(cls, Cell):
        raise UsageError(f"{options.what} is not a Cell: only a class with a transition can be run in another way")
    given = {name: free(text) for name, text in dict_once(options.args, "--args").items()} or examples_of(cls)[0]
    check_arguments(options.what, cls, given)
    try:
        cell = cls(**given).to(device=device, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{options.what}: {error}") from None
    print(f"{options.what}({', '.join(f'{k}={v}' for k, v in given.items())}): {(cls.__doc__ or '').strip()}")
    print(parallelize(cell).explain(*shape[:2]))


def show_facts(info: LayerInfo, given: Mapping[str, Any], layer: RecurrentLayer[Any]) -> None:
    """Equation, state, transition and operations a token."""
    from ..interpret import facts
    from ..report import show_bytes, show_count

    found = facts(layer)
    parts = (f"{name} ({', '.join(map(str, size))}) {dtype}" for name, (dtype, size) in found.state.items())
    print(f"{info.name} ({info.paper})")
    for line in found.equation.splitlines():
        print(f"  {line}")
    print(f"  arguments   {', '.join(f'{k}={v}' for k, v in given.items())}")
    print(f"  parameters  {show_count(sum(p.numel() for p in layer.parameters()))}")
    print(f"  state       {show_bytes(found.state_bytes)} per stream{', and grows' if found.grows else ''}: ", end="")
    print(", ".join(parts).replace("torch.", "") or "none")
    print(f"  transition  {found.transition}")
    print(f"  streaming   {show_count(found.stream)} operations a step")
    print(
        f"  training    {show_count(found.train)} operations a token, {show_count(found.forward)} of them forward "
        f"(T = {found.steps})"
    )


def loops(layer: RecurrentLayer[Any]) -> bool:
    from ..core import Cell

    return isinstance(layer, Cell) and type(layer).scan is Cell.scan


@contextmanager
def recorded() -> Iterator[dict[Any, Call]]:
    """Note every kind of op call within the block: the same op with the same shapes counts as one kind."""
    import torch

    from ..ops import observe

    calls: dict[Any, Call] = {}

    def note(op: Op, chosen: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        shapes = ", ".join(str(shape) for shape in tensors)
        call = Call(op.name, chosen, op.explain(*args, **kwargs), shapes, 0)
        calls.setdefault((op.name, shapes, chosen), call).times += 1

    with observe(note):
        yield calls
