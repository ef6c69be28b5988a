"""Attention by another layer's matrix, students that begin as their teachers, and which layers see alike."""

from __future__ import annotations

import pytest
import torch

from statewise.core import UsageError, chunked, leaves, unroll
from statewise.interpret import attention_matrices, attention_similarity, followers
from statewise.layers import Attention, EchoAttention, Mamba2
from statewise.models import LanguageModel, Stack, inherit, stack_of, watched

PLAIN = "attention(window=5,heads=2)"
ECHO = "attention(window=5,heads=2,echo=true)"


def build(layer: str, depth: int, **fields):
    return Stack(layer, width=8, depth=depth, **fields).build(x_width=3, y_width=2).double()


def by_hand(model, x):
    """Every block with the T x T matrix of the last attention that has one of its own."""
    h, matrix = model.embed(x), None
    for block in model.at_depths():
        u, layer = block.norms[0](h), block.layer
        if isinstance(layer, Attention):
            matrix = layer.look(u, None, None, None)[2].matrix(layer.window)
            v = layer.qkv(u).split(layer.sizes, -1)[2]
        else:
            v = layer.values(u)
        o = torch.einsum("bhts,bshk->bthk", matrix, v.unflatten(-1, (2, -1)))
        h, _ = block._end(h, layer.out(o.flatten(-2)), None, None, None)
    return model.head(model.norm(h))


def test_followers_see_by_their_leaders_matrix() -> None:
    torch.manual_seed(0)
    model, x = build(f"{PLAIN},{ECHO}*2", 6), torch.randn(2, 11, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x)[0], by_hand(model, x))
    assert model.shared == frozenset(range(6))


def test_a_matrix_sums_to_one_over_its_window() -> None:
    model = build(PLAIN, 2)
    matrices = attention_matrices(model, torch.randn(2, 9, 3, dtype=torch.float64))
    t = torch.arange(9)
    outside = (t > t[:, None]) | (t <= t[:, None] - 5)
    for matrix in matrices.values():
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))
        assert (matrix[..., outside] == 0).all() and (matrix[..., ~outside] > 0).all()


def test_it_streams_past_other_layers_with_values_alone_in_its_state() -> None:
    torch.manual_seed(0)
    model, x = build(f"{PLAIN},mamba2(heads=2,value=4,key=4),{ECHO}", 3).eval(), torch.randn(2, 13, 3).double()
    whole, last = model(x)
    torch.testing.assert_close(unroll(model, x)[0], whole)
    torch.testing.assert_close(chunked(model, x, [1, 4, 8])[0], whole)
    assert last[2].shape == (2, 4, 2, 4) and len(leaves(last[0])) == 3
    assert model.shared == {0, 2}


def test_gradients_reach_the_leader_through_its_followers() -> None:
    model, x = build(f"{PLAIN},{ECHO}", 2), torch.randn(1, 6, 3).double()
    rows = model.blocks[0].layer.qkv.weight
    model.blocks[0].layer.out.weight.data.zero_()  # what it reads itself counts for nothing
    model.blocks[0].layer.out.bias.data.zero_()
    model(x)[0].sin().sum().backward()
    q, k, v, _ = rows.grad.split(model.blocks[0].layer.sizes)
    assert q.abs().max() > 1e-6 and k.abs().max() > 1e-6 and v.abs().max() == 0


def test_recomputed_blocks_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, x = build(f"{PLAIN},{ECHO},gru", 6).train(), torch.randn(2, 7, 3).double()
    grads = []
    for again in (False, True):
        model.recompute = again
        model.zero_grad()
        model(x)[0].sin().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "pattern, words",
    [
        (f"{ECHO},{PLAIN}", "comes first"),
        (f"{PLAIN},attention(window=6,heads=2,echo=true)", "window 6, that of the attention before it 5"),
        (f"{PLAIN},attention(window=5,heads=4,echo=true)", "heads 4, that of the attention before it 2"),
        (f"{PLAIN},gru(echo=true)", "of attention"),
        (f"{PLAIN},attention(window=5,heads=2,echo=3)", "expected true or false"),
        (f"{PLAIN},attention(window=5,heads=2,echo=true,rotary=0)", "no argument 'rotary'"),
    ],
)
def test_what_is_wrong_is_named(pattern: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(pattern, 2)


# ---- a student that begins as its teacher


def test_a_student_of_the_same_shape_is_its_teacher() -> None:
    teacher, student = build(PLAIN, 3), build(PLAIN, 3)
    assert inherit(student, teacher) == set()
    x = torch.randn(2, 9, 3).double()
    torch.testing.assert_close(student(x)[0], teacher(x)[0], rtol=0, atol=0)
    assert inherit(build(PLAIN, 3), teacher, "none") == {name for name, _ in teacher.named_parameters()}


def test_an_echo_of_equal_layers_changes_nothing() -> None:
    """Where two layers see by equal matrices, to share one is exact: here both look with queries of zero."""
    teacher = build("attention(window=5,heads=2,kv_heads=1,gate=true)", 2)
    for block in teacher.blocks:
        block.layer.qkv.weight.data[:8] = 0
        block.layer.qkv.bias.data[:8] = 0
    student = build(
        "attention(window=5,heads=2,kv_heads=1,gate=true),attention(window=5,heads=2,kv_heads=1,gate=true,echo=true)", 2
    )
    new = inherit(student, teacher)
    assert new and all(name.startswith("blocks.1.layer") for name in new)
    assert isinstance(student.blocks[1].layer, EchoAttention)
    x = torch.randn(2, 12, 3).double()
    torch.testing.assert_close(student(x)[0], teacher(x)[0])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_mamba2_of_attention_is_its_linear_attention(kv_heads: int) -> None:
    """With a convolution that passes on, no decay, steps of one and no skip: S_t = S_{t-1} + silu(k) silu(v)^T."""
    torch.manual_seed(0)
    attention = f"attention(window=64,heads=2,kv_heads={kv_heads})"
    teacher = build(attention, 1)
    student = build("mamba2(heads=2,groups=2,key=4,value=4,bias=true)", 1)
    born = student.blocks[0].layer.in_proj.weight.clone()
    new = inherit(student, teacher)
    assert all(name.startswith("blocks.0.layer") for name in new) and len(new) == 10
    made, layer = student.blocks[0].layer, teacher.blocks[0].layer
    assert isinstance(made, Mamba2)
    torch.testing.assert_close(made.out_proj.weight, layer.out.weight, rtol=0, atol=0)
    torch.testing.assert_close(made.in_proj.weight[:8], born[:8], rtol=0, atol=0)  # the gate
    torch.testing.assert_close(made.in_proj.weight[32:], born[32:], rtol=0, atol=0)  # the step size
    made.conv.weight.data.zero_()[0] = 1
    made.conv.bias.data.zero_()
    made.a_log.data.fill_(-40)
    made.d.data.zero_()
    made.in_proj.weight.data[32:] = 0
    made.in_proj.bias.data[32:] = 0
    made.dt_bias.data.fill_(float(torch.tensor(1.0).double().expm1().log()))
    x = torch.randn(2, 9, 8).double()
    q, k, v, _ = torch.nn.functional.silu(layer.qkv(x)).split(layer.sizes, -1)
    q, k, v = (z.unflatten(-1, (-1, 4)) for z in (q, k, v))
    k, v = (z.repeat_interleave(2 // kv_heads, 2) for z in (k, v))
    score = torch.einsum("bthk,bshk->bhts", q, k).tril()
    want = torch.einsum("bhts,bshv->bthv", score, v).flatten(-2)
    u = made.encode(x)
    got, _ = made.scan(u, made.initial_state(2), None, None)
    torch.testing.assert_close(got.y, want)


def test_what_differs_stays_as_it_was_born() -> None:
    teacher, student = build(PLAIN, 2), build(f"{PLAIN},gru", 2)
    before = student.blocks[1].layer.state_dict()
    before = {name: t.clone() for name, t in before.items()}
    new = inherit(student, teacher)
    assert new == {f"blocks.1.layer.{name}" for name, _ in student.blocks[1].layer.named_parameters()}
    for name, t in student.blocks[1].layer.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0)
    same = build(f"{PLAIN},{ECHO}", 2)
    born = same.blocks[1].layer.out.weight.clone()
    inherit(same, teacher, "same")
    torch.testing.assert_close(same.blocks[1].layer.out.weight, born, rtol=0, atol=0)


def test_what_cannot_be_inherited_is_named() -> None:
    teacher = build(PLAIN, 2)
    for student, words in (
        (build(PLAIN, 3), "depth and width"),
        (build("mamba2(heads=2,value=4,key=4)", 2), r"mamba2\(heads=2,groups=2,key=4,value=4\)"),
        (build("attention(window=6,heads=2),attention(window=6,heads=2,echo=true)", 2), "window 6"),
        (torch.nn.Linear(2, 2), "holds 0 stacks"),
    ):
        with pytest.raises(UsageError, match=words):
            inherit(student, teacher)
    with pytest.raises(UsageError, match="takes all, same, none"):
        inherit(build(PLAIN, 2), teacher, "some")  # type: ignore[arg-type]


def test_watched_is_what_enters_each_depth() -> None:
    model = LanguageModel(f"{PLAIN},{ECHO},gru@a,gru@a", width=8, depth=4).build(x_vocab=5, y_width=5)
    ids = torch.randint(5, (2, 6))
    with watched(model) as seen:
        y, _ = model(ids)
    stack = stack_of(model)
    torch.testing.assert_close(seen[0], stack.embed(ids))
    torch.testing.assert_close(stack.blocks[2](seen[3])[0], seen[4])
    torch.testing.assert_close(model.logits(stack.norm(seen[-1])), y)
    assert len(seen) == 5
    model(ids)
    assert len(seen) == 5


# ---- which layers see alike


def test_similarity_of_equal_and_of_other_layers() -> None:
    model = build(PLAIN, 3)
    model.blocks[1].load_state_dict(model.blocks[0].state_dict())
    for block in model.blocks:  # nothing is added: the same enters every depth
        block.back.weight.data.zero_()
        block.back.bias.data.zero_()
        block.mlp.out.weight.data.zero_()
        block.mlp.out.bias.data.zero_()
    alike = attention_similarity(model, torch.randn(2, 9, 3).double())
    torch.testing.assert_close(alike.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(alike, alike.mT)
    assert alike[0, 1] == pytest.approx(1) and alike[0, 2] < 0.999


def test_followers_are_the_most_alike_inner_layers() -> None:
    alike = torch.eye(7)
    for a, b, value in ((1, 2, 0.5), (2, 3, 0.9), (3, 4, 0.3), (4, 5, 0.8), (1, 3, 0.6), (5, 6, 0.99), (0, 1, 0.99)):
        alike[a, b] = alike[b, a] = value
    assert followers(alike, 0) == ()
    assert followers(alike, 1) == (3,)
    assert followers(alike, 2) == (3, 5)
    assert followers(alike, 3) == (2, 3, 5)  # then 3 follows 1 as well
    assert followers(alike, 1, least=True) == (4,)
    for count in (5, -1):
        with pytest.raises(UsageError, match="expected 0 to 4"):
            followers(alike, count)


@pytest.mark.parametrize("cls", [Attention, EchoAttention])
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(heads=0), "heads is 0"),
        (dict(heads=3), "width 8 is not a multiple of heads 3"),
        (dict(heads=4, kv_heads=3), "heads 4 is not a multiple of kv_heads 3"),
        (dict(heads=3, key=2, kv_heads=0), "kv_heads is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_alike(cls, sizes, words) -> None:
    with pytest.raises(UsageError, match=f"{cls.__name__}: {words}"):
        cls(8, window=5, **sizes)
    cls(8, window=5, heads=3, key=2)
