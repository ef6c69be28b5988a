"""Triton where there is no GPU: its kernels in the interpreter, and compiled for a GPU that is not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
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


def interpreted(code: str) -> str:
    """What the code prints in a process of its own: the mode is chosen when triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    return _run(code, env)


def says(op: Op, *args: Any, interpreted: bool = False, **kwargs: Any) -> str:
    """What the op says of its Triton kernels, with the interpreter or without. None is run, so this process will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        return op.explain(*args, **kwargs)["triton"]


def compiled(code: str, cache: Path) -> list[str]:
    """The lines that the code prints, which may call `compiles`."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    return _run(code, env).split()


def _run(code: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


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
