"""Compiled work on several threads at once, which may wait for one another.

They are torch's own where it uses GNU's OpenMP: those wait for more work by spinning, for milliseconds after each
product, and other threads would share the processors with them. Nothing of Python runs in such a team, so nothing can
fail or be interrupted in one thread while the others wait for it: a Ctrl-C is heard when all are done.

Work is one compiled function, which starts its team itself: what is compiled once more for each way to call it takes
that much longer at the first call.
    @compiled.function
    def work(like, q, me):  # me: which thread of how many, and where what starts a team is found
        if teams.started(me):
            return
        for unit in teams.share(units, me):
            ...
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from ..compiled import in_numba as compiled

Member = tuple[int, int, int]  # thread, threads, and the address of what starts them all, 0 in one that was started
SMALL = 1 << 15  # elements below which a second thread costs more than it brings

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def available() -> int:
    """Torch's number of threads; one in a forked child, where thread pools are lost."""
    return 1 if _forked else torch.get_num_threads()


def workers(elements: int, parts: int = sys.maxsize) -> int:
    """Threads to use for so many elements in so many parts."""
    return 1 if elements < SMALL else max(1, min(available(), parts))


@intrinsic
def started(context: Any, me: Any) -> Any:
    """Call the function that calls this on every thread of a team, if `me`, its last argument, says so; whether it did.

    As many of them as ended well are counted where `me` points to; none begins where there are fewer than were asked
    for.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, count, pointer = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
        function, (_, workers, team) = builder.function, cgutils.unpack_tuple(builder, args[0], 3)
        function.attributes.add("noinline")
        start = builder.icmp_signed("!=", team, word(0))
        with builder.if_then(start):
            out, error, *inputs = function.args  # the last three are `me`
            box = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in inputs]))
            slot = lambda code, box, i: code.gep(box, [count(0), count(i)], inbounds=True)
            for i, value in enumerate(inputs):
                builder.store(value, slot(builder, box, i))
            of_team = lambda code, team, i: code.load(code.inttoptr(code.add(team, word(8 * i)), word.as_pointer()))

            kind = ir.FunctionType(ir.VoidType(), [pointer])
            member = ir.Function(builder.module, kind, builder.module.get_unique_name("member"))
            member.linkage = "internal"
            inside = ir.IRBuilder(member.append_basic_block())
            its = inside.bitcast(member.args[0], box.type)
            *given, _, workers_, team_ = (inside.load(slot(inside, its, i)) for i in range(len(inputs)))
            ask = ir.FunctionType(count, []).as_pointer()
            have, number = (inside.inttoptr(of_team(inside, team_, i), ask) for i in (1, 2))
            with inside.if_then(inside.icmp_signed("==", inside.sext(inside.call(have, []), word), workers_)):
                me = [inside.sext(inside.call(number, []), word), workers_, word(0)]
                results = [inside.alloca(value.type.pointee) for value in (out, error)]
                status = inside.call(function, [*results, *given, *me])
                with inside.if_then(inside.icmp_signed("==", status, status.type(0))):
                    ended = inside.inttoptr(inside.add(team_, word(24)), word.as_pointer())
                    inside.atomic_rmw("add", ended, word(1), "acq_rel")
            inside.ret_void()

            begin = ir.FunctionType(ir.VoidType(), [kind.as_pointer(), pointer, count, count]).as_pointer()
            parallel, data = builder.inttoptr(of_team(builder, team, 0), begin), builder.bitcast(box, pointer)
            builder.call(parallel, [member, data, builder.trunc(workers, count), count(0)])
        return start

    return types.boolean(me), generate


@compiled.function
def share(units, me):
    """Those of so many units that are this thread's."""
    thread, workers, _ = me
    return range(units * thread // workers, units * (thread + 1) // workers)


@intrinsic
def claim(context: Any, address: Any) -> Any:
    """Take the next number off a counter that all threads share."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "acq_rel")

    return types.intp(types.intp), generate


@intrinsic
def is_set(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.intp(types.intp), generate


@intrinsic
def publish(context: Any, address: Any) -> Any:
    """Let other threads see everything written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        builder.store_atomic(word(1), builder.inttoptr(args[0], word.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def settle(context: Any) -> Any:
    """Have the stores that went past the caches done before anything else is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(context: Any) -> Any:
    """Let another thread have the processor, if one wants it: it may be the one that is waited for."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if sys.platform != "win32":
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP as loaded by torch, or None."""
    home = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "torch")  # torch/lib or torch.libs
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            found = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    except OSError:
        return None
    ours = [path for path in found if path.startswith(home)]
    return ctypes.CDLL(ours[0]) if len(ours) == 1 else None


@functools.cache
def _places(openmp: ctypes.CDLL) -> list[int]:
    names = openmp.GOMP_parallel, openmp.omp_get_num_threads, openmp.omp_get_thread_num
    return [ctypes.cast(name, ctypes.c_void_p).value or 0 for name in names]


def can_wait() -> bool:
    """Whether there are threads that may wait for one another."""
    openmp = _openmp()
    return openmp is not None and not openmp.omp_in_parallel()


def call(
    work: Callable[[Any, Any, Member], None], like: Any, q: Any, workers: int, held: object = None, waits: bool = False
) -> bool:
    """work(like, q, me) for each of so many threads, all at once; whether it was done.

    held: what q holds addresses of, kept for as long as any thread may use it.
    waits: whether threads wait for one another. That takes OpenMP: in threads of Python one could be interrupted.
    """
    if workers == 1:
        work(like, q, (0, 1, 0))
        return True
    openmp = _openmp()
    if openmp is not None and can_wait():
        team = (ctypes.c_int64 * 4)(*_places(openmp), 0)
        work(like, q, (0, workers, ctypes.addressof(team)))
        if team[3] == workers:
            return True
    if waits:
        return False
    errors: list[BaseException] = []
    ends = []
    for thread in range(1, workers):  # locks of this call alone: an interrupted pool may leave one of its own closed
        done = _thread.allocate_lock()
        done.acquire()
        _thread.start_new_thread(_each, (_Job((work, like, q, (thread, workers, 0), held)), errors, done))
        ends.append(done)
    work(like, q, (0, workers, 0))
    for done in ends:
        done.acquire()
    if errors:
        raise errors[0]
    return True


class _Job:
    """What a thread is to do."""

    def __init__(self, given: tuple[Any, ...] | None):
        self.given = given
        _jobs.add(self)


_jobs: weakref.WeakSet[_Job] = weakref.WeakSet()  # of threads that may not have begun
_under_way: set[_thread.LockType] = set()  # closed for as long as their threads work


def run(work: Any, x: Tensor, states: int, units: int, *arrays: Any, like: Any = None) -> None:
    """work(like, arrays, me) on as many threads as the work is worth.

    like: a number that has the dtype of x; 0 where it is None.
    """
    if like is None:
        like = np.float64(0) if x.dtype == torch.float64 else np.float32(0)
    call(work, like, arrays, workers(x.numel() * states, units))


def arrays(*tensors: Tensor | None) -> list[Any]:
    """What numba takes; an empty array for None."""
    return [
        np.empty((0, 0), np.uint8) if t is None else (t.view(torch.uint8) if t.dtype == torch.bool else t).numpy()
        for t in (None if t is None else t.detach().contiguous() for t in tensors)
    ]


def _each(job: _Job, errors: list[BaseException], done: _thread.LockType) -> None:
    """It may outlive an interrupted call, and keeps no tensor past `done`: one freed while Python ends aborts it."""
    try:
        _under_way.add(done)
        _work(job)
    except BaseException as error:
        errors.append(error.with_traceback(None))
    finally:
        _under_way.discard(done)
        done.release()


def _work(job: _Job) -> None:
    given, job.given = job.given, None
    if given is not None:
        work, like, q, me, _held = given  # held: until this returns
        work(like, q, me)


@atexit.register
def _end() -> None:
    """Of what interrupted calls left: who has not begun has nothing to do, the others are waited for."""
    for job in tuple(_jobs):
        job.given = None
    for done in tuple(_under_way):
        done.acquire()
