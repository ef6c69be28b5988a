"""Ids after ids: greedy and drawn, alone and in batches, with stops, and nothing that grows."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from tiny import tiny

from statewise.core import NumericError, UsageError, leaves, nbytes, select
from statewise.decoding import (
    GREEDY,
    Beam,
    PrefixCache,
    Sampling,
    Speculative,
    Stop,
    Token,
    advance,
    draw,
    generate,
    read,
    write,
)
from statewise.decoding import position as position_module
from statewise.models import Block, LanguageModel, Stack, TokenModel
from statewise.models.stack import Residual


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hybrid() -> TokenModel:
    """A recurrence, then attention."""
    torch.manual_seed(3)
    one, two = (LanguageModel(n, width=16, depth=1).build(x_vocab=9, y_width=9) for n in ("mamba", "window_attention"))
    blocks: list[Block] = [*one.body.blocks, *two.body.blocks]  # type: ignore[list-item]
    return TokenModel(Residual(one.body.embed, blocks, one.body.norm, None), None).double().eval()


MODELS = {
    "gru": lambda: tiny(vocab=9),
    "mamba2": lambda: tiny("mamba2", vocab=9),
    "attention": lambda: tiny("attention", vocab=9, window=64, heads=2),
    "hybrid": hybrid,
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_argmax_of_forward_again_and_again(name):
    model, x = MODELS[name](), torch.randint(9, (3, 4), generator=generator())
    want = x
    with torch.no_grad():
        for _ in range(12):
            want = torch.cat([want, model(want)[0][:, -1:].argmax(-1)], 1)
    found = generate(model, x, 12)
    assert torch.equal(found.ids, want[:, 4:])
    logp = model(want[:, :-1])[0].log_softmax(-1)[:, 3:].gather(2, want[:, 4:, None])[..., 0].sum(1)
    torch.testing.assert_close(found.scores, logp.detach())
    assert found.lengths.tolist() == [12] * 3
    assert generate(model, x, 0).ids.shape == (3, 0)
    assert torch.equal(generate(model, x, 12, Sampling(top_k=1), rng=generator()).ids, found.ids)


@pytest.mark.parametrize("how", [GREEDY, Sampling(0.9), Beam(3), Beam(4, groups=2), "speculative"], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_prompts_is_each_alone(name, how):
    model, prompts = MODELS[name](), [[1, 2, 3, 4, 5], [7], [8, 8, 0]]
    if how == "speculative":
        how = Speculative(tiny(vocab=9, seed=5), 3, Sampling(0.9))
    ids, lengths = torch.full((3, 5), 6), torch.tensor([5, 1, 3])
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    stop = Stop(ids=(2,))
    both = generate(model, ids, 10, how, rng=[generator(i) for i in range(3)], lengths=lengths, stop=stop)
    for row, prompt in enumerate(prompts):
        alone = generate(model, torch.tensor([prompt]), 10, how, rng=[generator(row)], stop=stop)
        n = int(alone.lengths[0])
        assert both.lengths[row] == n and torch.equal(both.ids[row, :n], alone.ids[0, :n])
        assert (both.ids[row, n:] == 2).all()  # padding
        torch.testing.assert_close(both.scores[row], alone.scores[0])


def test_a_long_prompt_is_read_in_spans(monkeypatch):
    model = tiny(vocab=9)
    x, lengths = torch.randint(9, (3, 50), generator=generator()), torch.tensor([50, 7, 21])
    monkeypatch.setattr(position_module, "SPAN", 7)
    for given in (None, lengths):
        at = read(model, x, lengths=given)
        y, state = model(x, lengths=given)
        ends = torch.full((3,), 50) if given is None else given
        torch.testing.assert_close(at.logits, y[torch.arange(3), ends - 1].detach())
        torch.testing.assert_close(at.state, tuple(s.detach() for s in state))
        for row, end in enumerate(ends.tolist()):
            assert at.seen[row].nonzero()[:, 0].tolist() == x[row, :end].unique().tolist()


def test_reading_goes_on_from_a_position():
    model, x = tiny(vocab=9), torch.randint(9, (2, 12), generator=generator())
    whole, parts = read(model, x), advance(model, x[:, 11], read(model, x[:, 5:11], read(model, x[:, :5])))
    torch.testing.assert_close(parts.logits, whole.logits)
    assert torch.equal(parts.seen, whole.seen)


def test_a_fork_is_a_row_chosen_twice():
    model = tiny(vocab=9)
    at = select(read(model, torch.tensor([[1, 2], [3, 4]])), torch.tensor([1, 1, 0]))
    tokens = [token.ids for token in write(model, at, 8, Sampling(), rng=[generator(i) for i in range(3)])]
    alone = generate(model, torch.tensor([[3, 4]]), 8, Sampling(), rng=[generator(1)])
    assert torch.equal(torch.stack(tokens, 1)[1], alone.ids[0])


# ---- distributions


def test_drawing_follows_the_weights():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(p.expand(40_000, -1), generator()).bincount(minlength=6) / 40_000
    assert (drawn[p == 0] == 0).all()
    assert (drawn - p).abs().max() < 0.01
    many = draw(torch.tensor([[1.0, 0.0]]).expand(1000, -1), generator())
    assert (many == 0).all()


LOGITS = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]]).log()
NONE = torch.zeros(1, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "sampling, want",
    [
        (Sampling(), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (Sampling(0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 0.4, 0, 0.25, 0]),
        (Sampling(top_p=0.39), [0, 0.4, 0, 0, 0]),
        (Sampling(top_p=0.41), [0, 0.4, 0, 0.25, 0]),
        (Sampling(top_p=0.8), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(top_p=0.99), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0, 0]),
        (Sampling(min_p=0.49), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(top_k=3, top_p=0.7), [0, 0.4, 0, 0.25, 0]),  # of what top_k left: 0.47 + 0.29
        (Sampling(0.5), [0.01, 0.16, 0.0025, 0.0625, 0.04]),
    ],
    ids=str,
)
def test_cuts_on_a_known_distribution(sampling, want):
    p = sampling.probabilities(LOGITS, NONE)[0]
    want = torch.tensor(want) / sum(want)
    torch.testing.assert_close(p, want)


def test_repetition_penalty_by_hand():
    z, seen = torch.tensor([[2.0, -1.0, 2.0, -1.0]]), torch.tensor([[True, True, False, False]])
    p = Sampling(repetition_penalty=2.0).probabilities(z, seen)
    torch.testing.assert_close(p, torch.tensor([[1.0, -2.0, 2.0, -1.0]]).softmax(-1))
    model = tiny(vocab=9)
    often = generate(model, torch.tensor([[1]]), 9, Sampling(0, repetition_penalty=1e9)).ids[0].tolist()
    assert len({1, *often}) == 9  # every id once, and then again


def test_cuts_equal_those_of_transformers():
    warpers = pytest.importorskip("transformers").generation.logits_process
    logits, ids = torch.randn(6, 50, generator=generator()), torch.randint(50, (6, 12), generator=generator())
    ours = Sampling(0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    theirs = logits
    for warp in (
        warpers.RepetitionPenaltyLogitsProcessor(1.3),
        warpers.TemperatureLogitsWarper(0.7),
        warpers.TopKLogitsWarper(20),
        warpers.TopPLogitsWarper(0.8),
        warpers.MinPLogitsWarper(0.05),
    ):
        theirs = warp(ids, theirs)
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, ids, True)
    torch.testing.assert_close(ours.probabilities(logits, seen), theirs.softmax(-1))


def test_a_generator_decides():
    model, x = tiny(), torch.randint(4, (2, 3))
    one, two, other = (generate(model, x, 30, Sampling(), rng=generator(s)).ids for s in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)


# ---- stops


def test_a_row_ends_at_its_stop_and_the_others_go_on():
    model, x = tiny(vocab=9, sharp=0.5), torch.randint(9, (8, 3), generator=generator())
    free = generate(model, x, 40, Sampling(), rng=[generator(i) for i in range(8)])
    cut = generate(model, x, 40, Sampling(), rng=[generator(i) for i in range(8)], stop=Stop(ids=(4, 7)))
    for row in range(8):
        ends = [n for n, id in enumerate(free.ids[row].tolist()) if id in (4, 7)]
        n = ends[0] + 1 if ends else 40
        assert cut.lengths[row] == n
        assert torch.equal(cut.ids[row, :n], free.ids[row, :n]) and (cut.ids[row, n:] == 4).all()
    assert cut.ids.shape[1] == cut.lengths.max() < 40


def letters(ids: list[int]) -> str:
    return "".join("abcdefghi"[i] for i in ids)


def test_a_stop_string_over_several_ids():
    model, x = tiny(vocab=9, sharp=0.5), torch.randint(9, (5, 3), generator=generator())
    free = generate(model, x, 60, Sampling(), rng=[generator(i) for i in range(5)])
    texts = [letters(row) for row in free.ids.tolist()]
    stop = Stop(strings=(texts[0][20:24], texts[1][3:5]), decode=letters)
    cut = generate(model, x, 60, Sampling(), rng=[generator(i) for i in range(5)], stop=stop)
    for row, text in enumerate(texts):
        ends = [text.find(s) + len(s) for s in stop.strings if s in text]
        assert cut.lengths[row] == min(ends, default=60)
    assert cut.lengths[0] <= 24 and cut.lengths[1] <= 5


# ---- one by one


def test_tokens_come_one_by_one_and_lazily():
    model, calls = tiny(vocab=9), []
    step = model.step
    model.step = lambda *given: calls.append(1) or step(*given)
    x = torch.tensor([[1, 2]])
    tokens = write(model, read(model, x), 5)
    assert isinstance(tokens, Iterator) and not calls
    first = next(tokens)
    assert not calls and torch.is_grad_enabled()
    assert [first.ids.item(), *(token.ids.item() for token in tokens)] == generate(model, x, 5).ids[0].tolist()
    assert len(calls) == 4 + 4  # the last id is not read
    heard: list[Token] = []
    found = generate(model, x, 5, on_token=heard.append)
    assert [token.ids.item() for token in heard] == found.ids[0].tolist()


def test_going_on_from_the_last_token_is_never_having_stopped():
    model, x = tiny(vocab=9), torch.tensor([[1, 2]])
    whole = generate(model, x, 12).ids[0].tolist()
    *_, token = write(model, read(model, x), 5)
    rest = [t.ids.item() for t in write(model, advance(model, token.ids, token.at), 7)]
    assert whole[5:] == rest


@pytest.mark.parametrize("name", ["gru", "mamba2", "hybrid"])
def test_memory_per_token_is_constant(name):
    """The position has the same size after 300 tokens as after 10, and no tensor of each token stays behind."""
    model, sizes, tensors = MODELS[name](), [], []
    for n, token in enumerate(write(model, read(model, torch.tensor([[1, 2]])), 300, Sampling(), rng=generator())):
        if n in (10, 299):
            gc.collect()
            sizes.append(nbytes(token.at))
            tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert sizes[0] == sizes[1] and tensors[1] < tensors[0] + 100  # what other tests left may come and go


# ---- prefixes


def test_a_known_prefix_is_not_read_again():
    model = tiny(vocab=9)
    cache, x = PrefixCache(model), torch.randint(9, (1, 40), generator=generator())
    plain = [generate(model, x[:, :n], 10).ids for n in (20, 30, 40)]
    for n, want in zip((20, 30, 40), plain, strict=True):
        assert torch.equal(generate(model, x[:, :n], 10, prefixes=cache).ids, want)
    assert (cache.ids_read, cache.ids_asked) == (40, 90)
    assert torch.equal(generate(model, x, 10, prefixes=cache).ids, plain[2]) and cache.ids_read == 40
    other = x.clone()
    other[0, 25] = (other[0, 25] + 1) % 9  # shares 25 ids: the 20 are known
    torch.testing.assert_close(cache.read(other).logits, read(model, other).logits)
    assert cache.ids_read == 60
    rows = torch.cat([x, other])
    torch.testing.assert_close(
        cache.read(rows, torch.tensor([30, 3])).logits, read(model, rows, lengths=torch.tensor([30, 3])).logits
    )


def test_the_cache_is_bounded_and_forgets_the_longest_unused():
    model = tiny(vocab=9)
    cache, prompts = PrefixCache(model, entries=3), [torch.full((1, 5), i) for i in range(4)]
    for i in (0, 1, 2, 0, 3):
        cache.read(prompts[i])
    before = cache.ids_read
    cache.read(prompts[0])
    assert cache.ids_read == before and len(cache.known) == 3
    cache.read(prompts[1])
    assert cache.ids_read == before + 5
    size = nbytes(read(model, prompts[0]))
    small = PrefixCache(model, limit=2 * size + size // 2)
    for prompt in prompts:
        small.read(prompt)
    assert len(small.known) == 2 and small.bytes == sum(map(nbytes, small.known.values())) <= small.limit
    tiny_cache = PrefixCache(model, limit=size - 1)
    tiny_cache.read(prompts[0])
    assert not tiny_cache.known
    small.clear()
    assert not small.known and small.bytes == 0


def test_the_cache_holds_what_it_says_and_no_more():
    model = tiny(vocab=50)
    cache = PrefixCache(model)
    cache.read(torch.randint(50, (2, 300), generator=generator()))  # two rows of logits, not 300
    held = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves([*cache.known.values()])
    }
    assert sum(held.values()) == cache.bytes


# ---- mistakes


def test_what_can_not_be_generated_is_refused():
    model, x = tiny(), torch.randint(4, (1, 3))
    for fields in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}):
        with pytest.raises(UsageError, match=next(iter(fields))):
            Sampling(**fields)
    for fields in ({"beams": 0}, {"beams": 4, "groups": 3}, {"penalty": -1.0}, {"ngram": 0}):
        with pytest.raises(UsageError):
            Beam(**fields)
    with pytest.raises(UsageError, match="generator"):
        generate(model, x, 3, Sampling())
    with pytest.raises(UsageError, match="2 generators for 1"):
        generate(model, x, 3, Sampling(), rng=[generator(), generator()])
    with pytest.raises(UsageError, match="T >= 1"):
        generate(model, x[:, :0], 3)
    with pytest.raises(UsageError, match=r"lengths\[0\]"):
        generate(model, x, 3, lengths=torch.tensor([0]))
    with pytest.raises(UsageError, match="max_new_tokens"):
        generate(model, x, -1)
    with pytest.raises(UsageError, match="logit for each"):
        generate(Stack("gru", width=4, depth=1).build(x_vocab=4, y_width=5), x, 1)
    with pytest.raises(UsageError, match="takes no ids"):
        generate(Stack("gru", width=4, depth=1).build(x_width=4, y_width=4), x, 1)
    with pytest.raises(UsageError, match="decode"):
        Stop(strings=("a",))
    with pytest.raises(UsageError, match="empty"):
        Stop(strings=("",), decode=letters)
    with pytest.raises(UsageError, match="another model"):
        generate(model, x, 3, prefixes=PrefixCache(tiny()))
    with pytest.raises(UsageError, match="has 5 ids, the model 4"):
        generate(model, x, 3, Speculative(tiny(vocab=5)))
    with pytest.raises(UsageError, match="on_token"):
        generate(model, x, 3, Beam(2), on_token=print)
    with torch.no_grad():
        model.head.bias[2] = torch.nan
    for how in (GREEDY, Sampling(), Beam(2), Speculative(tiny())):
        with pytest.raises(NumericError, match="row 0"):
            generate(model, x, 3, how, rng=generator())
