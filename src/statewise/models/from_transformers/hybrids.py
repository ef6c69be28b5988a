"""Hybrids with attention: bamba, jamba, qwen3_next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ...core import RecurrentLayer, UsageError
from ...layers import Attention, GatedDeltaNet, Mamba, Mamba2
from ...nn import Experts, GatedMLP, RMSNorm
from ..stack import Block
from ..token_model import TokenModel
from .mambas import limits, read_convolution, read_mamba, read_mamba2
from .weights import Weights, fill, read_config, require, token_model


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


Mixer = tuple[RecurrentLayer[Any], Callable[[Any, Weights, str], None], str]  # layer, what fills it, its name


def _hybrid(
    config: _HybridConfig,
    weights: Weights,
    mixers: list[Mixer],
    names: _Names,
    *,
    offset: float = 0.0,
    mixture: _Mixture | None = None,
) -> TokenModel:
    """x + mixer(norm(x)), then x + mlp(norm(x)), again and again. offset: added to the weights of the norms."""
    require(config, hidden_act="silu")
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
    model = token_model(weights, nn.Embedding(vocab, width), blocks, norm(), head)
    weights.linear(model.body.embed, "model.embed_tokens")
    read_norm(model.body.norm, f"model.{names.last}")
    weights.head(head)
    return model


def _read_mlp(mlp: GatedMLP, weights: Weights, prefix: str) -> None:
    weights.stacked(mlp.up, [f"{prefix}.gate_proj", f"{prefix}.up_proj"])
    weights.linear(mlp.out, f"{prefix}.down_proj")


def _read_experts(mlp: Experts, weights: Weights, prefix: str, router: str) -> None:
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


def _read_attention(layer: Attention, weights: Weights, prefix: str) -> None:
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


def bamba(found: Mapping[str, Any], weights: Weights) -> TokenModel:
    config = read_config(_BambaConfig, found)
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
            dt_limits=limits(config.time_step_limit),
            eps=config.rms_norm_eps,
        )

    attending = set(config.attn_layer_indices or ())
    mixers: list[Mixer] = [
        (_attention(config), _read_attention, "self_attn") if i in attending else (mamba(), read_mamba2, "mamba")
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


def jamba(found: Mapping[str, Any], weights: Weights) -> TokenModel:
    config = read_config(_JambaConfig, found)
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

    def read(mixer: Mamba, weights: Weights, prefix: str) -> None:
        read_mamba(mixer, weights, prefix)
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


def qwen3_next(found: Mapping[str, Any], weights: Weights) -> TokenModel:
    config = read_config(_Qwen3NextConfig, found)
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


def _read_gated_delta(layer: GatedDeltaNet, weights: Weights, prefix: str) -> None:
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
    read_convolution(layer.conv, weights, f"{prefix}.conv1d")
    for ours, theirs in ((layer.dt_bias, "dt_bias"), (layer.a_log, "A_log")):
        fill(ours, weights.take(f"{prefix}.{theirs}", *ours.shape))
    weights.linear(layer.norm, f"{prefix}.norm")
    weights.linear(layer.out, f"{prefix}.out_proj")
