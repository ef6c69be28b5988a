"""statewise explain RUN --states: what becomes of the state, and of the loss, far past the training length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..interpret import Followed
    from ..tasks import Task
    from ..tasks.base import Batch

ROWS, LOOKS, TIMES = 8, 16, 16  # rows of generated data, lines of the table, and how far past the training length


def show_states(run: str, length: int) -> None:
    """Follow the run's model for `length` steps, 0 for 16 training lengths, and print what was seen.

    Raises UsageError for a task whose rows have no length to go past, and a length that is not twice the training's.
    """
    from ..core import UsageError
    from ..interpret import follow_states
    from ..interpret.states import asked_only
    from ..training import load

    model, experiment = load(run)
    task = experiment.task
    trained = getattr(task, "train_length", None) or getattr(task, "length", None)
    if not trained:
        raise UsageError(f"--states: {task.name} has rows of no one length; expected a task with a training length")
    length = length or TIMES * trained
    if length < 2 * trained:
        raise UsageError(f"--length {length}; expected at least {2 * trained}, twice the training length")
    every = max(1, trained // 2)
    followed = asked_only(follow_states(model, pieces(task, length), every=every))
    if not len(followed.steps) or followed.steps[-1] < 2 * trained:
        seen = int(followed.steps[-1]) if len(followed.steps) else 0
        raise UsageError(f"--states: {task.name} gives {seen} steps with an answer; expected {2 * trained} or more")
    show(followed, trained)


def pieces(task: Task, length: int) -> Iterator[Batch]:
    """Test rows of that length: drawn at that length where the task is generated, else read on side by side."""
    from ..tasks.generated import Generated

    if isinstance(task, Generated):
        yield task.at(length).batch(0, ROWS, seed=0, split="test")
        return
    seen = 0
    for batch in task.batches("test"):
        yield batch
        seen += batch.x.shape[1]
        if seen >= length:
            return


def show(followed: Followed, trained: int) -> None:
    """A line for some of the looks, the training length among them, and whether it is collapse."""
    from .show import table

    steps = followed.steps.tolist()
    last = max((i for i, s in enumerate(steps) if s <= trained), default=0)
    shown = sorted({last, *(round(i * (len(steps) - 1) / (LOOKS - 1)) for i in range(LOOKS))})
    head = {name: int(norm[-1].argmax()) for name, norm in followed.norm.items()}  # the one that ends largest
    lines = []
    for i in shown:
        norms = (f"{float(norm[i, head[name]]):.3g}" for name, norm in followed.norm.items())
        mark = " (trained to here)" if i == last else ""
        lines.append([f"{steps[i]}{mark}", f"{float(followed.loss[i].mean()):.3f}", *norms])
    columns = ("steps", "loss", *head)
    table(columns, lines, right=columns, title="loss, and the norm of the head of each state that ends largest")
    largest, lines = followed.largest(trained), []
    for leaf, one in head.items():
        seen = (largest[leaf], *(t[leaf][-1] for t in (followed.norm, followed.mean, followed.variance)))
        lines.append([leaf, str(one), *(f"{float(t[one]):.3g}" for t in seen)])
    columns = ("state", "head", "largest norm in training length", "norm at the end", "mean", "variance")
    table(columns, lines, right=columns[1:])
    found = followed.collapse(trained)
    print(f"loss within the training length {found.within:.4f}, in the last quarter {found.beyond:.4f} "
          f"(rise {found.rise:.4f}, standard error {found.error:.2g})")  # fmt: skip
    for (leaf, which), times in found.grown.items():
        print(f"{leaf}, head {which}: its norm is {times:.3g} times the largest within the training length")
    print("collapse: the loss rises and a norm leaves its range" if found.collapsed else "no collapse")
