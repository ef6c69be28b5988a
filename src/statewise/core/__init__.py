from .errors import DataError, NumericError, ResourceError, StatewiseError, Unknown, UsageError
from .files import load_state, read_json, read_tensors, save_state, write_json, write_tensors
from .layer import (
    Cell,
    RecurrentLayer,
    Traits,
    check_input,
    check_sizes,
    clear_past_end,
    past_end,
    ragged,
)
from .registry import LayerInfo, Registry, layers, near, register_layer
from .running import Step, chunked, stream, unroll
from .state import Cost, Load, clone, costs, detach, join, leaves, names, nbytes, select, settled, tree_map, where, wide
from .vary import grid, put, put_all

__all__ = [
    "Cell", "Cost", "DataError", "LayerInfo", "Load", "NumericError", "RecurrentLayer", "Registry", "ResourceError",
    "StatewiseError", "Step", "Traits", "Unknown", "UsageError", "check_input", "check_sizes", "chunked",
    "clear_past_end", "clone", "costs", "detach", "grid", "join", "layers", "leaves", "load_state", "names", "nbytes",
    "near", "past_end", "put", "put_all", "ragged", "read_json", "read_tensors", "register_layer", "save_state",
    "select", "settled", "stream", "tree_map", "unroll", "where", "wide", "write_json", "write_tensors",
]  # fmt: skip
