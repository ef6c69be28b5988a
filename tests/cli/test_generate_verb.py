"""generate writes what the library writes, letter by letter; a dialogue carries its state; mistakes are one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from statewise.decoding import Sampling, Stop, generate
from statewise.text import load_tokenizer
from statewise.training import load

GREEDY = ["--temperature", "0"]


def text_of(run, prompt: str, tokens: int, **sampling) -> str:
    """What the library writes after the prompt."""
    (model, _), tokenizer = load(run), load_tokenizer(run)
    begin = [] if tokenizer.end is None else [tokenizer.end]
    ids = torch.tensor([[*begin, *tokenizer.encode(prompt).tolist()]])
    stop = Stop(() if tokenizer.end is None else (tokenizer.end,))
    rng = torch.Generator().manual_seed(sampling.pop("seed", 0))
    found = generate(model, ids, tokens, Sampling(**sampling), rng=rng, stop=stop)
    return tokenizer.decode(found.ids[0, : found.lengths[0]].tolist())


def dialogue(run, lines: list[str], tokens: int) -> list[str]:
    """What the model writes after each line, having read all before: on ids, for text may hold half a character."""
    (model, _), tokenizer = load(run), load_tokenizer(run)
    ids, said = [] if tokenizer.end is None else [tokenizer.end], []
    for line in lines:
        ids += tokenizer.encode(line).tolist()
        found = generate(model, torch.tensor([ids]), tokens).ids[0].tolist()
        assert tokenizer.end not in found
        ids += found
        said.append(tokenizer.decode(found))
    return said


def test_it_writes_what_the_library_writes(runs, call):
    said = call("generate", runs["text"], "--prompt", "the ", "--tokens", "30", *GREEDY)
    assert (said.code, said.err) == (0, "")
    assert said.out == "the " + text_of(runs["text"], "the ", 30, temperature=0.0) + "\n"
    args = [
        "--tokens",
        "20",
        "--temperature",
        "1.2",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--min-p",
        "0.001",
        "--seed",
        "7",
    ]
    said = call("generate", runs["text"], "--prompt", "fox", *args)
    want = text_of(runs["text"], "fox", 20, temperature=1.2, top_k=50, top_p=0.9, min_p=0.001, seed=7)
    assert said.out == "fox" + want + "\n"
    assert call("generate", runs["text"], "--tokens", "5").code == 0  # without a prompt


def test_a_stop_is_not_shown(runs, call):
    whole = call("generate", runs["text"], "--prompt", "the ", "--tokens", "60", "--seed", "3").out
    stop = whole[10:12]
    said = call("generate", runs["text"], "--prompt", "the ", "--tokens", "60", "--seed", "3", "--stop", stop)
    assert said.out == "the " + whole[4:].split(stop)[0] + "\n"


def test_beams_are_listed_with_their_scores(runs, call):
    said = call("generate", runs["text"], "--prompt", "a", "--tokens", "4", "--beams", "6", "--groups", "2")
    scores = [float(line.split("\t")[0]) for line in said.out.split("\n") if "\ta" in line]
    assert said.code == 0 and len(scores) == 6 and max(scores) < 0


def test_a_draft_keeps_the_text(runs, call):
    args = ["--prompt", "the ", "--tokens", "20", *GREEDY]
    plain = call("generate", runs["text"], *args)
    said = call("generate", runs["text"], *args, "--draft", runs["text"])
    assert said.out == plain.out and "drafted ids were kept" in said.err


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_rounded_weights_write_too_and_draft(runs, call, monkeypatch, kind):
    from statewise.cli import generate as verb

    asked, loaded = [], verb.loaded
    monkeypatch.setattr(verb, "loaded", lambda run, rounded: asked.append(rounded) or loaded(run, rounded=rounded))
    said = call("generate", runs["text"], "--prompt", "the ", "--tokens", "5", f"--{kind}", "--draft", runs["text"])
    assert said.code == 0 and asked == [kind, kind]
    said = call("generate", runs["text"], "--int8", "--bfloat16")
    assert said.code == 2 and "choose one" in said.err


def test_a_dialogue_carries_its_state_and_can_be_saved(runs, call, tmp_path):
    args = ["--interactive", "--tokens", "8", *GREEDY]
    both = call("generate", runs["text"], *args, stdin=b"the quick\nbrown\n\n")
    assert (both.code, both.err) == (0, "")
    first, second, third = dialogue(runs["text"], ["the quick", "\nbrown", ""], 8)
    assert both.out == f"{first}\n{second}\n{third}\n"
    place = tmp_path / "talk.state"
    one = call(
        "generate", runs["text"], *args, stdin=f"the quick\n/save {place}\n/reset\nthe quick\n/quit\nno\n".encode()
    )
    assert one.out == f"{first}\n{first}\n" and place.exists()
    two = call("generate", runs["text"], *args, stdin=f"/load {place}\nbrown\n".encode())
    assert two.out == f"{second}\n"
    slash = call("generate", runs["text"], *args, stdin=b"//a\n")
    assert slash.out == text_of(runs["text"], "/a", 8, temperature=0.0) + "\n"


def test_a_mistake_in_a_line_does_not_end_the_dialogue(runs, call, tmp_path):
    (tmp_path / "junk").write_bytes(b"junk")
    other = runs["files"] / "adding.state"
    lines = f"/lod x\n/load {tmp_path / 'none'}\n/load {tmp_path / 'junk'}\n/load {other}\n/save\n".encode()
    lines += b"not \xff UTF-8\nfox\n"
    said = call("generate", runs["text"], "--interactive", "--tokens", "4", *GREEDY, stdin=lines)
    errors = said.err.splitlines()
    assert said.code == 0 and len(errors) == 6 and all(line.startswith("error: ") for line in errors)
    assert said.out == text_of(runs["text"], "fox", 4, temperature=0.0) + "\n"


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["--temperatur", "1"], 2, "near: --temperature"),
        (["--temperature", "-1"], 2, "temperature is -1"),
        (["--top-p", "1.5"], 2, "top_p is 1.5"),
        (["--tokens", "-1"], 2, "--tokens"),
        (["--tokens", "many"], 2, "whole number"),
        (["--beams", "4", "--groups", "3"], 2, "multiple of groups"),
        (["--beams", "4", "--interactive"], 2, "choose one"),
        (["--draft", "nowhere"], 3, "not a run"),
        (["--groups", "2"], 2, "--groups is for --beams"),
        (["--beams", "2", "--top-k", "5"], 2, "--top-k is for drawing"),
        (["--ahead", "2"], 2, "--ahead is for --draft"),
    ],
)
def test_mistakes_are_one_line(runs, call, args, code, words):
    said = call("generate", runs["text"], *args)
    assert said.code == code and said.out == "" and len(said.err.splitlines()) == 1 and words in said.err


def test_a_run_that_is_not_of_text_is_refused(runs, call):
    for run in ("adding", "copy"):
        said = call("generate", runs[run])
        assert said.code == 2 and "not text" in said.err and len(said.err.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_with_130(runs):
    command = [sys.executable, "-m", "statewise", "generate", str(runs["text"]), "--interactive"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"the\n")
    process.stdin.flush()
    process.stdout.read(1)  # it is at work
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 130 and not err


def test_export_says_what_it_wrote(runs, call, tmp_path):
    said = call("export", runs["text"], "--format", "torch", "--out", tmp_path / "m.pt2")
    assert said.code == 0 and "ids (B,)" in said.out and (tmp_path / "m.pt2").stat().st_size > 1000
    wrong = call("export", runs["text"], "--format", "torch", "--out", tmp_path / "no" / "m.pt2")
    assert wrong.code == 3 and len(wrong.err.splitlines()) == 1
