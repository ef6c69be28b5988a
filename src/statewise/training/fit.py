"""fit: from an experiment to a trained model, its scores and a run directory that survives whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import (
    DataError,
    NumericError,
    RecurrentLayer,
    ResourceError,
    StatewiseError,
    UsageError,
    costs,
    detach,
    leaves,
    names,
    read_json,
    settled,
    tree_map,
    write_json,
)
from ..core.errors import out_of_memory
from ..core.files import shown
from ..core.machine import locked
from ..models import Residual
from ..tasks.base import Batch, Split
from ..tasks.units import write_units
from . import checkpoint
from .checkpoint import Checkpoint
from .data import data_hash
from .distil import Distiller
from .distributed import Ranks
from .evaluate import MEASURED, evaluate, sound
from .experiment import Experiment, differences
from .log import Log, TensorBoard
from .optimise import Average, Optimizer, learning_rate, refuse_nonfinite
from .shards import Replicas, Shards, whole_blocks
from .signals import Stop, Stopped

Event = dict[str, Any]

WEIGHT = "parameter."  # before the names of the raw weights in a checkpoint
WARM_UP = 5  # first steps of a process that its pace leaves out: kernels are compiled or loaded there


class OtherData(UsageError):
    """The data of a task are not those that its run began with."""


@dataclass(frozen=True)
class Result:
    """What came out. `score` is the task's metric on the test split, by the best weights of the validation split."""

    metrics: dict[str, dict[str, float]]  # split -> name -> value
    score: float
    steps: int
    parameters: int
    seconds: float  # of training steps, over all resumptions
    tokens_per_second: float  # without the first five steps of each process, unless there are no others
    peak_memory: int  # bytes: of the process on a CPU, of tensors on a GPU
    stopped: str  # "done", or "early" when the patience ran out
    tokens: int = 0  # time steps without padding that it was trained on, over all resumptions; 0 in older results


def fit(
    experiment: Experiment,
    run: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    resume: bool = True,
    force: bool = False,
    signals: bool = False,
    tensorboard: bool = True,
    on_event: Callable[[Event], None] | None = None,
    ranks: Ranks | None = None,
) -> Result:
    """Train, evaluate on the validation split as it goes, and once at the end on the test split.

    run: a directory for the log, the checkpoints and the result. With `resume` a stopped run goes on where its newest
    whole checkpoint is, on a CPU with the same threads with the same bits as if it had never stopped, and a finished
    run gives its result at once; without, what an earlier run left there is removed. force: go on though configuration
    or data differ.
    device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
    signals: SIGTERM, SIGHUP and Ctrl-C finish the step, save and raise `Stopped` (main thread only).
    tensorboard: write its files into the run too, where it is installed; the log has everything in any case.
    on_event: called with every event of the log: dicts with "event", "step", and what belongs to it.
    ranks: the processes that train together, each of which calls fit with the same arguments, as `distributed.joined`
    gives them; each works on some rows of each batch, and only rank 0 writes. All must see the run directory.

    Raises UsageError (device, configuration, directory in use), DataError, ResourceError (disk, memory, another rank
    lost), NumericError (a loss or gradient that is not finite; the last checkpoint stays), Stopped.
    """
    place, ranks = choose_device(device), ranks or Ranks()
    ranks.check(experiment.train)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([place] if place.type == "cuda" else [], device_type="cuda"))
        folder = None if run is None else Path(run)
        done: Result | None = None
        if folder is not None and ranks.writes:
            _make(folder)
            stack.enter_context(locked(folder))
            checkpoint.clean(folder)
            done = _settle(folder, experiment, resume=resume, force=force)
        if ranks.largest(int(done is not None)):
            assert folder is not None
            return done or read_result(folder)
        events = stack.enter_context(Events(folder if ranks.writes else None, on_event, tensorboard))
        stop = stack.enter_context(Stop()) if signals else Stop()
        training = Training(experiment, place, folder, events, stop, force, ranks)
        try:
            with _memory_named(training):
                training.begin()
                if folder is not None and ranks.writes:
                    write_units(folder, experiment.task)
                    experiment.task.keep(folder)
                result = training.train()
        except Stopped as error:
            events.send("stopped", training.step, message=str(error), code=error.code)
            raise
        except Exception as error:
            with contextlib.suppress(OSError):  # a full disk takes no last words
                events.send("failed", training.step, message=str(error) or type(error).__name__, code=_code(error))
            raise
        if folder is not None and ranks.writes:
            setup = {"data": training.data, "device": str(place), "threads": torch.get_num_threads()}
            setup["version"] = checkpoint._version()
            write_json(folder / "result.json", {"key": experiment.key, **setup, **asdict(result)})
        events.send("done", training.step, **asdict(result))
        return result


def read_result(run: str | os.PathLike[str]) -> Result:
    """The result of a finished run. Raises DataError where there is none."""
    record = read_json(Path(run) / "result.json")
    try:
        return Result(**{f.name: record[f.name] for f in fields(Result) if f.name in record or f.name != "tokens"})
    except KeyError as error:
        raise DataError(f"{shown(Path(run) / 'result.json')}: no entry {error}; not a result of this version") from None


@dataclass
class Training:
    """One run in progress. Everything a checkpoint must hold is in its fields and in the generators of torch."""

    experiment: Experiment
    device: torch.device
    run: Path | None
    events: Events
    stop: Stop
    force: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    step: int = 0
    evaluated: int = -1  # the step of the last finished evaluation
    saved: tuple[int, int] = (-1, -1)  # step and evaluated of the last checkpoint
    best: dict[str, Tensor] | None = None  # the weights with the best score
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0  # evaluations since the best one
    carried: Any = None  # the state at the end of the last batch, where the task carries
    tokens: int = 0
    seconds: float = 0.0
    paced_tokens: int = 0  # the same without the first steps of each process
    paced_seconds: float = 0.0

    def begin(self) -> None:
        """Build the model and the optimiser, and go back to the newest checkpoint if there is one."""
        train = self.experiment.train
        torch.manual_seed(self.experiment.seed)
        self.model: RecurrentLayer[Any] = checkpoint.build(self.experiment).to(self.device).train()
        for part in self.model.modules():
            if isinstance(part, Residual):
                part.recompute = train.recompute_blocks
        self.distiller: Distiller | None = None
        if self.experiment.teacher.run:
            self.distiller = Distiller(self.model, self.experiment, self.device)  # each rank has all of the teacher
            if self.ranks.shard and self.experiment.teacher.layers:
                whole_blocks(self.model)
        self.compiled: Any = torch.compile(self.model) if train.compile else self.model
        found, skipped = checkpoint.newest(self.run, allow_nonfinite=True) if self.run else (None, [])
        self.data = data_hash(self.experiment.task) if self.run else ""
        if found is not None:
            if not self.force:
                _refuse_other_data(self.run, self.experiment, found.state, self.data)
            weights = {name.removeprefix(WEIGHT): t for name, t in found.optim.items() if name.startswith(WEIGHT)}
            checkpoint.load_weights(self.model, weights, shown(found.path or "checkpoint"))
        like = None if found is None else (self.distiller or self.model).initial_state(0)
        own = (self.model, self.ranks)
        self.held: Replicas | Shards = Shards(*own) if self.ranks.shard else Replicas(*own)
        self.optimizer = Optimizer(self.held, train)
        self.average = Average(self.held, train.ema) if train.ema else None
        if found is not None:
            self._restore(found, like)
        elif self.ranks.rank:
            torch.manual_seed(self._own_seed())
        self.clock, self.first = Clock(self), self.step
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        size = sum(p.numel() for p in self.model.parameters())
        self.events.send("start", self.step, steps=train.steps, parameters=size, skipped=skipped)
        before, now = (found.state if found else {}).get("threads"), torch.get_num_threads()
        if before not in (None, now):
            self.events.send("warning", self.step, message=f"goes on with {now} threads, began with {before}: the last "
                             "bits may differ from those of a run that was never stopped")  # fmt: skip

    def train(self) -> Result:
        """Steps, evaluations and checkpoints, each where it is due, until the end, the patience or a signal."""
        train = self.experiment.train
        while True:
            if self._due(train.evaluate_every) and self.evaluated != self.step:
                self._evaluate_and_keep()
            finished = self.step >= train.steps or bool(train.patience and self.stale >= train.patience)
            if self.evaluated == self.step or finished or self._due(train.checkpoint_every):
                self._save()
            self._stop_if_asked()
            if finished:
                break
            self._step()
        test = self._evaluate("test")
        tokens, seconds = (self.paced_tokens, self.paced_seconds) if self.paced_seconds else (self.tokens, self.seconds)
        return Result(
            metrics={"validation": self.best_metrics, "test": test},
            score=test[self.experiment.task.metric],
            steps=self.step,
            parameters=sum(p.numel() for p in self.model.parameters()),
            seconds=self.seconds,
            tokens_per_second=tokens / max(seconds, 1e-9),
            peak_memory=peak_memory(self.device),
            stopped="done" if self.step >= train.steps else "early",
            tokens=self.tokens,
        )

    def _due(self, every: int) -> bool:
        return self.step > 0 and (self.step >= self.experiment.train.steps or bool(every and self.step % every == 0))

    # ---- one step

    def _step(self) -> None:
        train, began, tokens = self.experiment.train, time.perf_counter(), self.tokens
        rate = learning_rate(train, self.step)
        self.model.zero_grad(set_to_none=True)
        parts = [self._backward(self.step * train.accumulate + i) for i in range(train.accumulate)]
        loss = self.ranks.total(torch.stack(parts).sum())
        norm = self.held.exchange(train.clip)
        loss_now, norm_now = torch.stack([loss.float(), norm.float()]).tolist()  # the one wait for the device
        kept = f"step-{self.saved[0]} is kept" if self.saved[0] >= 0 else "no checkpoint yet"
        advice = f"checkpoint: {kept}; try a lower train.lr, a smaller train.clip or a longer train.warmup"
        refuse_nonfinite(loss_now, norm_now, self.held, self.step, advice)
        self.optimizer.step(rate)
        if self.average:
            self.average.update(self.held, self.step)
        self.step += 1
        took = time.perf_counter() - began
        self.seconds += took
        if self.step > self.first + WARM_UP:
            self.paced_seconds += took
            self.paced_tokens += self.tokens - tokens
        self._report(loss_now, norm_now, rate)

    def _backward(self, index: int) -> Tensor:
        """Gradients of one batch, added to those there are; returns its share of the loss."""
        task, train = self.experiment.task, self.experiment.train
        batch = task.batch(index, train.batch, seed=self.experiment.seed, split="train")
        tokens = batch.tokens
        self.tokens += tokens
        batch, share = self.ranks.rows(batch)
        batch = batch.to(self.device)
        if self.distiller is not None:
            loss, state = self.distiller.lesson(self.compiled, task, batch, self.carried, self._call)
        else:
            out, state = self._run(batch, self.carried)
            loss = task.loss(out, batch)
        loss = loss * share
        for total in costs(state if self.distiller is None else state.student, self.ranks.total):
            loss = loss + total.sum() / max(tokens, 1)
        loss = loss / train.accumulate
        with self.held.running():
            loss.backward()
        if task.carries:
            self.carried = detach(settled(state))  # truncated back-propagation: the state goes on, its past does not
        return loss.detach()

    def _run(self, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        out, state = self._call(self.compiled if self.model.training else self.model, batch.x, state, batch)
        return out, state

    def _call(self, function: Any, x: Tensor, state: Any, batch: Batch) -> tuple[Any, ...]:
        half = self.experiment.train.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half), self.held.running():
            found: tuple[Any, ...] = function(x, state, reset=batch.reset, lengths=batch.lengths)
        return found

    def _report(self, loss: float, norm: float, rate: float) -> None:
        train = self.experiment.train
        every = max(1, min(train.evaluate_every or train.steps, train.steps) // 10)
        self.clock.add(loss)
        if self.step % every and self.clock.quiet() < 1.0 and self.step < train.steps:
            return
        mean, speed, pace = self.clock.lap(self)
        self.events.send(
            "train",
            self.step,
            steps=train.steps,
            loss=mean,
            lr=rate,
            gradient=norm,
            seconds=self.seconds,
            tokens_per_second=speed,
            eta=(train.steps - self.step) * pace,
        )

    # ---- evaluation

    def _evaluate_and_keep(self) -> None:
        task = self.experiment.task
        metrics = self._evaluate("validation", best=False)
        score = metrics[task.metric]
        old = self.best_score
        better = old is None or (score > old if task.higher_is_better else score < old)
        if better:
            self.best_score, self.best_metrics, self.stale = score, metrics, 0
            self.best = {name: t.detach().clone() for name, t in self._weights().items()}
        else:
            self.stale += 1
        self.evaluated = self.step
        self.events.send(
            "evaluate", self.step, split="validation", score=score, metrics=metrics, best=better, seconds=self.seconds
        )

    @torch.no_grad()
    def _evaluate(self, split: Split, *, best: bool = True) -> dict[str, float]:
        """Every batch of a split by the best weights so far, or by the present ones."""
        task = self.experiment.task
        weights = self.best if best and self.best is not None else self._weights()
        generators = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(generators, device_type="cuda"), self._using(weights):
            # ranks that hold parts of the weights go through every batch together
            batches = takewhile(lambda _: self.ranks.shard or self.stop.received is None, task.batches(split))
            found = evaluate(task, batches, self._run, self.device)
        found = self.ranks.first_says(found)  # or machines that differ in a last bit could disagree on the best
        self._stop_if_asked()  # out here, where the model has its own weights and generators again
        if not sound(task, found):
            raise NumericError(f"step {self.step}: {task.metric} on the {split} split is {found.get(task.metric)}; "
                               "the outputs are not finite, or nothing is asked there")  # fmt: skip
        return found

    def _weights(self) -> dict[str, Tensor]:
        return self.average.tensors if self.average else self.held.state_dict()

    @contextlib.contextmanager
    def _using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other weights and in evaluation mode; after it, as it was."""
        own = self.held.state_dict()
        raw = {name: t.clone() for name, t in own.items() if weights[name].data_ptr() != t.data_ptr()}
        self.model.eval()
        try:
            _copy(own, weights)
            yield
        finally:
            _copy(own, raw)
            self.model.train()

    # ---- checkpoints

    def _save(self) -> None:
        if self.run is None or self.saved == (self.step, self.evaluated):
            return
        content, self.saved = self._content(), (self.step, self.evaluated)
        if not self.ranks.writes:
            return
        path = checkpoint.save(self.run, self.step, content)
        self.events.send("checkpoint", self.step, path=str(path.relative_to(self.run)), sync=True)

    def _content(self) -> Checkpoint:
        whole = self.held.whole
        optim = {WEIGHT + name: t for name, t in whole(self.held.state_dict()).items()}
        optim |= {f"optimizer.{name}": t for name, t in whole(self.optimizer.tensors()).items()}
        if self.average:
            optim |= {f"average.{name}": t for name, t in whole(self.average.tensors).items()}
        if self.carried is not None:
            carried = self.ranks.join_rows(self.carried, self.experiment.train.batch)
            optim |= {f"carried.{n}": t for n, t in zip(names(carried), leaves(carried), strict=True)}
        for rank, state_of_rank in enumerate(self.ranks.all_of(torch.get_rng_state())):
            optim[_rng("cpu", rank)] = state_of_rank
        if self.device.type == "cuda":
            for rank, state_of_rank in enumerate(self.ranks.all_of(torch.cuda.get_rng_state(self.device))):
                optim[_rng("cuda", rank)] = state_of_rank
        state = {name: getattr(self, name) for name in (*_COUNTERS, *_PACE)}
        state["threads"], state["data"] = torch.get_num_threads(), self.data
        return Checkpoint(whole(self.best or self._weights()), optim, state)

    def _restore(self, found: Checkpoint, like: Any) -> None:
        """All but the weights. like: a state of the model, for the names of its leaves."""
        where = shown(found.path or "checkpoint")
        missing = [name for name in _COUNTERS if name not in found.state]
        if missing:
            raise DataError(f"{where}/state.json: no entry {missing[0]!r}; the checkpoint is of another version")
        for name in _COUNTERS:
            setattr(self, name, found.state[name])
        for name in _PACE:  # which the first versions did not keep
            setattr(self, name, found.state.get(name, 0))
        parts: dict[str, dict[str, Tensor]] = {
            "optimizer": {},
            "average": {},
            "carried": {},
            "rng": {},
        }
        for full, t in found.optim.items():
            part, _, name = full.partition(".")
            if part in parts:
                parts[part][name] = t
        self.optimizer.restore(self.held.own(parts["optimizer"]), where)
        if self.best_score is not None:
            self.best = {name: t.to(self.device) for name, t in self.held.own(found.model).items()}
        if self.average and parts["average"]:
            _copy(self.average.tensors, self.held.own(parts["average"]))
        if parts["carried"]:
            saved = iter([parts["carried"][name] for name in names(like)])
            self.carried = self.ranks.own_rows(tree_map(lambda leaf: next(saved).to(self.device), like))
        cpu, cuda = (_rng(kind, self.ranks.rank).removeprefix("rng.") for kind in ("cpu", "cuda"))
        if cpu not in parts["rng"]:  # of fewer ranks
            torch.manual_seed(self._own_seed())
        else:
            torch.set_rng_state(parts["rng"][cpu])
            if self.device.type == "cuda" and cuda in parts["rng"]:
                torch.cuda.set_rng_state(parts["rng"][cuda], self.device)
        self.saved = (self.step, self.evaluated)

    def _own_seed(self) -> int:
        """Of the dropout of a rank that draws its first numbers at this step."""
        own = f"{self.experiment.seed}/{self.ranks.rank}/{self.step}"
        return int.from_bytes(hashlib.sha256(own.encode()).digest()[:8], "little")

    def _stop_if_asked(self) -> None:
        received = self.ranks.largest(self.stop.received or 0)  # by any rank
        if not received:
            return
        self._save()
        name = {1: "the end of the terminal", 2: "Ctrl-C", 15: "SIGTERM"}.get(received, f"signal {received}")
        kept = f"saved in {shown(self.run)}; the same command goes on from there" if self.run else "nothing was saved"
        raise Stopped(received, f"stopped by {name} at step {self.step}; {kept}")


_COUNTERS = ("step", "evaluated", "best_score", "best_metrics", "stale", "tokens", "seconds")
_PACE = ("paced_tokens", "paced_seconds")


def _rng(kind: str, rank: int) -> str:
    """The name in a checkpoint of a rank's generator; rank 0's is that of training by one process."""
    return f"rng.{kind}{rank or ''}"


class Clock:
    """Mean loss and tokens/s of training since the last report, and seconds per step since the start."""

    def __init__(self, training: Training):
        self.first, self.began = training.step, time.monotonic()
        self.tokens, self.seconds = training.tokens, training.seconds
        self.last, self.losses, self.count = self.began, 0.0, 0

    def add(self, loss: float) -> None:
        self.losses, self.count = self.losses + loss, self.count + 1

    def quiet(self) -> float:
        return time.monotonic() - self.last

    def lap(self, training: Training) -> tuple[float, float, float]:
        speed = (training.tokens - self.tokens) / max(training.seconds - self.seconds, 1e-9)
        self.tokens, self.seconds = training.tokens, training.seconds
        self.last, mean = time.monotonic(), self.losses / max(self.count, 1)
        self.losses, self.count = 0.0, 0
        return mean, speed, (self.last - self.began) / max(training.step - self.first, 1)


class Events:
    """Sends events to the log, to TensorBoard and to the caller."""

    def __init__(self, run: Path | None, on_event: Callable[[Event], None] | None, tensorboard: bool):
        self._log = Log(run / "log.jsonl") if run else None
        self._board = TensorBoard(run / "tensorboard") if run and tensorboard else None
        self._call = on_event

    def send(self, event: str, step: int, *, sync: bool = False, **entries: Any) -> None:
        record = {"event": event, "step": step, "time": time.time(), **entries}
        if self._log:
            self._log.write(record, sync=sync)
        if self._board:
            self._board.write(record)
        if self._call:
            self._call(record)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log:
            self._log.close()
        if self._board:
            self._board.close()


def choose_device(name: str) -> torch.device:
    """The device of a name. Raises UsageError for a GPU that is not there: never a silent CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise UsageError(f"device is {name!r}; takes auto, cpu, cuda, cuda:N")
    there = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(number or 0) >= there:
        raise UsageError(f"device {name!r} asked for, {there} CUDA devices found; use --device cpu or auto")
    return torch.device(name)


def peak_memory(device: torch.device) -> int:
    """Bytes: the largest resident size of this process, or what tensors took of a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as status:  # getrusage counts the parent's size in
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
        import sys
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _make(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise DataError(f"{shown(folder)} is a link that leads nowhere or in a circle; expected a directory")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise DataError(f"cannot make the run directory {shown(folder)}: {reason}") from error


def _settle(folder: Path, experiment: Experiment, *, resume: bool, force: bool) -> Result | None:
    """Compare the directory with what is to run: record a new run, or give the result of a finished one."""
    path, result = folder / "experiment.json", folder / "result.json"
    record = experiment.record()
    if not resume:
        if not path.exists() and ((folder / "checkpoints").exists() or result.exists()):
            raise UsageError(f"{shown(folder)} holds something that is not a run; choose another run directory")
        for old in (result, folder / MEASURED, folder / "log.jsonl", path):
            old.unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    elif path.exists():
        found = list(differences(read_json(path), record))
        if found and not force:
            raise UsageError(
                f"{shown(folder)} is a run of another configuration: {'; '.join(found[:10])}; "
                "choose another run directory, start over with resume=False, or go on with force=True"
            )
        if not found and result.exists():
            done, now = read_json(result), data_hash(experiment.task)
            if done.get("data", now) == now:
                return read_result(folder)
            if not force:
                _refuse_other_data(folder, experiment, done, now)
        result.unlink(missing_ok=True)
    write_json(path, record)
    return None


def _refuse_other_data(folder: Path | None, experiment: Experiment, found: Mapping[str, Any], now: str) -> None:
    """found: state.json or result.json. Raises OtherData where it has another hash than the data have now."""
    before = found.get("data", now)
    if before != now:
        raise OtherData(
            f"{shown(folder or '')}: the data of task {experiment.task.name!r} are not those that this run began with "
            f"(hash {before} -> {now}); put them back, choose another run directory, start over with resume=False, or "
            "go on with force=True"
        )


@torch.no_grad()
def _copy(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, t in source.items():
        if to[name].data_ptr() != t.data_ptr():
            to[name].copy_(t)


@contextlib.contextmanager
def _memory_named(training: Training) -> Iterator[None]:
    """Out of memory as one clear line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        text = str(error).split("\n")[0]
        batch = training.experiment.train.batch
        raise ResourceError(
            f"step {training.step}: out of memory: {text[-120:]}; lower train.batch ({batch}), raise train.accumulate"
        ) from error


def _code(error: Exception) -> int:
    return error.code if isinstance(error, StatewiseError) else 1
