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
from ..core.files import shown
from ..layers import Mamba, Mamba2, MLSTMLarge
from ..nn import GatedMLP, RMSNorm
from .stack import Block, Residual
from .token_model import TokenModel

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PLAIN: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}
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
        config, tensors = read_pretrained(Path(model_or_path))
        where = str(model_or_path)
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
    """The fields of a configuration. Raises UsageError for a value of another type than a plain default has."""
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value, plain = found.get(field.name, field.default), type(field.default)
        if type(value) not in PLAIN.get(plain, (type(value),)):
            raise UsageError(
                f"config.json: {field.name} is {value!r}; expected a {plain.__name__}, such as {field.default!r}"
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
    intermediate_size: Any = None  # where it is given, it counts and not expand: falcon-mamba-7b has both, at odds
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
    rank, width, inner = config.time_step_rank, config.hidden_size, config.intermediate_size
    if inner is not None and (type(inner) is not int or width < 1 or inner % width):
        raise UsageError(f"config.json: intermediate_size is {inner!r}; expected a multiple of hidden_size, {width}")

    def layer() -> Mamba:
        return Mamba(
            width,
            states=config.state_size,
            expand=config.expand if inner is None else inner // width,
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


# ---- mamba2


@dataclass(frozen=True)
class _Mamba2Config:
    num_heads: int = 128
    head_dim: int = 64
    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    layer_norm_epsilon: float = 1e-5
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    time_step_limit: Any = (0.0, math.inf)
    tie_word_embeddings: bool = False


def _mamba2(found: Mapping[str, Any], weights: _Weights) -> TokenModel:
    config = _config(_Mamba2Config, found)
    _require(config, hidden_act="silu")

    def layer() -> Mamba2:
        return Mamba2(
            config.hidden_size,
            heads=config.num_heads,
            value=config.head_dim,
            key=config.state_size,
            groups=config.n_groups,
            taps=config.conv_kernel,
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            dt_limits=_limits(config.time_step_limit),
            eps=config.layer_norm_epsilon,
        )

    def read(mixer: Mamba2, prefix: str) -> None:
        for name in ("in_proj", "norm", "out_proj"):
            weights.linear(getattr(mixer, name), f"{prefix}.{name}")
        _read_convolution(mixer.conv, weights, f"{prefix}.conv1d")
        for ours, theirs in ((mixer.dt_bias, "dt_bias"), (mixer.a_log, "A_log"), (mixer.d, "D")):
            fill(ours, weights.take(f"{prefix}.{theirs}", *ours.shape))

    return _backbone(config, weights, layer, read)


def _limits(found: Any) -> tuple[float, float]:
    """(low, high), where an infinity may be written as transformers does: {"__float__": "Infinity"}."""
    ends = [
        float(end["__float__"]) if isinstance(end, dict) and end.get("__float__") == "Infinity" else end
        for end in (found if isinstance(found, list | tuple) else [])
    ]
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
        raise UsageError(f"config.json: time_step_limit is {found!r}; expected two numbers, such as [0.0, 1.0]")
    return float(ends[0]), float(ends[1])


# ---- xlstm, in the form of xLSTM-7B


@dataclass(frozen=True)
class _XLSTMConfig:
    vocab_size: int = 50304
    hidden_size: int = 4096
    embedding_dim: Any = None  # for hidden_size where the two differ in what is left out
    num_hidden_layers: int = 32
    num_heads: int = 8
    use_bias: bool = False
    tie_word_embeddings: bool = False
    add_out_norm: bool = True
    norm_eps: float = 1e-6
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    eps: float = 1e-6
    ffn_proj_factor: float = 2.667
    ffn_round_up_to_multiple_of: int = 64
    gate_soft_cap: float = 15.0
    output_logit_soft_cap: float = 30.0
    weight_mode: str = "single"


class CappedLinear(nn.Linear):
    """y = cap tanh(W x / cap)."""

    def __init__(self, width: int, out_width: int, *, cap: float):
        super().__init__(width, out_width, bias=False)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().forward(x) / self.cap)


def _xlstm(found: Mapping[str, Any], weights: _Weights) -> TokenModel:
    config = _config(_XLSTMConfig, found)
    width, heads = config.hidden_size, config.num_heads
    _require(config, use_bias=False, add_out_norm=True)
    if config.embedding_dim not in (None, width):
        raise UsageError(f"config.json: embedding_dim is {config.embedding_dim!r}; expected hidden_size, {width}")
    if config.weight_mode not in ("single", "fused"):
        raise UsageError(f"config.json: weight_mode is {config.weight_mode!r}; expected 'single' or 'fused'")
    keys, values = int(width * config.qk_dim_factor), int(width * config.v_dim_factor)
    multiple = config.ffn_round_up_to_multiple_of
    # their own rounding, which goes down where the factor leaves less than one channel over
    hidden = int((width * config.ffn_proj_factor + multiple - 1) // multiple * multiple)
    for name, size in (("qk_dim_factor", keys), ("v_dim_factor", values)):
        if size % heads or not size:
            raise UsageError(f"config.json: {name} gives {size} channels; expected a multiple of {heads} heads")

    def block() -> Block:
        layer = MLSTMLarge(
            width, heads=heads, key=keys // heads, value=values // heads, gate_cap=config.gate_soft_cap, eps=config.eps
        )
        layer.norm.eps = config.norm_eps
        norms: list[nn.Module] = [RMSNorm(width, eps=config.norm_eps) for _ in range(2)]
        return Block(layer, norms, GatedMLP(width, hidden, bias=False), back=nn.Identity())

    blocks = [block() for _ in range(config.num_hidden_layers)]
    head = CappedLinear(width, config.vocab_size, cap=config.output_logit_soft_cap)
    norm = RMSNorm(width, eps=config.norm_eps)
    model = _token_model(weights, nn.Embedding(config.vocab_size, width), blocks, norm, head)
    weights.linear(model.body.embed, "backbone.embeddings")
    weights.linear(norm, "backbone.out_norm")
    for i, one in enumerate(blocks):
        _read_xlstm_block(one, weights, f"backbone.blocks.{i}", fused=config.weight_mode == "fused")
    if config.tie_word_embeddings:
        weights.left.pop("lm_head.weight", None)
        fill(head.weight, model.body.embed.weight)  # a copy: a TokenModel that is tied has no cap
    else:
        weights.linear(head, "lm_head")
    return model


def _read_xlstm_block(block: Block, weights: _Weights, name: str, *, fused: bool) -> None:
    layer, mlp = block.layer, block.mlp
    assert isinstance(layer, MLSTMLarge) and mlp is not None

    def together(parameters: list[Tensor], theirs: list[str], one: str) -> None:
        """Parameters stacked in this order; theirs are stacked likewise, or all in `one` tensor."""
        rows = [len(p) for p in parameters]
        if fused:
            values = weights.take(one, sum(rows), *parameters[0].shape[1:]).split(rows)
        else:
            values = tuple(weights.take(t, *p.shape) for t, p in zip(theirs, parameters, strict=True))
        for parameter, value in zip(parameters, values, strict=True):
            fill(parameter, value)

    weights.linear(block.norms[0], f"{name}.norm_mlstm")
    weights.linear(block.norms[1], f"{name}.norm_ffn")
    prefix = f"{name}.mlstm_layer"
    maps = [layer.q.weight, layer.k.weight, layer.v.weight, layer.out_gate.weight]
    names = [f"{prefix}.{part}.weight" for part in ("q", "k", "v", "ogate_preact")]
    together(maps, names, f"{prefix}.qkv_opreact.weight")
    for part in ("weight", "bias"):
        gates = list(getattr(layer.gates, part).data.chunk(2))
        together(gates, [f"{prefix}.{g}gate_preact.{part}" for g in "if"], f"{prefix}.ifgate_preact.{part}")
    weights.linear(layer.norm, f"{prefix}.multihead_norm")
    weights.linear(layer.out, f"{prefix}.out_proj")
    up = list(mlp.up.weight.data.chunk(2))
    together(
        up, [f"{name}.ffn.{part}.weight" for part in ("proj_up_gate", "proj_up")], f"{name}.ffn.proj_up_gate_z.weight"
    )
    weights.linear(mlp.out, f"{name}.ffn.proj_down")


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], _Weights], TokenModel]] = {
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "mamba2": _mamba2,
    "xlstm": _xlstm,
}
