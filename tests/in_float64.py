"""Peers that ask for float32 whatever they are given, made to compute in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class InFloat64(TorchFunctionMode):
    """Within the block every request for a narrower float is one for float64, the default dtype included."""

    def __enter__(self) -> InFloat64:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *what: Any) -> None:
        super().__exit__(*what)
        torch.set_default_dtype(self.before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half):
            return args[0].double()
        kwargs = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **kwargs)


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
