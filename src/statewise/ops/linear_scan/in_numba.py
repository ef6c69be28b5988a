"""Compiled loops over time that run at the speed of memory.

A time step is one row of channels, handled in vectors; the state is carried in registers where rows are narrow, else
in a row of its own, in the nearest cache. Large results are stored past the caches, so a line is not read first only to
be overwritten. Threads share out the batch and wide blocks of channels. Where there are more of them they share out
time, in three ways:

Guesses, where states are soon forgotten. Each thread has a stretch of tiles of its own, as in torch's own operations,
so that a cache holds what its thread worked on before; one that is done helps with those of others. A stretch begins
from zero. Whoever is last to end looks through all tiles: where one began from another state than it should have, its
first rows are run again, until both ways carry the same bits; the rest stands. Nobody waits.

Thirds, where they are not and two threads have a row. One runs the first two thirds; the other meanwhile finds what the
second third carries on, its end and its product of decays, and runs the last.

Tiles, where there are more threads. Each is for whoever claims it first, forward in time, so a thread waits only for
tiles that are already being worked on. It is first run for its end and its product of decays alone, which brings it
into the cache; the state after it is published as soon as the one before it is known, and only then is it run for good.

Backward is one pass, with mu_t the gradient that reaches h_{t-1}:
    lam_t = g_t + mu_{t+1},   dx_t = lam_t,   da_t = lam_t conj(h_{t-1}),   mu_t = conj(a_t) lam_t,   dh_0 = mu_1.

Pointers are integers and vectors are written as LLVM code, so that no aliasing checks stand in the inner loop and any
strides will do. Products and sums are rounded one by one, so the numbers are those of the reference, bit for bit,
except where products of decays were taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from ..compiled import in_numba as compiled
from ..fresh import empty
from ..teams import in_numba as teams
from ..vectors import in_numba as vectors
from ..vectors.in_numba import Row
from .adjoint import differentiable
from .edges import at_lengths, normal

TILE = 1 << 19  # bytes of a and x in a tile of time: they stay in the second-level cache between its two passes
TURNS = 8  # tiles in a thread's stretch of them: what others can help with
BLOCK = 4096  # channels in a row: a, x and two rows of h fit the first-level cache
NARROW = 512  # channels below which a part of a row is read far slower than the whole
SHORTEST = 64  # steps in a tile, at least
AT_ONCE = 256  # bytes of a row that are carried in registers; where results go past the caches, twice as many
TALL = 1 << 23  # bytes of a narrow row of the batch from which on two threads are better than one
FAR = 1 << 24  # bytes of x from which on guesses pay: with results and decays they are more than the caches hold
FIRST = 64  # rows of a tile after which a guess is checked first
LEFT = 1e-16  # part of a state that a tile leaves where guessing pays
FEW = 256  # steps by whose decays that is judged

_compile = compiled.function


def _through(carries: int, rows: int, results: int, put: Callable[..., None] = Row.store, down: bool = False) -> Any:
    """Compiled f(like, n, steps, (address, ...), (stride, ...)): the body's code over n channels and `steps` rows.

    The addresses are those of the carries, then of the first row of what is read and of what is written; strides, in
    bytes, of the latter two. The body takes vectors of carries and of what is read, and gives new carries and what is
    written by `put`. Carries stay in registers from row to row. like gives the dtype.

    down: from the last channel to the first. Where time runs backwards, memory is then walked without a turn, which is
    what the processor foresees: at rows of 512 bytes this is twice as fast.
    """

    def compiled(body: Callable[..., tuple[list[Any], list[Any]]]) -> Any:
        @intrinsic
        def run(context: Any, like: Any, n: Any, steps: Any, addresses: Any, strides: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                size, word = like.bitwidth // 8, args[1].type
                twice = 2 * AT_ONCE // size
                held = cgutils.unpack_tuple(builder, args[3], carries + rows + results)
                moves = cgutils.unpack_tuple(builder, args[4], rows + results)
                start, parts = ir.Constant(word, 0), []
                for count in dict.fromkeys((*[twice] * (put is Row.stream), twice // 2, 16, 4, 1)):
                    stop = builder.and_(args[1], ir.Constant(word, -count))
                    parts.append((count, start, stop))
                    start = stop
                for count, start, stop in reversed(parts) if down else parts:
                    step = ir.Constant(word, count)
                    with cgutils.for_range_slice(builder, start, stop, step, intp=word) as (index, _):
                        if down:
                            index = builder.sub(builder.sub(builder.add(start, stop), step), index)
                        line = min(count, vectors.LINE // size)
                        firsts = range(0, count, line)
                        vs = [
                            Row(builder, like, line, builder.mul(builder.add(index, word(i)), word(size)))
                            for i in (reversed(firsts) if down else firsts)
                        ]
                        kept = [[cgutils.alloca_once_value(builder, v.load(row)) for row in held[:carries]] for v in vs]
                        places = [cgutils.alloca_once_value(builder, row) for row in held[carries:]]
                        with cgutils.for_range(builder, args[2]):
                            at = [builder.load(place) for place in places]
                            for v, slots in zip(vs, kept, strict=True):
                                read = [v.load(row) for row in at[:rows]]
                                after, written = body(v, *map(builder.load, slots), *read)
                                for value, row in zip(written, at[rows:], strict=True):
                                    put(v, row, value)
                                for value, slot in zip(after, slots, strict=True):
                                    builder.store(value, slot)
                            for row, place, move in zip(at, places, moves, strict=True):
                                builder.store(builder.add(row, move), place)
                        for v, slots in zip(vs, kept, strict=True):
                            for slot, row in zip(slots, held[:carries], strict=True):
                                v.store(row, builder.load(slot))
                return context.get_dummy_value()

            each = types.UniTuple(types.intp, carries + rows + results), types.UniTuple(types.intp, rows + results)
            return types.void(like, types.intp, types.intp, *each), generate

        return run

    return compiled


def _recur(v, h, a, x):
    new = v.add(v.mul(a, h), x)
    return [new], [new]


def _adjoint(v, mu, a, g, before):
    lam = v.add(g, mu)
    return [v.mul(a, lam, conj=True)], [lam, v.mul(before, lam, conj=True)]


_recur_store, _recur_stream = _through(1, 2, 1)(_recur), _through(1, 2, 1, Row.stream)(_recur)
_adjoint_store = _through(1, 3, 2, down=True)(_adjoint)
_adjoint_stream = _through(1, 3, 2, Row.stream, down=True)(_adjoint)


@_through(2, 2, 0)
def _advance(v, end, product, a, x):
    return [v.add(v.mul(a, end), x), v.mul(a, product)], []


@_through(2, 3, 1, down=True)
def _adjoint_summed(v, mu, da, a, g, before):
    lam = v.add(g, mu)
    return [v.mul(a, lam, conj=True), v.add(da, v.mul(before, lam, conj=True))], [lam]


@_through(2, 2, 0, down=True)
def _adjoint_advance(v, mu, product, a, g):
    return [v.mul(a, v.add(g, mu), conj=True), v.mul(a, product, conj=True)], []


@_through(1, 1, 0)
def _multiply(v, product, a):
    return [v.mul(a, product)], []


@vectors.rowwise
def _combine(v, past, product, into, end):
    v.store(past, v.add(v.mul(v.load(product), v.load(into)), v.load(end)))


class _Problem(NamedTuple):
    """Sizes, addresses, and strides in bytes (0: the same again). Rows of channels are contiguous."""

    item: int  # bytes of a channel
    real: int  # bytes of a real number
    batch: int
    steps: int
    width: int
    block: int  # channels that one thread handles as a row; all of them where time is shared out
    tile: int  # steps in a tile of time
    tiles: int
    a: int
    a_batch: int
    a_time: int
    a_channel: int  # 0: one decay for the whole row
    x: int  # backward: the gradient of h
    x_batch: int
    x_time: int
    reset: int  # (B, T) bytes, or 0
    start: int  # (B, width), the first carry
    end: int  # (B, width), the last one
    h0: int  # (B, width)
    h: int  # (B, T, width)
    dx: int  # (B, T, width)
    da: int  # (B, T, width), or (B, tiles, width) where it is summed
    sum_da: int  # one sum per tile of time is wanted
    stream: int  # whether results go past the caches
    own: int  # rows of `width` that a thread has for itself
    rows: int  # these rows
    kept: int  # rows of `width` kept of each tile where guesses are made
    carries: int  # (B, tiles, kept, width): these; elsewhere (B, tiles + 1, width): what is carried into each tile
    flags: (
        int  # (B, tiles + 1) words, that a carry is known (the first always is), and a counter of claims; or counters
    )


@_compile
def _rows(like, q, b, t, start):
    """Addresses of row t of a, of x or g, and of every (B, T, width) array, from channel `start`."""
    first = start * q.item
    a = q.a + b * q.a_batch + t * q.a_time + first * q.a_channel
    x = q.x + b * q.x_batch + t * q.x_time + first
    return a, x, (b * q.steps + t) * q.width * q.item + first


@_compile
def _cut(q, b, t):
    return q.reset != 0 and vectors.byte(q.reset + b * q.steps + t) != 0


@_compile
def _same(like, q, p, r):
    """Whether two rows are equal in every bit."""
    compiled.apart()
    differs = 0
    for i in range(0, q.width * q.item, 4):
        differs |= vectors.int32(p + i) ^ vectors.int32(r + i)
    return differs == 0


@_compile
def _finite(like, q, row):
    compiled.apart()
    for i in range(q.width * q.item // q.real):
        value = vectors.real(like, row + i * q.real)
        if value - value != 0:
            return False
    return True


@_compile
def _alike(q, n, twice):
    """Whether rows of n channels are run many at a time, carries in registers: they are narrow, and no two differ."""
    narrow = n * q.item <= AT_ONCE or (twice and n * q.item == 2 * AT_ONCE)
    return q.reset == 0 and q.a_channel != 0 and narrow


@_compile
def _decay(like, q, n, a, spread):
    """The row of decays at a, laid out in `spread` where one number stands for all of it."""
    if q.a_channel == 0:
        vectors.spread(like, n, (spread, a))
        return spread
    return a


@_compile
def _forward_span(like, q, b, start, n, t0, t1, carry, spread):
    """Rows t0 to t1 of h; carry, the state before a row and then after it, changes in place."""
    compiled.apart()
    row = q.width * q.item
    a, x, at = _rows(like, q, b, t0, start)
    h, moves = q.h + at, (q.a_time, q.x_time, row)
    steps = t1 - t0 if _alike(q, n, q.stream != 0) else 1
    for t in range(t0, t1, steps):
        decay = _decay(like, q, n, a, spread)
        if _cut(q, b, t):
            vectors.zero(like, n, (carry,))
            decay = carry
        if q.stream:
            _recur_stream(like, n, steps, (carry, decay, x, h), moves)
        else:
            _recur_store(like, n, steps, (carry, decay, x, h), moves)
        h, a, x = h + row, a + q.a_time, x + q.x_time


@_compile
def _backward_span(like, q, b, start, n, k, t0, t1, mu, spread):
    """Rows t1 - 1 down to t0 of dx and da; mu, the gradient carried from row to row, changes in place."""
    compiled.apart()
    row = q.width * q.item
    da_sum = q.da + ((b * q.tiles + k) * q.width + start) * q.item
    t = t1 - 1
    while t >= t0:
        a, g, at = _rows(like, q, b, t, start)
        before = q.h + at - row if t else q.h0 + (b * q.width + start) * q.item
        alike = t > 0 and _alike(q, n, q.stream != 0 and not q.sum_da)  # the first row of all has h0 before it
        steps = t - max(t0, 1) + 1 if alike else 1
        if _cut(q, b, t):
            vectors.add(like, n, (q.dx + at, g, mu))
            vectors.zero(like, n, (mu,))
            if not q.sum_da:
                vectors.zero(like, n, (q.da + at,))
        else:
            decay, moves = _decay(like, q, n, a, spread), (-q.a_time, -q.x_time, -row)
            if q.sum_da:
                _adjoint_summed(like, n, steps, (mu, da_sum, decay, g, before, q.dx + at), (*moves, -row))
            elif q.stream:
                _adjoint_stream(like, n, steps, (mu, decay, g, before, q.dx + at, q.da + at), (*moves, -row, -row))
            else:
                _adjoint_store(like, n, steps, (mu, decay, g, before, q.dx + at, q.da + at), (*moves, -row, -row))
        t -= steps


@_compile
def _span(like, q, b, start, n, i, s0, s1, carry, spread, back):
    """Rows s0 to s1 of tile i, or to its end; both counted the way that time runs.

    back: None forward; the other way is not compiled.
    """
    k = i if back is None else q.tiles - 1 - i
    t0, t1 = k * q.tile, min(q.steps, (k + 1) * q.tile)
    if back is None:
        _forward_span(like, q, b, start, n, t0 + s0, min(t0 + s1, t1), carry, spread)
    else:
        if q.sum_da and s0 == 0:
            vectors.zero(like, n, (q.da + ((b * q.tiles + k) * q.width + start) * q.item,))
        _backward_span(like, q, b, start, n, k, max(t1 - s1, t0), t1 - s0, carry, spread)


@_compile
def _forward_summary(like, q, b, t0, t1, end, product, spread):
    compiled.apart()
    cut = False
    a, x, _ = _rows(like, q, b, t0, 0)
    steps = t1 - t0 if _alike(q, q.width, False) else 1
    for t in range(t0, t1, steps):
        if _cut(q, b, t):
            vectors.copy(like, q.width, (end, x))
            vectors.zero(like, q.width, (product,))
            cut = True
        else:
            decay = _decay(like, q, q.width, a, spread)
            _advance(like, q.width, steps, (end, product, decay, x), (q.a_time, q.x_time))
        a, x = a + q.a_time, x + q.x_time
    return cut


@_compile
def _backward_summary(like, q, b, t0, t1, mu, product, spread):
    compiled.apart()
    cut = False
    steps = t1 - t0 if _alike(q, q.width, False) else 1
    for t in range(t1 - 1, t0 - 1, -steps):
        if _cut(q, b, t):
            vectors.zero(like, q.width, (mu,))
            vectors.zero(like, q.width, (product,))
            cut = True
        else:
            a, g, _ = _rows(like, q, b, t, 0)
            decay = _decay(like, q, q.width, a, spread)
            _adjoint_advance(like, q.width, steps, (mu, product, decay, g), (-q.a_time, -q.x_time))
    return cut


@_compile
def _summary(like, q, b, i, end, product, spread, back):
    """What tile i, counted the way that time runs, carries on if nothing is carried into it, and its product of decays.

    True if a reset makes what was before irrelevant.
    """
    k = i if back is None else q.tiles - 1 - i
    t0, t1 = k * q.tile, min(q.steps, (k + 1) * q.tile)
    vectors.zero(like, q.width, (end,))
    vectors.one(like, q.width, (product,))
    if back is None:
        return _forward_summary(like, q, b, t0, t1, end, product, spread)
    return _backward_summary(like, q, b, t0, t1, end, product, spread)


@_compile
def _slot(q, b, i):
    """Address of what is carried into tile i of row b, counted the way that time runs."""
    row = q.width * q.item
    if i == 0:
        return q.start + b * row
    if i == q.tiles:
        return q.end + b * row
    return q.carries + (b * (q.tiles + 1) + i) * row


@_compile
def _flag(q, b, i):
    return q.flags + (b * (q.tiles + 1) + i) * 8


@_compile
def _are_small(like, least, batch, steps, width, item, real, product, a, a_batch, a_time):
    """Whether products of so many decays are below `least`, in every row of the batch and channel."""
    compiled.apart()
    for b in range(batch):
        vectors.one(like, width, (product,))
        _multiply(like, width, steps, (product, a + b * a_batch), (a_time,))
        for i in range(width * item // real):
            if not abs(vectors.real(like, product + i * real)) < least:
                return False
    return True


@_compile
def _units(like, given, me):
    """One thread's share: a part of batch and channels over all time. given: q, back."""
    compiled.apart()
    if teams.started(me):
        return
    q, back = given
    row, blocks = q.width * q.item, (q.width + q.block - 1) // q.block
    spread = q.rows + me[0] * q.own * row
    carry = spread + row
    for unit in teams.share(q.batch * blocks, me):
        b, start = unit // blocks, unit % blocks * q.block
        n, first = min(q.block, q.width - start), start * q.item
        vectors.copy(like, n, (carry, q.start + b * row + first))
        for i in range(q.tiles):
            _span(like, q, b, start, n, i, 0, q.tile, carry, spread, back)
        vectors.copy(like, n, (q.end + b * row + first, carry))
    if q.stream:
        teams.settle()


@_compile
def _tiles(like, given, me):
    """One thread's share of time: tiles, each for the thread that claims it, until none is left. given: q, back."""
    compiled.apart()
    if teams.started(me):
        return
    q, back = given
    row = q.width * q.item
    spread = q.rows + me[0] * q.own * row
    carry, end, product = spread + row, spread + 2 * row, spread + 3 * row
    while True:
        unit = teams.claim(_flag(q, q.batch, 0))
        if unit >= q.batch * q.tiles:
            break
        b, i = unit % q.batch, unit // q.batch
        into, past = _slot(q, b, i), _slot(q, b, i + 1)
        cut = _summary(like, q, b, i, end, product, carry, back)
        known = _carry_on(like, q, b, i, cut, past, product, end, into)
        vectors.copy(like, q.width, (carry, into))
        _span(like, q, b, 0, q.width, i, 0, q.tile, carry, spread, back)
        if not known or i == q.tiles - 1:
            vectors.copy(like, q.width, (past, carry))
            teams.publish(_flag(q, b, i + 1))
    if q.stream:
        teams.settle()


@_compile
def _thirds(like, given, me):
    """One thread's share where there are two for each row of the batch. given: q, back.

    The first runs two thirds of the time. The other finds what the second third carries on, and runs the last. Should
    it begin too late, the first has taken that too.
    """
    compiled.apart()
    if teams.started(me):
        return
    q, back = given
    row, unit = q.width * q.item, teams.claim(q.flags)
    b, leads = unit % q.batch, unit < q.batch
    spread, taken = q.rows + me[0] * q.own * row, q.flags + 8 * (1 + 3 * b)
    carry, end, product = spread + row, spread + 2 * row, spread + 3 * row
    if leads:
        vectors.copy(like, q.width, (carry, q.start + b * row))
        for i in (0, 1):
            _span(like, q, b, 0, q.width, i, 0, q.tile, carry, spread, back)
            vectors.copy(like, q.width, (q.carries + (2 * b + i) * row, carry))
            teams.publish(taken + 8 + 8 * i)
    mine = teams.claim(taken) == 0
    if mine and not leads:
        cut = _summary(like, q, b, 1, end, product, carry, back)
        _wait(taken + 8)
        if cut:
            vectors.copy(like, q.width, (carry, end))
        else:
            _combine(like, q.width, (carry, product, q.carries + 2 * b * row, end))
        if not _finite(like, q, carry):  # the product of decays may leave the range where the state does not
            _wait(taken + 16)
            vectors.copy(like, q.width, (carry, q.carries + (2 * b + 1) * row))
    if mine:
        _span(like, q, b, 0, q.width, 2, 0, q.tile, carry, spread, back)
        vectors.copy(like, q.width, (q.end + b * row, carry))
    if q.stream:
        teams.settle()


@_compile
def _guesses(like, given, me):
    """One thread's share of time where states are soon forgotten. given: q, back.

    Its own tiles first, which lie side by side: what it has read or written before may still be near it. Whoever is
    last to end looks through all of them.
    """
    compiled.apart()
    if teams.started(me):
        return
    q, back = given
    row, units, ended = q.width * q.item, q.batch * q.tiles, 0
    spread = q.rows + me[0] * q.own * row
    carry = spread + row
    for turn in range(me[1]):
        whose = (me[0] + turn) % me[1]
        part = teams.share(units, (whose if back is None else me[1] - 1 - whose, me[1], 0))
        before = -1
        while True:
            unit = part.start + teams.claim(q.flags + 8 * whose)
            if unit >= part.stop:
                break
            if unit % q.tiles == 0:
                vectors.copy(like, q.width, (carry, q.start + unit // q.tiles * row))
            elif unit != before + 1:
                vectors.zero(like, q.width, (carry,))
            vectors.copy(like, q.width, (_kept(q, unit), carry))
            _by_marks(like, q, unit, carry, spread, True, back)
            before, ended = unit, ended + 1
    if q.stream:
        teams.settle()
    last = False
    for _ in range(ended):
        last |= teams.claim(q.flags + 8 * me[1]) == units - 1
    if last:
        for unit in range(units):
            if unit % q.tiles == 0:
                vectors.copy(like, q.width, (carry, q.start + unit // q.tiles * row))
            if _same(like, q, carry, _kept(q, unit)):
                vectors.copy(like, q.width, (carry, _kept(q, unit) + row))
            else:
                _by_marks(like, q, unit, carry, spread, False, back)
            if (unit + 1) % q.tiles == 0:
                vectors.copy(like, q.width, (q.end + unit // q.tiles * row, carry))
        if q.stream:
            teams.settle()


@_compile
def _kept(q, unit):
    """Rows kept of a tile: what was carried into it, what past it, then marks. Tiles are counted as time runs."""
    return q.carries + unit * q.kept * q.width * q.item


@_compile
def _by_marks(like, q, unit, carry, spread, guess, back):
    """Run a tile. guess: keep in marks what is carried after FIRST rows, twice as many, and so on, to the end.

    Else until that is carried, to the last bit, which stands in a mark: what was guessed after it is right.
    """
    b, i, row = unit // q.tiles, unit % q.tiles, q.width * q.item
    k, past = i if back is None else q.tiles - 1 - i, _kept(q, unit) + row
    steps, mark, done, stop, right = min(q.tile, q.steps - k * q.tile), past + row, 0, FIRST, False
    while done < steps and not right:
        stop = min(stop, steps)
        _span(like, q, b, 0, q.width, i, done, stop, carry, spread, back)
        if guess:
            vectors.copy(like, q.width, (mark, carry))
        else:
            right = _same(like, q, carry, mark)
        done, stop, mark = stop, 2 * stop, mark + row
    if right:
        vectors.copy(like, q.width, (carry, past))
    else:
        vectors.copy(like, q.width, (past, carry))


@_compile
def _wait(flag):
    while teams.is_set(flag) == 0:
        teams.give_way()


@_compile
def _carry_on(like, q, b, i, cut, past, product, end, into):
    """Wait for the carry into tile i and publish the one past it. False if that is only known once the tile is done."""
    compiled.apart()
    if i:
        _wait(_flag(q, b, i))
    if cut:
        vectors.copy(like, q.width, (past, end))
    else:
        _combine(like, q.width, (past, product, into, end))
    # the product of decays may leave the range of numbers where the state itself does not
    known = _finite(like, q, past)
    if known:
        teams.publish(_flag(q, b, i + 1))
    return known


def _run(work: Any, like: Any, q: _Problem, backward: bool, workers: int, held: object) -> None:
    """held: what q holds addresses of."""
    # where they share time, whoever comes late finds nothing left to claim: no thread waits for one that has not begun
    teams.call(work, like, (q, 0 if backward else None), workers, held)


def _solve(
    a: Tensor, x: Tensor, start: Tensor, h0: Tensor, h: Tensor, dx: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fill h; or, given dx, fill dx from x = g. start: the first carry. Returns the last carry, and da (B, *, N)."""
    batch, steps = x.shape[:2]
    width, item, backward = math.prod(x.shape[2:]), x.element_size(), dx is not None
    blocks, workers = -(-width // BLOCK), teams.workers(x.numel())
    while batch * blocks < workers and width >= 2 * NARROW * blocks:
        blocks += 1
    sum_da, row = backward and a.shape[1] == 1, width * item
    a, x, h0 = _rows_of(a, width), _rows_of(x, width), plain(h0)
    tile = max(SHORTEST, TILE // (2 * row))
    far = batch * steps * row >= FAR and batch * blocks < workers
    moves = [a.stride(i) * item if a.shape[i] > 1 else 0 for i in (0, 1)]
    long = min(steps, max(tile, batch * steps // (TURNS * workers)))
    guess = far and not sum_da and _forgets(a, long, moves, backward)
    wide, tall = batch * blocks * 2 >= workers, width < NARROW and steps * row >= TALL
    thirds = not guess and batch * 2 == workers and tall
    if guess:
        tile = long
    elif thirds:
        tile = -(-steps // 3)
    elif wide and not sum_da:
        tile = steps
    tiles = -(-steps // tile)
    work = _guesses if guess else _thirds if thirds else _units if wide else _tiles
    workers = max(1, min(workers, batch * (blocks if work is _units else tiles)))

    start, end = h0 if start is h0 else plain(start), empty(start, *start.shape)
    reset = None if reset is None else reset.contiguous()
    da = empty(x, batch, (tiles if sum_da else steps) if backward else 0, width)
    kept = 3 + (max(FIRST, tile - 1) // FIRST).bit_length() if guess else 0
    own = 2 if work in (_units, _guesses) else 4
    shared = batch * (tiles * kept if guess else tiles + 1)
    rows = empty(x, own * workers + shared, width)
    flags = torch.zeros(1 + workers + batch * (tiles + 1), dtype=torch.int64)
    q = _Problem(
        item=item,
        real=item // 2 if x.is_complex() else item,
        batch=batch,
        steps=steps,
        width=width,
        block=-(-width // blocks),
        tile=tile,
        tiles=tiles,
        a=a.data_ptr(),
        a_batch=moves[0],
        a_time=moves[1],
        a_channel=int(a.shape[2] == width),
        x=x.data_ptr(),
        x_batch=x.stride(0) * item,
        x_time=x.stride(1) * item,
        reset=0 if reset is None else reset.data_ptr(),
        start=start.data_ptr(),
        end=end.data_ptr(),
        h0=h0.data_ptr(),
        h=h.data_ptr(),
        dx=0 if dx is None else dx.data_ptr(),
        da=da.data_ptr(),
        sum_da=int(sum_da),
        stream=int(_streams(width, -(-width // blocks), [h] if dx is None else [dx, da])),
        own=own,
        kept=kept,
        rows=rows.data_ptr(),
        carries=rows.data_ptr() + own * workers * row,
        flags=flags.data_ptr(),
    )
    _run(work, _LIKE[x.dtype], q, backward, workers, (a, x, h0, h, dx, da, reset, start, end, rows, flags))
    return end, da


def _forgets(a: Tensor, within: int, moves: list[int], backward: bool) -> bool:
    """Whether next to nothing is left of a state after so many steps, judged by the first few that time meets.

    The way is chosen for all tiles at once, and by the numbers alone: not all ways round alike.
    """
    (batch, steps, width), item, product = a.shape, a.element_size(), a.new_empty(a.shape[2])
    few = min(FEW, within)
    sizes = batch, few, width, item, item // 2 if a.is_complex() else item
    first, move = (a.data_ptr() + (steps - 1) * moves[1], -moves[1]) if backward else (a.data_ptr(), moves[1])
    small = _are_small(_LIKE[a.dtype], LEFT ** (few / within), *sizes, product.data_ptr(), first, moves[0], move)
    return bool(small)


def _streams(width: int, block: int, results: list[Tensor]) -> bool:
    """Results larger than the caches would only push other things out. Their rows must begin where a line begins."""
    for r in results:
        item = r.element_size()
        if r.numel() * item < vectors.STREAM or (r.data_ptr() | width * item | block * item) % vectors.LINE:
            return False
    return True


_LIKE = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.complex64: np.complex64(0),
    torch.complex128: np.complex128(0),
}


def plain(t: Tensor) -> Tensor:
    """The same numbers as they lie in memory, contiguous."""
    return (t.resolve_conj() if t.is_complex() else t).resolve_neg().contiguous()


def _rows_of(t: Tensor, width: int) -> Tensor:
    """(B, T, N...) as (B, T, width), or (B, T, 1), with contiguous rows; a view where that is possible."""
    t = (t.resolve_conj() if t.is_complex() else t).resolve_neg()
    if t.ndim != 3:
        t = t.reshape(*t.shape[:2], 1 if t.shape[2:].numel() == 1 else width)
    return t if t.shape[2] == 1 or t.stride(2) == 1 else t.contiguous()


def _decays(a: Tensor, x: Tensor) -> Tensor:
    """a, with its channels laid out in full unless there are all of them or one."""
    as_is = a.shape == x.shape or a.shape[2:] == x.shape[2:] or math.prod(a.shape[2:]) == 1
    return a if as_is else a.expand(*a.shape[:2], *x.shape[2:])


def _forward(a: Tensor, x: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    h = empty(x, *x.shape)
    if not x.numel():
        return h, h0.clone()
    last, _ = _solve(_decays(a, x), x, h0, h0, h, None, reset)
    return h, last


def _backward(
    g: Tensor, g_last: Tensor, a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty(h, *h.shape)
    if not h.numel():
        return torch.zeros_like(a), dx, g_last.clone()
    d_h0, da = _solve(_decays(a, h), g, g_last, h0, h.contiguous(), dx, reset)
    da = da.view(len(h), -1, *h.shape[2:])
    if da.shape[1] != h.shape[1]:
        da = da.sum(1, keepdim=True)
    return da.sum_to_size(a.shape).contiguous(), dx, d_h0


_scan = differentiable("linear_scan_numba", "cpu", _forward, _backward)


def scan(
    a: Tensor, x: Tensor, h0: Tensor, *, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    a, x, reset, dtype = *normal(a, x, h0, reset, lengths), x.dtype
    h, last = _scan(a, x if dtype == h0.dtype else x.to(h0.dtype), h0, reset)
    last = last if lengths is None else at_lengths(h, h0, lengths)
    return h if dtype == h0.dtype else h.to(dtype), last
