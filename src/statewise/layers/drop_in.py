"""RNN, LSTM and GRU with torch.nn's arguments, parameter names, layouts and numbers, on our own recurrences.

Beyond torch.nn: torch.compile(fullgraph=True) works through them, time and batch may be empty, and `layer()` gives the
same weights as a RecurrentLayer: streaming, resets, lengths, saved states.
"""

from __future__ import annotations

import abc
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..core import RecurrentLayer, UsageError, check_input, clear_past_end, wide
from ..core.layer import WRONG_CALL, check_step
from ..ops.gated_loop import elman_loop, elman_step, gru_loop, gru_step, lstm_loop, lstm_step
from .bidirectional import backward_in_time

State = tuple[Tensor, ...]  # (h,) or (h, c)


class InputError(UsageError, RuntimeError):
    """Also a RuntimeError, since that is what torch.nn raises for a shape that does not fit."""


class _DropIn(nn.Module, abc.ABC):
    """What the three share: parameters, layouts, layers and directions. The recurrence is the subclass's."""

    gates: int
    weight_ih_l0: nn.Parameter  # and so on: torch.nn's names

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Any,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        _check_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        rows, out = self.gates * hidden_size, proj_size or hidden_size
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                width = input_size if layer == 0 else out * (2 if bidirectional else 1)
                shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, width), "weight_hh": (rows, out)}
                if bias:
                    shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
                if proj_size:
                    shapes["weight_hr"] = (proj_size, hidden_size)
                for name, shape in shapes.items():
                    self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @abc.abstractmethod
    def _loop(self, x: Tensor, state: State, weights: Any, **masks: Any) -> tuple[Tensor, State]:
        """One layer, one direction over (B, T, D)."""

    @abc.abstractmethod
    def _step(self, x: Tensor, state: State, weights: Any) -> State:
        """The same for one step (B, D)."""

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(hidden_size), as torch.nn: the same seed gives the same numbers."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing to do; torch.nn has it."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """Parameters of each layer and direction, in torch.nn's order."""
        return [
            [w for w in self._weights(suffix) if w is not None]
            for layer in range(self.num_layers)
            for suffix in self._suffixes(layer)
        ]

    def layer(self) -> TorchLayer:
        """The same parameters, shared, as a RecurrentLayer. Raises UsageError if bidirectional: that cannot stream."""
        return TorchLayer(self)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As torch.nn: input (T, B, D), (B, T, D) with batch_first, (T, D), or packed -> the same form, last states.

        Raises InputError (a UsageError and a RuntimeError) for shapes and dtypes that do not fit.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        name = type(self).__name__
        if input.dim() not in (2, 3):
            raise InputError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0)
        x = x if self.batch_first or not batched else x.transpose(0, 1)
        state = self._first_state(x, hx, None if batched else 1)
        y, state = self._run(x, state, None, None)
        y = y if self.batch_first or not batched else y.transpose(0, 1)
        last = [torch.stack(part) for part in zip(*state, strict=True)]
        if not batched:
            y, last = y.squeeze(0), [part.squeeze(1) for part in last]
        return y, self._hidden(last, x.dtype)

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        x, lengths = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes), batch_first=True)
        order, back = input.sorted_indices, input.unsorted_indices
        if hx is not None and order is not None:
            parts = [part.index_select(1, order) for part in self._parts(hx)]
            hx = parts[0] if len(parts) == 1 else tuple(parts)
        y, state = self._run(x, self._first_state(x, hx, None), None, lengths, packed=True)
        data = pack_padded_sequence(y, lengths, batch_first=True).data
        last = [torch.stack(part) for part in zip(*state, strict=True)]
        if back is not None:
            last = [part.index_select(1, back) for part in last]
        return PackedSequence(data, input.batch_sizes, order, back), self._hidden(last, x.dtype)

    def _run(
        self, x: Tensor, state: list[State], reset: Tensor | None, lengths: Tensor | None, *, packed: bool = False
    ) -> tuple[Tensor, list[State]]:
        """All layers over x (B, T, D). state: (h,) or (h, c) of each layer and direction, (B, N), float32 or wider.

        packed: lengths are above 0, and dropout is to fall as it does on a packed sequence.
        """
        last: list[State] = []
        ends = None if lengths is None else lengths.to(x.device)
        for layer in range(self.num_layers):
            outs = []
            for suffix in self._suffixes(layer):
                back = suffix.endswith("_reverse")
                y, new = self._loop(
                    backward_in_time(x, ends) if back else x,
                    state[len(last)],
                    self._weights(suffix),
                    reset=reset,
                    lengths=ends,
                )
                outs.append(backward_in_time(y, ends) if back else y)
                last.append(new)
            x = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
            if self.training and self.dropout and layer < self.num_layers - 1:
                x = self._drop(x, lengths if packed else None)
        return x, last

    def _drop(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Dropout in the memory order of torch.nn, so that one seed drops the same units."""
        if lengths is None:
            return F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return pad_packed_sequence(
            packed._replace(data=F.dropout(packed.data, self.dropout)), batch_first=True, total_length=x.shape[1]
        )[0]

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def _weights(self, suffix: str) -> tuple[Tensor | None, ...]:
        """w_ih, w_hh, b_ih, b_hh and, with a projection, w_hr: the arguments of the loops."""
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"] + (["weight_hr"] if self.proj_size else [])
        return tuple(getattr(self, name + suffix, None) for name in names)

    def _sizes(self) -> tuple[int, ...]:
        """Width of each part of the state."""
        return (self.hidden_size,)

    def _parts(self, hx: Any) -> tuple[Tensor, ...]:
        return (hx,)

    def _hidden(self, parts: list[Tensor], dtype: torch.dtype) -> Any:
        return parts[0].to(dtype)

    def _first_state(self, x: Tensor, hx: Any, unbatched: int | None) -> list[State]:
        """Check x (B, T, D) and hx, and cut hx into layers and directions."""
        name, weight = type(self).__name__, self.weight_ih_l0
        if x.shape[-1] != self.input_size:
            raise InputError(
                f"{name}: input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(f"{name}: input is {x.dtype}, the weights {weight.dtype}; convert one of them")
        count = self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            zeros = [x.new_zeros(x.shape[0], size, dtype=wide(x.dtype)) for size in self._sizes()]
            return [tuple(zeros)] * count
        parts = []
        for i, (part, size) in enumerate(zip(self._parts(hx), self._sizes(), strict=True)):
            want = (count, size) if unbatched else (count, x.shape[0], size)
            if tuple(part.shape) != want:
                which = f"hidden[{i}]" if len(self._sizes()) > 1 else "hidden"
                raise InputError(f"{name}: Expected {which} size {want}, got {list(part.shape)}")
            parts.append((part.unsqueeze(1) if unbatched else part).to(wide(x.dtype)).unbind(0))
        return list(zip(*parts, strict=True))

    def extra_repr(self) -> str:
        shown = {
            "proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
            "nonlinearity": "tanh",
        }  # fmt: skip
        more = [f"{k}={getattr(self, k)}" for k, usual in shown.items() if getattr(self, k, usual) != usual]
        return ", ".join([str(self.input_size), str(self.hidden_size), *more])


class RNN(_DropIn):
    """h_t = tanh(W x_t + b + R h_{t-1} + c), or relu: drop-in for torch.nn.RNN."""

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise UsageError(f"RNN: Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )
        self.nonlinearity = nonlinearity

    def _loop(self, x: Tensor, state: State, weights: Any, **masks: Any) -> tuple[Tensor, State]:
        y, h = elman_loop(x, *state, *weights, nonlinearity=self.nonlinearity, **masks)
        return y, (h,)

    def _step(self, x: Tensor, state: State, weights: Any) -> State:
        return (elman_step(x, *state, *weights, nonlinearity=self.nonlinearity),)


class GRU(_DropIn):
    """r, z = s(W x + R h),  n = tanh(W_n x + r R_n h),  h' = (1 - z) n + z h: drop-in for torch.nn.GRU."""

    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )

    def _loop(self, x: Tensor, state: State, weights: Any, **masks: Any) -> tuple[Tensor, State]:
        y, h = gru_loop(x, *state, *weights, **masks)
        return y, (h,)

    def _step(self, x: Tensor, state: State, weights: Any) -> State:
        return (gru_step(x, *state, *weights),)


class LSTM(_DropIn):
    """i, f, g, o = W x + R h,  c' = s(f) c + s(i) tanh(g),  h' = W_hr s(o) tanh(c'): drop-in for torch.nn.LSTM."""

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )

    def _loop(self, x: Tensor, state: State, weights: Any, **masks: Any) -> tuple[Tensor, State]:
        y, h, c = lstm_loop(x, *state, *weights, **masks)
        return y, (h, c)

    def _step(self, x: Tensor, state: State, weights: Any) -> State:
        return lstm_step(x, *state, *weights)

    def _sizes(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size

    def _parts(self, hx: Any) -> tuple[Tensor, ...]:
        h, c = hx
        return h, c

    def _hidden(self, parts: list[Tensor], dtype: torch.dtype) -> Any:
        return tuple(part.to(dtype) for part in parts)


class StackState(NamedTuple):
    """The state of an LSTM of L layers. An RNN's or GRU's is h alone."""

    h: Tensor  # (B, L, N), or (B, L, P) where it projects
    c: Tensor  # (B, L, N)


class TorchLayer(RecurrentLayer[Any]):
    """A drop-in RNN, GRU or LSTM, its layers stacked, as a layer of the protocol. It shares the drop-in's parameters.

    h_t^l = cell(h_t^{l-1}, h_{t-1}^l) for layers l = 1 .. L, with h_t^0 = x_t; y_t = h_t^L.
    The state is h (B, L, N), or StackState for an LSTM. `to_torch` and `from_torch` turn it to torch.nn's hx and back.
    """

    def __init__(self, drop_in: _DropIn):
        super().__init__()
        if drop_in.bidirectional:
            raise UsageError(
                f"{type(drop_in).__name__}: bidirectional=True reads the future and cannot stream; "
                "statewise.layers.Bidirectional is its protocol"
            )
        self.drop_in = drop_in
        self.width, self.out_width = drop_in.input_size, drop_in.proj_size or drop_in.hidden_size

    def initial_state(self, batch: int) -> Any:
        weight, cell = self.drop_in.weight_ih_l0, self.drop_in
        shapes = [(batch, cell.num_layers, size) for size in cell._sizes()]
        return _packed_up([weight.new_zeros(shape, dtype=wide(weight.dtype)) for shape in shapes])

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        check_input(self, x, state, reset, lengths)
        x = x if lengths is None else clear_past_end(x, lengths.to(x.device))
        state = self.initial_state(x.shape[0]) if state is None else state
        y, last = self.drop_in._run(x, self._by_layer(state), reset, lengths)
        return y, _packed_up([torch.stack(part, 1) for part in zip(*last, strict=True)])

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        cell, y, last = self.drop_in, x, []
        if not x.is_floating_point():  # which answers would be rounded to
            check_step(self, x, state)
        try:
            for layer, before in enumerate(self._by_layer(state)):
                if layer and cell.training:
                    y = F.dropout(y, cell.dropout)
                last.append(cell._step(y, before, cell._weights(f"_l{layer}")))
                y = last[-1][0].to(x.dtype)
            return y, _packed_up([torch.stack(part, 1) for part in zip(*last, strict=True)])
        except WRONG_CALL:
            check_step(self, x, state)
            raise

    def to_torch(self, state: Any) -> Any:
        """The state as torch.nn's hx: h_n (L, B, N), for an LSTM (h_n, c_n)."""
        parts = [part.transpose(0, 1).contiguous() for part in self._parts(state)]
        return self.drop_in._hidden(parts, self.drop_in.weight_ih_l0.dtype)

    def from_torch(self, hx: Any) -> Any:
        """torch.nn's hx as a state."""
        parts = [part.transpose(0, 1) for part in self.drop_in._parts(hx)]
        return _packed_up([part.to(wide(part.dtype)).contiguous() for part in parts])

    def _parts(self, state: Any) -> State:
        return (state,) if isinstance(state, Tensor) else tuple(state)

    def _by_layer(self, state: Any) -> list[State]:
        return list(zip(*(part.unbind(1) for part in self._parts(state)), strict=True))


def _packed_up(parts: list[Tensor]) -> Any:
    return parts[0] if len(parts) == 1 else StackState(*parts)


def _check_arguments(
    input_size: Any, hidden_size: Any, num_layers: Any, bias: Any, batch_first: Any, dropout: Any, proj_size: Any
) -> None:
    for name, flag in {"bias": bias, "batch_first": batch_first}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
    for name, size in {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}.items():
        if not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise UsageError(f"{name} must be greater than zero, got {size}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise UsageError(f"dropout should be a number in range [0, 1], got {dropout!r}")
    if dropout > 0 and num_layers == 1:
        warnings.warn(f"dropout acts between layers, so dropout={dropout} does nothing with num_layers=1", stacklevel=4)
    if not 0 <= proj_size < hidden_size:
        raise UsageError(f"proj_size {proj_size}; expected 0 (no projection) to hidden_size - 1 = {hidden_size - 1}")
