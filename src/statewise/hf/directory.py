"""A language model as config.json and model.safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..core import DataError, UsageError, near, write_json, write_tensors
from ..core.files import check_format, shown
from ..core.vary import recorded
from ..models import LanguageModel, TokenModel
from ..models.from_transformers import SINGLE, read_pretrained
from ..text import Tokenizer
from ..training.checkpoint import load_weights
from .tokenizer import save_tokenizer

FORMAT = 1
KIND = "statewise"
# Module.to(dtype) would make complex parameters real
CAST: dict[torch.dtype, Callable[[TokenModel], TokenModel]] = {
    torch.float32: TokenModel.float,
    torch.float64: TokenModel.double,
    torch.bfloat16: TokenModel.bfloat16,
    torch.float16: TokenModel.half,
}
PREFIX = "model."  # of the names of the tensors: as a model of transformers holds ours


def save_pretrained(
    model: TokenModel,
    description: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model as config.json and model.safetensors into a directory, which is made where there is none.

    description: what the model was built from. tokenizer: written beside, as transformers' fast tokenizers are; the id
    that ends a document is then the model's first, last and padding id.
    Raises UsageError for a description of another model, ResourceError and DataError where files cannot be written.
    """
    tensors = {PREFIX + name: t for name, t in model.state_dict().items()}
    config = config_of(description, model.vocab or 0, tokenizer)
    twin = build(description, model.vocab or 0, dtype := model.body.embed.weight.dtype)
    load_weights(twin, model.state_dict(), f"save_pretrained: {type(model).__name__}, described as {description.layer}")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the directory {shown(path)}: {error.strerror}") from error
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_tensors(path / SINGLE, tensors, {"format": "pt"})
    write_json(path / "config.json", config)
    if tokenizer is not None:
        save_tokenizer(tokenizer, path)


def from_pretrained(folder: str | os.PathLike[str]) -> TokenModel:
    """The model of a directory, in eval mode, on the CPU. Nothing is fetched, no pickle is read.

    Raises DataError for files that are missing, broken or of another kind, and for weights of another model.
    """
    return load(folder)[0]


def load(folder: str | os.PathLike[str]) -> tuple[TokenModel, LanguageModel]:
    """The model of a directory and its description; as `from_pretrained`."""
    path = Path(folder)
    config, tensors = read_pretrained(path)
    where = shown(path / "config.json")
    if config.get("model_type") != KIND:
        raise DataError(
            f"{where}: model_type is {config.get('model_type')!r}, expected {KIND!r}; "
            "statewise.models.from_transformers reads architectures of transformers"
        )
    check_format(config.get("format"), FORMAT, where)
    description = described(config.get("description"), where)
    if bare := [name for name in tensors if not name.startswith(PREFIX)]:
        raise DataError(f"{shown(path / SINGLE)}: tensor {bare[0]!r}; expected names that begin with {PREFIX!r}")
    embedding = tensors.get(PREFIX + "body.embed.weight")
    model = build(description, config.get("vocab_size"), torch.float32 if embedding is None else embedding.dtype)
    load_weights(model, {name.removeprefix(PREFIX): t for name, t in tensors.items()}, shown(path / SINGLE))
    return model.eval(), description


def config_of(description: LanguageModel, vocab: int, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """What config.json holds. Raises UsageError for a description that JSON cannot hold."""
    if type(description) is not LanguageModel:
        raise UsageError(f"the description is a {type(description).__name__}; expected a LanguageModel")
    end = None if tokenizer is None else tokenizer.end
    return {
        "architectures": ["StatewiseForCausalLM"],
        "model_type": KIND,
        "format": FORMAT,
        "vocab_size": vocab,
        "description": recorded(description),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def described(found: Any, where: str) -> LanguageModel:
    """The description that a configuration holds. Raises DataError."""
    if not isinstance(found, dict):
        raise DataError(f"{where}: description is {found!r:.60}; expected the fields of a LanguageModel")
    known = [f.name for f in fields(LanguageModel)]
    for name in found:
        if name not in known:
            raise DataError(f"{where}: description has no field {name[:60]!r}; {near(name, known)}")
    return LanguageModel(**found)


def build(description: LanguageModel, vocab: Any, dtype: torch.dtype = torch.float32) -> TokenModel:
    """The model with its first weights; nobody's generator notices. Raises UsageError for fields out of range."""
    if dtype not in CAST:
        raise UsageError(f"weights of {dtype}; expected one of {', '.join(map(str, CAST))}")
    if type(vocab) is not int or vocab < 1:
        raise UsageError(f"vocab_size is {vocab!r}; expected a whole number of at least 1")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # transformers builds on the meta device
            return CAST[dtype](description.build(x_vocab=vocab, y_width=vocab))
    except (TypeError, AttributeError) as error:
        raise UsageError(f"description: {description!r:.100}: {error}") from error
