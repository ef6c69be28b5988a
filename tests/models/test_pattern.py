"""Hybrids: what stands at which depth, what is shared, and that a pattern is plain text."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from statewise.core import UsageError
from statewise.core.vary import grid, put, recorded
from statewise.models import LanguageModel, Stack
from statewise.models.pattern import Place, places


def kinds(pattern: str, depth: int) -> list[str]:
    return [type(block.layer).__name__ for block in Stack(pattern, width=16, depth=depth).build(
        x_width=2, y_width=1).at_depths()]  # fmt: skip


def test_a_pattern_repeats_to_the_depth():
    assert kinds("lru", 3) == ["LRU"] * 3
    assert kinds("lru*2,attention(window=8)", 7) == ["LRU", "LRU", "Attention"] * 2 + ["LRU"]
    jamba = kinds("min_gru*3,attention(window=8),min_gru*4", 8)
    assert jamba.count("Attention") == 1 and jamba.index("Attention") == 3
    assert places("gru+lru", 2) == places(" gru , lru", 2) == [Place("gru"), Place("lru")]


def test_every_place_has_its_own_arguments():
    pattern = "window_attention(window=3,heads=2),window_attention(window=9, heads=4)"
    blocks = Stack(pattern, width=16, depth=2).build(x_width=1, y_width=1).at_depths()
    assert [(block.layer.window, block.layer.heads) for block in blocks] == [(3, 2), (9, 4)]
    for_all = Stack("gru,min_gru,attention(window=4)", width=16, depth=3, args={"hidden": 5})
    blocks = for_all.build(x_width=1, y_width=1).at_depths()
    assert [block.layer.out_width for block in blocks] == [5, 5, 16]  # attention takes no `hidden`
    one = Stack("gru(mlp=0),gru", width=8, depth=2).build(x_width=1, y_width=1).at_depths()
    assert [block.mlp is None for block in one] == [True, False]


def test_a_label_shares_weights_and_not_states():
    model = Stack("gru*2,attention(window=4)@a", width=16, depth=6).build(x_width=2, y_width=1).eval()
    alone = Stack("gru*2,attention(window=4)", width=16, depth=6).build(x_width=2, y_width=1)
    assert len(model.blocks) == 5 and model.order == (0, 1, 2, 3, 4, 2)
    one = sum(p.numel() for p in model.blocks[2].parameters())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (alone, model)]
    assert sizes[0] - sizes[1] == one
    tensors = [t.data_ptr() for t in model.state_dict().values()]
    assert len(tensors) == len(set(tensors))
    _, state = model(torch.randn(1, 3, 2))
    assert len(state) == 6 and not torch.equal(state[2].k, state[5].k)


def test_shared_equals_copied():
    """A stack whose places share weights gives what one with the same weights copied to each place gives."""
    shared = Stack("gru@g,min_gru", width=8, depth=4).build(x_width=2, y_width=1)
    copied = Stack("gru,min_gru", width=8, depth=4).build(x_width=2, y_width=1)
    for to, place in zip(copied.blocks, shared.at_depths(), strict=True):
        to.load_state_dict(place.state_dict())
    for part in ("embed", "norm", "head"):
        getattr(copied, part).load_state_dict(getattr(shared, part).state_dict())
    x = torch.randn(3, 7, 2)
    torch.testing.assert_close(shared(x)[0], copied(x)[0], rtol=0, atol=0)


def test_residual_scale():
    x = torch.randn(2, 5, 2)
    torch.manual_seed(0)
    full = Stack("gru", width=8, depth=1, mlp=0).build(x_width=2, y_width=1).blocks[0]
    torch.manual_seed(0)
    half = Stack("gru", width=8, depth=1, mlp=0, residual_scale=0.5).build(x_width=2, y_width=1).blocks[0]
    h = torch.randn(2, 5, 8)
    torch.testing.assert_close(half(h)[0] - h, (full(h)[0] - h) / 2)
    none = Stack("gru", width=8, residual_scale=0.0).build(x_width=2, y_width=1)
    torch.testing.assert_close(none(x)[0], none.head(none.norm(none.embed(x))))


def test_a_pattern_is_plain_text():
    model = LanguageModel("mamba2*3,attention(window=8)@a", width=16, depth=8, residual_scale=0.5)
    assert LanguageModel(**json.loads(json.dumps(asdict(model)))) == model
    assert put(model, "layer", "gru").layer == "gru"
    found = list(grid(model, {"layer": ["gru", "gru,lru"], "residual_scale": [0.5, 1.0]}))
    assert [(m.layer, m.residual_scale) for m in found][2] == ("gru,lru", 0.5)
    assert "residual_scale" in recorded(model) and "residual_scale" not in recorded(LanguageModel("gru"))


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("gru,,lru", "not a pattern at ',lru'"),
        ("gru,", "not a pattern at ''"),
        ("gru*0,lru", "not a pattern"),
        ("gru(hidden)", "'hidden'; expected FIELD=VALUE"),
        ("gru(hidden=3,hidden=4)", "each field once"),
        ("gru*2,nothing", "unknown layer 'nothing'"),
        ("gru(hiden=3),lru", "gru has no argument 'hiden'; near: hidden"),
        ("gru@a,lru@a", "@a stands on two different layers"),
        ("gru*4,lru", "the pattern has 5 layers, the depth is 4"),
        ("gru(width=3)", "set the width of the stack"),
        ("gru(mlp=-1)", "mlp is -1"),
    ],
)
def test_what_is_wrong_is_named(pattern, words):
    with pytest.raises(UsageError, match=words.replace("*", r"\*").replace("(", r"\(")):
        Stack(pattern, width=8, depth=4).build(x_width=1, y_width=1)


def test_recomputed_blocks_give_the_same_gradients():
    torch.manual_seed(0)
    model = LanguageModel("gru,mamba2,window_attention(window=3)@a", width=16, depth=6, dropout=0.3).build(
        x_vocab=7, y_width=7
    )
    x, grads, kept = torch.randint(7, (2, 9)), [], []
    for model.body.recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            y, _ = model(x)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        kept.append(sum(sizes))
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)
    assert kept[1] < kept[0] / 3
