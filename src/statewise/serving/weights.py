"""Weights made for streaming on a CPU: read as fast as memory gives them, or rounded to 8 bits.

torch multiplies one row by a matrix at a third to a half of what memory would give; streaming at batch 1 is nothing
but that. A `StreamedWeight` stands in place of a weight, and the model stays the one that it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import NumericError, RecurrentLayer, UsageError
from ..ops.recorded import Weights, watching
from .recorded import FEW, RecordedStep

LEAST = 1 << 12  # weights: a smaller matrix is left as it is

Kind = Literal["float32", "bfloat16", "int8"]
M = TypeVar("M", bound=nn.Module)


class StreamedWeight(Tensor):
    """w (N, K) for y = x w^T, float32 to whoever asks; kept as float32, bfloat16, or int8 with w = scale_n q.

    Products of up to FEW rows go to a kernel of their own, of more to torch; looking up rows of an embedding takes
    those rows alone. In everything else it is the tensor `dense()`. No gradient reaches it.
    """

    kept: Tensor  # (N, K) float32, bfloat16 or int8
    scale: Tensor | None  # (N,) float32

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor | None) -> StreamedWeight:
        made: Any = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)
        made.kept, made.scale = values.contiguous(), scale
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, weight: Tensor, kind: Kind) -> StreamedWeight:
        """kind "int8": q = round(w / scale) within 127, scale_n = max |w_n| / 127: off by at most scale_n / 2."""
        weight = weight.detach()
        if kind != "int8":
            return cls(weight if kind == "float32" else weight.bfloat16(), None)
        if not bool(weight.isfinite().all()):
            raise NumericError("int8: a weight is not finite, and 8 bits have nothing for that")
        scale = weight.abs().amax(1) / 127
        steps = (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        return cls(steps.to(torch.int8), scale)

    def dense(self) -> Tensor:
        """The weights as a plain tensor (N, K)."""
        dense = self.kept.float()
        return dense if self.scale is None else dense * self.scale[:, None]

    @property
    def stored_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.kept, self.scale) if t is not None)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and type(args[1]) is cls:
            return args[1]._linear(*args)
        if func is Tensor.to and args[1:] == (torch.float32,) and not kwargs:
            return args[0]  # it is that already
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is F.embedding and type(args[1]) is cls and not isinstance(args[0], cls):
            return args[1]._rows(args[0])
        return func(*map(cls._plain, args), **{name: cls._plain(given) for name, given in (kwargs or {}).items()})

    @classmethod
    def _plain(cls, given: Any) -> Any:
        if type(given) in (list, tuple):
            return type(given)(map(cls._plain, given))
        return given.dense() if isinstance(given, cls) else given

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise UsageError(f"a streamed weight cannot take part in {func}; it is for step and forward in evaluation mode")

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedWeight:
        return self  # nothing changes it

    def _linear(self, x: Tensor, _: Any, bias: Tensor | None = None) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        if not 0 < rows <= FEW or x.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.dense().to(x.dtype), bias)
        watch = watching()
        if watch is not None:
            parts = x, Weights(self.kept, self.scale), bias
            return watch.note("product", parts, lambda: self._product(x, rows, bias))
        return self._product(x, rows, bias)

    def _product(self, x: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        from ..ops.recorded.in_numba.products import product

        y = product(self.kept, self.scale, x.detach().reshape(rows, -1).contiguous())
        y = y if x.ndim == 2 else y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.detach()

    def _rows(self, ids: Tensor) -> Tensor:
        watch = watching()
        if watch is not None:
            return watch.note("rows", (ids, Weights(self.kept, self.scale)), lambda: self._looked_up(ids))
        return self._looked_up(ids)

    def _looked_up(self, ids: Tensor) -> Tensor:
        found = F.embedding(ids, self.kept.detach()).float()  # checks the ids, which plain indexing would wrap
        return found if self.scale is None else found * self.scale[ids][..., None]


_FACTS = {
    getattr(Tensor, name).__get__ for name in ("dtype", "shape", "device", "requires_grad", "ndim", "layout", "is_leaf")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}


def for_streaming(model: M, *, weights: Kind = "float32") -> M:
    """A copy of a model on a CPU, in evaluation mode, whose linear maps and embeddings are read at the speed of memory.

    weights "float32": the same numbers, shared with the model, its sums in another order. "bfloat16": half of the
    bytes, each weight off by at most 1 / 256 of itself. "int8": each row of a matrix rounded to 255 levels, a quarter
    of the bytes. Biases, norms, decays and states stay as they are. A layer may name more of its parameters (N, K) in
    `multiplied`, those that its step gives to F.linear as weights and to nothing else: recurrent ones.
    The copy takes the states of the model and gives them back. Its step is recorded when it first meets a batch, of
    up to FEW rows, and then runs without Python (`recorded`): hooks on its parts are not called, and no gradient is
    kept unless its inputs ask for one. The state of an attention is then a view of a buffer with room behind it, to
    which the next step adds: writing into a state in place would change the states before it too. What cannot be
    recorded, such as a choice among experts, takes the step that it always took.
    The copy does not train, compile or export; export the model.

    Raises UsageError for another kind and for parameters that are not float32 on a CPU, NumericError for weights that
    are not finite and int8.
    """
    if weights not in get_args(Kind):
        raise UsageError(f"for_streaming: weights {weights!r}; expected one of {', '.join(get_args(Kind))}")
    for name, p in model.named_parameters():
        if p.is_floating_point() and (p.dtype != torch.float32 or p.device.type != "cpu"):
            raise UsageError(f"for_streaming: {name} is {p.dtype} on {p.device}; expected float32 on cpu")
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    done: dict[int, StreamedWeight] = {}  # a matrix may stand in several places
    for module in made.modules():
        linear = type(module) in (nn.Linear, nn.Embedding) or _is_linear(module)
        for name in ("weight",) if linear else getattr(module, "multiplied", ()):
            weight = module._parameters.get(name)
            if weight is None or weight.ndim != 2 or weight.numel() < LEAST:
                continue
            if id(weight) not in done:
                done[id(weight)] = StreamedWeight.of(weight, weights)
            del module._parameters[name]
            module.register_buffer(name, done[id(weight)])
    if isinstance(made, RecurrentLayer):
        made.step = RecordedStep(made)  # type: ignore[method-assign]
    return made


def _is_linear(module: nn.Module) -> bool:
    """A subclass of Linear, such as one that bends the result, as long as it multiplies by `weight` alone."""
    return isinstance(module, nn.Linear) and set(module._parameters) <= {"weight", "bias"}
