"""Learning from a trained model besides the data (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import RecurrentLayer, UsageError, past_end
from ..layers import Sight
from ..models import inherit, stack_of, watched
from ..tasks.base import Batch, Task
from .checkpoint import load
from .experiment import Experiment

Run = Callable[[Any, Tensor, Any, Batch], tuple[Any, ...]]  # (function, x, state or None, batch) -> outputs, state ...


class Carried(NamedTuple):
    """What goes on from one batch to the next."""

    student: Any
    teacher: Any  # None where it is not asked
    forced: tuple[Any, ...]  # of the student's new blocks on what enters the teacher's; None at the other depths


class Distiller:
    """A student that begins as its teacher and learns from it, as `Teacher` describes.

    Raises DataError where the teacher's run has no checkpoint, UsageError where the two do not fit.
    """

    def __init__(self, student: RecurrentLayer[Any], experiment: Experiment, device: torch.device):
        self.how, self.student = experiment.teacher, student
        self.teacher = load(self.how.run)[0].to(device).requires_grad_(False)
        new = inherit(student, self.teacher, self.how.inherit)
        self.asked = bool(self.how.logits or self.how.hidden or self.how.layers)
        self.inside = bool(self.how.hidden or self.how.layers)
        self.forced: frozenset[int] = frozenset()
        if self.inside:
            if experiment.train.compile:
                raise UsageError("train.compile with teacher.hidden or teacher.layers is not built; leave one out")
            sizes = [(len(s.order), s.blocks[0].width) for s in map(stack_of, (student, self.teacher))]
            if sizes[0] != sizes[1]:
                raise UsageError(f"teacher.hidden, teacher.layers: depth and width {sizes[0]} from {sizes[1]}")
        if self.how.layers:
            fresh = {id(p) for name, p in student.named_parameters() if name in new}
            blocks = stack_of(student).at_depths()
            self.forced = frozenset(
                depth for depth, block in enumerate(blocks) if any(id(p) in fresh for p in block.parameters())
            )
            if not self.forced:
                raise UsageError("teacher.layers: no block of the student is new; leave it out")
        if self.how.only_new:
            for name, p in student.named_parameters():
                p.requires_grad_(name in new)

    def initial_state(self, batch: int) -> Carried:
        """What is carried, before the first batch."""
        forced = tuple(
            block.initial_state(batch) if depth in self._run_depths() else None
            for depth, block in enumerate(stack_of(self.student).at_depths())
        )
        return Carried(
            self.student.initial_state(batch),
            self.teacher.initial_state(batch) if self.asked else None,
            forced if self.how.layers else (),
        )

    def lesson(
        self, student: Any, task: Task, batch: Batch, before: Carried | None, run: Run
    ) -> tuple[Tensor, Carried]:
        """The loss on a batch and what goes on. student: the model or what was compiled of it."""
        how, old = self.how, Carried(None, None, ()) if before is None else before
        taught, teacher_state = None, None
        theirs: list[Tensor] = []
        if self.asked:
            with self._watched(self.teacher) as theirs, torch.no_grad():
                taught, teacher_state = run(self.teacher, batch.x, old.teacher, batch)
        with self._watched(self.student) as ours:
            out, state = run(student, batch.x, old.student, batch)
        loss = how.truth * task.loss(out, batch)
        if taught is not None and how.logits:
            loss = loss + how.logits * soft_loss(out, taught, batch, task.kind, how.temperature)
        if how.hidden:
            each = [relative(h, t, t, batch) for h, t in zip(ours[1:], theirs[1:], strict=True)]
            loss = loss + how.hidden * torch.stack(each).mean()
        forced: tuple[Any, ...] = ()
        if how.layers:
            each, forced = self._force(theirs, old.forced, batch, run)
            loss = loss + how.layers * torch.stack(each).mean()
        return loss, Carried(state, teacher_state, forced)

    def _watched(self, model: RecurrentLayer[Any]) -> AbstractContextManager[list[Tensor]]:
        return watched(model) if self.inside else nullcontext([])

    def _run_depths(self) -> frozenset[int]:
        """The new blocks, and those without which they cannot be run."""
        return self.forced | (stack_of(self.student).shared if self.forced else frozenset())

    def _force(
        self, theirs: list[Tensor], before: tuple[Any, ...], batch: Batch, run: Run
    ) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Each new block on what enters the teacher's: how far from what the teacher's adds, and the blocks' states."""
        stack, losses = stack_of(self.student), []
        after: list[Any] = []
        sight: Sight | None = None
        for depth, block in enumerate(stack.at_depths()):
            if depth not in self._run_depths():
                after.append(None)
                continue
            x, old = theirs[depth], before[depth] if before else None
            if depth in stack.shared:
                y, state, sight = run(partial(block.along, sight=sight), x, old, batch)
            else:
                y, state = run(block, x, old, batch)
            after.append(state)
            if depth in self.forced:
                losses.append(relative(y, theirs[depth + 1], theirs[depth + 1] - x, batch))
        return losses, tuple(after)


def soft_loss(out: Tensor, taught: Tensor, batch: Batch, kind: str, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)), the mean over what is asked; of numbers, the squared error.

    out, taught (B, T, E): answers of student and teacher. tau^2: so that gradients keep their size as tau grows.
    """
    out, taught = out.float(), taught.float()
    if kind == "regression":
        each = (out - taught).pow(2).mean(-1)
    else:
        ours, theirs = ((z / temperature).log_softmax(-1) for z in (out, taught))
        each = temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    asked = batch.weight.sum().clamp_min(torch.finfo(batch.weight.dtype).tiny)
    return (each.where(batch.weight > 0, 0) * batch.weight).sum() / asked


def relative(x: Tensor, target: Tensor, unit: Tensor, batch: Batch) -> Tensor:
    """|x - target|^2 / |unit|^2 of (B, T, D), each summed over all steps that are not padding."""
    far, size = ((z.float() ** 2).sum(-1) for z in (x - target, unit))
    if batch.lengths is not None:
        over = past_end(batch.lengths, x.shape[1])
        far, size = far.masked_fill(over, 0), size.masked_fill(over, 0)
    return far.sum() / size.sum().clamp_min(torch.finfo(size.dtype).tiny)
