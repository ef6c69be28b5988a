"""Watching operations of torch from below, on which tensors they are, and the views that these are of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_here = threading.local()


def watching() -> Watch | None:
    """What watches the steps of this thread."""
    return getattr(_here, "watch", None)


class Watch(TorchDispatchMode):
    """The operations of one step, in order: (function or name, arguments, results)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.quiet:
            self.seen.append((func, args, kwargs or {}, result))
        return result

    def __enter__(self) -> Watch:
        _here.watch = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _here.watch = None
        super().__exit__(*error)

    def note(self, name: str, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """compute(), seen as one operation."""
        self.quiet = True
        try:
            result = compute()
        finally:
            self.quiet = False
        self.seen.append((name, args, {}, result))
        return result
