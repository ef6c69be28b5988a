"""A step, recorded once and then run without Python: see `ops.recorded`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import RecurrentLayer, leaves, tree_map
from ..ops.opaque import is_traced
from ..ops.recorded import Program, Unrecordable, Watch, watching

FEW = 8  # rows of x up to which reading the weights is what takes the time
KEPT = 4  # records of a step: one for each batch


class _Last(NamedTuple):
    """What the last step gave."""

    program: Program
    state: Any
    leaves: list[Tensor]


def _rebuilt(tree: Any, fresh: Iterator[Tensor]) -> Any:
    """The same tree of other tensors: what tree_map does, in a third of the time."""
    if isinstance(tree, Tensor):
        return next(fresh)
    if tree is None:
        return None
    parts = [_rebuilt(part, fresh) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


class RecordedStep:
    """step of a model, recorded for each batch that it meets; as it is where it cannot be, or a gradient is wanted."""

    def __init__(self, model: RecurrentLayer[Any]):
        self.model = model
        self.programs: dict[Any, Program | str] = {}  # or why there is none
        self.last: _Last | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedStep:
        return RecordedStep(memo.get(id(self.model), self.model))

    def __call__(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        last = self.last  # of a stream that goes on nothing needs to be looked at again
        inputs = [x, *(last.leaves if last is not None and last.state is state else leaves(state))]
        if self._watched(inputs):
            return self._plain(x, state)
        key = x.shape, x.dtype
        program = self.programs.get(key)
        if program is None or (isinstance(program, Program) and not program.current()):
            program = self._record(key, x, state)
        if isinstance(program, str):
            return self._plain(x, state)
        if last is None or last.state is not state or last.program is not program:
            if not program.takes(inputs):
                return self._plain(x, state)
            inputs = program.laid_out(inputs)
        try:
            y, *after = program([x.contiguous(), *inputs[1:]])
        except IndexError:  # an id out of range: the step itself says which
            return self._plain(x, state)
        state = _rebuilt(state, iter(after))
        self.last = _Last(program, state, after)
        return y, state

    def _watched(self, inputs: Sequence[Tensor]) -> bool:
        """Whether something else than the numbers is wanted of a step."""
        return (
            is_traced(inputs[0])
            or not 0 < len(inputs[0]) <= FEW
            or self.model.training
            or watching() is not None
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
        )

    def _plain(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return type(self.model).step(self.model, x, state)

    def _record(self, key: Any, x: Tensor, state: Any) -> Program | str:
        with torch.inference_mode(False), torch.no_grad():  # where operations are seen in their parts
            inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in (x, *leaves(state))]
            _, *given = inputs
            left = iter(given)
            with Watch() as watched:
                y, after = self._plain(inputs[0], tree_map(lambda _: next(left), state))
        outputs = [y, *leaves(after)]
        made: Program | str
        try:
            if [t.shape for t in outputs[1:]] != [t.shape for t in given]:
                raise Unrecordable("the state changes its shape")
            made = Program(self.model, watched, inputs, outputs)
            if not all(map(_near, made(inputs), outputs)):
                raise Unrecordable("the record gives other numbers")
        except Unrecordable as error:
            made = str(error)
        while len(self.programs) >= KEPT:
            del self.programs[next(iter(self.programs))]
        self.programs[key] = made
        return made


def _near(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by rounding alone: at most 1e-4 of the largest finite number."""
    size = float(want.abs().nan_to_num(posinf=0.0).max()) if want.numel() else 0.0
    return got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-4 * size, equal_nan=True)
