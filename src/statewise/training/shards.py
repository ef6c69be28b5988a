"""What each of several ranks holds of the weights, their gradients and moments: all of them, or a part (FSDP).

Training by one process holds weights as `Replicas` too. Both answer as a module does where optimisers and averages ask:
`named_parameters` and `state_dict` are of what this rank holds.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core import UsageError
from ..models import Block, Residual
from .distributed import Ranks, loss_of_a_rank_named
from .optimise import gradient_norm


class Replicas:
    """All of every parameter on every rank; gradients are added up after the backward pass."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward or backward pass."""
        return contextlib.nullcontext()

    def exchange(self, clip: float) -> Tensor:
        """Make the gradients those of all ranks together, clipped; returns their norm before that."""
        self.ranks.sum_gradients(self.trained)
        return gradient_norm(self.trained, clip)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of whole weights or moments, by the names of parameters or PARAMETER.KEY."""
        return dict(tensors)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights or moments from what the ranks hold of them."""
        return dict(tensors)


class Shards:
    """Rank r of n holds rows r c to (r + 1) c of every parameter, c = ceil(rows / n), of its gradient and its moments.

    The parameters of a block are brought together while it computes, on the way forward and on the way back, and its
    gradients are added up and parted when it is done (torch.distributed.fsdp.fully_shard). Buffers are
    whole everywhere.

    Raises UsageError for a parameter that is complex or has no rows.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self.rows = {name: len(_with_rows(name, p)) for name, p in model.named_parameters()}
        undecaying = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # it warns of results that are views, for whoever changes them in place: nobody does here
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        for unit in (*_blocks(model), model):
            made = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            made.set_force_sum_reduction_for_comms(True)  # gloo knows no average, and the shares add up to one
            made.set_gradient_divide_factor(1.0)
            if isinstance(unit, Block):
                register_fsdp_forward_method(unit, "along")
        self.sharded = dict(model.named_parameters())
        self.parts = {name: _local(p).detach() for name, p in self.sharded.items()}  # of the same memory
        for name, part in self.parts.items():
            part.requires_grad_(self.sharded[name].requires_grad)
            cast(Any, part)._no_weight_decay = name in undecaying

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.parts.items())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: _local(t) for name, t in self.model.state_dict().items()}

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward or backward pass, in which ranks exchange weights and gradients."""
        return loss_of_a_rank_named(self.ranks.rank, among_others=True)

    def exchange(self, clip: float) -> Tensor:
        """Give the parts the gradients that the backward pass has parted, clipped; returns the norm of all of them."""
        for name, part in self.parts.items():
            grad = self.sharded[name].grad
            part.grad = None if grad is None else _local(grad)
        trained = [part for part in self.parts.values() if part.requires_grad and part.numel()]
        norm = self.ranks.total(gradient_norm(trained, 0).double().square()).sqrt().float()
        if clip > 0:
            nn.utils.clip_grads_with_norm_(trained, clip, norm, foreach=True)
        return norm

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of whole weights or moments, by the names of parameters or PARAMETER.KEY."""
        found, rank = {}, self.ranks.rank
        for name, t in tensors.items():
            rows = self._rows_of(name, t)
            each = -(-rows // self.ranks.size)
            found[name] = t[rank * each : (rank + 1) * each].clone() if rows else t
        return found

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights or moments from what the ranks hold of them, for the rank that writes; none for others."""
        found = {}
        for name, t in tensors.items():
            rows = self._rows_of(name, t)
            if rows:
                each = -(-rows // self.ranks.size)
                filled = torch.cat([t, t.new_zeros(each - len(t), *t.shape[1:])])
                t = torch.cat(self.ranks.all_of(filled))[:rows]
            if self.ranks.writes:
                found[name] = t
        return found

    def _rows_of(self, name: str, t: Tensor) -> int:
        """Of the parameter that a tensor belongs to; 0 for one that is the same on all ranks."""
        of = name if name in self.rows else name.rpartition(".")[0]
        return self.rows.get(of, 0) if t.ndim else 0


def _with_rows(name: str, p: Tensor) -> Tensor:
    if p.ndim == 0 or p.is_complex():
        what = "is complex" if p.is_complex() else "has no rows to share out"
        raise UsageError(f"parameter {name} {what}, so it cannot be sharded; leave out --shard: each rank holds all")
    return p


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of every stack in the model. Where a block stands at several depths, it goes with the rest."""
    stacks = [part for part in model.modules() if isinstance(part, Residual)]
    return [block for stack in stacks if len(stack.order) == len(stack.blocks) for block in stack.blocks]


def whole_blocks(model: nn.Module) -> None:
    """Raise UsageError where a block cannot be run alone, for its parameters are brought together with the rest."""
    if len(_blocks(model)) < sum(isinstance(part, Block) for part in model.modules()):
        raise UsageError(
            "teacher.layers of blocks that stand at several depths is not built with --shard; leave out one"
        )


def _local(t: Tensor) -> Tensor:
    """The part of a distributed tensor that is here; another tensor as it is."""
    return cast(Tensor, t.to_local()) if hasattr(t, "to_local") else t
