"""Language models of Hugging Face transformers on our layers: the same weights, the same numbers, and they stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core import DataError, Unknown, UsageError, near, read_json, read_tensors
from ...core.files import shown
from ..token_model import TokenModel
from .hybrids import bamba, jamba, qwen3_next
from .mambas import mamba, mamba2
from .weights import Weights
from .xlstm import xlstm

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def from_transformers(model_or_path: nn.Module | str | os.PathLike[str], *, context: int | None = None) -> TokenModel:
    """The model that a causal language model of transformers is, in eval mode: ids (B, T) to logits (B, T, vocab).

    model_or_path: such a model, or the directory that its `save_pretrained` wrote (config.json and safetensors, in one
    file or several), which is read without transformers. Architectures: falcon_mamba, mamba, mamba2, xlstm, and the
    hybrids with attention bamba, jamba, qwen3_next, mixtures of experts among them. context: how many ids attention
    sees, and so the size of its state, in place of the configuration's max_position_embeddings. Nothing is fetched and
    no pickle is read. Weights of half precision are held in float32, those of float64 in float64; the model is on the
    device of the given one.

    Raises Unknown for another architecture, UsageError for a configuration that our layers do not have, DataError for
    a file that is missing or broken and for a tensor that is missing, unknown or of another shape.
    """
    if isinstance(model_or_path, nn.Module):
        config, tensors, where = _in_memory(model_or_path)
    else:
        config, tensors = read_pretrained(Path(model_or_path))
        where = str(model_or_path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise Unknown(f"from_transformers: {where} is of architecture {kind!r}; {near(str(kind), ARCHITECTURES)}")
    if context is not None:
        config = config | {"max_position_embeddings": context}
    weights = Weights(tensors, where)
    # on the way the parameters are drawn at random; nobody's generator should notice
    with torch.random.fork_rng(devices=[]):
        model = ARCHITECTURES[kind](config, weights)
    weights.all_taken()
    return model.eval()


def _in_memory(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    name = type(model).__name__
    if not hasattr(model.config if hasattr(model, "config") else None, "to_dict"):
        raise UsageError(f"from_transformers: a {name}; expected a model of transformers, or the path of a saved one")
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    return model.config.to_dict(), tensors, name  # type: ignore[union-attr, operator]


def read_pretrained(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a directory that some `save_pretrained` wrote: config.json and safetensors,
    in one file or several. Raises DataError where either is missing or broken."""
    if not path.is_dir():
        raise DataError(f"no directory {shown(path)} (nothing is fetched); expected one with config.json and {SINGLE}")
    config = read_json(path / "config.json", allow_nonfinite=True)
    if (path / INDEX).is_file():
        shards = read_json(path / INDEX, limit=1 << 26).get("weight_map")
        if not isinstance(shards, dict) or not all(_plain(shard) for shard in shards.values()):
            raise DataError(f"{shown(path / INDEX)}: 'weight_map' must map names to files of the same directory")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(shards.values())):
            tensors |= read_tensors(path / shard)[0]
    elif (path / SINGLE).is_file():
        tensors, _ = read_tensors(path / SINGLE)
    else:
        raise DataError(f"{shown(path)} holds no {SINGLE}; pickles are not read: save it as safetensors")
    return config, tensors


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not {"/", "\\", ":"} & set(name)


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], Weights], TokenModel]] = {
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
    "xlstm": xlstm,
    "bamba": bamba,
    "jamba": jamba,
    "qwen3_next": qwen3_next,
}
