"""xLSTM: residual blocks of matrix and scalar memories (Beck et al. 2024, arXiv:2405.04517)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import nn

from ..core import RecurrentLayer, UsageError, check_sizes
from ..layers import MLSTM, ConvSLSTM
from ..nn import BlockLinear, GatedMLP
from .classifier import Classifier
from .stack import Block, Residual, embedding


@dataclass(frozen=True)
class XLSTM:
    """Describes an xLSTM[M:S]: `depth` residual blocks, M with an mLSTM to S with an sLSTM; `build` makes it.

    An mLSTM's block is x + mlstm(norm(x)), which widens inside; an sLSTM's is x + conv_slstm(norm(x)), then x +
    mlp(norm(x)) with a gated MLP of GELU and `mlp` times the width. Norms are layer norms without bias.
    blocks: "M:S", where of every M + S blocks the last S hold an sLSTM; or a letter for each, as in "mmsm". Repeats to
    the depth. taps: of the convolutions. pool as for `Stack`. From ids to logits it is a language model.

    Linear maps start normal with variance 2 / (5 width), those that add to x with deviation 2 / (depth sqrt(width));
    forget gates as in the layers, the sLSTMs' by their place in the stack.
    """

    width: int = 64
    depth: int = 2
    blocks: str = "1:1"
    heads: int = 4
    mlp: float = 4 / 3
    taps: int = 4
    dropout: float = 0.0
    pool: Literal["none", "mean"] = "none"

    def build(self, *, x_width: int | None = None, x_vocab: int | None = None, y_width: int) -> RecurrentLayer[Any]:
        """A model from x (B, T, x_width), or ids (B, T) below x_vocab, to y (B, T, y_width), on torch's generator.

        Raises UsageError for a field out of range and heads that do not divide the width.
        """
        self.check()
        embed, head = embedding(self.width, x_width, x_vocab), nn.Linear(self.width, y_width)
        blocks = [self._block(kind, place) for place, kind in enumerate(self.kinds())]
        model = Residual(embed, blocks, self._norm(), head)
        return Classifier(model) if self.pool == "mean" else model

    def check(self) -> None:
        """Raise UsageError unless every field is in range."""
        check_sizes("XLSTM", width=self.width, depth=self.depth, heads=self.heads, taps=self.taps)
        for name, value, low, high in (("mlp", self.mlp, 1 / self.width, math.inf), ("dropout", self.dropout, 0, 1)):
            if not low <= value < high:
                raise UsageError(f"XLSTM: {name} is {value}; expected at least {low:g} and below {high}")
        if self.width % self.heads:
            raise UsageError(f"XLSTM: width {self.width} is not a multiple of heads {self.heads}")
        if self.pool not in ("none", "mean"):
            raise UsageError(f"XLSTM: pool {self.pool!r}; expected 'none' or 'mean'")
        self.kinds()

    def kinds(self) -> str:
        """A letter for each block: m or s.

        >>> XLSTM(depth=8, blocks="3:1").kinds()
        'mmmsmmms'
        """
        ratio = re.fullmatch(r"(\d{1,4}):(\d{1,4})", self.blocks)
        once = "m" * int(ratio[1]) + "s" * int(ratio[2]) if ratio else self.blocks
        if not re.fullmatch("[ms]+", once):
            raise UsageError(f"XLSTM: blocks {self.blocks[:40]!r}; expected a ratio as '7:1' or letters as 'mmsm'")
        if len(once) > self.depth:
            raise UsageError(f"XLSTM: blocks {self.blocks[:40]!r} are {len(once)}, the depth is {self.depth}; raise it")
        return (once * (self.depth // len(once) + 1))[: self.depth]

    def _norm(self) -> nn.Module:
        return nn.LayerNorm(self.width, bias=False)

    def _block(self, kind: str, place: int) -> Block:
        layer: RecurrentLayer[Any]
        if kind == "m":
            size = next(b for b in (4, 2) if 2 * self.width % b == 0)
            layer, mlp = MLSTM(self.width, heads=self.heads, block=size, taps=self.taps), None
            last = layer.out
        else:
            relative = place / max(1, self.depth - 1)
            layer = ConvSLSTM(self.width, heads=self.heads, taps=self.taps, place=relative)
            mlp = GatedMLP(self.width, round(self.width * self.mlp), bias=False, gate=F.gelu)
            last = mlp.out
        norms = [self._norm() for _ in range(1 if mlp is None else 2)]
        block = Block(layer, norms, mlp, dropout=self.dropout, back=nn.Identity())
        for module in block.modules():
            # gates that do not hear the state start as their layer says
            if isinstance(module, nn.Linear | BlockLinear) and module is not getattr(layer, "gates", None):
                nn.init.normal_(module.weight, std=math.sqrt(0.4 / self.width))
        nn.init.normal_(last.weight, std=2 / (self.depth * math.sqrt(self.width)))
        return block
