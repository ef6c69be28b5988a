"""Our models as models of transformers: generate, Trainer, pipeline, with a recurrent state as the cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise import hf
from statewise.core import UsageError
from statewise.decoding import Beam, Stop, generate
from statewise.models import LanguageModel, TokenModel
from statewise.text import ByteTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB = 13
MODELS = {
    "hybrid": LanguageModel("mamba2,window_attention(window=5,heads=2)", width=16, depth=2, args={"value": 8}),
    "delta": LanguageModel("gated_delta_net", width=16, depth=2, tied=False),
    "lstm": LanguageModel("lstm", width=12, depth=1, mlp=0.0, tied=False),
}


def built(name: str, vocab: int = VOCAB) -> TokenModel:
    """A float64 model whose logits say something."""
    torch.manual_seed(3)
    model = MODELS[name].build(x_vocab=vocab, y_width=vocab).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "log" not in key:
                parameter.mul_(3)
    return model


def saved(name: str, folder: Path) -> Any:
    """The same by AutoModelForCausalLM."""
    hf.register()
    hf.register()
    hf.save_pretrained(built(name), MODELS[name], folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def ids(*shape: int, seed: int = 1, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_auto_classes_read_what_we_wrote_and_we_what_they_write(name: str, tmp_path: Path):
    ours, theirs = built(name), saved(name, tmp_path / "a")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (
        VOCAB, MODELS[name].width, MODELS[name].depth,
    )  # fmt: skip
    close(theirs(ids(2, 9)).logits, ours(ids(2, 9))[0])
    theirs.save_pretrained(tmp_path / "b")
    again = hf.from_pretrained(tmp_path / "b").state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[key], t) for key, t in ours.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_warm_cache_goes_on_with_many_ids_as_in_one_pass(name: str):
    model, x = hf.wrap(built(name)), ids(3, 20)
    want, cache, parts = model(x).logits, None, []
    for start, stop in ((0, 7), (7, 8), (8, 15), (15, 20)):
        found = model(x[:, start:stop], past_key_values=cache, use_cache=True)
        parts.append(found.logits)
        cache = found.past_key_values
        assert cache.get_seq_length() == stop
    close(torch.cat(parts, 1), want)
    close(model(x, logits_to_keep=2).logits, want[:, -2:])
    assert model(x, use_cache=False).past_key_values is None
    assert model.train()(x).past_key_values is None


@pytest.mark.parametrize("name", MODELS)
def test_padding_anywhere_changes_nothing(name: str):
    model, x = hf.wrap(built(name)), ids(4, 12)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[1, :5] = 0  # left
    mask[2, 8:] = 0  # right
    mask[3, [0, 4, 5, 11]] = 0  # anywhere
    found = model(x, attention_mask=mask, use_cache=True)
    for row in range(4):
        kept = mask[row].bool()
        alone = model(x[row, kept][None], use_cache=True)
        close(found.logits[row, kept], alone.logits[0])
        more = ids(1, 3, seed=9)
        after = copy.copy(found.past_key_values)
        after.batch_select_indices(torch.tensor([row]))
        close(
            model(more, past_key_values=after).logits,
            model(more, past_key_values=alone.past_key_values).logits,
        )
    close(found.logits[2, 8:], found.logits[2, 7].expand(4, -1))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_ours_token_for_token(name: str, tmp_path: Path):
    model, ours, x = saved(name, tmp_path), built(name), ids(5, 6)
    got = model.generate(x, max_new_tokens=25, do_sample=False)
    want = generate(ours, x, 25).ids
    assert torch.equal(got[:, 6:], want)
    assert torch.equal(model.generate(x, max_new_tokens=25, do_sample=False, use_cache=False), got)
    assert len(want.unique()) > 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length_penalty, end", [(1.0, None), (0.3, 2), (2.0, 5)])
def test_beams_are_ours_token_for_token(name: str, length_penalty: float, end: int | None):
    ours, x = built(name), ids(3, 6)
    model = hf.wrap(ours)
    stop = Stop() if end is None else Stop((end,))
    for beams in (2, 5):
        got = model.generate(
            x, max_new_tokens=12, num_beams=beams, do_sample=False, length_penalty=length_penalty, early_stopping=False,
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        want = generate(ours, x, 12, Beam(beams, length_penalty=length_penalty), stop=stop)
        assert torch.equal(got[:, 6:], want.ids)


def test_left_padded_prompts_write_what_they_write_alone():
    ours = built("hybrid")
    model, lengths = hf.wrap(ours), [3, 7, 5]
    x, mask = ids(3, 7), torch.zeros(3, 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 7 - length :] = 1
    for beams in (1, 3):
        got = model.generate(x, attention_mask=mask, max_new_tokens=9, num_beams=beams, do_sample=False)
        for row, length in enumerate(lengths):
            alone = generate(ours, x[row : row + 1, 7 - length :], 9, Beam(beams)).ids
            assert torch.equal(got[row : row + 1, 7:], alone)


def test_generate_goes_on_from_a_cache():
    model, x = hf.wrap(built("hybrid")), ids(2, 9)
    want = model.generate(x, max_new_tokens=8, do_sample=False)
    cache = model(x[:, :5], use_cache=True).past_key_values
    got = model.generate(x, max_new_tokens=8, do_sample=False, past_key_values=copy.copy(cache))
    assert torch.equal(got, want) and cache.get_seq_length() == 5
    empty = type(cache)()
    chunks = model.generate(x, max_new_tokens=8, do_sample=False, prefill_chunk_size=4, past_key_values=empty)
    assert torch.equal(chunks, want)
    several = model.generate(x, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert several.shape == (6, 13)


def test_what_cannot_be_is_one_line(tmp_path: Path):
    model, x = hf.wrap(built("lstm")), ids(2, 5)
    for given, words in (
        (dict(inputs_embeds=torch.zeros(2, 5, 12)), "input_ids"),
        (dict(input_ids=x, attention_mask=torch.ones(2, 1, 5, 5)), "attention_mask"),
        (dict(input_ids=x, attention_mask=torch.ones(2, 3)), "attention_mask"),
        (dict(input_ids=x, past_key_values=transformers.DynamicCache()), "DynamicCache"),
    ):
        with pytest.raises(UsageError, match=words):
            model(**given)
    with pytest.raises(UsageError, match="description"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="Residual"):
        hf.wrap(built("lstm").body)
    with pytest.raises(ValueError, match=r"assisted|stateful"):
        model.generate(x, max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_the_loss_is_that_of_the_next_id():
    ours, x = built("delta"), ids(3, 8)
    model, labels = hf.wrap(ours), x.clone()
    labels[1, 3:] = -100
    loss = model(x, labels=labels).loss
    want = torch.nn.functional.cross_entropy(ours(x)[0][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(loss.float(), want)
    before = [p.grad for p in ours.parameters()]
    loss.backward()
    assert before == [None] * len(before) and all(p.grad is not None for p in ours.parameters())


def test_trainer_trains_evaluates_and_saves(tmp_path: Path):
    pytest.importorskip("accelerate")
    hf.register()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("statewise", vocab_size=5, description={"layer": "gru", "width": 16})
    )
    rows = [{"input_ids": (torch.arange(12) + i) % 5} for i in range(32)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_checkpointing=True, logging_strategy="no",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows[:9])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before > 1.2 and after < 0.2, (before, after)
    assert model.model.body.recompute
    trainer.save_model(str(tmp_path / "saved"))
    ours = hf.from_pretrained(tmp_path / "saved")
    assert generate(ours, torch.tensor([[3, 4, 0]]), 6).ids.tolist() == [[1, 2, 3, 4, 0, 1]]


def test_a_pipeline_writes_text(tmp_path: Path):
    pytest.importorskip("tokenizers")
    hf.register()
    described, tokenizer = MODELS["hybrid"], ByteTokenizer()
    ours = described.build(x_vocab=256, y_width=256).eval()
    hf.save_pretrained(ours, described, tmp_path, tokenizer=tokenizer)
    writer = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["In the", "And God said,"]
    found = writer(prompts, max_new_tokens=7, do_sample=False, batch_size=2, return_full_text=False)
    for prompt, texts in zip(prompts, found, strict=True):
        x = torch.tensor([[tokenizer.end, *tokenizer.encode(prompt).tolist()]])
        want = generate(ours, x, 7, stop=Stop((255,))).ids[0].tolist()
        assert texts[0]["generated_text"] == tokenizer.decode([i for i in want if i != 255])


@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_write_the_same_when_asked_for(name: str):
    torch.manual_seed(0)
    model = hf.wrap(MODELS[name].build(x_vocab=VOCAB, y_width=VOCAB)).eval()
    given = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ways = [dict(), dict(num_beams=3), dict(attention_mask=mask)]
    want = [model.generate(ids(2, 5), **given, **way) for way in ways]
    assert not model._fast
    keys = model.state_dict().keys()
    model.stream()
    step = model._fast[0].step
    assert model.state_dict().keys() == keys
    for way, expected in zip(ways, want, strict=True):
        assert torch.equal(model.generate(ids(2, 5), **given, **way), expected)
    assert step.programs and all(not isinstance(p, str) for p in step.programs.values())
    found = model(ids(2, 5))
    step.programs.clear()
    again = model(ids(2, 1), past_key_values=found.past_key_values)  # with gradients, as it always was
    assert again.logits.requires_grad and not step.programs
    with pytest.raises(UsageError, match="float64"):
        hf.wrap(built(name)).stream()
