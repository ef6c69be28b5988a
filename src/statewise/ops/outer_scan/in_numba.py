"""Matrix products by torch over chunks of time, as in in_torch.py, with all that lies between them compiled.

What lies between is done once and in passes over memory: a change of layout scales too, a mask multiplies too. One
decay per head makes e^D row by row: the sums of the log decays since each step of the chunk grow by one term, and their
exponentials weigh the row. They are 0 where nothing is to pass, so a mask is not needed. Backward does it again and
sums rows and columns on the way for the gradient of the decays.

A decay per key is one factor per step and key, never rounded to one number (see selective_scan). In blocks of LEAF
steps every pair of steps is walked, the decays multiplied one by one; the rest of the weights, halving by halving, are
matrix products about the middle of their block, the factors on rows of q and k being running products from there.

Threads share out (chunk, row, head).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..linear_scan import in_numba as threads
from ..selective_scan import in_numba as vectors
from ..selective_scan.in_numba import _Lanes
from . import in_torch
from .edges import normal
from .in_torch import Span, Way

LEAF = 16  # steps in a block whose pairs are walked
LANES = 16  # rows of vectors are filled up to a multiple of this
LOG2 = math.log2(math.e)
CHUNK = {"scalar": 64, "key": 64}  # steps, by measurement; twice that for a decay per head and wide states
WIDE = 64  # keys beyond which a state is wide
SCRATCH = 1 << 18  # elements of the weights of a span

_compile, _code = threads._compile, vectors._code


# ---- vector code: `steps` is how many, `row` the bytes from one to the next


def _grow(v: _Lanes, at: Any, g: Any) -> Any:
    """The sums at `at` grow by g; e to them is returned in two parts."""
    total = v.builder.fadd(v.load(at), g)
    v.store(at, total)
    return v.exp2(total)


@functools.partial(_code, addresses=4)
def _weigh(v: _Lanes, steps: Any, row: Any, sums: Any, g: Any, weights: Any, out: Any):
    """out = weights e^sums over `steps` vectors, once the sums have grown by g."""
    from_g = v.splat(g)
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        at = [v.at(base, loop.index, vectors.BYTES) for base in (sums, weights, out)]
        v.store(at[2], v.decayed(_grow(v, at[0], from_g), v.load(at[1])))


@functools.partial(_code, addresses=7)
def _weigh_both(
    v: _Lanes, steps: Any, row: Any, sums: Any, g: Any, weights: Any, d_out: Any, total: Any, columns: Any, across: Any
):
    """Backward: d_out becomes the weights, total grows by the gradient of those without decay, columns and the one
    vector across by the gradient of the sums."""
    from_g, whole = v.splat(g), v.variable(v.full(0.0))
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        at = [v.at(base, loop.index, vectors.BYTES) for base in (sums, weights, d_out, total, columns)]
        decay = _grow(v, at[0], from_g)
        weight, given = v.decayed(decay, v.load(at[1])), v.load(at[2])
        v.store(at[2], weight)
        v.store(at[3], v.builder.fadd(v.load(at[3]), v.decayed(decay, given)))
        both = v.builder.fmul(weight, given)
        v.store(at[4], v.builder.fadd(v.load(at[4]), both))
        v.builder.store(v.builder.fadd(v.builder.load(whole), both), whole)
    v.sum(across, v.builder.load(whole))


@functools.partial(_code, addresses=2)
def _exp2(v: _Lanes, steps: Any, row: Any, x: Any, out: Any):
    """out = 2^x, and 2^x - out in the vector `row` bytes further on."""
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        power, rest = v.exp2(v.load(v.at(x, loop.index, vectors.BYTES)))
        at = v.at(out, loop.index, vectors.BYTES)
        v.store(at, power)
        v.store(v.builder.add(at, row), rest)


# ---- what is the same for every kind


@_compile
def _cut(x, out, start, steps, first, last):
    """Units (chunk, row, head) of (B, T, H, D) -> (units, C, D), zero past `steps`."""
    _, heads, size, width = x.shape[0], x.shape[2], out.shape[1], out.shape[2]
    batch = x.shape[0]
    for u in range(first, last):
        c, b, h = u // (batch * heads), u // heads % batch, u % heads
        for i in range(size):
            t = c * size + i
            if t < steps:
                for d in range(width):
                    out[u, i, d] = x[b, start + t, h, d]
            else:
                for d in range(width):
                    out[u, i, d] = 0


@_compile
def _paste(x, out, start, steps, sound, first, last):
    """The way back from _cut; sound[u]: whether all of it is finite."""
    batch, heads, size, width = out.shape[0], out.shape[2], x.shape[1], x.shape[2]
    for u in range(first, last):
        c, b, h = u // (batch * heads), u // heads % batch, u % heads
        spoilt = x[u, 0, 0] * 0
        for i in range(min(size, steps - c * size)):
            t = start + c * size + i
            for d in range(width):
                out[b, t, h, d] = x[u, i, d]
            for d in range(width):
                spoilt += x[u, i, d] * 0
        sound[u] = spoilt == 0


@_compile
def _pass_on(added, state, decay, backwards, first, last):
    """added (chunks, heads, K, V) becomes the states before (after) each chunk; state (heads, K, V) that past them all.

    decay: (chunks, heads, 2, K or 1), each in two parts.
    """
    many, _, keys, values = added.shape
    for u in range(first, last):
        for step in range(many):
            c = many - 1 - step if backwards else step
            for k in range(keys):
                power, rest = decay[c, u, 0, k % decay.shape[3]], decay[c, u, 1, k % decay.shape[3]]
                for x in range(values):
                    more, now = added[c, u, k, x], state[u, k, x]
                    added[c, u, k, x] = now
                    state[u, k, x] = now * power + (now * rest + more)


def _bytes(t: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.uint8) if t is None else t.contiguous().view(torch.uint8).numpy()


def _numbers(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]


_pool: tuple[int, ThreadPoolExecutor] | None = None


def _forget() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _share(work: Callable[..., None], units: int, elements: int, *args: Any) -> None:
    """work(*args, first, last) over all units, by as many threads as torch has."""
    global _pool
    workers = max(1, min(threads._workers(elements), units))
    if workers == 1:
        work(*args, 0, units)
        return
    if _pool is None or _pool[0] < workers:
        _pool = workers, ThreadPoolExecutor(workers)
    each = [units * i // workers for i in range(workers + 1)]
    jobs = [_pool[1].submit(work, *args, first, last) for first, last in itertools.pairwise(each[1:])]
    work(*args, each[0], each[1])
    for job in jobs:
        job.result()


class _Room:
    """Memory by name: fresh memory costs as much as what is done with it."""

    def __init__(self) -> None:
        self.known: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        count = math.prod(shape)
        if name not in self.known or self.known[name].numel() < count:
            self.known[name] = like.new_empty(count)
        return self.known[name][:count].view(shape)

    def product(self, name: str, p: Tensor, q: Tensor) -> Tensor:
        return torch.bmm(p, q, out=self(name, p, len(p), p.shape[1], q.shape[2]))


def _like(dtype: torch.dtype) -> Any:
    return np.float64(0) if dtype == torch.float64 else np.float32(0)


def _up(n: int) -> int:
    return -(-n // LANES) * LANES


def _size(span: Span) -> int:
    return max(span.size, LEAF)


def _two_parts(x: Tensor) -> Tensor:
    """2^x of (n, m) with m a multiple of LANES: (n, 2, m), to be added."""
    out = x.new_empty(len(x), 2, x.shape[1])
    (source, target), like, row = _numbers(x, out), _like(x.dtype), x.shape[1] * x.element_size()
    _exp2_rows(like, source, target, row)
    return out


@_compile
def _exp2_rows(like, source, target, row):
    lanes = 64 // source.itemsize
    for u in range(source.shape[0]):
        at = source.ctypes.data + u * row
        _exp2(like, source.shape[1] // lanes, row, (at, target.ctypes.data + 2 * u * row))


# ---- one decay per head


@_compile
def _prepare(like, q, k, v, d_o, g, reset, start, steps, qs, ks, vs, do, q_, k_, logs, factors, whole, first, last):
    """For units (chunk, row, group), steps past the end being zero: q, k, v and d_o, if there is one; q and k scaled
    for the state before and after each head's chunk; its log decays in powers of 2; the factors (2, units, C) of q and
    k, and that of the state (units, 2, 1) in two parts."""
    batch, groups, size = q.shape[0], q.shape[2], qs.shape[1]
    keys, values, group, lanes = q.shape[3], v.shape[3], v.shape[2] // q.shape[2], 64 // q.itemsize
    sums, parts, row = np.empty((2, size), q.dtype), np.empty((2, 2, size), q.dtype), size * q.itemsize
    for u in range(first, last):
        c, b, at = u // (batch * groups), u // groups % batch, u % groups
        here = max(0, min(size, steps - c * size))
        begin = start + c * size
        for i in range(here):
            for d in range(keys):
                qs[u, i, d] = q[b, begin + i, at, d]
            for d in range(keys):
                ks[u, i, d] = k[b, begin + i, at, d]
        qs[u, here:] = 0
        ks[u, here:] = 0
        for e in range(group):
            n, h = u * group + e, at * group + e
            for i in range(here):
                for d in range(values):
                    vs[n, i, d] = v[b, begin + i, h, d]
                if do.shape[0]:
                    for d in range(values):
                        do[n, i, d] = d_o[b, begin + i, h, d]
                logs[n, i] = g[b, begin + i, h, 0] * LOG2 if g.shape[3] else 0
                if reset.shape[0] and reset[b, begin + i]:
                    logs[n, i] = -np.inf
            vs[n, here:] = 0
            if do.shape[0]:
                do[n, here:] = 0
            logs[n, here:] = 0
            upto, after = logs[n, 0] * 0, logs[n, 0] * 0
            for i in range(size):
                upto += logs[n, i]
                sums[0, i] = upto
                sums[1, size - 1 - i] = after
                after += logs[n, size - 1 - i]
            for side in range(2):
                where = (sums.ctypes.data + side * row, parts.ctypes.data + 2 * side * row)
                _exp2(like, size // lanes, row, where)
                for i in range(size):
                    factors[side, n, i] = parts[side, 0, i] + parts[side, 1, i]
            whole[n, 0, 0], whole[n, 1, 0] = parts[0, 0, size - 1], parts[0, 1, size - 1]
            for i in range(size):
                f = factors[0, n, i]
                for d in range(keys):
                    q_[n, i, d] = qs[u, i, d] * f
            for i in range(size):
                f = factors[1, n, i]
                for d in range(keys):
                    k_[n, i, d] = ks[u, i, d] * f


@_compile
def _weigh_units(like, weights, g, out, group, first, last):
    """e^D times the weights (units, C, C) of each of the group's heads, -> (units * group, C, C)."""
    size = weights.shape[1]
    lanes = 64 // weights.itemsize
    sums = np.empty(size, weights.dtype)
    row = size * weights.itemsize
    for u in range(first, last):
        for h in range(u * group, (u + 1) * group):
            sums[:] = -np.inf
            for i in range(size):
                many = i // lanes + 1
                own = weights[u, i, i]
                here = i * row
                _weigh(
                    like, many, row,
                    (sums.ctypes.data, g.ctypes.data + h * row + i * g.itemsize,
                     weights.ctypes.data + u * size * row + here, out.ctypes.data + h * size * row + here),
                )  # fmt: skip
                out[h, i, i] = own
                sums[i] = 0
                for j in range(many * lanes, size):
                    out[h, i, j] = 0


@_compile
def _weigh_units_back(like, weights, d_weights, g, later, group, first, last):
    """d_weights (units * group, C, C) become the weights, weights (units, C, C) their gradient before the decay.

    later: (units * group, C), the gradient of the sums of the decays from each step on.
    """
    size = weights.shape[1]
    lanes = 64 // weights.itemsize
    row = size * weights.itemsize
    sums = np.empty((group, size), weights.dtype)
    total, across = np.empty(size, weights.dtype), np.zeros(1, weights.dtype)
    columns = np.empty((group, size), weights.dtype)
    for u in range(first, last):
        sums[:] = -np.inf
        columns[:] = 0
        for i in range(size):
            many = i // lanes + 1
            own = weights[u, i, i]
            total[:] = 0
            for e in range(group):
                h = u * group + e
                given = d_weights[h, i, i]
                _weigh_both(
                    like, many, row,
                    (sums.ctypes.data + e * row, g.ctypes.data + h * row + i * g.itemsize,
                     weights.ctypes.data + (u * size + i) * row, d_weights.ctypes.data + (h * size + i) * row,
                     total.ctypes.data, columns.ctypes.data + e * row, across.ctypes.data),
                )  # fmt: skip
                later[h, i] = across[0]
                total[i] += given
                sums[e, i] = 0
                d_weights[h, i, i] = own
                for j in range(many * lanes, size):
                    d_weights[h, i, j] = 0
            for j in range(size):
                weights[u, i, j] = total[j]
        for e in range(group):
            for i in range(size):
                later[u * group + e, i] -= columns[e, i]


@functools.partial(threads.numba.njit, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"}, cache=True)
def _dot(p, q):
    total = p[0] * 0
    for i in range(p.shape[0]):
        total += p[i] * q[i]
    return total


@_compile
def _finish(d_q, d_k, dq_, dk_, q_, k_, factors, g, later, starts, ends, d_g, first, last):
    """What came through the states joins d_q and d_k (units, C, K), and everything d_g (units * group, C)."""
    size, keys = d_q.shape[1], d_q.shape[2]
    group = dq_.shape[0] // d_q.shape[0]
    least = -126.5 if d_q.itemsize == 4 else -1022.5  # of log decays that are not 0
    for u in range(first, last):
        for h in range(u * group, (u + 1) * group):
            whole = _dot(starts[h], ends[h]) * factors[0, h, size - 1]
            for i in range(size):
                upto, after = factors[0, h, i], factors[1, h, i]
                later[h, i] += _dot(q_[h, i], dq_[h, i])
                d_g[h, i] = whole  # and of the earlier ones
                whole += _dot(k_[h, i], dk_[h, i])
                for d in range(keys):
                    d_q[u, i, d] += dq_[h, i, d] * upto
                for d in range(keys):
                    d_k[u, i, d] += dk_[h, i, d] * after
            beyond = later[h, 0] * 0
            for step in range(size):
                i = size - 1 - step
                beyond += later[h, i]
                d_g[h, i] += beyond
                if g[h, i] < least:  # nothing passes, not the rounding of sums that cancel
                    d_g[h, i] = 0
                    beyond = later[h, i] * 0


class _Scalar:
    """One decay per head and step, or none."""

    def _parts(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None, span: Span, room: _Room,
        d_o: Tensor | None = None,
    ) -> Any:  # fmt: skip
        batch, _, heads, values = v.shape
        groups, keys, size = q.shape[2], q.shape[3], _size(span)
        n, many = span.many * batch * groups, span.many * batch * heads
        qs, ks = (room(name, v, n, size, keys) for name in "qk")
        q_, k_ = (room(name, v, many, size, keys) for name in ("q_", "k_"))
        vs, do = (room(name, v, many * used, size, values) for name, used in (("v", 1), ("do", d_o is not None)))
        logs, factors, whole = room("g", v, many, size), room("factors", v, 2, many, size), room("whole", v, many, 2, 1)
        given = v.new_empty(batch, 0, heads, 0) if g is None else g
        _share(
            _prepare, n, vs.numel(), _like(v.dtype), *_numbers(q, k, v, v if d_o is None else d_o, given),
            _bytes(reset), span.start, span.steps, *_numbers(qs, ks, vs, do, q_, k_, logs, factors, whole),
        )  # fmt: skip
        whole = whole.view(span.many, batch * heads, 2, 1)
        return qs, ks, vs, do, q_, k_, logs, factors, whole

    def forward(
        self, parts: Any, reset: Tensor | None, span: Span, before: Tensor, out: Tensor, kept: Tensor, room: _Room
    ) -> Tensor | None:
        q, k, v, g = parts
        group = v.shape[2] // q.shape[2]
        qs, ks, vs, _, q_, k_, logs, _, whole = self._parts(q, k, v, g, reset, span, room)
        weights = room.product("weights", qs, ks.mT)
        weighed = weights if group == 1 else room("weighed", v, len(vs), *weights.shape[1:])
        _share(
            _weigh_units, len(qs), weighed.numel(), _like(v.dtype), *_numbers(weights, logs, weighed), group
        )  # fmt: skip
        return _read(weighed, vs, q_, k_, whole, span, before, out, kept, room)

    def backward(
        self, d_o: Tensor, after: Tensor, parts: Any, reset: Tensor | None, span: Span, starts: Tensor, outs: Any,
        room: _Room,
    ) -> Tensor | None:  # fmt: skip
        q, k, v, g = parts
        group = v.shape[2] // q.shape[2]
        qs, ks, vs, do, q_, k_, logs, factors, whole = self._parts(q, k, v, g, reset, span, room, d_o)
        ends, d_state = _pass_back(q_, do, after, whole, span, room)
        starts = starts.flatten(0, 2)
        weights, d_weights = room.product("weights", qs, ks.mT), room.product("d_weights", do, vs.mT)
        later, d_g = room("later", v, *logs.shape), room("d_g", v, *logs.shape)
        _share(
            _weigh_units_back, len(qs), d_weights.numel(), _like(v.dtype),
            *_numbers(weights, d_weights, logs, later), group,
        )  # fmt: skip
        d_v = room.product("d_v", d_weights.mT, do).baddbmm_(k_, ends)
        d_q, d_k = room.product("d_q", weights, ks), room.product("d_k", weights.mT, qs)
        dq_, dk_ = room.product("dq_", do, starts.mT), room.product("dk_", vs, ends.mT)
        _share(
            _finish, len(qs), dq_.numel(),
            *_numbers(d_q, d_k, dq_, dk_, q_, k_, factors, logs, later, starts.flatten(1), ends.flatten(1), d_g),
        )  # fmt: skip
        return d_state if _paste_all(outs, (d_q, d_k, d_v, d_g[..., None]), span) else None


def _read(
    weights: Tensor, v: Tensor, q: Tensor, k: Tensor, whole: Tensor, span: Span, before: Tensor, out: Tensor,
    kept: Tensor, room: _Room,
) -> Tensor | None:  # fmt: skip
    """The outputs, from the weights (n, C, C) within chunks and the scaled q and k; the states, and that at the end."""
    starts = kept if kept.is_contiguous() else room("starts", kept, *kept.shape)
    torch.bmm(k.mT, v, out=starts.flatten(0, 2))
    last = before.clone(memory_format=torch.contiguous_format)
    heads = last.shape[0] * last.shape[1]
    args = _numbers(starts.view(span.many, heads, *kept.shape[3:]), last.view(heads, *kept.shape[3:]), whole)
    _share(_pass_on, heads, starts.numel(), *args, False)
    o = room.product("o", weights, v).baddbmm_(q, starts.flatten(0, 2))
    if starts is not kept:
        kept.copy_(starts)
    return last if _paste_all((out,), (o,), span) and in_torch._finite(last) else None


def _pass_back(q: Tensor, d_o: Tensor, after: Tensor, whole: Tensor, span: Span, room: _Room) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each chunk (n, K, V), and of that before them all."""
    ends, d_state = room.product("ends", q.mT, d_o), after.clone(memory_format=torch.contiguous_format)
    heads = d_state.shape[0] * d_state.shape[1]
    args = _numbers(ends.view(span.many, heads, *ends.shape[1:]), d_state.view(heads, *ends.shape[1:]), whole)
    _share(_pass_on, heads, ends.numel(), *args, True)
    return ends, d_state


def _paste_all(outs: Any, found: Any, span: Span) -> bool:
    """False if something is not finite."""
    good = True
    for out, t in zip(outs, found):
        if out is not None:
            sound = np.empty(len(t), np.bool_)
            _share(_paste, len(t), t.numel(), *_numbers(t, out), span.start, span.steps, sound)
            good &= bool(sound.all())
    return good


# ---- one decay per head and key


@functools.partial(_code, addresses=4)
def _factors(v: _Lanes, steps: Any, row: Any, g: Any, power: Any, rest: Any, total: Any):
    """2^g in two parts, and the sum of g."""
    whole = v.variable(v.full(0.0))
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        log = v.load(v.at(g, loop.index, row))
        v.builder.store(v.builder.fadd(v.builder.load(whole), log), whole)
        for base, part in zip((power, rest), v.exp2(log)):
            v.store(v.at(base, loop.index, row), part)
    v.store(total, v.builder.load(whole))


def _decayed(v: _Lanes, value: Any, i: Any, row: Any, power: Any, rest: Any) -> Any:
    return v.decayed((v.load(v.at(power, i, row)), v.load(v.at(rest, i, row))), value)


def _running(
    v: _Lanes, steps: Any, row: Any, power: Any, rest: Any, back: bool, use: Callable[[Any, Any], None]
) -> None:
    """use(i, the product of decays from the first step to i), or that of those behind i, from the last step back."""
    product = v.variable(v.full(1.0))
    with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
        i = v.builder.sub(v.builder.sub(steps, steps.type(1)), loop.index) if back else loop.index
        so_far = v.builder.load(product)
        new = _decayed(v, so_far, i, row, power, rest)
        v.builder.store(new, product)
        use(i, so_far if back else new)


def _scaled_by(back: bool) -> Any:
    def body(v: _Lanes, steps: Any, row: Any, x: Any, power: Any, rest: Any, out: Any) -> None:
        def use(i: Any, product: Any) -> None:
            v.store(v.at(out, i, row), v.mul(v.load(v.at(x, i, row)), product))

        _running(v, steps, row, power, rest, back, use)

    return _code(body, 4)


def _through_by(back: bool) -> Any:
    """out += the product of decays times dx; dg += the sum of x dx over the steps whose x a step's decay is in, from
    what stands in `total`."""

    def body(
        v: _Lanes, steps: Any, row: Any, x: Any, dx: Any, power: Any, rest: Any, out: Any, dg: Any, total: Any
    ) -> None:
        def use(i: Any, product: Any) -> None:
            at = v.at(out, i, row)
            v.store(at, v.mad(v.load(v.at(dx, i, row)), product, v.load(at)))

        _running(v, steps, row, power, rest, back, use)
        sum_ = v.variable(v.load(total))
        with vectors.cgutils.for_range(v.builder, steps, intp=steps.type) as loop:
            i = loop.index if back else v.builder.sub(v.builder.sub(steps, steps.type(1)), loop.index)
            old = v.builder.load(sum_)
            new = v.mad(v.load(v.at(x, i, row)), v.load(v.at(dx, i, row)), old)
            v.builder.store(new, sum_)
            at = v.at(dg, i, row)
            v.store(at, v.builder.fadd(v.load(at), old if back else new))

    return _code(body, 7)


_upto, _after = _scaled_by(False), _scaled_by(True)
_through_upto, _through_after = _through_by(False), _through_by(True)


@functools.partial(_code, addresses=7)
def _column(v: _Lanes, steps: Any, row: Any, q: Any, k: Any, power: Any, rest: Any, seen: Any, out: Any, out_row: Any):
    """The weights of the first of `steps` steps in each of them; seen: scratch, a row."""
    word = steps.type
    many = v.builder.udiv(row, word(vectors.BYTES))
    with vectors.cgutils.for_range(v.builder, many, intp=word) as loop:
        v.store(v.at(seen, loop.index, vectors.BYTES), v.load(v.at(k, loop.index, vectors.BYTES)))
    with vectors.cgutils.for_range(v.builder, steps, intp=word) as step:
        total = v.variable(v.full(0.0))
        q_i, power_i, rest_i = (v.at(base, step.index, row) for base in (q, power, rest))
        first = v.builder.icmp_signed("==", step.index, word(0))
        with vectors.cgutils.for_range(v.builder, many, intp=word) as loop:
            at = v.at(seen, loop.index, vectors.BYTES)
            old = v.load(at)
            new = v.builder.select(first, old, _decayed(v, old, loop.index, word(vectors.BYTES), power_i, rest_i))
            v.store(at, new)
            here = v.load(v.at(q_i, loop.index, vectors.BYTES))
            v.builder.store(v.mad(here, new, v.builder.load(total)), total)
        v.sum(v.at(out, step.index, out_row), v.builder.load(total))


@functools.partial(_code, addresses=10)
def _column_back(
    v: _Lanes, steps: Any, row: Any, q: Any, k: Any, power: Any, rest: Any, seen: Any, given: Any, given_row: Any,
    dq: Any, dk: Any, dg: Any,
):  # fmt: skip
    """Backward of _column for one vector of keys; seen: scratch, `steps` vectors."""
    word, value = steps.type, v.variable(v.load(k))
    v.store(seen, v.load(k))
    more = v.builder.sub(steps, word(1))
    with vectors.cgutils.for_range(v.builder, more, intp=word) as loop:
        i = v.builder.add(loop.index, word(1))
        new = _decayed(v, v.builder.load(value), i, row, power, rest)
        v.builder.store(new, value)
        v.store(v.at(seen, i, vectors.BYTES), new)
    v.builder.store(v.full(0.0), value)

    def arrive(i: Any) -> tuple[Any, Any]:
        weight, at, then = v.splat(v.at(given, i, given_row)), v.at(dq, i, row), v.load(v.at(seen, i, vectors.BYTES))
        v.store(at, v.mad(weight, then, v.load(at)))
        return v.mad(weight, v.load(v.at(q, i, row)), v.builder.load(value)), then

    with vectors.cgutils.for_range(v.builder, more, intp=word) as loop:
        i = v.builder.sub(more, loop.index)
        mu, then = arrive(i)
        at = v.at(dg, i, row)
        v.store(at, v.mad(mu, then, v.load(at)))
        v.builder.store(_decayed(v, mu, i, row, power, rest), value)
    mu, _ = arrive(word(0))
    v.store(dk, v.builder.fadd(mu, v.load(dk)))


Q, K, POWER, REST, Q_, K_ = range(6)


@_compile
def _prepare_keys(like, q, k, g, reset, start, steps, tiles, levels, weights, total, first, last):
    """For units (chunk, row, head), in tiles (6, units, C, keys): q, k, both parts of the decays, q and k scaled for
    the state before and after; in levels, q and k scaled about the middle of each block; the weights within leaves."""
    batch, heads, group = g.shape[0], g.shape[2], g.shape[2] // q.shape[2]
    size, width = tiles.shape[2], tiles.shape[3]
    row, keys, unit = width * q.itemsize, q.shape[3], tiles.shape[2] * tiles.shape[3] * q.itemsize
    logs, seen = np.zeros((size, width), q.dtype), np.zeros(width, q.dtype)
    for u in range(first, last):
        c, b, h = u // (batch * heads), u // heads % batch, u % heads
        for i in range(size):
            t = c * size + i
            if t < steps:
                t += start
                for d in range(keys):
                    tiles[Q, u, i, d] = q[b, t, h // group, d]
                for d in range(keys):
                    tiles[K, u, i, d] = k[b, t, h // group, d]
                if reset.shape[0] != 0 and reset[b, t] != 0:
                    for d in range(keys):
                        logs[i, d] = -np.inf
                else:
                    for d in range(keys):
                        logs[i, d] = g[b, t, h, d] * LOG2
            else:
                logs[i] = 0
                tiles[Q, u, i] = 0
                tiles[K, u, i] = 0
            for d in range(keys, width):
                tiles[Q, u, i, d] = 0
                tiles[K, u, i, d] = 0
        apart = tiles.shape[1] * unit
        here = tiles.ctypes.data + u * unit
        for at in range(0, row, 64):
            q_, k_, power, rest = here + at, here + apart + at, here + 2 * apart + at, here + 3 * apart + at
            _factors(like, size, row, (logs.ctypes.data + at, power, rest, total.ctypes.data + u * row + at))
            _upto(like, size, row, (q_, power, rest, here + 4 * apart + at))
            _after(like, size, row, (k_, power, rest, here + 5 * apart + at))
            half = LEAF
            for level in range(levels.shape[0]):
                out = levels.ctypes.data + level * apart + u * unit + at
                for i in range(0, size, 2 * half):
                    low, mid = i * row, (i + half) * row
                    _after(like, half, row, (k_ + low, power + low, rest + low, out + low))
                    _upto(like, half, row, (q_ + mid, power + mid, rest + mid, out + mid))
                half *= 2
        weights[u] = 0
        for j in range(size):
            at = here + j * row
            _column(
                like, LEAF - j % LEAF, row,
                (at, at + apart, at + 2 * apart, at + 3 * apart, seen.ctypes.data,
                 weights.ctypes.data + ((u * size + j) * size + j) * q.itemsize, size * q.itemsize),
            )  # fmt: skip


@_compile
def _finish_keys(like, tiles, levels, through, between, d_weights, whole, grads, first, last):
    """grads (3, units, C, keys): of q, k and the log decays. through: (2, units, C, keys), the gradients of q and k
    scaled for the states; between: (2, levels, units, C / 2, keys), those about the middles of blocks."""
    size, width = tiles.shape[2], tiles.shape[3]
    row, unit = width * tiles.itemsize, tiles.shape[2] * tiles.shape[3] * tiles.itemsize
    zero, seen = np.zeros(16, tiles.dtype), np.zeros((LEAF, 16), tiles.dtype)
    for u in range(first, last):
        grads[:, u] = 0
        apart = tiles.shape[1] * unit
        for at in range(0, row, 64):
            here, out = tiles.ctypes.data + u * unit + at, grads.ctypes.data + u * unit + at
            power, rest, dg = here + 2 * apart, here + 3 * apart, out + 2 * apart
            dx = through.ctypes.data + u * unit + at
            total = whole.ctypes.data + u * row + at
            _through_upto(like, size, row, (here + 4 * apart, dx, power, rest, out, dg, total))
            _through_after(
                like, size, row, (here + 5 * apart, dx + apart, power, rest, out + apart, dg, zero.ctypes.data)
            )
            half = LEAF
            for level in range(levels.shape[0]):
                x = levels.ctypes.data + level * apart + u * unit + at
                for i in range(0, size, 2 * half):
                    low, mid = i * row, (i + half) * row
                    dx = between.ctypes.data + (level * apart + u * unit) // 2 + low // 2 + at
                    _through_upto(
                        like, half, row,
                        (x + mid, dx, power + mid, rest + mid, out + mid, dg + mid, zero.ctypes.data),
                    )  # fmt: skip
                    dx += levels.shape[0] * apart // 2
                    _through_after(
                        like, half, row,
                        (x + low, dx, power + low, rest + low, out + apart + low, dg + low, zero.ctypes.data),
                    )  # fmt: skip
                half *= 2
            for j in range(size):
                low = j * row
                _column_back(
                    like, LEAF - j % LEAF, row,
                    (here + low, here + apart + low, power + low, rest + low, seen.ctypes.data,
                     d_weights.ctypes.data + ((u * size + j) * size + j) * tiles.itemsize, size * tiles.itemsize,
                     out + low, out + apart + low, dg + low),
                )  # fmt: skip


class _Key:
    """One decay per head, step and key."""

    def _parts(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, reset: Tensor | None, span: Span, room: _Room) -> Any:
        batch, _, heads, values = v.shape
        size, n, width, keys = _size(span), span.many * batch * heads, _up(q.shape[3]), q.shape[3]
        tiles = room("tiles", v, 6, n, size, width)
        levels = room("levels", v, int(math.log2(size // LEAF)), n, size, width)
        weights, total, vs = room("weights", v, n, size, size), v.new_empty(n, width), room("v", v, n, size, values)
        _share(
            _prepare_keys, n, tiles.numel(), _like(v.dtype), *_numbers(q, k, g), _bytes(reset), span.start, span.steps,
            *_numbers(tiles, levels, weights, total),
        )  # fmt: skip
        _share(_cut, n, vs.numel(), *_numbers(v, vs), span.start, span.steps)
        for later, earlier, block in self._halves(levels, weights):
            for pair, part in enumerate(
                room.product("block", later, earlier.mT).view(n, -1, *block.shape[2:]).unbind(1)
            ):
                block[:, pair] = part
        whole = _two_parts(total)[..., :keys].contiguous().view(span.many, batch * heads, 2, keys)
        return tiles, levels, weights, vs, whole

    @staticmethod
    def _halves(levels: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each level the later and earlier halves of its blocks (blocks, S, keys), and their weights, a view
        (n, blocks of a chunk, S, S)."""
        found, size = [], LEAF
        for level in levels:
            x = level.view(-1, 2 * size, level.shape[2])
            pairs = weights.shape[1] // (2 * size)
            block = weights.view(-1, pairs, 2, size, pairs, 2, size)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)
            found.append((x[:, size:], x[:, :size], block.permute(0, 3, 1, 2)))
            size *= 2
        return found

    def forward(
        self, parts: Any, reset: Tensor | None, span: Span, before: Tensor, out: Tensor, kept: Tensor, room: _Room
    ) -> Tensor | None:
        tiles, _, weights, vs, whole = self._parts(*parts, reset, span, room)
        q_, k_ = (tiles[i, :, :, : parts[0].shape[3]] for i in (Q_, K_))
        return _read(weights, vs, q_, k_, whole, span, before, out, kept, room)

    def backward(
        self, d_o: Tensor, after: Tensor, parts: Any, reset: Tensor | None, span: Span, starts: Tensor, outs: Any,
        room: _Room,
    ) -> Tensor | None:  # fmt: skip
        q, _, v, _ = parts
        keys, group = q.shape[3], v.shape[2] // q.shape[2]
        tiles, levels, weights, vs, whole = self._parts(*parts, reset, span, room)
        q_, k_ = (tiles[i, :, :, :keys] for i in (Q_, K_))
        do = room("do", v, *vs.shape)
        _share(_cut, len(do), do.numel(), *_numbers(d_o, do), span.start, span.steps)
        ends, d_state = _pass_back(q_, do, after, whole, span, room)
        starts = starts.flatten(0, 2)
        d_v = room.product("d_v", weights.mT, do).baddbmm_(k_, ends)
        d_weights = room.product("d_weights", do, vs.mT)
        n, size, width = tiles.shape[1:]
        through, between = (
            room("through", v, 2, n, size, width),
            room("between", v, 2, len(levels), n, size // 2, width),
        )
        for to, a, b in ((through[0], do, starts), (through[1], vs, ends)):
            if width == keys:
                torch.bmm(a, b.mT, out=to)
            else:
                to.zero_()[..., :keys] = torch.bmm(a, b.mT)
        for level, (later, earlier, block) in enumerate(self._halves(levels, d_weights)):
            given = block.reshape(-1, *block.shape[2:])
            torch.bmm(given, earlier, out=between[0, level].view(later.shape))
            torch.bmm(given.mT, later, out=between[1, level].view(later.shape))
        crossing = tiles.new_zeros(n, width)
        crossing[:, :keys] = (starts * ends).sum(2) * whole.sum(2).view(n, keys)
        grads = room("grads", v, 3, n, size, width)
        _share(
            _finish_keys, n, grads.numel(), _like(v.dtype),
            *_numbers(tiles, levels, through, between, d_weights, crossing, grads),
        )  # fmt: skip
        d_q, d_k, d_g = (t[..., :keys] for t in grads)
        if group > 1:
            d_q, d_k = (t.unflatten(0, (-1, group)).sum(1) for t in (d_q, d_k))
        found = (d_q.contiguous(), d_k.contiguous(), d_v, d_g.contiguous())
        return d_state if _paste_all(outs, found, span) else None


class _Way(Way):
    KINDS: dict[str, _Scalar | _Key] = {"scalar": _Scalar(), "key": _Key()}

    def chunk(self, kind: str, v: Tensor, keys: int) -> int:
        return CHUNK[kind] * (2 if kind == "scalar" and keys > WIDE else 1)

    def scratch(self, kind: str) -> int:
        return SCRATCH

    def room(self) -> _Room:
        return _Room()

    def forward(
        self, parts: Any, reset: Any, span: Span, before: Any, out: Any, kept: Any, kind: str, room: _Room
    ) -> Tensor | None:
        return self.KINDS[kind].forward(parts, reset, span, before, out, kept, room)

    def backward(
        self, d_o: Any, after: Any, parts: Any, reset: Any, span: Span, starts: Any, outs: Any, kind: str, room: _Room
    ) -> Tensor | None:
        return self.KINDS[kind].backward(d_o.contiguous(), after, parts, reset, span, starts, outs, room)


_run = in_torch.compiled("outer_scan_numba", "cpu", _Way())


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v, g, *rest = normal(q, k, v, log_decay, state, reset, lengths)
    wide = [t if t is None else t.to(state.dtype).contiguous() for t in (q, k, v, g)]
    o, last = _run(*wide, *rest)
    return o.to(v.dtype), last
