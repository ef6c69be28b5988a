from .errors import DataError, NumericError, ResourceError, StatewiseError, Unknown, UsageError
from .layer import (
    Cell,
    RecurrentLayer,
    Traits,
    check_input,
    chunked,
    clear_past_end,
    past_end,
    ragged,
    stream,
    unroll,
)
from .registry import LayerInfo, Registry, layers, near, register_layer
from .state import clone, detach, join, leaves, names, nbytes, select, tree_map, where, wide
from .vary import grid, put

__all__ = [
    "Cell", "DataError", "LayerInfo", "NumericError", "RecurrentLayer", "Registry", "ResourceError", "StatewiseError",
    "Traits", "Unknown", "UsageError", "check_input", "chunked", "clear_past_end", "clone", "detach", "grid", "join",
    "layers", "leaves", "names", "nbytes", "near", "past_end", "put", "ragged", "register_layer", "select", "stream",
    "tree_map", "unroll", "where", "wide",
]  # fmt: skip
