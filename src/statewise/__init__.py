"""Recurrent sequence models: write a recurrence once, train it in parallel, stream it in constant memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import Cell, RecurrentLayer, Traits, chunked, grid, put, stream, unroll
    from .layers.drop_in import GRU, LSTM, RNN
    from .layers.parallelized import parallelize

__version__ = "0.1.0"
__all__ = [
    "Cell", "GRU", "LSTM", "RNN", "RecurrentLayer", "Traits", "__version__", "chunked", "grid", "parallelize", "put",
    "stream", "unroll",
]  # fmt: skip

# Where each name lives. Imported when first asked for, so that `statewise --help` does not wait for torch.
_HOMES = {
    "Cell": "core", "RecurrentLayer": "core", "Traits": "core", "chunked": "core", "grid": "core", "put": "core",
    "stream": "core", "unroll": "core", "RNN": "layers.drop_in", "LSTM": "layers.drop_in", "GRU": "layers.drop_in",
    "parallelize": "layers.parallelized",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
