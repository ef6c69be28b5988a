"""Our language models under lm-evaluation-harness: python -m statewise.hf.in_lm_eval run --model statewise ..."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from torch import Tensor

from ..core import RecurrentLayer, UsageError, select, wide
from ..core.files import shown
from ..decoding import GREEDY, Position, Sampling, Stop, generate, read
from ..decoding.position import SPAN, check_model
from ..text import Tokenizer, load_tokenizer
from ..text.tokenizer import NAME
from ..training import load

T = TypeVar("T")


@register_model("statewise")
class HarnessModel(TemplateLM):
    """A model of ids and its tokenizer, for `lm_eval.simple_evaluate(model=HarnessModel.of_run("runs/notes"), ...)`.

    Every text begins as a document in training does: behind the tokenizer's end, where it has one. Each context is read
    once, however many continuations go on from it: they start from copies of its state. Texts may be of any length:
    memory is that of the states and of SPAN ids.
    By name, model="statewise", the arguments are those of `of_run`. Raises UsageError for a model that is not of ids.
    """

    def __init__(self, model: RecurrentLayer[Any], tokenizer: Tokenizer, *, batch_size: int = 16, seed: int = 0):
        super().__init__()
        check_model(model)
        if type(batch_size) is not int or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
        if model.vocab != tokenizer.vocab:
            raise UsageError(f"the model has {model.vocab} ids, the tokenizer {tokenizer.vocab}")
        self.model, self.ids, self.batch_size = model.eval(), tokenizer, batch_size
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.rng = torch.Generator(self._device).manual_seed(seed)
        self.begin: list[int] = [] if tokenizer.end is None else [tokenizer.end]

    @classmethod
    def of_run(
        cls, run: str | os.PathLike[str], *, batch_size: int | str = 16, device: str = "cpu", seed: int = 0,
        max_batch_size: int | None = None,
    ) -> HarnessModel:  # fmt: skip
        """The best weights of a run of `statewise train` on text. max_batch_size: the harness says it too; unused.

        Raises DataError as `statewise.training.load`, UsageError for a run that is not of text.
        """
        if not (Path(run) / NAME).is_file():
            raise UsageError(f"{shown(run)} has no tokenizer; expected a run of `statewise train text` or `text_file`")
        size = int(batch_size) if str(batch_size).isdecimal() else 16  # "auto"
        if not torch.cuda.is_available() and device.startswith("cuda"):
            device = "cpu"  # the harness asks for cuda where nothing was said
        return cls(load(run)[0].to(device), load_tokenizer(Path(run)), batch_size=size, seed=seed)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> Any:
        beside = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls.of_run(**{**beside, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- what the harness asks for

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that nothing stands before: the end, or else a new line."""
        return (self.begin or self.tok_encode("\n"))[0]

    @property
    def tokenizer_name(self) -> str:
        return f"statewise-{self.ids.kind}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.ids.encode(string).tolist()  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): log p(continuation | context), and whether greedy writes it."""
        after: dict[tuple[int, ...], list[int]] = {}
        for i, (_, ids_before, _) in enumerate(requests):
            begin = [] if ids_before[:1] == self.begin else self.begin
            after.setdefault((*begin, *ids_before), []).append(i)
        answers: dict[int, tuple[float, bool]] = {}
        for contexts in _parts(sorted(after, key=len), self.batch_size):
            ids, lengths = self._padded(contexts)
            at = read(self.model, ids, lengths=lengths)
            asked = [(row, i) for row, context in enumerate(contexts) for i in after[context]]
            for some in _parts(asked, self.batch_size):
                forks = select(at, torch.tensor([row for row, _ in some], device=self._device))
                for (_, i), answer in zip(some, self._follow(forks, [requests[i][2] for _, i in some]), strict=True):
                    answers[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: of every id, given all before it."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        found: dict[int, float] = {}
        for some in _parts(sorted(range(len(texts)), key=lambda i: len(texts[i])), self.batch_size):
            first = torch.full((len(some), 1), self.eot_token_id, device=self._device)
            for i, (score, _) in zip(
                some, self._follow(read(self.model, first), [texts[i] for i in some]), strict=True
            ):
                found[i] = score
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, score)
        return [found[i] for i in range(len(texts))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of its stop strings."""
        return [self._write(request.args[0], request.args[1]) for request in requests]

    # ---- how

    def _write(self, context: str, how: Mapping[str, Any]) -> str:
        until = how.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        drawn = Sampling(how.get("temperature") or 1.0, how.get("top_k"), how.get("top_p"))
        ids = [*self.begin, *self.tok_encode(context)] or [self.eot_token_id]
        written = generate(
            self.model, torch.tensor([ids], device=self._device), int(how.get("max_gen_toks", 256)),
            drawn if how.get("do_sample") else GREEDY, rng=self.rng,
            stop=Stop(tuple(self.begin), tuple(until), self.ids.decode),
        )  # fmt: skip
        text = self.ids.decode(written.ids[0, : int(written.lengths[0])].tolist())
        return text[: min((text.index(s) for s in until if s in text), default=len(text))]

    @torch.no_grad()
    def _follow(self, at: Position, texts: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Of the ids that go on from each row: the sum of log-probabilities, and whether each is the likeliest."""
        ids, lengths = self._padded(texts)
        before, state = at.logits, at.state
        total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        likeliest = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)
        for start in range(0, ids.shape[1], SPAN):
            part = ids[:, start : start + SPAN]
            count = (lengths - start).clamp(0, part.shape[1])
            y, state = self.model(part, state, lengths=count)
            logits = torch.cat([before[:, None], y[:, :-1]], 1)
            there = torch.arange(part.shape[1], device=ids.device) < count[:, None]
            each = logits.to(wide(logits.dtype)).log_softmax(-1).gather(2, part[..., None])[..., 0]
            total += each.masked_fill(~there, 0).double().sum(1)
            likeliest &= ((logits.argmax(-1) == part) | ~there).all(1)
            before = torch.where(count[:, None] > 0, y[rows, (count - 1).clamp_min(0)], before)
        return list(zip(total.tolist(), likeliest.tolist(), strict=True))

    def _padded(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids (B, T), each row's at its beginning, and how many they are (B,)."""
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64, device=self._device)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor(text, dtype=torch.int64)
        return ids, lengths


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
