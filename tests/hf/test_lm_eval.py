"""lm-evaluation-harness on our models: its log-likelihoods are those of one pass over all ids, on local files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from statewise.core import RecurrentLayer, UsageError
from statewise.models import LanguageModel
from statewise.tasks import TextFile
from statewise.text import ByteTokenizer, Tokenizer, load_tokenizer
from statewise.training import Experiment, Train, fit, load

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'statewise[lm-eval]'")
pytestmark = pytest.mark.timeout(300)  # its imports alone take long where the machine is shared

BOOK = "in the beginning was the word and the word was with the light and the darkness\n" * 30
DOCUMENTS = [
    {"start": "in the beginning was", "ends": ["the word", "a fish", "lightning"], "right": 0},
    {"start": "and the word was", "ends": ["with the light", "naïve"], "right": 0},
    {"start": "in the beginning was", "ends": ["the darkness", "the word and the word was with"], "right": 1},
    {"start": "x", "ends": ["y", "the light and the darkness " * 4], "right": 1},
]
CHOICE = """
task: choose_the_end
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
ROLLING = """
task: bits_of_starts
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{start}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
metadata: {version: 1}
"""


class Asked(NamedTuple):
    args: tuple[Any, ...]


def model(layer: str = "mamba2,window_attention(window=5,heads=2)", vocab: int = 256) -> RecurrentLayer[Any]:
    torch.manual_seed(3)
    made = LanguageModel(layer, width=16, depth=2).build(x_vocab=vocab, y_width=vocab).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 2:
                p.mul_(3)
    return made


@torch.no_grad()
def directly(
    made: RecurrentLayer[Any], begin: Sequence[int], context: list[int], text: list[int]
) -> tuple[float, bool]:
    """By one pass over all ids of one row, with no state kept."""
    ids = torch.tensor([*begin, *context, *text])
    z = made(ids[None, :-1])[0][0, -len(text) :].double()
    each = z.log_softmax(-1).gather(1, ids[-len(text) :, None])
    return float(each.sum()), bool((z.argmax(-1) == ids[-len(text) :]).all())


def harness(made: RecurrentLayer[Any], tokenizer: Tokenizer | None = None, **options: Any) -> Any:
    from statewise.hf.in_lm_eval import HarnessModel

    return HarnessModel(made, tokenizer or ByteTokenizer(), **options)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("end", [255, None])
def test_log_likelihoods_are_those_of_one_pass(batch, end, monkeypatch):
    from statewise.hf import in_lm_eval

    monkeypatch.setattr(in_lm_eval, "SPAN", 7)  # continuations in several pieces
    made, tokenizer = model(), ByteTokenizer(end=end)
    begin = [] if end is None else [end]
    pairs = [(d["start"], " " + text) for d in DOCUMENTS for text in d["ends"]] + [("", "word"), ("the ", "end")]
    found = harness(made, tokenizer, batch_size=batch).loglikelihood([Asked(pair) for pair in pairs], disable_tqdm=True)
    assert len(found) == len(pairs)
    for (context, text), (score, greedy) in zip(pairs, found, strict=True):
        spaces = len(context) - len(context.rstrip())  # which the harness gives to the continuation
        context, text = context[: len(context) - spaces], " " * spaces + text
        first = begin or ([10] if not context else [])
        want = directly(made, first, list(context.encode()), list(text.encode()))
        assert score == pytest.approx(want[0], rel=1e-4) and greedy == want[1]


def test_what_greedy_writes_is_told():
    made = model()
    lm = harness(made)
    written = lm.generate_until([Asked(("the word", {"until": [], "max_gen_toks": 3}))])[0]
    ids = list(written.encode()) if "\ufffd" not in written else None
    state, best, at = None, [], torch.tensor([[255, *b"the word"]])
    for _ in range(3):
        z, state = made(at, state)
        best.append(int(z[0, -1].argmax()))
        at = torch.tensor([best[-1:]])
    assert ids in (None, best)
    (told,) = lm._loglikelihood_tokens([(("", ""), list(b"the word"), best)])
    other = lm._loglikelihood_tokens([(("", ""), list(b"the word"), [*best[:2], (best[2] + 1) % 255])])
    assert told[1] and not other[0][1]


def test_texts_end_before_their_stop_string():
    made = model()
    whole = harness(made).generate_until([Asked(("a", {"until": [], "max_gen_toks": 30}))])[0]
    stop = whole[3:5]
    cut = harness(made).generate_until([Asked(("a", {"until": stop, "max_gen_toks": 30}))])[0]
    assert len(whole) > 5 and cut == whole[: whole.index(stop)]
    drawn = {"until": [], "do_sample": True, "temperature": 2.0, "max_gen_toks": 20}
    assert len({harness(made, seed=seed).generate_until([Asked(("a", drawn))])[0] for seed in range(3)}) > 1


@pytest.mark.parametrize("end", [255, None])
def test_whole_texts_are_scored_from_their_first_id(end):
    made, texts = model("gru"), ["a", "some longer text " * 9, "another", ""]
    found = harness(made, ByteTokenizer(end=end), batch_size=3).loglikelihood_rolling([Asked((t,)) for t in texts])
    for text, score in zip(texts, found, strict=True):
        ids = list(text.encode())
        assert score == pytest.approx(directly(made, [end or 10], [], ids)[0] if ids else 0.0, rel=1e-4)


def test_contexts_are_read_once(monkeypatch):
    from statewise.decoding import read
    from statewise.hf import in_lm_eval

    seen: list[int] = []

    def watched(made, ids, *, lengths=None):
        seen.append(len(ids))
        return read(made, ids, lengths=lengths)

    monkeypatch.setattr(in_lm_eval, "read", watched)
    pairs = [Asked((start, end)) for start in ("one", "two") for end in (" a", " bb", " ccc")]
    harness(model()).loglikelihood(pairs, disable_tqdm=True)
    assert seen == [2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    (place / "book.txt").write_text(BOOK)
    task = TextFile(path=str(place / "book.txt"), length=16)
    fit(Experiment(task, LanguageModel("min_gru", width=16, depth=1), Train(steps=60, batch=8)), place / "run")
    return place / "run"


def test_simple_evaluate_on_local_files(run, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    import statewise.hf.in_lm_eval  # noqa: F401  its name is known from now on

    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(text % file)
    found = lm_eval.simple_evaluate(
        model="statewise", model_args={"run": str(run)}, tasks=["choose_the_end", "bits_of_starts"], batch_size=2,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    made, tokenizer = load(run)[0], load_tokenizer(run)
    code = lambda text: tokenizer.encode(text).tolist()
    right = 0
    for sample in found["samples"]["choose_the_end"]:
        document = sample["doc"]
        want = [directly(made, [255], code(document["start"]), code(" " + end)) for end in document["ends"]]
        got = [(float(score), bool(greedy)) for score, greedy in sample["filtered_resps"]]
        assert [score for score, _ in got] == pytest.approx([score for score, _ in want], rel=1e-4)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
        right += max(range(len(want)), key=lambda i: want[i][0]) == document["right"]
    assert found["results"]["choose_the_end"]["acc,none"] == right / len(DOCUMENTS)
    starts = [document["start"] for document in DOCUMENTS]
    nats = sum(directly(made, [255], [], code(start))[0] for start in starts)
    bits = -nats / sum(map(len, starts)) / torch.log(torch.tensor(2.0)).item()
    assert found["results"]["bits_of_starts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


def test_mistakes_are_named(run, tmp_path):
    from statewise.hf.in_lm_eval import HarnessModel

    with pytest.raises(UsageError, match="has no tokenizer"):
        HarnessModel.of_run(tmp_path)
    with pytest.raises(UsageError, match="the model has 9 ids, the tokenizer 256"):
        harness(model(vocab=9))
    with pytest.raises(UsageError, match="batch_size is 0"):
        harness(model(), batch_size=0)
