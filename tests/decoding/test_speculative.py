"""A draft changes the speed and nothing else."""

from __future__ import annotations

import pytest
import torch
from tiny import enumerated, tiny

from statewise.decoding import GREEDY, Sampling, Speculative, Stop, generate, speculate

PROMPT = torch.tensor([2, 0, 1])
LAYERS = [("gru", {}), ("mamba2", {}), ("attention", {"window": 32, "heads": 2})]


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("layer, args", LAYERS, ids=[name for name, _ in LAYERS])
def test_greedy_is_that_of_the_model_alone(layer, args, ahead):
    model, draft = tiny(layer, vocab=7, **args), tiny(vocab=7, seed=9)
    x, lengths = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(0)), torch.tensor([5, 1, 3, 4])
    want = generate(model, x, 21, lengths=lengths)
    found = speculate(model, x, 21, Speculative(draft, ahead), lengths=lengths)
    assert torch.equal(found.ids, want.ids) and torch.equal(found.lengths, want.lengths)
    torch.testing.assert_close(found.scores, want.scores)
    assert (found.kept < found.drafted).any()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=3), Sampling(repetition_penalty=1.5)], ids=str)
def test_a_model_that_drafts_for_itself_is_always_kept(sampling):
    model, x = tiny(vocab=7), torch.randint(7, (3, 5))
    rng = torch.Generator().manual_seed(0)
    found = speculate(model, x, 40, Speculative(model, 4, sampling), rng=rng)
    assert torch.equal(found.kept, found.drafted) and (found.drafted >= 32).all()


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """How many standard deviations sum (n - e)^2 / e is above its mean, over cells that are expected 5 times."""
    expected = p * counts.sum()
    rest = expected < 5
    counts = torch.cat([counts[~rest], counts[rest].sum()[None]]).double()
    expected = torch.cat([expected[~rest], expected[rest].sum()[None]]).clamp_min(1e-9)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


CASES = [Sampling(), Sampling(0.7), Sampling(top_k=2), Sampling(top_p=0.8), Sampling(repetition_penalty=1.7)]


def target(model, sampling: Sampling, steps: int) -> torch.Tensor:
    """The exact probability of each continuation when every id is drawn by `sampling`."""
    every, _ = enumerated(model, PROMPT, steps)
    whole = torch.cat([PROMPT.expand(len(every), -1), every], 1)
    logits, p = model(whole)[0].detach(), torch.ones(len(every), dtype=torch.float64)
    for n in range(steps):
        at = len(PROMPT) + n
        seen = torch.zeros(len(every), model.out_width, dtype=torch.bool).scatter(1, whole[:, :at], True)
        p = p * sampling.probabilities(logits[:, at - 1], seen).gather(1, every[:, n, None])[:, 0]
    return p


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_the_distribution_is_that_of_the_model_alone(sampling, ahead):
    model, draft = tiny(vocab=3, seed=1, sharp=1.5), tiny(vocab=3, seed=2, sharp=1.5)
    p, rows, steps = target(model, sampling, 4), 10_000, 4
    assert abs(float(p.sum()) - 1) < 1e-9
    rng = torch.Generator().manual_seed(1)
    for how in (Speculative(draft, ahead, sampling), *[sampling] * (ahead == 1)):  # the plain way knows no `ahead`
        ids = generate(model, PROMPT.expand(rows, -1), steps, how, rng=rng).ids
        counts = (ids @ 3 ** torch.arange(steps - 1, -1, -1)).bincount(minlength=3**steps)
        assert chi_square(counts, p) < 4, how


def test_the_chi_square_sees_a_wrong_distribution():
    """Drawing from the draft, or accepting whatever it drafts, is found out."""
    model, draft = tiny(vocab=3, seed=1, sharp=1.5), tiny(vocab=3, seed=2, sharp=1.5)
    ids = generate(draft, PROMPT.expand(10_000, -1), 4, Sampling(), rng=torch.Generator().manual_seed(1)).ids
    counts = (ids @ 3 ** torch.arange(3, -1, -1)).bincount(minlength=81)
    assert chi_square(counts, target(model, Sampling(), 4)) > 50


def test_a_stop_inside_a_round_ends_the_row_there():
    model, draft = tiny(vocab=7, sharp=0.5), tiny(vocab=7, seed=9)
    x = torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(0))
    letters = lambda ids: "".join("abcdefg"[i] for i in ids)
    free = generate(model, x, 30)
    text = letters(free.ids[0].tolist())
    for stop in (Stop(ids=(3, 5)), Stop(strings=(text[7:10],), decode=letters)):
        want, found = generate(model, x, 30, stop=stop), speculate(model, x, 30, Speculative(draft, 4), stop=stop)
        assert torch.equal(found.ids, want.ids) and torch.equal(found.lengths, want.lengths)
        torch.testing.assert_close(found.scores, want.scores)


def test_each_row_may_have_its_own_generator():
    model, x = tiny(vocab=7), torch.randint(7, (3, 4))
    how, rngs = (
        Speculative(tiny(vocab=7, seed=4), 3, Sampling()),
        lambda: [torch.Generator().manual_seed(i) for i in range(3)],
    )
    both = generate(model, x, 15, how, rng=rngs())
    for row in range(3):
        assert torch.equal(generate(model, x[row : row + 1], 15, how, rng=rngs()[row : row + 1]).ids[0], both.ids[row])
