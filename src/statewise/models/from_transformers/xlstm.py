"""xlstm, in the form of xLSTM-7B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core import UsageError
from ...layers import MLSTMLarge
from ...nn import GatedMLP, RMSNorm
from ..stack import Block
from ..token_model import TokenModel
from .weights import Weights, fill, read_config, require, token_model


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


def xlstm(found: Mapping[str, Any], weights: Weights) -> TokenModel:
    config = read_config(_XLSTMConfig, found)
    width, heads = config.hidden_size, config.num_heads
    require(config, use_bias=False, add_out_norm=True)
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
    model = token_model(weights, nn.Embedding(config.vocab_size, width), blocks, norm, head)
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


def _read_xlstm_block(block: Block, weights: Weights, name: str, *, fused: bool) -> None:
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
