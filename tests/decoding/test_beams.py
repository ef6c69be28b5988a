"""Beams against enumeration, against themselves in groups, and against transformers."""

from __future__ import annotations

import pytest
import torch
from tiny import enumerated, tiny

from statewise.decoding import Beam, Beams, Stop, beam_search, generate, read
from statewise.models import from_transformers

PROMPT = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_as_wide_as_everything_finds_everything(seed):
    model = tiny(vocab=3, seed=seed)
    every, logp = enumerated(model, PROMPT, 4)
    found = beam_search(model, read(model, PROMPT[None]), 4, Beam(81))
    assert torch.equal(found.ids[0], every[logp.argsort(descending=True)])
    torch.testing.assert_close(found.scores[0], logp.sort(descending=True).values)
    best = generate(model, PROMPT[None], 4, Beam(27))
    assert torch.equal(best.ids[0], every[logp.argmax()])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_with_a_stop_and_every_text_the_best_by_score_is_found(length_penalty):
    model = tiny(vocab=3, seed=1)
    every, _ = enumerated(model, PROMPT, 4)
    texts = set()
    for row in every.tolist():
        n = row.index(2) + 1 if 2 in row else 4
        texts.add(tuple(row[:n]))
    scores = {}
    for text in texts:
        ids, logp = enumerated(model, PROMPT, len(text))
        scores[text] = float(logp[(ids == torch.tensor(text)).all(1)]) / len(text) ** length_penalty
    best = max(scores, key=scores.__getitem__)
    found = generate(model, PROMPT[None], 4, Beam(len(texts), length_penalty), stop=Stop(ids=(2,)))
    assert tuple(found.ids[0, : found.lengths[0]].tolist()) == best


def test_one_beam_is_greedy_and_more_are_not_worse():
    for seed in range(4):
        model = tiny(vocab=7, seed=seed, sharp=1.0)
        greedy = generate(model, PROMPT[None], 12)
        one, many = (generate(model, PROMPT[None], 12, Beam(k)) for k in (1, 16))
        assert torch.equal(one.ids, greedy.ids)
        torch.testing.assert_close(one.scores, greedy.scores)
        assert many.scores >= greedy.scores - 1e-9


def test_scores_are_those_of_the_model():
    model = tiny(vocab=5)
    found = beam_search(model, read(model, PROMPT[None]), 6, Beam(6, groups=3, penalty=2.0), stop=Stop(ids=(1,)))
    for ids, n, score in zip(found.ids[0], found.lengths[0], found.scores[0], strict=True):
        whole = torch.cat([PROMPT, ids[:n]])[None]
        logp = model(whole[:, :-1])[0].log_softmax(-1)[0, len(PROMPT) - 1 :].gather(1, ids[:n, None]).sum()
        torch.testing.assert_close(score, logp.detach())


def diverse(model, penalty: float, groups: int, beams: int = 6, ngram: int | None = None, steps: int = 8) -> Beams:
    return beam_search(model, read(model, PROMPT[None]), steps, Beam(beams, 1.0, groups, penalty, ngram))


@pytest.mark.parametrize("ngram", [None, 1, 2])
def test_one_group_is_beam_search_and_so_is_the_first_of_many(ngram):
    model = tiny(vocab=7)
    plain, alone = diverse(model, 0.0, 1, 2), diverse(model, 3.0, 1, 2, ngram)
    many = diverse(model, 3.0, 3, 6, ngram)
    for got in (alone, many):
        assert torch.equal(got.ids[:, :2], plain.ids)
        torch.testing.assert_close(got.scores[:, :2], plain.scores)


def test_without_a_penalty_the_groups_are_equal_and_with_one_they_differ():
    model = tiny(vocab=7, sharp=1.0)
    same = diverse(model, 0.0, 3).ids.view(3, 2, -1)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    for ngram in (None, 1, 3):
        distinct = [len(diverse(model, p, 3, ngram=ngram).ids[0].unique(dim=0)) for p in (0.0, 5.0)]
        assert distinct[0] < distinct[1], (ngram, distinct)


def by_hand(model, groups: int, penalty: float, steps: int, ngram: int | None) -> list[list[int]]:
    """Diverse beam search with one beam per group, as a loop over lists."""
    texts: list[list[int]] = [[] for _ in range(groups)]
    for t in range(steps):
        for g in range(groups):
            whole = torch.tensor([[*PROMPT.tolist(), *texts[g]]])
            z = model(whole)[0][0, -1].log_softmax(-1).detach()
            for other in texts[:g]:
                for id in range(len(z)):
                    if ngram is None:
                        z[id] -= penalty * (other[t] == id)
                    else:
                        gram = [*texts[g], id][-ngram:]
                        if len(gram) == ngram:
                            z[id] -= penalty * sum(other[i : i + ngram] == gram for i in range(len(other) - ngram + 1))
            texts[g].append(int(z.argmax()))
    return texts


@pytest.mark.parametrize("ngram", [None, 1, 2, 3])
def test_diversity_by_hand(ngram):
    model = tiny(vocab=5, sharp=1.0)
    for penalty in (0.3, 1.5):
        found = diverse(model, penalty, 5, 5, ngram)
        assert found.ids[0].tolist() == by_hand(model, 5, penalty, 8, ngram)


def random_mamba(seed: int):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.in_proj.weight.mul_(20)
            block.mixer.out_proj.weight.mul_(20)
        model.backbone.embeddings.weight.mul_(5)
    return model


@pytest.mark.parametrize("length_penalty, eos", [(1.0, None), (0.0, 5), (1.0, 5), (2.0, 7), (-1.0, 7)])
def test_beams_equal_those_of_transformers_token_for_token(length_penalty, eos):
    ended = 0
    for seed in range(4):
        theirs = random_mamba(seed)
        ours = from_transformers(theirs)
        x = torch.randint(23, (3, 6), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = theirs.generate(
                x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False, num_beams=4,
                length_penalty=length_penalty, eos_token_id=eos, pad_token_id=0 if eos is None else eos,
                num_return_sequences=4, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        stop = Stop(ids=() if eos is None else (eos,))
        found = beam_search(ours, read(ours, x), 12, Beam(4, length_penalty), stop=stop)
        got = found.ids.flatten(0, 1)
        assert torch.equal(got, want.sequences[:, 6:])
        scores = (found.scores / found.lengths**length_penalty).flatten()
        torch.testing.assert_close(scores, want.sequences_scores, rtol=1e-4, atol=1e-4)
        best = generate(ours, x, 12, Beam(4, length_penalty), stop=stop)
        assert torch.equal(best.ids, got[::4, : best.ids.shape[1]])
        ended += int((found.lengths < 12).sum())
    assert eos is None or length_penalty > 1 or ended > 0


def test_greedy_equals_that_of_transformers_token_for_token():
    for seed in range(3):
        theirs, x = random_mamba(seed), torch.randint(23, (2, 5), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=30, do_sample=False)
        got = generate(from_transformers(theirs), x, 30).ids
        assert torch.equal(got, want[:, 5:]) and len(got.unique()) > 3
