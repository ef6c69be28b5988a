"""Says that kernels are being compiled, for which the first start on a machine waits and no other does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

WORDS = "compiling kernels, once on this machine: up to half a minute"


@contextmanager
def telling(out: TextIO) -> Iterator[None]:
    """Print WORDS when the first kernel inside is compiled; nothing where all of them are found compiled."""
    try:
        from numba.core import event
    except ImportError:  # and nothing is compiled
        yield
        return

    class Once(event.Listener):  # type: ignore[misc]  # numba has no types
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told:
                self.told = True
                print(WORDS, file=out, flush=True)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Once()):
        yield
