"""Compiled work on several threads at once, which may wait for one another.

They are torch's own where it uses GNU's OpenMP: those wait for more work by spinning, for milliseconds after each
product, and other threads would share the processors with them. Nothing of Python runs in such a team, so nothing can
fail or be interrupted in one thread while the others wait for it: a Ctrl-C is heard when all are done.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Places = tuple[int, int, int]  # addresses of GOMP_parallel, omp_get_num_threads and omp_get_thread_num


@intrinsic
def in_parallel(context: Any, work: Any, like: Any, q: Any, workers: Any, places: Any) -> Any:
    """work(like, q, thread) on as many threads of OpenMP; whether there were as many, else nothing was done."""
    given = (like, q, types.intp)
    work.get_call_type(context, given, {})  # compiles it

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        overload = work.dispatcher.overloads[given]
        context.add_linking_libs([overload.library])
        word, count, pointer = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
        parallel, size, number = cgutils.unpack_tuple(builder, args[4], 3)
        inputs = [args[1], args[2], args[3], size, number, word(0)]
        box = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in inputs]))
        slot = lambda code, box, i: code.gep(box, [count(0), count(i)], inbounds=True)
        for i, value in enumerate(inputs):
            builder.store(value, slot(builder, box, i))

        kind = ir.FunctionType(ir.VoidType(), [pointer])
        member = ir.Function(builder.module, kind, builder.module.get_unique_name("member"))
        member.linkage = "internal"
        inside = ir.IRBuilder(member.append_basic_block())
        its = inside.bitcast(member.args[0], box.type)
        like_, q_, workers_, size_, number_ = (inside.load(slot(inside, its, i)) for i in range(5))
        ask = ir.FunctionType(count, []).as_pointer()
        have = inside.sext(inside.call(inside.inttoptr(size_, ask), []), word)
        with inside.if_then(inside.icmp_signed("==", have, workers_)):
            thread = inside.sext(inside.call(inside.inttoptr(number_, ask), []), word)
            code = context.declare_function(builder.module, overload.fndesc)
            kinds = overload.fndesc.argtypes
            context.call_conv.call_function(inside, code, overload.fndesc.restype, kinds, [like_, q_, thread])
            inside.atomic_rmw("add", slot(inside, its, 5), word(1), "acq_rel")
        inside.ret_void()

        start = ir.FunctionType(ir.VoidType(), [kind.as_pointer(), pointer, count, count]).as_pointer()
        data = builder.bitcast(box, pointer)
        builder.call(builder.inttoptr(parallel, start), [member, data, builder.trunc(args[3], count), count(0)])
        done = builder.load(slot(builder, box, 5))
        return builder.zext(builder.icmp_signed("==", done, args[3]), ir.IntType(8))

    return types.boolean(work, like, q, types.intp, places), generate


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
def _places(openmp: ctypes.CDLL) -> Places:
    names = openmp.GOMP_parallel, openmp.omp_get_num_threads, openmp.omp_get_thread_num
    parallel, size, number = (ctypes.cast(name, ctypes.c_void_p).value or 0 for name in names)
    return parallel, size, number


def can_wait() -> bool:
    """Whether there are threads that may wait for one another."""
    openmp = _openmp()
    return openmp is not None and not openmp.omp_in_parallel()


def run(
    work: Callable[..., None],
    team: Callable[..., bool],
    like: Any,
    q: Any,
    workers: int,
    held: object,
    waits: bool = False,
) -> bool:
    """work(like, q, thread) for each thread below `workers`, all at once; whether it was done.

    team(like, q, workers, places): compiled, returns in_parallel(work, like, q, workers, places).
    held: what q holds addresses of, kept for as long as any thread may use it.
    waits: whether threads wait for one another. That takes OpenMP: in threads of Python one could be interrupted.
    """
    if workers == 1:
        work(like, q, 0)
        return True
    openmp = _openmp()
    if openmp is not None and can_wait() and team(like, q, workers, _places(openmp)):
        return True
    if waits:
        return False
    errors: list[BaseException] = []
    ends = []
    for thread in range(1, workers):  # locks of this call alone: an interrupted pool may leave one of its own closed
        done = _thread.allocate_lock()
        done.acquire()
        _thread.start_new_thread(_each, ([work, like, q, thread, held], errors, done))
        ends.append(done)
    work(like, q, 0)
    for done in ends:
        done.acquire()
    if errors:
        raise errors[0]
    return True


_under_way: set[_thread.LockType] = set()  # closed for as long as their threads work


def _each(job: list[Any], errors: list[BaseException], done: _thread.LockType) -> None:
    """It may outlive an interrupted call, and keeps no tensor past `done`: one freed while Python ends aborts it."""
    try:
        _under_way.add(done)
        _work(job)
    except BaseException as error:
        errors.append(error.with_traceback(None))
    finally:
        _under_way.discard(done)
        done.release()


def _work(job: list[Any]) -> None:
    work, like, q, thread, _held = job  # held: until this returns
    job.clear()
    work(like, q, thread)


@atexit.register
def _wait() -> None:
    """For what interrupted calls left."""
    for done in tuple(_under_way):
        done.acquire()
