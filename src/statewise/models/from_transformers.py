"""Language models of Hugging Face transformers on our layers: the same weights, the same numbers, and they stream."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core import DataError, RecurrentLayer, Unknown, UsageError, near, read_json, read_tensors, wide
from ..layers import Mamba
from ..nn import RMSNorm
from .stack import Block, Residual
from .token_model import TokenModel

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Config = TypeVar("Config")


def from_transformers(model_or_path: nn.Module | str | os.PathLike[str]) -> TokenModel:
    """The model that a causal language model of transformers is, in eval mode: ids (B, T) to logits (B, T, vocab).

    model_or_path: such a model, or the directory that its `save_pretrained` wrote (config.json and safetensors, in one
    file or several), which is read without transformers. Architectures: falcon_mamba, mamba, mamba2, xlstm. Nothing is
    fetched and no pickle is read. Weights of half precision are held in float32, those of float64 in float64; the
    model is on the device of the given one.

    Raises Unknown for another architecture, UsageError for a configuration that our layers do not have, DataError for
    a file that is missing or broken and for a tensor that is missing, unknown or of another shape.
    """
    if isinstance(model_or_path, nn.Module):
        config, tensors, where = _in_memory(model_or_path)
    else:
        config, tensors, where = _in_directory(Path(model_or_path))
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise Unknown(f"from_transformers: {where} is of architecture {kind!r}; {near(str(kind), ARCHITECTURES)}")
    weights = _Weights(tensors, where)
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


def _in_directory(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    if not path.is_dir():
        raise DataError(f"from_transformers: no directory {path}; expected one with config.json and {SINGLE}")
    config = read_json(path / "config.json", allow_nonfinite=True)
    if (path / INDEX).is_file():
        shards = read_json(path / INDEX, limit=1 << 26).get("weight_map")
        if not isinstance(shards, dict) or not all(_plain(shard) for shard in shards.values()):
            raise DataError(f"{path / INDEX}: 'weight_map' must map names to files of the same directory")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(shards.values())):
            tensors |= read_tensors(path / shard)[0]
    elif (path / SINGLE).is_file():
        tensors, _ = read_tensors(path / SINGLE)
    else:
        raise DataError(f"from_transformers: {path} holds no {SINGLE}; pickles are not read: save it as safetensors")
    return config, tensors, str(path)


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not {"/", "\\", ":"} & set(name)


class _Weights:
    """Tensors by transformers' names, each to be taken once."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str):
        self.left, self.where = dict(tensors), where
        floating = [t for t in self.left.values() if t.is_floating_point()]
        if not floating:
            raise DataError(f"{where}: no weights")
        self.dtype, self.device = torch.float32, floating[0].device
        for t in floating:
            self.dtype = torch.promote_types(self.dtype, wide(t.dtype))

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self.left:
            raise DataError(f"{self.where}: no tensor {name!r}; {near(name, self.left)}")
        found = self.left.pop(name)
        if found.shape != shape:
            raise DataError(f"{self.where}: tensor {name!r} has shape {tuple(found.shape)}; expected {shape}")
        return found

    def linear(self, into: nn.Module, name: str) -> None:
        """Fill the weight, and the bias where there is one, of a map from their namesakes."""
        for part in ("weight", "bias"):
            parameter = getattr(into, part, None)
            if parameter is not None:
                fill(parameter, self.take(f"{name}.{part}", *parameter.shape))

    def head(self, into: nn.Linear | None) -> None:
        """The map to the logits; a tied one is the embedding, whatever the file holds beside it."""
        if into is None:
            self.left.pop("lm_head.weight", None)
        else:
            self.linear(into, "lm_head")

    def rename(self, old: str, new: str) -> None:
        if old in self.left and new not in self.left:
            self.left[new] = self.left.pop(old)

    def all_taken(self) -> None:
        if self.left:
            names, more = sorted(self.left), len(self.left) - 1
            rest = f" and {more} more" if more else ""
            raise DataError(f"{self.where}: tensor {names[0]!r}{rest} has no place in this architecture")


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values of the same shape."""
    assert parameter.shape == values.shape
    parameter.copy_(values)


def _config(kind: type[Config], found: Mapping[str, Any]) -> Config:
    """The fields of a configuration. Raises UsageError for a value of another type than the field's default has."""
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = found.get(field.name, field.default)
        wanted = {float: (float, int), int: (int,)}.get(type(field.default), (type(field.default),))
        if field.default is not None and (not isinstance(value, wanted) or (value is True) > (bool in wanted)):
            raise UsageError(
                f"config.json: {field.name} is {value!r}; expected a {type(field.default).__name__}, such as "
                f"{field.default!r}"
            )
        values[field.name] = value
    return kind(**values)


def _require(found: object, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(found, name) != value:
            raise UsageError(f"config.json: {name} is {getattr(found, name)!r}; only {value!r} is built here")


def _token_model(
    weights: _Weights, table: nn.Embedding, blocks: list[Block], norm: nn.Module, head: nn.Linear | None
) -> TokenModel:
    return TokenModel(Residual(table, blocks, norm, None), head).to(weights.device, weights.dtype)


# ---- mamba and falcon_mamba


@dataclass(frozen=True)
class _MambaConfig:
    """What matters in a config.json of mamba or falcon_mamba, with the values that stand for what is left out."""

    model_type: str = "mamba"
    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    expand: int = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    time_step_rank: Any = None  # a number, or "auto"
    mixer_rms_eps: float = 1e-6  # of falcon_mamba
    tie_word_embeddings: bool = True


def _mamba(found: Mapping[str, Any], weights: _Weights) -> TokenModel:
    config = _config(_MambaConfig, found)
    _require(config, hidden_act="silu")
    rank, width = config.time_step_rank, config.hidden_size

    def layer() -> Mamba:
        return Mamba(
            width,
            states=config.state_size,
            expand=config.expand,
            taps=config.conv_kernel,
            dt_rank=math.ceil(width / 16) if rank in (None, "auto") else rank,
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            inner_norm=config.model_type == "falcon_mamba",
            norm_eps=config.mixer_rms_eps,
        )

    def read(mixer: Mamba, prefix: str) -> None:
        for ours, theirs in (("inp", "in_proj"), ("select", "x_proj"), ("dt", "dt_proj"), ("out", "out_proj")):
            weights.linear(getattr(mixer, ours), f"{prefix}.{theirs}")
        _read_convolution(mixer.conv, weights, f"{prefix}.conv1d")
        fill(mixer.a_log, weights.take(f"{prefix}.A_log", *mixer.a_log.shape))
        fill(mixer.d, weights.take(f"{prefix}.D", *mixer.d.shape))

    return _backbone(config, weights, layer, read)


def _read_convolution(conv: nn.Module, weights: _Weights, name: str) -> None:
    """Theirs (D, 1, P) has the oldest tap first, ours (P, D) the newest."""
    taps, width = conv.weight.shape  # type: ignore[misc, union-attr]
    fill(conv.weight, weights.take(f"{name}.weight", width, 1, taps)[:, 0].flip(1).mT)  # type: ignore[arg-type]
    if conv.bias is not None:
        fill(conv.bias, weights.take(f"{name}.bias", width))  # type: ignore[arg-type]


def _backbone(
    config: Any, weights: _Weights, layer: Callable[[], RecurrentLayer[Any]], read: Callable[[Any, str], None]
) -> TokenModel:
    """x + layer(norm(x)) again and again, between an embedding and a norm with a head: what the Mambas share."""
    width, vocab = config.hidden_size, config.vocab_size
    norm = lambda: RMSNorm(width, eps=config.layer_norm_epsilon)
    blocks = [Block(layer(), [norm()], None, back=nn.Identity()) for _ in range(config.num_hidden_layers)]
    head = None if config.tie_word_embeddings else nn.Linear(width, vocab, bias=False)
    model = _token_model(weights, nn.Embedding(vocab, width), blocks, norm(), head)
    weights.rename("backbone.embedding.weight", "backbone.embeddings.weight")  # as the first checkpoints had it
    weights.linear(model.body.embed, "backbone.embeddings")
    weights.linear(model.body.norm, "backbone.norm_f")
    for i, block in enumerate(blocks):
        weights.linear(block.norms[0], f"backbone.layers.{i}.norm")
        read(block.layer, f"backbone.layers.{i}.mixer")
    weights.head(head)
    return model


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], _Weights], TokenModel]] = {
    "mamba": _mamba,
    "falcon_mamba": _mamba,
}
