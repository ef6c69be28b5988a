"""What the checks of the ops have in common."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..core import UsageError


def check_time(op: str, x: Tensor, reset: Tensor | None, lengths: Tensor | None) -> None:
    """Raise UsageError unless reset is bool (B, T) and lengths (B,), of values up to T, as x (B, T, ...) is."""
    batch, steps = x.shape[:2]
    if reset is not None and (reset.dtype != torch.bool or reset.shape != (batch, steps)):
        raise UsageError(f"{op}: reset is {reset.dtype} {tuple(reset.shape)}; expected bool {(batch, steps)}")
    if lengths is not None and lengths.shape != (batch,):
        raise UsageError(f"{op}: lengths has shape {tuple(lengths.shape)}; expected ({batch},)")
    if lengths is not None and not torch.compiler.is_compiling() and not lengths.is_meta:
        bad = ((lengths < 0) | (lengths > steps)).nonzero()[:, 0].tolist()
        if bad:
            raise UsageError(f"{op}: lengths[{bad[0]}] is {int(lengths[bad[0]])}; expected 0 to T = {steps}")


def needs_a_gpu(*args: Any, **kwargs: Any) -> str | None:
    """The limit of a Triton backend: on a CPU its kernels run in the interpreter alone."""
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor) and t.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "device cpu (takes cuda, or cpu with TRITON_INTERPRET=1)"
    return None
