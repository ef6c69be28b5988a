"""What every architecture is read with: tensors by their names, a configuration by its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...core import DataError, UsageError, near, wide
from ..stack import Block, Residual
from ..token_model import TokenModel

PLAIN: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}
Config = TypeVar("Config")


class Weights:
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


def read_config(kind: type[Config], found: Mapping[str, Any]) -> Config:
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


def require(found: object, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(found, name) != value:
            raise UsageError(f"config.json: {name} is {getattr(found, name)!r}; only {value!r} is built here")


def token_model(
    weights: Weights, table: nn.Embedding, blocks: list[Block], norm: nn.Module, head: nn.Linear | None
) -> TokenModel:
    return TokenModel(Residual(table, blocks, norm, None), head).to(weights.device, weights.dtype)
