"""A trained run as a directory for Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path

from ..core import UsageError
from ..core.files import shown
from ..models import LanguageModel, TokenModel
from ..text import load_tokenizer
from ..text.tokenizer import NAME
from ..training import load
from .directory import save_pretrained


def export_run(run: str | os.PathLike[str], folder: str | os.PathLike[str]) -> TokenModel:
    """Write the best weights of a run of `statewise train`, and its tokenizer where it has one; returns the model.

    Raises UsageError for a run whose model is no LanguageModel; DataError as `statewise.training.load`.
    """
    model, experiment = load(run)
    if not isinstance(model, TokenModel) or type(experiment.model) is not LanguageModel:
        kind = type(experiment.model).__name__
        raise UsageError(f"{shown(run)} trained a {kind}; only a LanguageModel is a language model of transformers")
    tokenizer = load_tokenizer(Path(run)) if (Path(run) / NAME).is_file() else None
    save_pretrained(model, experiment.model, folder, tokenizer=tokenizer)
    return model
