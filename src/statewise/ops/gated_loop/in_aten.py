"""The native kernels behind torch.nn: oneDNN or a fused loop on a CPU, cuDNN on a GPU.

One step by them has no Python in it. Over time they know neither resets nor padding, but they take packed batches. A
reset makes the rest of a row a sequence of its own, so rows are cut at their resets and the pieces run side by side:
more resets make it faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import clear_past_end
from ..opaque import is_traced
from . import cells
from .cells import no_autocast


def elman(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, last = _call(f"rnn_{nonlinearity}", x, [h0], _weights(w_ih, w_hh, b_ih, b_hh), reset, lengths)
    return h, last


def jordan_by(elman: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Where the context is the last output alone, U y = (U V) h + U b: an Elman network with R = U V.

    What of the context does not come from h (the first context, then b, nothing after a reset) enters beside x.
    """

    def jordan(
        x: Tensor,
        s0: Tensor,
        w_ih: Tensor,
        w_sh: Tensor,
        w_hy: Tensor,
        b_ih: Tensor | None = None,
        b_hy: Tensor | None = None,
        *,
        decay: float = 0.0,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], 0, len(w_hy)), s0.clone()
        wide = s0.dtype
        with no_autocast(x):
            b = torch.zeros_like(w_hy[:, 0]) if b_hy is None else b_hy
            beside = torch.cat([s0[:, None], b.to(wide).expand(x.shape[0], x.shape[1] - 1, -1)], 1)
            beside = beside if reset is None else beside.masked_fill(reset[..., None], 0)
            u, feedback, out = torch.cat([x.to(wide), beside], -1), w_sh.to(wide), w_hy.to(wide)
            h0 = s0.new_zeros(x.shape[0], len(w_ih))
            h, _ = elman(
                u, h0, torch.cat([w_ih.to(wide), feedback], 1), feedback @ out, b_ih, reset=reset, lengths=lengths
            )
            y = torch.nn.functional.linear(h, out, b.to(wide))
        if lengths is None:
            return y.to(x.dtype), y[:, -1].clone()  # a view would keep all of y in memory
        last = y[torch.arange(y.shape[0], device=y.device), (lengths - 1).clamp(min=0)]
        return clear_past_end(y, lengths).to(x.dtype), torch.where((lengths > 0)[:, None], last, s0)

    return jordan


jordan = jordan_by(elman)


def gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, last = _call("gru", x, [h0], _weights(w_ih, w_hh, b_ih, b_hh), reset, lengths)
    return h, last


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(w_ih, w_hh, b_ih, b_hh) + ([] if w_hr is None else [w_hr])
    h, h_last, c_last = _call("lstm", x, [h0, c0], weights, reset, lengths)
    return h, h_last, c_last


def elman_step(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    leak: float = 1.0,
) -> Tensor:
    """cells.elman_step, by torch's own where it can be."""
    if leak == 1 and _has_native_step(x, h, w_ih, w_hh):
        step = torch.rnn_relu_cell if nonlinearity == "relu" else torch.rnn_tanh_cell
        return step(x, h, w_ih, w_hh, b_ih, b_hh)  # type: ignore[arg-type]
    return cells.elman_step(x, h, w_ih, w_hh, b_ih, b_hh, nonlinearity=nonlinearity, leak=leak)


def gru_step(
    x: Tensor, h: Tensor, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """cells.gru_step, by torch's own where it can be."""
    if _has_native_step(x, h, w_ih, w_hh):
        return torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)  # type: ignore[arg-type]
    return cells.gru_step(x, h, w_ih, w_hh, b_ih, b_hh)


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cells.lstm_step, by torch's own where it can be."""
    if w_hr is None and _has_native_step(x, h, w_ih, w_hh):
        return torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)  # type: ignore[arg-type]
    return cells.lstm_step(x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr)


def _has_native_step(x: Tensor, h: Tensor, w_ih: Tensor | None, w_hh: Tensor) -> bool:
    """Whether there is nothing to convert and nothing but eager autograd, on a CPU, looks on."""
    return (
        w_ih is not None
        and w_hh.ndim == 2
        and x.dtype is h.dtype is w_hh.dtype is w_ih.dtype
        and x.is_cpu
        and not is_traced(x)
        and not torch.is_autocast_enabled("cpu")
    )


def _weights(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> list[Tensor]:
    """torch.nn's list for one layer: both biases or none."""
    if b_ih is None and b_hh is None:
        return [w_ih, w_hh]
    zero = w_ih.new_zeros(len(w_ih))
    return [w_ih, w_hh, zero if b_ih is None else b_ih, zero if b_hh is None else b_hh]


def _call(
    kernel: str, x: Tensor, state: list[Tensor], weights: list[Tensor], reset: Tensor | None, lengths: Tensor | None
) -> list[Tensor]:
    """[h, *last]. Traced as one opaque op: torch.compile would otherwise unroll the loop, or refuse the packing."""
    run = _opaque if torch.compiler.is_compiling() else _run
    return run(kernel, x, state, weights, reset, lengths)


def _run(
    kernel: str, x: Tensor, state: list[Tensor], weights: list[Tensor], reset: Tensor | None, lengths: Tensor | None
) -> list[Tensor]:
    dtype = state[0].dtype
    reset = None if reset is None or not reset.any() else reset
    lengths = None if lengths is None or bool((lengths == x.shape[1]).all()) else lengths
    if x.shape[0] * x.shape[1] == 0 or (lengths is not None and not lengths.any()):
        return [x.new_zeros(*x.shape[:2], state[0].shape[-1]), *(s.clone() for s in state)]
    with no_autocast(x):
        wide = [w.to(dtype) for w in weights]
        if reset is None and lengths is None:
            h, *last = _kernel(kernel, x.to(dtype), None, state, wide)
            return [h.to(x.dtype), *last]
        pack = _packing(x, reset, lengths)
        data = x[pack.row, pack.time].to(dtype).index_select(0, pack.element)
        fresh = pack.fresh[:, None]
        first = [s[pack.origin].masked_fill(fresh, 0) for s in state]
        h, *last = _kernel(kernel, data, pack.batch_sizes, first, wide)
        index = (pack.row.index_select(0, pack.element), pack.time.index_select(0, pack.element))
        y = x.new_zeros(*x.shape[:2], h.shape[-1]).index_put(index, h.to(x.dtype))
        ended = [torch.where(pack.alive[:, None], new[pack.final], old) for new, old in zip(last, state, strict=True)]
        return [y, *ended]


def _kernel(
    name: str, x: Tensor, batch_sizes: Tensor | None, state: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, ...]:
    """One layer, one direction. x (B, T, D), or (elements, D) of a packed batch of these batch sizes."""
    function: Any = getattr(torch, name)
    hx: Any = tuple(s.unsqueeze(0) for s in state)
    hx = hx if name == "lstm" else hx[0]
    train = torch.is_grad_enabled()  # cuDNN keeps what backward needs only when it is told to train
    settings = (weights, len(weights) > 3, 1, 0.0, train, False)
    if batch_sizes is None:
        y, *last = function(x, hx, *settings, True)
    else:
        y, *last = function(x, batch_sizes, hx, *settings)
    return y, *(s.squeeze(0) for s in last)


class _Packing(NamedTuple):
    """Pieces of rows, longest first, laid out step by step: all the first elements, all the second, and so on."""

    row: Tensor  # (elements,) where each element that is not padding stands in x, row by row
    time: Tensor
    element: Tensor  # (elements,) which of these stands at each place of the packed batch
    batch_sizes: Tensor  # (longest,) on the CPU: how many pieces are longer than s steps
    origin: Tensor  # (pieces,) the row that each piece was cut from
    fresh: Tensor  # (pieces,) it begins with a reset
    final: Tensor  # (B,) the last piece of each row
    alive: Tensor  # (B,) the row has such a piece: its length is not 0


def _packing(x: Tensor, reset: Tensor | None, lengths: Tensor | None) -> _Packing:
    batch, steps, device = *x.shape[:2], x.device
    t = torch.arange(steps, device=device).expand(batch, steps)
    live = t >= 0 if lengths is None else t < lengths[:, None]
    row, time = live.nonzero().unbind(1)
    cleared = torch.zeros_like(time, dtype=torch.bool) if reset is None else reset[row, time]
    begins = cleared | (time == 0)
    begin, piece = begins.nonzero()[:, 0], begins.cumsum(0) - 1
    offset = torch.arange(len(row), device=device) - begin[piece]
    order = piece.bincount().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=device))
    batch_sizes = offset.bincount()
    place = (batch_sizes.cumsum(0) - batch_sizes)[offset] + rank[piece]
    element = torch.empty_like(place).index_copy(0, place, torch.arange(len(place), device=device))
    pieces = row[begin].bincount(minlength=batch)
    return _Packing(
        row=row,
        time=time,
        element=element,
        batch_sizes=batch_sizes.cpu(),
        origin=row[begin][order],
        fresh=cleared[begin][order],
        final=rank[(pieces.cumsum(0) - 1).clamp(min=0)],
        alive=pieces > 0,
    )


@torch.library.custom_op("statewise::gated_loop", mutates_args=())
def _opaque(
    kernel: str, x: Tensor, state: list[Tensor], weights: list[Tensor], reset: Tensor | None, lengths: Tensor | None
) -> list[Tensor]:
    h, *last = _run(kernel, x, state, weights, reset, lengths)
    # no output may be an input, as a row of length 0 would have it
    return [h.contiguous(), *(s.clone(memory_format=torch.contiguous_format) for s in last)]


@_opaque.register_fake
def _(
    kernel: str, x: Tensor, state: list[Tensor], weights: list[Tensor], reset: Tensor | None, lengths: Tensor | None
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:2], state[0].shape[-1]), *(s.new_empty(s.shape) for s in state)]


@torch.library.custom_op("statewise::gated_loop_backward", mutates_args=())
def _backward(
    kernel: str,
    x: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    reset: Tensor | None,
    lengths: Tensor | None,
    grads: list[Tensor],
) -> list[Tensor]:
    """Gradients of [x, *state, *weights]: runs forward again, since an opaque op keeps no graph."""
    # a custom op runs below autograd; this is how to come back up
    above = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with above, torch.enable_grad():
        x, *rest = inputs = [t.detach().requires_grad_() for t in (x, *state, *weights)]
        outs = _run(kernel, x, rest[: len(state)], rest[len(state) :], reset, lengths)
        found = torch.autograd.grad(outs, inputs, grads, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.contiguous() for t, g in zip(inputs, found, strict=True)]


@_backward.register_fake
def _(
    kernel: str,
    x: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    reset: Tensor | None,
    lengths: Tensor | None,
    grads: list[Tensor],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, *state, *weights)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.kernel, x, state, weights, reset, lengths = inputs
    ctx.parts = len(state), len(weights)
    ctx.save_for_backward(x, *state, *weights, reset, lengths)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *rest, reset, lengths = ctx.saved_tensors
    states = ctx.parts[0]
    found = _backward(ctx.kernel, x, rest[:states], rest[states:], reset, lengths, list(grads))
    return None, found[0], found[1 : 1 + states], found[1 + states :], None, None


_opaque.register_autograd(_differentiate, setup_context=_keep)
