"""The way into transformers, which is imported here only when it is called for."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..core import RecurrentLayer, UsageError


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM of transformers know our directories. Calling it again does no harm.

    Then AutoModelForCausalLM.from_pretrained(folder) gives a StatewiseForCausalLM (`hf.in_transformers`), for
    `generate`, Trainer and pipeline("text-generation"). Raises UsageError where transformers is not installed.
    """
    _need_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    from .in_transformers import StatewiseConfig, StatewiseForCausalLM

    AutoConfig.register(StatewiseConfig.model_type, StatewiseConfig, exist_ok=True)
    AutoModelForCausalLM.register(StatewiseConfig, StatewiseForCausalLM, exist_ok=True)


def wrap(model: RecurrentLayer[Any], **ids: Any) -> Any:
    """A TokenModel as a StatewiseForCausalLM that shares its weights: also one of `from_transformers`, or of your own.

    ids: bos_token_id, eos_token_id, pad_token_id. It cannot be saved, since nothing says how to build it again: use
    `save_pretrained`. Raises UsageError where transformers is not installed, and for another model.
    """
    _need_transformers()
    from .in_transformers import StatewiseConfig, StatewiseForCausalLM

    return StatewiseForCausalLM(StatewiseConfig(vocab_size=model.vocab, **ids), model)


def _need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("this needs the package transformers: pip install 'statewise[hf]'")
