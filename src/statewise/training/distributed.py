"""Training by several processes on the same batches: each takes some of the rows, and gradients are added up."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import ResourceError, UsageError, leaves, select, tree_map
from ..tasks.base import Batch
from .experiment import Train

EXCHANGES = ("gloo", "Gloo", "NCCL", "Connection ")  # words in the errors of those that carry them
PATIENCE = datetime.timedelta(minutes=30)  # for the slowest rank


class RankLost(ResourceError):
    """Another process of the same training ended or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model, and which of them this one is. Ranks() is the only one.

    Rank r works on rows r, r + size, r + 2 size ... of every batch. shard: it holds a part of the weights, of their
    gradients and moments, and not all of them (`shards`).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shard: bool = False

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def rows(self, batch: Batch) -> tuple[Batch, float]:
        """This rank's rows, and its share of what is asked in all of them: the weight of its mean loss."""
        if not self.several:
            return batch, 1.0
        own: Batch = tree_map(lambda leaf: leaf[self.rank :: self.size], batch)
        asked = float(batch.weight.sum())
        return own, float(own.weight.sum()) / asked if asked else 0.0

    def check(self, train: Train) -> None:
        """Raise UsageError for a batch with fewer rows than there are ranks, and for shards that cannot be had."""
        if train.batch < self.size:
            raise UsageError(f"train.batch is {train.batch}, for {self.size} ranks; each needs one row at least")
        if self.shard and not self.several:
            raise UsageError(
                "--shard parts the weights among ranks, and this is the only one; start several with torchrun "
                "--nproc-per-node 2, or leave it out"
            )
        if self.shard and train.compile:
            raise UsageError("train.compile together with --shard is not built; leave out one of the two")

    def total(self, t: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.several:
            t = t.clone()
            with loss_of_a_rank_named(self.rank):
                dist.all_reduce(t)
        return t

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.several:
            with loss_of_a_rank_named(self.rank):
                sum_gradients(parameters)

    def largest(self, number: int) -> int:
        """The largest of what the ranks say, which then is what all of them know."""
        if not self.several:
            return number
        t = torch.tensor(number, device=self.device)
        with loss_of_a_rank_named(self.rank):
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return int(t)

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Rank 0 runs the block, then the others do."""
        if self.rank:
            self.largest(0)
        yield
        if not self.rank:
            self.largest(0)

    def first_says(self, numbers: dict[str, float]) -> dict[str, float]:
        """The numbers of rank 0."""
        if not self.several:
            return numbers
        t = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        with loss_of_a_rank_named(self.rank):
            dist.broadcast(t, 0)
        return dict(zip(numbers, t.tolist(), strict=True))

    def all_of(self, t: Tensor) -> list[Tensor]:
        """A tensor of the same shape from each rank, by rank."""
        if not self.several:
            return [t]
        here = t.to(self.device).contiguous()
        found = [torch.empty_like(here) for _ in range(self.size)]
        with loss_of_a_rank_named(self.rank):
            dist.all_gather([_real(f) for f in found], _real(here))
        return [f.to(t.device) for f in found]

    def join_rows(self, state: Any, rows: int) -> Any:
        """The state of all `rows` of a batch from the states of each rank's."""
        if not self.several or not leaves(state):
            return state
        most = -(-rows // self.size)

        def whole(leaf: Tensor) -> Tensor:
            filled = torch.cat([leaf, leaf.new_zeros(most - len(leaf), *leaf.shape[1:])])
            return torch.stack(self.all_of(filled), 1).flatten(0, 1)[:rows]

        return tree_map(whole, state)

    def own_rows(self, state: Any) -> Any:
        """The state of this rank's rows from that of all."""
        if not self.several or not leaves(state):
            return state
        return select(state, torch.arange(self.rank, len(leaves(state)[0]), self.size, device=leaves(state)[0].device))


def from_torchrun() -> tuple[int, int, int]:
    """Rank, ranks and rank on this machine, as torchrun says in the environment: 0, 1, 0 without it."""
    return tuple(int(os.environ.get(name, "") or default)  # type: ignore[return-value]
                 for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip


@contextlib.contextmanager
def joined(device: torch.device | None = None, *, shard: bool = False) -> Iterator[Ranks]:
    """Join the other processes that torchrun started: gloo on a CPU, nccl on GPUs. One process alone joins nothing.

    shard: each is to hold a part of the weights.
    Raises RankLost where the others cannot be reached.
    """
    device = torch.device("cpu") if device is None else device
    rank, size, _ = from_torchrun()
    if size == 1:
        yield Ranks(device=device, shard=shard)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with loss_of_a_rank_named(rank):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(rank, size, device, shard)
    finally:
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[nn.Parameter], group: Any = None) -> None:
    """Add up the gradients of all ranks, in one exchange for each dtype. One that no rank has stays None."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        if p.requires_grad:
            by_kind.setdefault((p.dtype, p.device), []).append(p)
    for (dtype, device), named in by_kind.items():
        there = torch.tensor([p.grad is not None for p in named], device=device).to(dtype)
        flat = torch.cat([there, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in named)])
        dist.all_reduce(_real(flat), group=group)
        counts, *grads = flat.split([len(named), *(p.numel() for p in named)])
        for p, count, grad in zip(named, counts.real.tolist(), grads, strict=True):
            p.grad = grad.view_as(p).clone() if count else None


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


@contextlib.contextmanager
def loss_of_a_rank_named(rank: int, *, among_others: bool = False) -> Iterator[None]:
    """An exchange that fails because another process is gone, as one clear line.

    among_others: the block does other things too, whose errors are left as they are.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's DistError and DistBackendError are RuntimeErrors
        if among_others and not isinstance(error, dist.DistError) and not any(w in str(error) for w in EXCHANGES):
            raise
        text = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise RankLost(
            f"rank {rank}: another rank has ended or cannot be reached ({text}); start all of them again to go on from "
            "the last checkpoint"
        ) from error
