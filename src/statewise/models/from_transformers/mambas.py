"""mamba, falcon_mamba and mamba2."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core import RecurrentLayer, UsageError
from ...layers import Mamba, Mamba2
from ...nn import RMSNorm
from ..stack import Block
from ..token_model import TokenModel
from .weights import Weights, fill, read_config, require, token_model


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


def mamba(found: Mapping[str, Any], weights: Weights) -> TokenModel:
    config = read_config(_MambaConfig, found)
    require(config, hidden_act="silu")
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

    return _backbone(config, weights, layer, read_mamba)


def read_mamba(mixer: Mamba, weights: Weights, prefix: str) -> None:
    for ours, theirs in (("inp", "in_proj"), ("select", "x_proj"), ("dt", "dt_proj"), ("out", "out_proj")):
        weights.linear(getattr(mixer, ours), f"{prefix}.{theirs}")
    read_convolution(mixer.conv, weights, f"{prefix}.conv1d")
    fill(mixer.a_log, weights.take(f"{prefix}.A_log", *mixer.a_log.shape))
    fill(mixer.d, weights.take(f"{prefix}.D", *mixer.d.shape))


def read_convolution(conv: nn.Module, weights: Weights, name: str) -> None:
    """Theirs (D, 1, P) has the oldest tap first, ours (P, D) the newest."""
    taps, width = conv.weight.shape  # type: ignore[misc, union-attr]
    fill(conv.weight, weights.take(f"{name}.weight", width, 1, taps)[:, 0].flip(1).mT)  # type: ignore[arg-type]
    if conv.bias is not None:
        fill(conv.bias, weights.take(f"{name}.bias", width))  # type: ignore[arg-type]


def _backbone(
    config: Any, weights: Weights, layer: Callable[[], RecurrentLayer[Any]], read: Callable[[Any, Weights, str], None]
) -> TokenModel:
    """x + layer(norm(x)) again and again, between an embedding and a norm with a head: what the Mambas share."""
    width, vocab = config.hidden_size, config.vocab_size
    norm = lambda: RMSNorm(width, eps=config.layer_norm_epsilon)
    blocks = [Block(layer(), [norm()], None, back=nn.Identity()) for _ in range(config.num_hidden_layers)]
    head = None if config.tie_word_embeddings else nn.Linear(width, vocab, bias=False)
    model = token_model(weights, nn.Embedding(vocab, width), blocks, norm(), head)
    weights.rename("backbone.embedding.weight", "backbone.embeddings.weight")  # as the first checkpoints had it
    weights.linear(model.body.embed, "backbone.embeddings")
    weights.linear(model.body.norm, "backbone.norm_f")
    for i, block in enumerate(blocks):
        weights.linear(block.norms[0], f"backbone.layers.{i}.norm")
        read(block.layer, weights, f"backbone.layers.{i}.mixer")
    weights.head(head)
    return model


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


def mamba2(found: Mapping[str, Any], weights: Weights) -> TokenModel:
    config = read_config(_Mamba2Config, found)
    require(config, hidden_act="silu")

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
            dt_limits=limits(config.time_step_limit),
            eps=config.layer_norm_epsilon,
        )

    return _backbone(config, weights, layer, read_mamba2)


def read_mamba2(mixer: Mamba2, weights: Weights, prefix: str) -> None:
    for name in ("in_proj", "norm", "out_proj"):
        weights.linear(getattr(mixer, name), f"{prefix}.{name}")
    read_convolution(mixer.conv, weights, f"{prefix}.conv1d")
    for ours, theirs in ((mixer.dt_bias, "dt_bias"), (mixer.a_log, "A_log"), (mixer.d, "D")):
        fill(ours, weights.take(f"{prefix}.{theirs}", *ours.shape))


def limits(found: Any) -> tuple[float, float]:
    """(low, high), where an infinity may be written as transformers does: {"__float__": "Infinity"}."""
    ends = [
        float(end["__float__"]) if isinstance(end, dict) and end.get("__float__") == "Infinity" else end
        for end in (found if isinstance(found, list | tuple) else [])
    ]
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
        raise UsageError(f"config.json: time_step_limit is {found!r}; expected two numbers, such as [0.0, 1.0]")
    return float(ends[0]), float(ends[1])
