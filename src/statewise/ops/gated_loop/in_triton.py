"""The gated loops on a GPU: one program per head and block of rows walks through time, the head's R on chip.

Heads do not hear each other, so programs never wait for each other (cf. FlashRNN, Poeppel et al. 2024,
arXiv:2412.07752). Inputs of the gates are one product over all of time; so are, after the walk backward has written
the gradients of the gates, the gradients of weights and inputs. What the walk forward keeps, by cell, (B, T, slots, N):

    elman   the activation
    gru     r, z, n, and q = R_n h + c_n
    lstm    i, f, g, o after their activations, c
    slstm   i, f, z, o before them, c, n, m

A reset is a mask on the state; a row that has ended keeps its state. R is as wide as the state, products are summed
in that dtype, float64 too; offsets are 64-bit. A head's R must fit on chip: the limits of the backend say how large.

Tested in interpreter mode only: compiled for GPUs, but not yet run on one, so block of rows, warps and the largest head
are guesses. Compiled for sm_90, R lies in shared memory, and heads of 32 units or more spill registers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ...core import clear_past_end
from ..opaque import opaque
from .cells import no_autocast

ROWS = 16  # of a program: the smallest side of a matrix product


class _Cell(NamedTuple):
    gates: int
    parts: int  # tensors of the state
    slots: int  # numbers of a unit and step that backward wants
    slopes: int  # and that it writes: of the gates' inputs, then of those R h + c that are not summed with them


CELLS = {"elman": _Cell(1, 1, 1, 1), "gru": _Cell(3, 1, 4, 4), "lstm": _Cell(4, 2, 5, 4), "slstm": _Cell(4, 4, 7, 4)}


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _log_sigmoid(x):
    """min(x, 0) - log(1 + e^-|x|), the log by 2 artanh(e / (2 + e)): right where it is tiny, too."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square, total = s * s, s * 0.0
    for k in tl.static_range(18):
        total = total * square + 1.0 / (35 - 2 * k)
    return tl.where(x < 0, x, 0.0) - 2.0 * s * total


@triton.jit
def _tanh(x):
    """Near 0, where the difference of exponentials cancels, by the continued fraction."""
    e, y = tl.exp(-2.0 * tl.abs(x)), x * x
    far = (1.0 - e) / (1.0 + e)
    near = x * (10395.0 + y * (1260.0 + y * 21.0)) / (10395.0 + y * (4725.0 + y * (210.0 + y)))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _places(batch, size, B: tl.constexpr, D: tl.constexpr):
    """Of a program: its rows, its head, the columns of its units, and what of rows by units there is."""
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    head, unit = tl.program_id(1).to(tl.int64), tl.arange(0, D)
    return row, head, (head * size + unit)[None, :], (row < batch)[:, None] & (unit < size)[None, :]


@triton.jit
def _matrices(r, size, row_stride, column_stride, GATES: tl.constexpr, D: tl.constexpr):
    """R of a head, gate by gate. What a cell has none of is a copy here and in _load."""
    unit = tl.arange(0, D)
    at = r + unit[:, None] * row_stride + unit[None, :] * column_stride
    square = (unit < size)[:, None] & (unit < size)[None, :]
    r0 = tl.load(at, mask=square, other=0.0)
    r1, r2, r3 = r0, r0, r0
    if GATES > 1:
        r1 = tl.load(at + size * size, mask=square, other=0.0)
        r2 = tl.load(at + 2 * size * size, mask=square, other=0.0)
    if GATES > 3:
        r3 = tl.load(at + 3 * size * size, mask=square, other=0.0)
    return r0, r1, r2, r3


@triton.jit
def _load(at, width, mask, COUNT: tl.constexpr):
    """COUNT numbers, `width` apart: 1, 2 or 4."""
    a = tl.load(at, mask=mask, other=0.0)
    b, c, d = a, a, a
    if COUNT > 1:
        b = tl.load(at + width, mask=mask, other=0.0)
    if COUNT > 2:
        c = tl.load(at + 2 * width, mask=mask, other=0.0)
        d = tl.load(at + 3 * width, mask=mask, other=0.0)
    return a, b, c, d


@triton.jit
def _store(at, width, mask, a, b, c, d, COUNT: tl.constexpr):
    tl.store(at, a, mask=mask)
    if COUNT > 1:
        tl.store(at + width, b, mask=mask)
    if COUNT > 2:
        tl.store(at + 2 * width, c, mask=mask)
        tl.store(at + 3 * width, d, mask=mask)


@triton.jit
def _gate(u, h, r, live):
    return tl.load(u, mask=live, other=0.0) + tl.dot(h, r, input_precision="ieee")


@triton.jit
def _past(series, stride, first, later, live, cut, fresh):
    """What the step found: the series one step earlier, at the start the first state, after a reset the fresh one."""
    past = tl.load(series - stride, mask=live & later, other=0.0) + tl.load(first, mask=live & ~later, other=0.0)
    return tl.where(cut, fresh, past)


@triton.jit
def _forward_kernel(
    u, state, r, c_n, reset, ends, out, last, kept, batch, steps, width, size,
    CELL: tl.constexpr, KIND: tl.constexpr, LEAK: tl.constexpr, LOWEST: tl.constexpr, HAS_RESET: tl.constexpr,
    KEEP: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, B: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    row, head, column, inside = _places(batch, size, B, D)
    r0, r1, r2, r3 = _matrices(r + head * GATES * size * size, size, 1, size, GATES, D)  # turned
    if CELL == "gru":
        bias = tl.load(c_n + column, mask=(tl.arange(0, D) < size)[None, :], other=0.0)
    at = row[:, None] * (PARTS * width) + column
    h, c, n, m = _load(state + at, width, inside, PARTS)
    end = tl.load(ends + row, mask=row < batch, other=0)
    longest = tl.max(end, 0)
    t = head * 0
    while t < longest:
        place = row * steps + t
        live = (t < end)[:, None] & inside
        x, keep = u + place[:, None] * (GATES * width) + column, kept + place[:, None] * (SLOTS * width) + column
        if HAS_RESET:
            cut = tl.load(reset + place, mask=t < end, other=0)[:, None] != 0
            h = tl.where(cut, 0.0, h)
            if PARTS > 1:
                c = tl.where(cut, 0.0, c)
            if PARTS > 2:
                n, m = tl.where(cut, 0.0, n), tl.where(cut, LOWEST, m)
        if CELL == "elman":
            new = _gate(x, h, r0, live)
            if KIND == "relu":
                new = tl.where(new < 0, 0.0, new)
            else:
                new = _tanh(new)
            if KEEP:
                tl.store(keep, new, mask=live)
            if LEAK != 1:
                new = (1 - LEAK) * h + LEAK * new
        elif CELL == "gru":
            i, z = _sigmoid(_gate(x, h, r0, live)), _sigmoid(_gate(x + width, h, r1, live))
            q = tl.dot(h, r2, input_precision="ieee") + bias
            y = _tanh(tl.load(x + 2 * width, mask=live, other=0.0) + i * q)
            new = y + z * (h - y)
            if KEEP:
                _store(keep, width, live, i, z, y, q, 4)
        else:
            i, f = _gate(x, h, r0, live), _gate(x + width, h, r1, live)
            z, o = _gate(x + 2 * width, h, r2, live), _gate(x + 3 * width, h, r3, live)
            if CELL == "lstm":
                i, f, z, o = _sigmoid(i), _sigmoid(f), _tanh(z), _sigmoid(o)
                c_new = f * c + i * z
                new = o * _tanh(c_new)
            else:
                if KIND == "sigmoid":
                    old = _log_sigmoid(f) + m
                else:
                    old = f + m
                m_new = tl.where(i > old, i, old)
                write, hold = tl.exp(i - m_new), tl.exp(old - m_new)
                c_new, n_new = hold * c + write * _tanh(z), hold * n + write
                new = _sigmoid(o) * c_new / n_new
                n, m = tl.where(live, n_new, n), tl.where(live, m_new, m)
            c = tl.where(live, c_new, c)
            if KEEP:
                _store(keep, width, live, i, f, z, o, 4)
                tl.store(keep + 4 * width, c, mask=live)
                if PARTS > 2:
                    tl.store(keep + 5 * width, n, mask=live)
                    tl.store(keep + 6 * width, m, mask=live)
        tl.store(out + place[:, None] * width + column, new, mask=live)
        h = tl.where(live, new, h)
        t += 1
    _store(last + at, width, inside, h, c, n, m, PARTS)


@triton.jit
def _backward_kernel(
    g, g_last, state, r, reset, ends, out, kept, d, d_state, batch, steps, width, size,
    CELL: tl.constexpr, KIND: tl.constexpr, LEAK: tl.constexpr, LOWEST: tl.constexpr, HAS_RESET: tl.constexpr,
    GATES: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SLOPES: tl.constexpr, B: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    row, head, column, inside = _places(batch, size, B, D)
    r0, r1, r2, r3 = _matrices(r + head * GATES * size * size, size, size, 1, GATES, D)
    at = row[:, None] * (PARTS * width) + column
    first = state + at
    dh, dc, dn, dm = _load(g_last + at, width, inside, PARTS)
    end = tl.load(ends + row, mask=row < batch, other=0)
    t = tl.max(end, 0) - 1
    while t >= 0:
        place = row * steps + t
        live = (t < end)[:, None] & inside
        later, cut = (place > row * steps)[:, None], (place < 0)[:, None]
        if HAS_RESET:
            cut = tl.load(reset + place, mask=t < end, other=0)[:, None] != 0
        keep, slope = kept + place[:, None] * (SLOTS * width) + column, d + place[:, None] * (SLOPES * width) + column
        e = dh + tl.load(g + place[:, None] * width + column, mask=live, other=0.0)
        if CELL == "elman":
            y = tl.load(keep, mask=live, other=0.0)
            if KIND == "relu":
                di = LEAK * tl.where(y <= 0, 0.0, e)
            else:
                di = LEAK * e * (1.0 - y * y)
            back = tl.dot(di, r0, input_precision="ieee")
            if LEAK != 1:
                back += (1 - LEAK) * e
        elif CELL == "gru":
            i, z, y, q = _load(keep, width, live, 4)
            h = _past(out + place[:, None] * width + column, width, first, later, live, cut, 0.0)
            df, dz = e * (h - y) * z * (1.0 - z), e * (1.0 - z) * (1.0 - y * y)
            di, do = dz * q * i * (1.0 - i), dz * i  # the last of q
            back = tl.dot(di, r0, input_precision="ieee") + tl.dot(df, r1, input_precision="ieee")
            back += tl.dot(do, r2, input_precision="ieee") + e * z
        else:
            i, f, z, o = _load(keep, width, live, 4)
            c = tl.load(keep + 4 * width, mask=live, other=0.0)
            c_old = _past(keep + 4 * width, SLOTS * width, first + width, later, live, cut, 0.0)
            if CELL == "lstm":
                y = _tanh(c)
                dc_new = dc + e * o * (1.0 - y * y)
                di, df = dc_new * z * i * (1.0 - i), dc_new * c_old * f * (1.0 - f)
                dz, do = dc_new * i * (1.0 - z * z), e * y * o * (1.0 - o)
                dc_old = dc_new * f
            else:
                n = tl.load(keep + 5 * width, mask=live, other=1.0)
                m = tl.load(keep + 6 * width, mask=live, other=0.0)
                n_old = _past(keep + 5 * width, SLOTS * width, first + 2 * width, later, live, cut, 0.0)
                old = _past(keep + 6 * width, SLOTS * width, first + 3 * width, later, live, cut, LOWEST)
                if KIND == "sigmoid":
                    old += _log_sigmoid(f)
                else:
                    old += f
                write, hold, z, o = tl.exp(i - m), tl.exp(old - m), _tanh(z), _sigmoid(o)
                dc_new, dn_new = dc + e * o / n, dn - e * o * c / n / n
                di, dm_old = (dc_new * z + dn_new) * write, (dc_new * c_old + dn_new * n_old) * hold
                dz, do = dc_new * write * (1.0 - z * z), e * c / n * o * (1.0 - o)
                dm_new = dm - di - dm_old  # m is the larger of the two: its gradient goes there
                di, dm_old = tl.where(i > old, di + dm_new, di), tl.where(i > old, dm_old, dm_old + dm_new)
                dc_old, dn_old = dc_new * hold, dn_new * hold
                df = dm_old
                if KIND == "sigmoid":
                    df *= _sigmoid(-f)
                dn = tl.where(live, tl.where(cut, 0.0, dn_old), dn)
                dm = tl.where(live, tl.where(cut, 0.0, dm_old), dm)
            dc = tl.where(live, tl.where(cut, 0.0, dc_old), dc)
            back = tl.dot(di, r0, input_precision="ieee") + tl.dot(df, r1, input_precision="ieee")
            back += tl.dot(dz, r2, input_precision="ieee") + tl.dot(do, r3, input_precision="ieee")
        if SLOPES > 1:
            _store(slope, width, live, di, df, dz, do, 4)
        else:
            tl.store(slope, di, mask=live)
        dh = tl.where(live, tl.where(cut, 0.0, back), dh)
        t -= 1
    _store(d_state + at, width, inside, dh, dc, dn, dm, PARTS)


def _launch(
    state: Tensor, r: Tensor, reset: Tensor | None, cell: str, kind: str, leak: float
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what the kernels know when they are compiled."""
    heads, _, size = r.shape
    side = max(ROWS, triton.next_power_of_2(size))
    options = {
        "CELL": cell, "KIND": kind, "LEAK": leak, "LOWEST": torch.finfo(state.dtype).min,
        "HAS_RESET": reset is not None, "GATES": CELLS[cell].gates, "PARTS": CELLS[cell].parts,
        "SLOTS": CELLS[cell].slots, "B": ROWS, "D": side, "num_warps": 8 if side >= 64 else 4,
    }  # fmt: skip
    return (triton.cdiv(len(state), ROWS), heads), options


def _flags(reset: Tensor | None, other: Tensor) -> Tensor:
    """Bytes; where there is no reset, any address will do."""
    return other if reset is None else reset.contiguous().view(torch.uint8)


def _forward(
    u: Tensor, state: Tensor, r: Tensor, c_n: Tensor | None, reset: Tensor | None, ends: Tensor, cell: str, kind: str,
    leak: float, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, steps), width, slots = u.shape[:2], state.shape[2], CELLS[cell].slots
    h, last = u.new_zeros(batch, steps, width), state.clone(memory_format=torch.contiguous_format)
    kept = u.new_empty(batch, steps, slots, width) if keep else u.new_empty(0)
    if u.numel():
        u, state, r = (t.contiguous() for t in (u, state, r))
        bias = u.new_zeros(width) if c_n is None else c_n.contiguous()
        grid, options = _launch(state, r, reset, cell, kind, leak)
        _forward_kernel[grid](
            u, state, r, bias, _flags(reset, u), ends, h, last, kept, batch, steps, width, r.shape[2],
            KEEP=keep, **options,
        )  # fmt: skip
    return h, last, kept


def _backward(
    g: Tensor, g_last: Tensor, u: Tensor, state: Tensor, r: Tensor, c_n: Tensor | None, reset: Tensor | None,
    ends: Tensor, cell: str, kind: str, leak: float, h: Tensor, last: Tensor, kept: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    (batch, steps), width, (heads, _, size) = u.shape[:2], state.shape[2], r.shape
    gates, _, _, slopes = CELLS[cell]
    d_state = g_last.clone(memory_format=torch.contiguous_format)
    d = u.new_zeros(batch, steps, slopes, width)
    if u.numel():
        grid, options = _launch(state, r, reset, cell, kind, leak)
        g, g_last, state, matrices = (t.contiguous() for t in (g, g_last, state, r))
        _backward_kernel[grid](
            g, g_last, state, matrices, _flags(reset, u), ends, h, kept, d, d_state, batch, steps, width, size,
            SLOPES=slopes, **options,
        )  # fmt: skip
    d_u = d[:, :, :gates].flatten(2)
    unseen = torch.arange(steps, device=u.device) >= ends[:, None]
    unseen = unseen if reset is None else unseen | reset
    past = torch.cat([state[:, :1], h], 1)[:, :steps].masked_fill(unseen[..., None], 0)
    heard = torch.cat([d[:, :, :2], d[:, :, 3:]], 2) if cell == "gru" else d
    d_r = torch.einsum("btghj,bthk->hgjk", heard.unflatten(3, (heads, size)), past.unflatten(2, (heads, size)))
    d_c = () if c_n is None else (d[:, :, 3].sum((0, 1)),)
    return d_u, d_state, d_r.reshape(r.shape), *d_c


def _like(
    u: Tensor, state: Tensor, r: Tensor, c_n: Tensor | None, reset: Tensor | None, ends: Tensor, cell: str, kind: str,
    leak: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*u.shape[:2], CELLS[cell].slots, state.shape[2])
    return u.new_empty(*u.shape[:2], state.shape[2]), state.new_empty(state.shape), u.new_empty(shape)


_run = opaque(
    "gated_loop_triton", ("cuda", "xpu", "cpu"), "u state r c_n? reset? ends cell:str kind:str leak:float",
    _forward, _backward, _like, results=2, kept=1, keep_results=True, alone=functools.partial(_forward, keep=False),
)  # fmt: skip  # cpu: interpreter mode


def _loop(
    cell: str, kind: str, leak: float, x: Tensor, state: tuple[Tensor, ...], w_ih: Tensor | None, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """h in the dtype of x, then the last states."""
    wide, c_n, half = state[0].dtype, None, x.dtype
    if lengths is None:
        ends = torch.full((x.shape[0],), x.shape[1], device=x.device)
    else:
        ends = lengths.to(x.device, torch.int64).contiguous()
        x = clear_past_end(x, ends)
    with no_autocast(x):
        biases = [b.to(wide) for b in (b_ih, b_hh) if b is not None]
        if cell == "gru" and b_hh is not None:
            summed, c_n = biases[-1].tensor_split([2 * state[0].shape[1]])
            biases[-1] = F.pad(summed, (0, len(c_n)))
        bias = sum(biases[1:], biases[0]) if biases else None
        if w_ih is not None:
            u = F.linear(x.to(wide), w_ih.to(wide), bias)
        else:
            u = x.to(wide) if bias is None else x.to(wide) + bias
        r = (w_hh if w_hh.ndim == 3 else w_hh[None]).to(wide)
        h, last = _run(u, torch.stack(state, 1), r, c_n, reset, ends, cell, kind, float(leak))
    return h.to(half), *(part.clone() for part in last.unbind(1))


def elman(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    leak: float = 1.0,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _loop("elman", nonlinearity, leak, x, (h0,), w_ih, w_hh, b_ih, b_hh, reset, lengths)


def gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _loop("gru", "", 1, x, (h0,), w_ih, w_hh, b_ih, b_hh, reset, lengths)


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _loop("lstm", "", 1, x, (h0, c0), w_ih, w_hh, b_ih, b_hh, reset, lengths)


def slstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    forget: str = "sigmoid",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _loop("slstm", forget, 1, x, (h0, c0, n0, m0), w_ih, w_hh, b_ih, b_hh, reset, lengths)
