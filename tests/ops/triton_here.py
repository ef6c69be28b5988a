"""Triton where there is no GPU: its kernels in the interpreter, and compiled for a GPU that is not here."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from statewise.ops import Op

MARKS = [
    pytest.mark.triton,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
TYPES = {"reset": "*u8", "ends": "*i64"} | dict.fromkeys(
    ("batch", "steps", "width", "size", "heads", "values", "blocks"), "i32"
)


# Importing torch and triton takes seconds: a process that has done so is copied for each piece of code.
SERVER = """
import json, os, signal, sys, traceback
import test_backends, torch, triton

torch.set_num_threads(1)
for line in sys.stdin:
    code, environment, out, err = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(290)
        os.environ.update(environment)
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        status = 1
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@functools.cache
def _server(interpret: str) -> subprocess.Popen[str]:
    """It ends when its input does, with this process."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": path}
    words = [sys.executable, "-c", SERVER]
    return subprocess.Popen(words, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def interpreted(code: str) -> str:
    """What the code prints in a process of its own: the mode is chosen when triton is imported."""
    return _run(code, "1")


CROSS = """
import itertools, torch
from statewise import ops
from test_backends import check

for name, dtype, every, longest in CASES:
    number = itertools.count()
    keep = lambda sample: sample[LONG].shape[1] <= longest and next(number) % every == 0
    print(check(getattr(ops, name), "triton", getattr(torch, dtype), keep))
"""


def crossed(*cases: tuple[str, str, int], longest: int = 100, of: str = "x") -> list[int]:
    """How many samples the kernels compute as the reference does, for each (op, dtype, every which sample).

    longest: samples of more steps of the argument `of` are left out.
    """
    given = [(*case, longest) for case in cases]
    return [int(line) for line in interpreted(f"CASES, LONG = {given!r}, {of!r}\n" + CROSS).split()]


def says(op: Op, *args: Any, interpreted: bool = False, **kwargs: Any) -> str:
    """What the op says of its Triton kernels, with the interpreter or without. None is run, so this process will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        return op.explain(*args, **kwargs)["triton"]


def compiled(code: str, cache: Path) -> list[str]:
    """The lines that the code prints, which may call `compiles`."""
    return _run(code, "0", TRITON_CACHE_DIR=str(cache)).split()


def _run(code: str, interpret: str, **environment: str) -> str:
    server = _server(interpret)
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        server.stdin.write(json.dumps([code, environment, str(out), str(err)]) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status == "0\n", f"{status or server.wait()}: {err.read_text()[-2000:] if err.exists() else ''}"
        return out.read_text()


def compiles(kernel: Any, number: str, constants: dict[str, Any], **options: Any) -> bool:
    """Whether there is code for sm_80. The interpreter takes more: types that change in a loop, for one.

    number: the type of arguments that are neither constants nor in TYPES.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, number) for name in names}
    fixed = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = ASTSource(kernel, signature, fixed)
    return "cubin" in triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm
