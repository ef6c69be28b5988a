"""Teams of threads that wait for one another: who fails or is interrupted leaves nobody waiting."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from statewise.ops.compiled import in_numba as compiled
from statewise.ops.teams import in_numba as teams

SETUP = """
import os, signal, threading, time
import torch
from statewise.ops import gru_loop
from statewise.ops.gated_loop import in_numba
from statewise.ops.teams import in_numba as teams

torch.set_num_threads(2)
in_numba._plan = lambda *args: in_numba._Plan(1, args[-1], 1) if SHARED else in_numba._Plan(2, 1, 2)
call = (torch.randn(2, 9, 96), torch.zeros(2, 32), None, torch.randn(96, 32) / 9)
want = gru_loop(*call, backend="numba")[0]
"""
FAILS = """
work, teams._openmp = in_numba._forward_work, lambda: None
for bad in (0, 1):
    def fails(number, q, me):
        if me[0] == bad:
            raise MemoryError
        work(number, q, me)

    in_numba._forward_work = fails
    try:
        gru_loop(*call, backend="numba")
    except MemoryError:
        in_numba._forward_work = work
        print(torch.equal(gru_loop(*call, backend="numba")[0], want))
"""
INTERRUPTED = """
if not SHARED:
    teams._openmp = lambda: None
inside, heard, calls, same = False, 0, 0, True

def hear(*_):
    global inside
    if inside:
        inside = False  # one for each call: what handles the first is not to be interrupted itself
        raise KeyboardInterrupt

def disturb():
    while heard < 200:
        time.sleep(3e-4)
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, hear)
other = threading.Thread(target=disturb)
other.start()
while heard < 200:
    try:
        inside = True
        got = gru_loop(*call, backend="numba")[0]
        inside = False
        calls += 1
        same &= torch.equal(got, want)
    except KeyboardInterrupt:
        heard += 1
other.join()
print(same, torch.equal(gru_loop(*call, backend="numba")[0], want))
"""
OUTLIVES = """
import _thread, atexit, threading, weakref
from statewise.ops.teams import in_numba as teams

teams._openmp, allocate, start = lambda: None, _thread.allocate_lock, _thread.start_new_thread
looked, over, at_last, late = (threading.Event() for _ in range(4))
ending = False

class Lock:  # whose thread lingers behind it, and which ends the work once it is waited for while Python ends
    def __init__(self):
        self.lock = allocate()

    def acquire(self):
        if ending:
            over.set()
        return self.lock.acquire()

    def release(self):
        self.lock.release()
        looked.wait()

class Held:
    pass

def work(like, q, me):
    if q and me[0]:
        q.set()
        over.wait()
        print("ended")
    elif q:
        q.wait()
        raise KeyboardInterrupt

def begin_late(each, args):  # as on a busy machine
    at_last.wait()
    each(*args)
    late.set()

teams._thread.allocate_lock = Lock
held = Held()
found = weakref.ref(held)
teams.call(work, None, False, 2, held)
del held
print(found() is None)
looked.set()
for begin in (start, lambda each, args: start(begin_late, (each, args))):
    teams._thread.start_new_thread, begun = begin, threading.Event()
    if begin is not start:
        begun.set()
    try:
        teams.call(work, None, begun, 2)
    except KeyboardInterrupt:
        print("interrupted")

@atexit.register  # the last that is registered runs first
def let_the_late_one_begin():
    at_last.set()
    late.wait(60)

@atexit.register
def end():
    global ending
    ending = True
    teams._end()
"""


WITHOUT = """
teams._openmp = lambda: None
print(torch.equal(gru_loop(*call, backend="numba")[0], want))
"""


ALL = """
import importlib, itertools, multiprocessing
from concurrent.futures import ThreadPoolExecutor
import torch
from statewise.core import leaves, tree_map
from statewise.ops import ops
from statewise.ops.teams import in_numba as teams

EACH = 4  # samples of an op
teams.SMALL = 0
importlib.import_module("statewise.ops.gated_loop.in_numba").ALONE = 0
if not OPENMP:
    teams._openmp = lambda: None

def trainable(value):
    if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.detach().requires_grad_()
    return tree_map(trainable, value) if isinstance(value, tuple) else value

def outcome(op, sample, backward=True):
    inputs = {name: trainable(value) for name, value in sample.items()}
    outs = leaves(op(**inputs, backend="numba"))
    if not backward:
        return outs
    wanted = [t for v in inputs.values() if v is not None for t in leaves(v) if getattr(t, "requires_grad", False)]
    loss = sum((out * out.detach().cos()).abs().sum() for out in outs)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*outs, *(g for g in grads if g is not None)]

def same(got, want):
    return len(got) == len(want) and all(map(torch.equal, got, want))

def again(number):  # in a forked child, which has lost the threads
    return all(map(torch.equal, outcome(*cases[number], backward=False), ones[number]))

cases, shared, together = [], set(), teams.call
for op in ops.values():
    if "numba" in op.backends:
        fits = (s for s in op.samples("cpu", torch.float32) if op.backends["numba"].why_not((), s) is None)
        cases += [(op, sample) for sample in itertools.islice(fits, EACH)]

def counted(work, like, q, workers, *more, **options):
    if workers > 1:
        shared.add(current)
    return together(work, like, q, workers, *more, **options)

teams.call = counted
torch.set_num_threads(1)
ones = []
for op, sample in cases:
    current = op.name
    ones.append(outcome(op, sample))
assert not shared
torch.set_num_threads(2)
for (op, sample), one in zip(cases, ones):
    current = op.name
    assert same(outcome(op, sample), one), op.name
assert shared == {op.name for op, _ in cases} - {"block_scan"}  # which one thread walks through
teams.call = together
# before threads of Python have run: MKL's locks are copied too, and threads that end may hold one
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert all(pool.map_async(again, range(len(cases))).get(300))
with ThreadPoolExecutor(3) as pool:
    for _ in range(3):
        found = pool.map(lambda case: outcome(*case), cases)
        assert all(itertools.starmap(same, zip(found, ones)))
print(len(shared))
"""


@compiled.function
def _ends_badly(like, q, me):
    if teams.started(me):
        return
    q[0][me[0]] += 1
    if me[0] == 1:
        raise MemoryError


def printed(code: str, shared: bool) -> list[str]:
    """shared: whether they share out units."""
    return said(f"SHARED = {shared}" + SETUP + code)


def said(code: str, seconds: float = 250) -> list[str]:
    """In a process of its own: threads that wait for ever cannot be stopped."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_a_thread_that_fails_leaves_nobody_waiting() -> None:
    assert printed(FAILS, shared=False) == ["True"] * 2


@pytest.mark.parametrize("shared", [True, False], ids=["threads of torch", "threads of ours"])
def test_interrupted_calls_leave_nobody_waiting(shared: bool) -> None:
    """Nothing of Python runs in a team of OpenMP, so a Ctrl-C is heard before it or after it."""
    assert printed(INTERRUPTED, shared) == ["True"] * 2


def test_without_openmp_nobody_waits() -> None:
    assert printed(WITHOUT, shared=True) == ["True"]


def test_a_thread_keeps_nothing_past_its_call_and_is_waited_for_at_the_end() -> None:
    """A tensor that another thread frees while Python ends aborts the process."""
    assert printed(OUTLIVES, shared=False) == ["True", "interrupted", "interrupted", "ended"]


@pytest.mark.timeout(900)  # the first time all ops are compiled
@pytest.mark.parametrize("openmp", [True, False], ids=["threads of torch", "threads of ours"])
def test_every_op_gives_the_same_bits_on_any_threads(openmp: bool) -> None:
    """Alone, on a team, in several Python threads at once, each with its team, and in a forked child."""
    assert int(said(f"OPENMP = {openmp}" + ALL, 900)[0]) >= 10


def test_what_fails_in_a_team_is_raised() -> None:
    """A team cannot raise anything: what did not end well in it is done again where it is raised."""
    count = np.zeros(2, np.int64)
    with pytest.raises(MemoryError):
        teams.call(_ends_badly, 0.0, (count,), 2)
    assert list(count) == ([2, 2] if teams.can_wait() else [1, 1])
