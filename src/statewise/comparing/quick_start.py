"""A process that trains for seconds should not import the compiler for seconds.

torch.optim imports torch._dynamo at its first call, only to tell it where a graph would break and that it should look
away: nothing where nothing is compiled. Until something asks for more than that, a stand-in answers; then the real
module takes its place. Where torch changes, the stand-in is not asked, or hands over, and only the seconds come back.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch


class _StandIn(types.ModuleType):
    def graph_break(self) -> None:
        """Outside of compiled code this does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(_real(), name)


def _real() -> types.ModuleType:
    if isinstance(sys.modules.get("torch._dynamo"), _StandIn):
        del sys.modules["torch._dynamo"]
        del torch._dynamo
    return importlib.import_module("torch._dynamo")


def leave_out_compiler() -> None:
    """Put the stand-in in place, unless the compiler is there already."""
    if "torch._dynamo" in sys.modules:
        return
    stand_in = _StandIn("torch._dynamo")
    sys.modules["torch._dynamo"] = stand_in
    torch._dynamo = stand_in  # type: ignore[assignment]
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None:
            setattr(plain, "__dynamo_disable", plain)
