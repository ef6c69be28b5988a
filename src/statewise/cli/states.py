"""statewise explain RUN --states: what becomes of the state, and of the loss, far past the training length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..interpret import Followed
    from ..report import Curve
    from ..tasks import Task
    from ..tasks.base import Batch

ROWS, LOOKS, TIMES = 8, 16, 16  # rows of generated data, lines of the table, and how far past the training length
DRAWN = 12  # heads in one chart: those that end largest


def show_states(run: str, length: int, out: Path | None = None) -> None:
    """Follow the run's model for `length` steps, 0 for 16 training lengths, print what was seen and draw it into `out`.

    Raises UsageError for a task whose rows have no length to go past, a length that is not twice the training's, and a
    name of a picture of another kind than .svg and .html.
    """
    from ..core import UsageError
    from ..interpret import follow_states
    from ..interpret.states import asked_only
    from ..report import check_panels
    from ..training import load

    if out is not None:
        check_panels(out)
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
    if out is not None:
        draw(followed, trained, out, f"{Path(run).name}: {task.name}")
        print(f"drawn into {out}")


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


def draw(followed: Followed, trained: int, out: Path, title: str) -> None:
    """The loss of a step, then norm, mean and variance of every state, a line for each head; one row for each state."""
    from ..report import Panel, write_panels

    loss = followed.loss
    error = loss.std(1) / math.sqrt(loss.shape[1]) if loss.shape[1] > 1 else loss.new_zeros(len(loss))
    line = curve("loss", 0, followed.steps, loss.mean(1), error)
    rows = [[Panel("loss", (line,) if line.points else ())]]
    for leaf, norm in followed.norm.items():
        heads = norm[-1].nan_to_num(math.inf).topk(min(DRAWN, norm.shape[1])).indices.sort().values.tolist()
        kinds = {"norm": norm, "mean": followed.mean[leaf], "variance": followed.variance[leaf]}
        panels, names = [], {h: f"head {h}" if norm.shape[1] > 1 else "state" for h in heads}
        for kind, values in kinds.items():
            lines = [curve(name, h, followed.steps, values[:, h]) for h, name in names.items()]
            panels.append(Panel(f"{leaf}: {kind}", tuple(line for line in lines if line.points)))
        rows.append(panels)
    collapse = followed.collapse(trained)
    note = (
        f"{'collapse' if collapse.collapsed else 'no collapse'}: loss {collapse.within:.4f} within the training length "
        f"of {trained:,} steps, {collapse.beyond:.4f} in the last quarter of {int(followed.steps[-1]):,}"
    )
    mark = (float(trained), "trained to here")
    write_panels(out, rows, title=title, note=note, x_label="steps", mark=mark)


def curve(name: str, index: int, steps: Tensor, values: Tensor, error: Tensor | None = None) -> Curve:
    """Values at each look, a band of their standard error; without looks at which they are not finite."""
    from ..report import Curve

    low, high = (values, values) if error is None else (values - error, values + error)
    kept = high.isfinite().nonzero()[:, 0].tolist()
    points = ((float(steps[i]), float(values[i]), float(low[i]), float(high[i])) for i in kept)
    return Curve(name, index, tuple(points))
