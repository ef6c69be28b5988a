"""statewise stream: a trained run answers standard input, line by line, in constant memory."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .parse import Positional

Item = TypeVar("Item")

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core import RecurrentLayer
    from ..tasks.units import Units

WORDS = "stopped by a signal after the last line answered"
LIMIT = 1 << 20  # bytes of a line
AHEAD = "ahead"  # note in a saved state: the logits for the byte that comes next
RECENT = "recent"  # another: the last steps, from which the inputs of a forecast are made


@dataclass(frozen=True)
class Options:
    """Answer each line of standard input with one line, at once, in constant memory.

    A model of numbers takes one step per line: the columns of the data it was trained on, in their units, with commas
    or spaces. It answers with the likeliest class and its probability, or with its numbers, in the units of the data
    too: the targets; or the forecast values, all leads of the first column, then of the next. A forecast takes nan for
    a missing value. An empty line starts a new stream.
    A model of ids takes one or more ids per line. A model of bytes takes text: a line is fed byte by byte, its end
    included, and answered with the likeliest next byte, its probability, and the bits per byte that the line cost.
    """

    run: Positional[Path]
    """A run of `statewise train`; or silero_vad, a published detector of speech."""
    audio: Positional[Path | None] = None
    """For silero_vad: a WAV file, 16 kHz mono 16 bit. Without one, standard input is raw samples of that kind."""
    format: Literal["auto", "numbers", "ids", "text", "json"] = "auto"
    """Of the lines. json: a list of numbers or ids, or a string for text; the answers are JSON objects."""
    load_state: Path | None = None
    """Go on from a saved state."""
    save_state: Path | None = None
    """Save the state after the last line answered, also when stopped by a signal."""
    fast: bool = False
    """Take each step as one compiled call: several times as fast, for seconds before the first answer and 200 MB of
    memory."""
    skip_bad: bool = False
    """Report a bad line and go on, instead of stopping with exit status 3."""


class Streamer:
    """A model, its state and how its lines read."""

    def __init__(self, model: RecurrentLayer[Any], name: str, units: Units, format: str):
        from ..core import UsageError

        text = units.x_vocab == units.y_width == 256 and units.kind == "classification"
        fits = ("text", "json") if text else ("ids", "json") if units.x_vocab else ("numbers", "json")
        if format not in ("auto", *fits) and not (text and format == "ids"):
            raise UsageError(f"--format {format}: a model of task {name!r} takes {', '.join(fits)}")
        self.model, self.units, self.bytes = model, units, text
        self.format = fits[0] if format == "auto" else format
        self.state = model.initial_state(1)
        self.step: Callable[[Tensor, Any], tuple[Tensor, Any]] = model.step
        self.ahead: Tensor | None = None  # logits for the next byte
        self.recent: np.ndarray | None = None  # what units.encode carries from step to step

    def answer(self, line: bytes) -> str:
        """One line in, one line out. Raises ValueError with the reason for a line that cannot be taken."""
        if not line.strip() and not (self.bytes and self.format == "text"):
            self.state, self.ahead, self.recent = self.model.initial_state(1), None, None
            return ""
        inputs, recent = self.read(line)
        state, ahead, bits, counted = self.state, self.ahead, 0.0, 0
        for x in inputs:
            if self.bytes and ahead is not None:
                bits, counted = bits - float(ahead.log_softmax(-1)[0, int(x)]) / math.log(2), counted + 1
            ahead, state = self.step(x, state)
        if ahead is None:
            raise ValueError("holds nothing")
        if not bool(ahead.isfinite().all()):
            raise ValueError("the answer is not finite; the state before this line is kept")
        self.state, self.ahead, self.recent = state, ahead, recent
        return self.write(ahead[0].float(), bits / counted if counted else None)

    def record(self, x: Tensor) -> None:
        """Take steps as one compiled call each, which is made ready now, with an input of a step."""
        from ..serving import RecordedStep
        from .compiling import telling

        recorded = RecordedStep(self.model)
        with telling(sys.stderr):
            recorded(x, self.model.initial_state(1))
        self.step = recorded

    def recorded(self, source: Iterable[bytes]) -> Iterator[bytes]:
        """The lines; `record` at the first that can be taken, so that a wrong one is answered before it."""
        ready = False
        for line in source:
            if not ready:
                with suppress(ValueError, IndexError):  # a line that holds nothing
                    self.record(self.read(line)[0][0])
                    ready = True
            yield line

    def read(self, line: bytes) -> tuple[list[Tensor], np.ndarray | None]:
        """The inputs of step, (1, D) or (1,), that a line holds, and what the next line's need of it."""
        import torch

        text = line.decode("utf-8", "surrogateescape")
        found: Any = parse_json(text) if self.format == "json" else text
        if self.bytes and isinstance(found, str) and self.format != "ids":
            raw = line if self.format == "text" else found.encode("utf-8", "surrogateescape")
            return list(torch.tensor(list(raw)).view(-1, 1)), None
        values = numbers(found)
        if self.units.x_vocab is None:
            x, recent = self.units.encode(values, self.recent)
            return [torch.from_numpy(x)[None].to(next(self.model.parameters()).dtype)], recent
        for value in values:
            if not 0 <= value < self.units.x_vocab or value != int(value):
                raise ValueError(f"id {value:g}; expected whole numbers from 0 to {self.units.x_vocab - 1}")
        return list(torch.tensor([int(v) for v in values]).view(-1, 1)), None

    def write(self, out: Tensor, bits: float | None) -> str:
        """The answer out (E,) as a line."""
        if self.units.kind == "regression":
            values = [float(f"{v:.7g}") for v in self.units.decode(out.tolist(), self.recent)]
            return json.dumps({"y": values}) if self.format == "json" else ",".join(f"{v:.7g}" for v in values)
        p = out.softmax(-1)
        best = int(p.argmax())
        if self.format == "json":
            found = {"class": self.units.classes[best] if self.units.classes else best, "probability": float(p[best])}
            if self.bytes:
                return json.dumps({**found, "bits_per_byte": bits})
            return json.dumps({**found, "probabilities": [round(v, 6) for v in p.tolist()]})
        shown = repr(chr(best)) if self.bytes and self.format == "text" else str(best)
        shown = self.units.classes[best] if self.units.classes else shown
        cost = f" {bits:.4f}" if bits is not None else " -" if self.bytes else ""
        return f"{shown} {float(p[best]):.4f}{cost}"


def run(options: Options) -> int:
    from ..core import UsageError
    from .speech import NAME

    if str(options.run) == NAME and not options.run.exists():
        return run_speech(options)
    if options.audio is not None:
        raise UsageError(f"{str(options.audio)!r}: only {NAME} takes a file; a run reads standard input")
    return run_lines(options)


def run_speech(options: Options) -> int:
    """A line for every 32 ms: the seconds at its start and the probability of speech."""
    import torch

    from ..core import load_state, save_state
    from ..core.files import check_writable
    from .speech import RATE, detector, frames

    if options.save_state is not None:
        check_writable(options.save_state)
    model = detector()
    state = load_state(options.load_state, model) if options.load_state else model.initial_state(1)
    try:
        with torch.inference_mode(), closing(until_stopped(frames(options.audio))) as source:
            for number, frame in enumerate(source):
                y, state = model.step(frame, state)
                print(f"{number * model.width / RATE:.3f} {float(y):.4f}", flush=True)
    finally:
        if options.save_state is not None:
            save_state(options.save_state, model, state, weights=True)
    return 0


def run_lines(options: Options) -> int:
    """A line for every line of standard input."""
    import numpy as np
    import torch

    from ..core import DataError, load_state, save_state
    from ..core.files import check_writable, read_tensors
    from ..tasks.units import kept_units, units_of
    from ..training import load

    if options.save_state is not None:
        check_writable(options.save_state)
    model, experiment = load(options.run)
    units = kept_units(options.run) or units_of(experiment.task)
    streamer = Streamer(model.eval(), experiment.task.name, units, options.format)
    if options.load_state is not None:
        streamer.state = load_state(options.load_state, model)
        notes = json.loads(read_tensors(options.load_state, allow_nonfinite=True)[1].get("extra", "{}"))
        streamer.ahead = torch.tensor([notes[AHEAD]]) if notes.get(AHEAD) else None
        streamer.recent = np.array(notes[RECENT]) if notes.get(RECENT) else None
    try:
        given = streamer.recorded(lines()) if options.fast else lines()
        with torch.inference_mode(), closing(until_stopped(given)) as source:
            for number, line in enumerate(source, 1):
                try:
                    if len(line) > LIMIT:
                        raise ValueError(f"longer than {LIMIT} bytes")
                    answer = streamer.answer(line)
                except ValueError as error:
                    if not options.skip_bad:
                        raise DataError(
                            f"line {number} of the input: {error}; --skip-bad goes on after such lines"
                        ) from None
                    print(f"skipped line {number} of the input: {error}", file=sys.stderr, flush=True)
                    continue
                print(answer, flush=True)
    finally:
        if options.save_state is not None:
            ahead = streamer.ahead[0].tolist() if streamer.bytes and streamer.ahead is not None else None
            recent = streamer.recent.tolist() if streamer.recent is not None else None
            save_state(options.save_state, model, streamer.state, weights=True, **{AHEAD: ahead, RECENT: recent})
    return 0


def lines() -> Iterator[bytes]:
    """Lines of standard input as they come; what stands beyond LIMIT in one is read and dropped."""
    source = sys.stdin.buffer
    while line := source.readline(LIMIT + 1):
        rest = line
        while len(rest) > LIMIT and not rest.endswith(b"\n"):
            rest = source.readline(LIMIT + 1)
        yield line


def numbers(found: Any) -> list[float]:
    """Numbers of a text or of a JSON list."""
    parts = found.replace(",", " ").replace(";", " ").split() if isinstance(found, str) else found
    if isinstance(parts, dict):
        parts = parts.get("x")
    if not isinstance(parts, list):
        parts = [parts]
    values = []
    for place, part in enumerate(parts, 1):
        try:
            if isinstance(part, bool) or part is None:
                raise TypeError
            values.append(float(part))
        except (TypeError, ValueError):
            hint = "" if any(map(_is_number, parts)) else ", and no line of names (tail -n +2 leaves one out)"
            raise ValueError(f"place {place} is {str(part)[:40]!r}; expected a number{hint}") from None
    return values


def _is_number(part: Any) -> bool:
    with suppress(TypeError, ValueError):
        return not isinstance(part, bool) and math.isfinite(float(part))
    return False


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{text.strip()[:40]!r} is not JSON") from None


def until_stopped(items: Iterable[Item]) -> Generator[Item]:
    """The items, until SIGTERM, Ctrl-C or a closed terminal: at once while waiting for an item, else when the one in
    hand is done with, so that no state holds an item that was not answered. Raises Stopped. Close it to get the old
    handlers back."""
    from ..training.signals import Stopped, handled

    asked, waiting = 0, False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked = number
        if waiting:
            raise Stopped(number, WORDS)

    if threading.current_thread() is not threading.main_thread():  # Python takes no handlers there
        yield from items
        return
    before = {number: signal.signal(number, stop) for number in handled()}
    source = iter(items)
    try:
        while True:
            waiting = True
            if asked:
                raise Stopped(asked, WORDS)
            try:
                item = next(source)
            except StopIteration:
                return
            waiting = False
            yield item
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
