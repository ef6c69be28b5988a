"""Ways to stack layers. Each model is a RecurrentLayer: it streams, resets and is checked as a layer is.

Descriptions are frozen dataclasses with `build(x_width= or x_vocab=, y_width=)`: `Stack`; `LanguageModel`, a stack
that ends in its embedding; `XLSTM`; `Forecasting`, which holds a Stack. `descriptions` has them by name.
"""

from collections.abc import Callable
from typing import Any

from ..core import RecurrentLayer
from .classifier import Classifier, ClassifierState
from .forecaster import Forecaster, Forecasting, forecast
from .from_transformers import from_transformers
from .halting import Halting
from .inherit import echo_of, inherit, mamba2_of, stack_of, watched
from .pattern import Place, places
from .stack import Block, Residual, Stack
from .token_model import LanguageModel, TokenModel
from .xlstm import XLSTM

descriptions: dict[str, type] = {
    "stack": Stack,
    "forecasting": Forecasting,
    "language_model": LanguageModel,
    "xlstm": XLSTM,
}


def examples() -> list[tuple[str, Callable[[], RecurrentLayer[Any]]]]:
    """Tiny models of every kind, as (name, function that builds one), for the conformance suite."""

    def stack(layer: str, **fields: Any) -> Callable[[], RecurrentLayer[Any]]:
        return lambda: Stack(layer, width=4, **fields).build(x_width=3, y_width=2)

    small = Stack("min_gru", width=4, depth=1)
    near, echo = "window_attention(window=3,heads=2)", "window_attention(window=3,heads=2,echo=true)"
    return [
        ("stack_min_gru", stack("min_gru")),
        ("stack_gru_plain", stack("gru", depth=1, mlp=0.0, norm="none")),
        ("stack_lru_layer_norm", stack("lru", norm="layer", mlp=1.0)),
        ("stack_window_attention", stack("window_attention", depth=1, args={"window": 3, "heads": 2})),
        ("stack_short_conv_dropout", stack("short_conv", depth=1, dropout=0.5)),
        ("classifier", stack("min_lstm", depth=1, pool="mean")),
        ("classifier_of_ids", lambda: Stack("s5", width=4, depth=1, pool="mean").build(x_vocab=5, y_width=2)),
        ("xlstm", lambda: XLSTM(width=6, heads=2, taps=2).build(x_width=3, y_width=2)),
        ("forecaster", lambda: Forecasting(small).build(x_width=2, y_width=6)),
        ("token_model_tied", lambda: LanguageModel("min_gru", width=4, depth=1).build(x_vocab=5, y_width=5)),
        ("hybrid_shared", stack("min_gru,window_attention(window=3,heads=2)@a", depth=4, residual_scale=0.5)),
        ("token_model", lambda: LanguageModel("min_gru", width=4, depth=1, tied=False).build(x_vocab=5, y_width=5)),
        ("shared_attention", stack(f"{near},min_gru,{echo}", depth=3)),
        ("shared_attention_twice", stack(f"{near}@a,{echo}@b", depth=4, depth_embedding=True, ponder=0.01)),
        ("universal", stack("window_attention(window=3,heads=2)@a", depth=3, depth_embedding=True, ponder=0.01)),
        ("experts", stack("min_gru,min_gru(experts=3)", depth=2, active=1, balance=0.1)),
        ("universal_gru", stack("gru@one", depth=2, mlp=0.0, norm="none", pool="mean", ponder=0.5)),
    ]


__all__ = [
    "Block",
    "Classifier",
    "ClassifierState",
    "Forecaster",
    "Forecasting",
    "Halting",
    "LanguageModel",
    "Place",
    "Residual",
    "Stack",
    "TokenModel",
    "XLSTM",
    "descriptions",
    "echo_of",
    "examples",
    "forecast",
    "from_transformers",
    "inherit",
    "mamba2_of",
    "places",
    "stack_of",
    "watched",
]
