"""Teams of threads that wait for one another: who fails or is interrupted leaves nobody waiting."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    def fails(number, q, thread):
        if thread == bad:
            raise MemoryError
        work(number, q, thread)

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
import _thread, time, weakref
from statewise.ops.teams import in_numba as teams

teams._openmp, allocate = lambda: None, _thread.allocate_lock

class Lingers:
    def __init__(self):
        self.lock = allocate()
        self.acquire = self.lock.acquire

    def release(self):
        self.lock.release()
        time.sleep(0.2)

class Held:
    pass

def work(like, q, thread):
    if q and thread:
        time.sleep(0.5)
        print("ended")
    elif q:
        time.sleep(0.1)
        raise KeyboardInterrupt

teams._thread.allocate_lock = Lingers
held = Held()
found = weakref.ref(held)
teams.run(work, None, None, False, 2, held)
del held
print(found() is None)
try:
    teams.run(work, None, None, True, 2, None)
except KeyboardInterrupt:
    print("interrupted")
"""


WITHOUT = """
teams._openmp = lambda: None
print(torch.equal(gru_loop(*call, backend="numba")[0], want))
"""


def printed(code: str, shared: bool) -> list[str]:
    """In a process of its own: threads that wait for ever cannot be stopped. shared: whether they share out units."""
    code = f"SHARED = {shared}" + SETUP + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
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
    assert printed(OUTLIVES, shared=False) == ["True", "interrupted", "ended"]
