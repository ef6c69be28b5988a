"""statewise generate: a run that was trained on text writes on."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parse import Positional, Repeated

if TYPE_CHECKING:
    import torch

    from ..core import RecurrentLayer
    from ..decoding import Beam, Position, Sampling, Speculative
    from ..serving import Kind
    from ..text import Tokenizer

COMMANDS = "/reset, /save FILE, /load FILE, /quit; a line that begins with // is text that begins with /"
LARGE = 5_000_000  # parameters from which reading them is what takes the time
NOTES = ("pending", "seen")  # of a saved state: ids that are yet to be read, ids that occurred


@dataclass(frozen=True)
class Options:
    """Write on from a prompt, letter by letter as it comes, in constant memory.

    With --interactive every line of standard input is read and continued, and the state is carried from line to line:
    the model has read what the screen shows. An empty line goes on writing. /reset begins anew, /save FILE and
    /load FILE keep the state and take it back, /quit or the end of the input ends.
    """

    run: Positional[Path]
    """A run of `statewise train` on text."""
    prompt: str = ""
    """What to write on from. Without one, a document begins."""
    tokens: int = 200
    """At most so many ids are written, for each line with --interactive."""
    temperature: float = 0.8
    """0 takes the likeliest id each time, 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw among the k likeliest ids; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest ids that have this much probability together."""
    min_p: float = 0.0
    """Draw among ids with at least this share of the probability of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes ids that occurred less likely."""
    stop: Repeated[str] = ()
    """End where the text holds this; as often as needed."""
    seed: int = 0
    """Of what is drawn."""
    beams: int = 0
    """Beam search of this width instead of drawing."""
    groups: int = 1
    """Diverse beam search: the beams in so many groups, every text printed with its log-probability."""
    penalty: float = 0.5
    """What a group pays for ids that groups before it chose."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length^this."""
    draft: Path | None = None
    """A smaller run with the same tokenizer that drafts: the same distribution, perhaps faster."""
    ahead: int = 4
    """Ids that the draft proposes at once."""
    interactive: bool = False
    """Read lines and continue each of them."""
    int8: bool = False
    """Weights rounded to 8 bits: less memory, on a CPU faster."""
    bfloat16: bool = False
    """Weights rounded to 16 bits: half of the memory, on a CPU faster, nearly the same numbers."""


def run(options: Options) -> int:
    import torch

    from ..core import UsageError
    from ..decoding import Sampling

    if options.tokens < 0:
        raise UsageError(f"--tokens {options.tokens}; expected at least 0")
    special = [f"--{name}" for name in ("beams", "draft") if getattr(options, name)]
    if len(special) > 1 or (special and options.interactive):
        raise UsageError(f"{' and '.join([*special, *(['--interactive'] if options.interactive else [])])}: choose one")
    if options.int8 and options.bfloat16:
        raise UsageError("--int8 and --bfloat16: choose one")
    _useful(options)
    how = chosen(options)
    model, tokenizer = loaded(options.run, rounded=rounded(options))
    writer = Writer(model, tokenizer, options, torch.Generator().manual_seed(options.seed))
    if options.interactive:
        return writer.converse()
    if options.draft is not None:
        return writer.speculate(drafted(options, tokenizer))
    if not isinstance(how, Sampling):
        return writer.search(how)
    writer.read(options.prompt)
    sys.stdout.write(options.prompt)
    writer.write()
    sys.stdout.write("\n")
    return 0


def _useful(options: Options) -> None:
    """Raise UsageError for a flag that would do nothing."""
    from ..core import UsageError

    drawing = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    beams, draft = ("groups", "penalty", "length_penalty"), ("ahead",)
    idle: list[tuple[tuple[str, ...], str]] = (
        [(drawing, "is for drawing, --beams does not draw")] if options.beams else [(beams, "is for --beams")]
    )
    idle += [] if options.draft else [(draft, "is for --draft")]
    for names, why in idle:
        for name in names:
            if getattr(options, name) != getattr(Options, name):
                raise UsageError(f"--{name.replace('_', '-')} {why}; leave it out")


def chosen(options: Options) -> Sampling | Beam:
    """What the flags ask for. Raises UsageError for a number out of range."""
    from ..decoding import Beam, Sampling

    if options.beams:
        return Beam(options.beams, options.length_penalty, options.groups, options.penalty)
    return Sampling(
        options.temperature, options.top_k or None, options.top_p, options.min_p or None, options.repetition_penalty
    )


def rounded(options: Options) -> Kind | None:
    return "int8" if options.int8 else "bfloat16" if options.bfloat16 else None


def loaded(place: Path, *, rounded: Kind | None = None) -> tuple[RecurrentLayer[Any], Tokenizer]:
    """The model of a run, and its tokenizer. Raises DataError for no run, UsageError for one that is not of text."""
    from ..core import UsageError
    from ..core.files import shown
    from ..text import load_tokenizer
    from ..training import load

    model, experiment = load(place)
    if model.vocab is None or model.out_width != model.vocab or not (place / "tokenizer.json").exists():
        raise UsageError(
            f"{shown(place)} is a run of task {experiment.task.name!r}, which is not text; expected one of "
            "`statewise train text` or `statewise train text_file`"
        )
    if rounded is not None or sum(p.numel() for p in model.parameters()) > LARGE:
        from ..serving import for_streaming

        model = for_streaming(model, weights=rounded or "float32")
    return model, load_tokenizer(place)


def drafted(options: Options, tokenizer: Tokenizer) -> Speculative:
    from ..core import UsageError
    from ..decoding import Sampling, Speculative

    assert options.draft is not None
    small, other = loaded(options.draft, rounded=rounded(options))
    if list(other.pieces) != list(tokenizer.pieces):
        raise UsageError(f"--draft {options.draft}: its tokenizer is another than that of {options.run}")
    sampling = chosen(options)
    assert isinstance(sampling, Sampling)
    return Speculative(small, options.ahead, sampling)


class Writer:
    """A model, where its text stands, and how it goes on."""

    def __init__(self, model: RecurrentLayer[Any], tokenizer: Tokenizer, options: Options, rng: torch.Generator):
        from ..decoding import Stop

        self.model, self.tokenizer, self.options, self.rng = model, tokenizer, options, rng
        ids = () if tokenizer.end is None else (tokenizer.end,)
        self.stop = Stop(ids, options.stop, tokenizer.decode)
        self.reset()

    def reset(self) -> None:
        self.at: Position | None = None
        self.pending: list[int] = [] if self.tokenizer.end is None else [self.tokenizer.end]  # a document begins

    def read(self, text: str) -> None:
        """Ids to be read before the next is written."""
        self.pending += self.tokenizer.encode(text.encode("utf-8", "surrogateescape")).tolist()

    def prompt(self) -> torch.Tensor:
        import torch

        return torch.tensor([self.pending or self.tokenizer.encode("\n").tolist()])

    def write(self) -> None:
        """Print what comes, as it comes."""
        from ..decoding import Sampling, TextStream, read, write

        self.at, self.pending = read(self.model, self.prompt(), self.at), []
        how, shown = chosen(self.options), TextStream(self.tokenizer.decode, self.options.stop)
        assert isinstance(how, Sampling)
        for token in write(self.model, self.at, self.options.tokens, how, rng=self.rng, stop=self.stop):
            sys.stdout.write(shown.add(int(token.ids)))
            sys.stdout.flush()
            self.at, self.pending = token.at, token.ids.tolist()
            if int(token.ids) == self.tokenizer.end:
                self.reset()
        sys.stdout.write(shown.rest())

    def search(self, how: Beam) -> int:
        """Print every text that the beams found."""
        from ..decoding import beam_search, read

        self.read(self.options.prompt)
        at = read(self.model, self.prompt())
        found = beam_search(self.model, at, self.options.tokens, how, stop=self.stop)
        for ids, length, score in zip(*(part[0].tolist() for part in found), strict=True):
            if score > float("-inf"):
                print(f"{score:.4f}\t{self.options.prompt}{self._text(ids[:length])}")
        return 0

    def speculate(self, how: Speculative) -> int:
        """Print a text that a draft helped with, when it is done."""
        from ..decoding import speculate

        self.read(self.options.prompt)
        done = speculate(self.model, self.prompt(), self.options.tokens, how, rng=self.rng, stop=self.stop)
        print(self.options.prompt + self._text(done.ids[0].tolist()))
        print(f"{int(done.kept)} of {int(done.drafted)} drafted ids were kept", file=sys.stderr)
        return 0

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids)
        return text[: min((text.index(s) for s in self.options.stop if s in text), default=len(text))]

    def converse(self) -> int:
        """Lines in, what follows them out."""
        from ..core import StatewiseError

        self.read(self.options.prompt)
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are a mistake of their line
        if sys.stdin.isatty():
            print(f"a line is read and continued; {COMMANDS}", file=sys.stderr)
        for line in sys.stdin:
            text = line.rstrip("\r\n")
            if text.startswith("/") and not text.startswith("//"):
                try:
                    if text.split()[0] == "/quit":
                        break
                    self._command(text)
                except StatewiseError as error:  # a mistake in a line does not end the dialogue
                    print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            try:
                if text:
                    self.read("\n" * (self.at is not None) + text.removeprefix("/" * text.startswith("//")))
            except StatewiseError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            self.write()
            sys.stdout.write("\n")
            sys.stdout.flush()
        return 0

    def _command(self, line: str) -> None:
        from ..core import UsageError

        word, _, place = line.partition(" ")
        if word == "/reset" and not place:
            self.reset()
        elif word == "/save" and place:
            self._save(Path(place.strip()))
        elif word == "/load" and place:
            self._load(Path(place.strip()))
        else:
            raise UsageError(f"{line.strip()!r}; known: {COMMANDS}")

    def _save(self, place: Path) -> None:
        from ..core import save_state

        state = self.model.initial_state(1) if self.at is None else self.at.state
        seen = [] if self.at is None else self.at.seen[0].nonzero()[:, 0].tolist()
        save_state(place, self.model, state, weights=True, **dict(zip(NOTES, (self.pending, seen), strict=True)))

    def _load(self, place: Path) -> None:
        import torch

        from ..core import DataError, load_state
        from ..core.files import read_tensors, shown
        from ..decoding import Position

        state = load_state(place, self.model)
        notes = json.loads(read_tensors(place, allow_nonfinite=True)[1].get("extra", "{}"))
        vocab = self.tokenizer.vocab
        for note in NOTES:
            ids = notes.get(note)
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab for i in ids):
                raise DataError(f"{shown(place)}: a state, but not of a text; expected a file of /save")
        seen = torch.zeros(1, vocab, dtype=torch.bool)
        seen[0, notes["seen"]] = True
        self.at, self.pending = Position(torch.zeros(1, vocab), seen, state), notes["pending"]
