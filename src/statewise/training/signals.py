"""SIGTERM, Ctrl-C and a closed terminal: the first asks the loop to finish its step, save and stop; the second ends the
process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ..core import StatewiseError

HANGUP: tuple[signal.Signals, ...] = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # not on Windows


def handled() -> tuple[signal.Signals, ...]:
    """The signals that ask for an end; under nohup a closed terminal does not."""
    return (signal.SIGTERM, signal.SIGINT, *(n for n in HANGUP if signal.getsignal(n) != signal.SIG_IGN))


class Stopped(StatewiseError):
    """Training ended by a signal, its progress saved. `code` is 128 + the signal: 143, 130 or 129."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal, self.code = number, 128 + number


class Stop:
    """While entered, remembers a signal in `received`. Restores the handlers that were there.

    Does nothing outside the main thread, where Python takes no handlers.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in handled()}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # whatever is half-written was written beside: the checkpoint before it is whole
        self.received = number

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
