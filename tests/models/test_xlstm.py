"""xLSTM: which block stands where, equality with the authors' package, where weights begin, parity of a bit stream."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from statewise.core import UsageError
from statewise.layers import MLSTM, ConvSLSTM
from statewise.models import XLSTM


def test_blocks_stand_where_the_ratio_says():
    assert XLSTM(depth=16, blocks="7:1").kinds() == "mmmmmmms" * 2
    assert XLSTM(depth=5, blocks="1:1").kinds() == "msmsm"
    assert XLSTM(depth=4, blocks="mms").kinds() == "mmsm"
    assert XLSTM(depth=2, blocks="1:0").kinds() == "mm" and XLSTM(depth=2, blocks="0:1").kinds() == "ss"
    model = XLSTM(width=8, depth=3, heads=2, blocks="msm").build(x_width=2, y_width=1)
    assert [type(block.layer) for block in model.blocks] == [MLSTM, ConvSLSTM, MLSTM]
    assert [block.mlp is None for block in model.blocks] == [True, False, True]


def convolution(weight):
    """Theirs (N, 1, P), oldest tap first -> ours (P, N), newest first."""
    return weight[:, 0].flip(-1).T


def weights(theirs, depth):
    """Parameters of the package's stack under our names. Their norms keep the weight less one."""
    p, found = dict(theirs.named_parameters()), {}
    for n in range(depth):
        ours, old = f"blocks.{n}.", f"blocks.{n}."
        found[f"{ours}norms.0.weight"] = 1 + p[f"{old}xlstm_norm.weight"]
        found[f"{ours}layer.conv.weight"] = convolution(p[f"{old}xlstm.conv1d.conv.weight"])
        found[f"{ours}layer.conv.bias"] = p[f"{old}xlstm.conv1d.conv.bias"]
        if f"{old}xlstm.proj_up.weight" in p:
            found[f"{ours}layer.skip"] = p[f"{old}xlstm.learnable_skip"]
            found[f"{ours}layer.norm.weight"] = 1 + p[f"{old}xlstm.mlstm_cell.outnorm.weight"]
            pairs = [("up", "proj_up"), ("out", "proj_down"), *((name, f"{name}_proj") for name in "qkv")]
            for kind in ("weight", "bias"):
                gates = [p[f"{old}xlstm.mlstm_cell.{gate}gate.{kind}"] for gate in "if"]
                found[f"{ours}layer.gates.{kind}"] = torch.cat(gates)
        else:
            found[f"{ours}layer.recurrent"] = p[f"{old}xlstm.slstm_cell._recurrent_kernel_"]
            found[f"{ours}layer.bias"] = p[f"{old}xlstm.slstm_cell._bias_"]
            found[f"{ours}layer.norm.weight"] = 1 + p[f"{old}xlstm.group_norm.weight"]
            found[f"{ours}norms.1.weight"] = 1 + p[f"{old}ffn_norm.weight"]
            found[f"{ours}mlp.up.weight"] = p[f"{old}ffn.proj_up.weight"]
            found[f"{ours}mlp.out.weight"] = p[f"{old}ffn.proj_down.weight"]
            # what their layer calls fgate feeds the cell's input gate, and igate the forget gate
            pairs = [("i", "fgate"), ("f", "igate"), ("z", "zgate"), ("o", "ogate")]
        for name, other in pairs:
            found[f"{ours}layer.{name}.weight"] = p[f"{old}xlstm.{other}.weight"]
    found["norm.weight"] = 1 + p["post_blocks_norm.weight"]
    return found


@pytest.mark.parametrize("blocks", ["m", "s", "msm"])
def test_equals_the_authors_package(blocks):
    peer = pytest.importorskip("xlstm")
    width, depth = 32, len(blocks)  # where 2 * 32 is the multiple of 64 that they round to
    cell = peer.sLSTMLayerConfig(
        backend="vanilla", num_heads=2, dtype="float32", enable_automatic_mixed_precision=False
    )
    described = peer.xLSTMBlockStackConfig(
        mlstm_block=peer.mLSTMBlockConfig(mlstm=peer.mLSTMLayerConfig(num_heads=2)),
        slstm_block=peer.sLSTMBlockConfig(slstm=cell, feedforward=peer.FeedForwardConfig(proj_factor=2.0)),
        context_length=24, num_blocks=depth, embedding_dim=width,
        slstm_at=[n for n, kind in enumerate(blocks) if kind == "s"],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peer.xLSTMBlockStack(described)
    ours = XLSTM(width=width, depth=depth, heads=2, mlp=2.0, blocks=blocks).build(x_width=width, y_width=width)
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
        ported = weights(theirs, depth)
        for linear in (ours.embed, ours.head):
            linear.weight.copy_(torch.eye(width))
            linear.bias.zero_()
        for name, p in ours.named_parameters():
            if not name.startswith(("embed", "head")):
                p.copy_(ported.pop(name))
        assert not ported
        x = torch.randn(2, 24, width)
        assert_close(ours(x)[0], theirs(x), atol=2e-5, rtol=2e-5)


def test_weights_begin_as_the_authors_begin_them():
    torch.manual_seed(0)
    model = XLSTM(width=128, depth=4, blocks="1:1").build(x_width=2, y_width=1)
    small, last = (0.4 / 128) ** 0.5, 2 / (4 * 128**0.5)
    m, s = model.blocks[0], model.blocks[1]
    want = {m.layer.up: small, m.layer.q: small, m.layer.out: last, s.layer.i: small, s.layer.z: small}
    want |= {s.mlp.up: small, s.mlp.out: last}
    for module, std in want.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not m.layer.gates.weight.any() and not s.layer.recurrent.any()
    places = [1 / 3, 1.0]  # of the second and of the fourth block
    for block, place in zip((s, model.blocks[3]), places, strict=True):
        assert_close(block.layer.bias, ConvSLSTM(128, heads=4, place=place).bias)


def test_from_ids_it_is_a_language_model():
    model = XLSTM(width=8, depth=2, heads=2).build(x_vocab=11, y_width=11)
    ids = torch.randint(11, (2, 7))
    y, state = model(ids)
    assert y.shape == (2, 7, 11)
    rest, _ = model(ids[:, :1], state)
    assert_close(model(torch.cat([ids, ids[:, :1]], 1))[0][:, 7:], rest, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(blocks="7:1"), "blocks '7:1' are 8, the depth is 2"),
        (dict(blocks="0:0"), "expected a ratio"),
        (dict(blocks="mx"), "expected a ratio as '7:1' or letters"),
        (dict(heads=5), "width 64 is not a multiple of heads 5"),
        (dict(depth=0), "depth is 0"),
        (dict(mlp=0.0), "mlp is 0.0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(pool="max"), "pool 'max'"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(XLSTM(), **fields).build(x_width=3, y_width=2)


@pytest.mark.slow
@pytest.mark.parametrize("blocks, learns", [("0:1", True), ("1:0", False)])
def test_scalar_memories_count_bits_and_matrix_memories_do_not(blocks, learns):
    """Parity of up to 16 bits, told at every step, and of 64 bits at the end."""
    torch.manual_seed(0)
    model = XLSTM(width=32, depth=2, heads=2, blocks=blocks).build(x_width=1, y_width=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    rng = torch.Generator().manual_seed(0)
    for _ in range(400):
        x = torch.randint(2, (64, 16, 1), generator=rng).float()
        y = model(2 * x - 1)[0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(y, x.cumsum(1) % 2)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    x = torch.randint(2, (256, 64, 1), generator=rng).float()
    with torch.no_grad():
        right = ((model(2 * x - 1)[0] > 0) == (x.cumsum(1) % 2 > 0))[:, -1].float().mean().item()
    assert right > 0.95 if learns else right < 0.7
