"""Language models of Hugging Face transformers on our layers: the same weights, the same numbers, and they stream."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..core import DataError, RecurrentLayer, Unknown, UsageError, near, read_json, read_tensors, wide
from ..core.files import shown
from ..layers import Attention, GatedDeltaNet, Mamba, Mamba2, MLSTMLarge
from ..nn import Experts, GatedMLP, RMSNorm
from .stack import Block, Residual
from .token_model import TokenModel

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PLAIN: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}
Config = TypeVar("Config")


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

    def stacked(self, into: nn.Linear, names: list[str]) -> None:
        """Fill a map from several of the same size, one behind the other."""
        for part in ("weight", "bias"):
            parameter = getattr(into, part)
            if parameter is not None:
                shape = (len(parameter) // len(names), *parameter.shape[1:])
                fill(parameter, torch.cat([self.take(f"{name}.{part}", *shape) for name in names]))

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

    return _backbone(config, weights, layer, _read_mamba)


def _read_mamba(mixer: Mamba, weights: _Weights, prefix: str) -> None:
    for ours, theirs in (("inp", "in_proj"), ("select", "x_proj"), ("dt", "dt_proj"), ("out", "out_proj")):
        weights.linear(getattr(mixer, ours), f"{prefix}.{theirs}")
    _read_convolution(mixer.conv, weights, f"{prefix}.conv1d")
    fill(mixer.a_log, weights.take(f"{prefix}.A_log", *mixer.a_log.shape))
    fill(mixer.d, weights.take(f"{prefix}.D", *mixer.d.shape))


def _read_convolution(conv: nn.Module, weights: _Weights, name: str) -> None:
    """Theirs (D, 1, P) has the oldest tap first, ours (P, D) the newest."""
    taps, width = conv.weight.shape  # type: ignore[misc, union-attr]
    fill(conv.weight, weights.take(f"{name}.weight", width, 1, taps)[:, 0].flip(1).mT)  # type: ignore[arg-type]
    if conv.bias is not None:
        fill(conv.bias, weights.take(f"{name}.bias", width))  # type: ignore[arg-type]


def _backbone(
    config: Any, weights: _Weights, layer: Callable[[], RecurrentLayer[Any]], read: Callable[[Any, _Weights, str], None]
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
        read(block.layer, weights, f"backbone.layers.{i}.mixer")
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

    return _backbone(config, weights, layer, _read_mamba2)


def _read_mamba2(mixer: Mamba2, weights: _Weights, prefix: str) -> None:
    for name in ("in_proj", "norm", "out_proj"):
        weights.linear(getattr(mixer, name), f"{prefix}.{name}")
    _read_convolution(mixer.conv, weights, f"{prefix}.conv1d")
    for ours, theirs in ((mixer.dt_bias, "dt_bias"), (mixer.a_log, "A_log"), (mixer.d, "D")):
        fill(ours, weights.take(f"{prefix}.{theirs}", *ours.shape))


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
    assert isinstance(layer, MLSTMLarge) and isinstance(mlp, GatedMLP)

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


# ---- hybrids with attention: bamba, jamba, qwen3_next


@dataclass(frozen=True)
class _HybridConfig:
    vocab_size: int = 65536
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: Any = None
    head_dim: Any = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Any = None  # as older files have it
    rope_parameters: Any = None
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0


class _Names(NamedTuple):
    """How an architecture calls the parts of its layers."""

    norm: str
    mlp: str
    last: str
    router: str = ""


class _Mixture(NamedTuple):
    """Which MLPs are mixtures of experts, and what makes one."""

    at: list[int]
    make: Callable[[], Experts]


Mixer = tuple[RecurrentLayer[Any], Callable[[Any, _Weights, str], None], str]  # layer, what fills it, its name


def _hybrid(
    config: _HybridConfig,
    weights: _Weights,
    mixers: list[Mixer],
    names: _Names,
    *,
    offset: float = 0.0,
    mixture: _Mixture | None = None,
) -> TokenModel:
    """x + mixer(norm(x)), then x + mlp(norm(x)), again and again. offset: added to the weights of the norms."""
    _require(config, hidden_act="silu")
    width, vocab = config.hidden_size, config.vocab_size
    norm = lambda: RMSNorm(width, eps=config.rms_norm_eps)

    def read_norm(into: nn.Module, name: str) -> None:
        fill(into.weight, weights.take(f"{name}.weight", width).to(weights.dtype) + offset)  # type: ignore[arg-type]

    blocks = []
    for i, (layer, read, name) in enumerate(mixers):
        prefix = f"model.layers.{i}"
        if mixture is not None and i in mixture.at:
            mlp: GatedMLP | Experts = mixture.make()
        else:
            mlp = GatedMLP(width, config.intermediate_size, bias=config.mlp_bias)
        block = Block(layer, [norm(), norm()], mlp, back=nn.Identity()).to(weights.dtype)
        read_norm(block.norms[0], f"{prefix}.input_layernorm")
        read_norm(block.norms[1], f"{prefix}.{names.norm}")
        read(layer, weights, f"{prefix}.{name}")
        if isinstance(mlp, Experts):
            _read_experts(mlp, weights, f"{prefix}.{names.mlp}", names.router)
        else:
            _read_mlp(mlp, weights, f"{prefix}.{names.mlp}")
        blocks.append(block)
    head = None if config.tie_word_embeddings else nn.Linear(width, vocab, bias=False)
    model = _token_model(weights, nn.Embedding(vocab, width), blocks, norm(), head)
    weights.linear(model.body.embed, "model.embed_tokens")
    read_norm(model.body.norm, f"model.{names.last}")
    weights.head(head)
    return model


def _read_mlp(mlp: GatedMLP, weights: _Weights, prefix: str) -> None:
    weights.stacked(mlp.up, [f"{prefix}.gate_proj", f"{prefix}.up_proj"])
    weights.linear(mlp.out, f"{prefix}.down_proj")


def _read_experts(mlp: Experts, weights: _Weights, prefix: str, router: str) -> None:
    """Theirs has the experts' maps in one tensor each, as ours, or, in a file, one by one."""
    weights.linear(mlp.router, f"{prefix}.{router}")
    experts, rows, width = mlp.up.shape
    if f"{prefix}.experts.gate_up_proj" in weights.left:
        fill(mlp.up, weights.take(f"{prefix}.experts.gate_up_proj", *mlp.up.shape))
        fill(mlp.out, weights.take(f"{prefix}.experts.down_proj", *mlp.out.shape))
    else:
        for e in range(experts):
            one = f"{prefix}.experts.{e}"
            up = [weights.take(f"{one}.{name}_proj.weight", rows // 2, width) for name in ("gate", "up")]
            fill(mlp.up[e], torch.cat(up))
            fill(mlp.out[e], weights.take(f"{one}.down_proj.weight", width, rows // 2))
    if mlp.shared is not None and mlp.shared_gate is not None:
        _read_mlp(mlp.shared, weights, f"{prefix}.shared_expert")
        weights.linear(mlp.shared_gate, f"{prefix}.shared_expert_gate")


def _attention(config: _HybridConfig, *, turned: bool = True, **options: Any) -> Attention:
    """turned: with rotary positions."""
    heads, rope = config.num_attention_heads, config.rope_parameters or {}
    key = config.hidden_size // heads if config.head_dim is None else config.head_dim
    if config.rope_scaling is not None or rope.get("rope_type", "default") != "default":
        raise UsageError(f"config.json: positions are scaled, {config.rope_scaling or rope}; only plain ones are built")
    return Attention(
        config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        key=key,
        window=config.max_position_embeddings,
        rotary=int(key * rope.get("partial_rotary_factor", config.partial_rotary_factor)) if turned else 0,
        base=rope.get("rope_theta", config.rope_theta),
        bias=config.attention_bias,
        **options,
    )


def _read_attention(layer: Attention, weights: _Weights, prefix: str) -> None:
    """Theirs has the gate's rows, where there is one, behind those of the query, head by head."""
    gated = layer.sizes[3] > 0
    for part in ("weight", "bias"):
        into = getattr(layer.qkv, part)
        if into is None:
            continue
        rest = into.shape[1:]
        q = weights.take(f"{prefix}.q_proj.{part}", layer.sizes[0] + layer.sizes[3], *rest)
        q, *gate = (z.flatten(0, 1) for z in q.unflatten(0, (layer.heads, -1)).split(layer.key, 1))
        k, v = (weights.take(f"{prefix}.{name}_proj.{part}", layer.sizes[1], *rest) for name in "kv")
        fill(into, torch.cat([q, k, v, *gate]))
    weights.linear(layer.out, f"{prefix}.o_proj")
    if gated:
        for norm, name in ((layer.q_norm, "q_norm"), (layer.k_norm, "k_norm")):
            around_zero = weights.take(f"{prefix}.{name}.weight", layer.key).to(weights.dtype)
            fill(norm.weight, 1 + around_zero)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _BambaConfig(_HybridConfig):
    rms_norm_eps: float = 1e-5
    num_key_value_heads: Any = 8
    vocab_size: int = 128000
    partial_rotary_factor: float = 0.5
    attn_layer_indices: Any = None
    mamba_n_heads: int = 128
    mamba_d_head: Any = None  # a number, or "auto"
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: Any = (0.0, math.inf)


def _bamba(found: Mapping[str, Any], weights: _Weights) -> TokenModel:
    config = _config(_BambaConfig, found)
    inner, heads = config.mamba_expand * config.hidden_size, config.mamba_n_heads
    if inner % heads or config.mamba_d_head not in (None, "auto", inner // heads):
        raise UsageError(
            f"config.json: mamba_n_heads is {heads}, mamba_d_head {config.mamba_d_head!r}; expected {inner} together"
        )

    def mamba() -> Mamba2:
        return Mamba2(
            config.hidden_size,
            heads=heads,
            value=inner // heads,
            key=config.mamba_d_state,
            groups=config.mamba_n_groups,
            taps=config.mamba_d_conv,
            bias=config.mamba_proj_bias,
            conv_bias=config.mamba_conv_bias,
            dt_limits=_limits(config.time_step_limit),
            eps=config.rms_norm_eps,
        )

    attending = set(config.attn_layer_indices or ())
    mixers: list[Mixer] = [
        (_attention(config), _read_attention, "self_attn") if i in attending else (mamba(), _read_mamba2, "mamba")
        for i in range(config.num_hidden_layers)
    ]
    return _hybrid(config, weights, mixers, _Names("pre_ff_layernorm", "feed_forward", "final_layernorm"))


@dataclass(frozen=True)
class _JambaConfig(_HybridConfig):
    num_key_value_heads: Any = 8
    num_experts: int = 16
    num_experts_per_tok: int = 2
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: Any = None  # a number, or "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False


def _jamba(found: Mapping[str, Any], weights: _Weights) -> TokenModel:
    config = _config(_JambaConfig, found)
    depths, experts = range(config.num_hidden_layers), config.num_experts > 1
    sparse = [i for i in depths if experts and i % config.expert_layer_period == config.expert_layer_offset]

    def experts_of_a_layer() -> Experts:
        return Experts(
            config.hidden_size, config.intermediate_size, experts=config.num_experts, active=config.num_experts_per_tok
        )

    def mamba() -> Mamba:
        return Mamba(
            config.hidden_size,
            states=config.mamba_d_state,
            expand=config.mamba_expand,
            taps=config.mamba_d_conv,
            dt_rank=None if config.mamba_dt_rank in (None, "auto") else config.mamba_dt_rank,
            bias=config.mamba_proj_bias,
            conv_bias=config.mamba_conv_bias,
            inner_norm=True,
            norm_eps=config.rms_norm_eps,
        )

    def read(mixer: Mamba, weights: _Weights, prefix: str) -> None:
        _read_mamba(mixer, weights, prefix)
        for name in ("dt", "b", "c"):
            weights.linear(getattr(mixer, f"{name}_norm"), f"{prefix}.{name}_layernorm")

    mixers: list[Mixer] = [
        (_attention(config, turned=False), _read_attention, "self_attn")
        if i % config.attn_layer_period == config.attn_layer_offset
        else (mamba(), read, "mamba")
        for i in depths
    ]
    names = _Names("pre_ff_layernorm", "feed_forward", "final_layernorm", "router")
    return _hybrid(config, weights, mixers, names, mixture=_Mixture(sparse, experts_of_a_layer))


@dataclass(frozen=True)
class _Qwen3NextConfig(_HybridConfig):
    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: Any = 2
    head_dim: Any = 256
    max_position_embeddings: int = 32768
    partial_rotary_factor: float = 0.25
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    decoder_sparse_step: int = 1
    num_experts: int = 512
    num_experts_per_tok: int = 10
    norm_topk_prob: bool = True
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    mlp_only_layers: Any = None
    full_attention_interval: int = 4
    layer_types: Any = None


def _qwen3_next(found: Mapping[str, Any], weights: _Weights) -> TokenModel:
    config = _config(_Qwen3NextConfig, found)
    depths, dense = range(config.num_hidden_layers), config.mlp_only_layers or ()
    sparse = [i for i in depths if i not in dense and (i + 1) % config.decoder_sparse_step == 0]

    def experts_of_a_layer() -> Experts:
        return Experts(
            config.hidden_size,
            config.moe_intermediate_size,
            experts=config.num_experts,
            active=config.num_experts_per_tok,
            normed=config.norm_topk_prob,
            shared=config.shared_expert_intermediate_size,
        )

    heads, values = config.linear_num_key_heads, config.linear_num_value_heads
    if heads < 1 or values % heads:
        raise UsageError(f"config.json: linear_num_value_heads is {values}; expected a multiple of {heads} key heads")
    types = config.layer_types or [
        "linear_attention" if (i + 1) % config.full_attention_interval else "full_attention" for i in depths
    ]
    if len(types) != len(depths) or not {"linear_attention", "full_attention"} >= set(types):
        raise UsageError(f"config.json: layer_types is {types!r:.80}; expected linear_attention or full_attention")

    def delta() -> GatedDeltaNet:
        layer = GatedDeltaNet(
            config.hidden_size,
            heads=heads,
            key=config.linear_key_head_dim,
            value=config.linear_value_head_dim,
            values_per_key=values // heads,
            taps=config.linear_conv_kernel_dim,
        )
        layer.norm.eps = config.rms_norm_eps
        return layer

    mixers: list[Mixer] = [
        (_attention(config, norm_eps=config.rms_norm_eps, gate=True), _read_attention, "self_attn")
        if kind == "full_attention"
        else (delta(), _read_gated_delta, "linear_attn")
        for kind in types
    ]
    for name in [name for name in weights.left if name.startswith("mtp.")]:
        del weights.left[name]  # a head that guesses several ids at once, which transformers leaves out as well
    names = _Names("post_attention_layernorm", "mlp", "norm", "gate")
    mixture = _Mixture(sparse if config.num_experts > 0 else [], experts_of_a_layer)
    return _hybrid(config, weights, mixers, names, offset=1.0, mixture=mixture)


def _read_gated_delta(layer: GatedDeltaNet, weights: _Weights, prefix: str) -> None:
    """Theirs has, for each key head, the rows of its query, key, values and gates; then those of its b and a."""
    heads, each, width = layer.heads, layer.values_per_key, layer.width
    parts = [layer.key, layer.key, each * layer.value, each * layer.value]
    rows = weights.take(f"{prefix}.in_proj_qkvz.weight", heads * sum(parts), width)
    *qkv, gate = (part.flatten(0, 1) for part in rows.unflatten(0, (heads, -1)).split(parts, 1))
    fill(layer.qkv.weight, torch.cat(qkv))
    rows = weights.take(f"{prefix}.in_proj_ba.weight", 2 * heads * each, width)
    beta, decay = (part.flatten(0, 1) for part in rows.unflatten(0, (heads, -1)).split(each, 1))
    assert layer.gate is not None and layer.decay is not None and layer.conv is not None
    for linear, values in ((layer.gate, gate), (layer.beta, beta), (layer.decay, decay)):
        fill(linear.weight, values)
    _read_convolution(layer.conv, weights, f"{prefix}.conv1d")
    for ours, theirs in ((layer.dt_bias, "dt_bias"), (layer.a_log, "A_log")):
        fill(ours, weights.take(f"{prefix}.{theirs}", *ours.shape))
    weights.linear(layer.norm, f"{prefix}.norm")
    weights.linear(layer.out, f"{prefix}.out_proj")


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], _Weights], TokenModel]] = {
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "mamba2": _mamba2,
    "xlstm": _xlstm,
    "bamba": _bamba,
    "jamba": _jamba,
    "qwen3_next": _qwen3_next,
}
