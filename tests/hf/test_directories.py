"""Models as directories of safetensors and JSON, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from statewise import cli, hf
from statewise.core import DataError, UsageError, read_tensors, write_tensors
from statewise.models import LanguageModel, Stack, TokenModel
from statewise.text import BpeTokenizer, ByteTokenizer, Tokenizer, train_bpe

HYBRID = LanguageModel(
    "gated_delta_net,window_attention(window=4)@a", width=16, depth=4, tied=False, args={"heads": 2}, dropout=0.1
)
STATES = LanguageModel("s5", width=8, depth=1)
TEXTS = ["In the beginning", "naïve café, 日本", " spaces  and\nlines\t", "it's 42", ""]


def built(description: LanguageModel, vocab: int = 11) -> TokenModel:
    return description.build(x_vocab=vocab, y_width=vocab).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("description", [HYBRID, STATES, LanguageModel("mamba2", args={"dt_limits": (0.0, 9.0)})])
def test_what_is_read_is_what_was_written(description: LanguageModel, dtype: torch.dtype, tmp_path: Path):
    model = built(description)
    model = {torch.float64: model.double, torch.bfloat16: model.bfloat16}.get(dtype, model.float)()
    hf.save_pretrained(model, description, tmp_path / "new" / "place")
    before = torch.get_rng_state()
    again = hf.from_pretrained(tmp_path / "new" / "place")
    assert torch.equal(torch.get_rng_state(), before)
    assert not again.training and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again.parameters(), model.parameters()))
    assert torch.equal(again(ids(2, 9))[0], model(ids(2, 9))[0])
    assert sorted(file.name for file in (tmp_path / "new" / "place").iterdir()) == ["config.json", "model.safetensors"]


def test_the_mixin_writes_and_reads_the_same_directories(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("jinja2")  # of the model card
    from statewise.hf.on_hub import HubModel

    model = HubModel(STATES, 11).eval()
    model.save_pretrained(tmp_path)
    for again in (HubModel.from_pretrained(str(tmp_path)), hf.from_pretrained(tmp_path)):
        assert torch.equal(again(ids(2, 9))[0], model(ids(2, 9))[0])
    plain = built(HYBRID)
    hf.save_pretrained(plain, HYBRID, tmp_path)
    assert torch.equal(HubModel.from_pretrained(str(tmp_path))(ids(1, 5))[0], plain(ids(1, 5))[0])


def test_a_description_of_another_model_is_refused(tmp_path: Path):
    model = built(STATES)
    for other in (HYBRID, LanguageModel("s5", width=8, depth=2)):
        with pytest.raises(DataError, match="save_pretrained"):
            hf.save_pretrained(model, other, tmp_path / "x")
    with pytest.raises(UsageError, match="Stack"):
        hf.save_pretrained(model, Stack("s5", width=8, depth=1), tmp_path / "x")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def changed(folder: Path, **values: Any) -> Path:
    hf.save_pretrained(built(STATES), STATES, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(model_type="mamba"), "from_transformers"),
        (dict(format=99), "99"),
        (dict(description=3), "expected the fields"),
        (dict(description={"layer": "s5", "widht": 8}), "near: width"),
        (dict(description={"layer": "s6", "width": 8}), "s6"),
        (dict(description={"layer": 5, "width": 8}), "description"),
        (dict(description={"layer": "s5", "width": 9, "depth": 1}), "another model"),
        (dict(vocab_size=12), "another model"),
        (dict(vocab_size="many"), "vocab_size"),
    ],
)
def test_broken_configurations_are_one_line(wrong: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises((DataError, UsageError), match=words) as caught:
        hf.from_pretrained(changed(tmp_path, **wrong))
    assert "\n" not in str(caught.value)


def test_broken_tensors_are_one_line(tmp_path: Path):
    file = changed(tmp_path) / "model.safetensors"
    tensors, _ = read_tensors(file)
    write_tensors(file, {name.removeprefix("model."): t for name, t in tensors.items()})
    with pytest.raises(DataError, match=r"begin with 'model\.'"):
        hf.from_pretrained(tmp_path)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(DataError, match="pickles are not read"):
        hf.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="nothing is fetched"):
        hf.from_pretrained("somebody/something")


def tokenizers() -> list[Tokenizer]:
    return [ByteTokenizer(), ByteTokenizer(end=None), train_bpe([text.encode() for text in TEXTS * 3], 280)]


@pytest.mark.parametrize("which", range(3))
def test_a_tokenizer_gives_the_same_ids_and_texts(which: int, tmp_path: Path):
    engine = pytest.importorskip("tokenizers").Tokenizer
    ours = tokenizers()[which]
    hf.save_tokenizer(ours, tmp_path)
    theirs = engine.from_file(str(tmp_path / "tokenizer.json"))
    first = [] if ours.end is None else [ours.end]
    assert theirs.get_vocab_size() == ours.vocab
    for text in TEXTS:
        found = theirs.encode(text).ids
        assert found == [*first, *ours.encode(text).tolist()]
        assert theirs.decode(found) == text
    assert isinstance(ours, BpeTokenizer) == (which == 2)


def test_export_of_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "a.txt"
    text.write_text("ab " * 400 + "\n\n" + "cd " * 400)
    run, out = tmp_path / "run", tmp_path / "out"
    train = ["train", "text_file", "--data", str(text), "--layer", "min_gru", "--width", "4", "--depth", "1"]
    train += ["--set", "train.steps=2", "task.length=16", "--run", str(run), "--device", "cpu"]
    assert cli.main(train) == 0, capsys.readouterr().err
    assert cli.main(["export", str(run), "--format", "hf"]) == 2
    assert "--out DIR" in capsys.readouterr().err
    assert cli.main(["export", str(run), "--format", "hf", "--out", str(out)]) == 0, capsys.readouterr().err
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert capsys.readouterr().out.strip() == f"{out}: {', '.join(names)}"
    from statewise.training import load

    model, _ = load(run)
    assert torch.equal(hf.from_pretrained(out)(ids(2, 7))[0], model(ids(2, 7))[0])
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == model.vocab - 1
