"""What experts pay for uneven use: the loss of transformers, as a part of the state; training makes use even."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statewise.core import Load, UsageError, chunked, costs, settled, unroll
from statewise.models import LanguageModel, Residual, Stack, from_transformers, stack_of
from statewise.nn import Experts
from statewise.tasks import Copy
from statewise.training import Experiment, Train, fit

SPARSE = LanguageModel("min_gru", width=6, depth=2, mlp=0.5, experts=4, active=2, balance=0.7)


def theirs(kind: str, layers: int) -> tuple[nn.Module, Any]:
    """A small model of transformers whose layers all have experts, and its own loss."""
    transformers = pytest.importorskip("transformers")
    common = dict(vocab_size=13, hidden_size=16, intermediate_size=10, num_hidden_layers=layers, num_attention_heads=2,
                  num_key_value_heads=1, num_experts=5, num_experts_per_tok=2, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    if kind == "jamba":
        from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

        config = transformers.JambaConfig(**common, expert_layer_period=1, expert_layer_offset=0, attn_layer_period=1,
                                          attn_layer_offset=0, use_mamba_kernels=False)  # fmt: skip
        model = transformers.JambaForCausalLM(config)
    else:
        from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

        config = transformers.Qwen3NextConfig(**common, moe_intermediate_size=6, shared_expert_intermediate_size=8,
                                              head_dim=8, layer_types=["full_attention"] * layers)  # fmt: skip
        model = transformers.Qwen3NextForCausalLM(config)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate.weight" in name or "router.weight" in name:
                p.copy_(torch.randn_like(p))  # odds that differ
    return model.double().eval(), load_balancing_loss_func


@pytest.mark.parametrize("kind", ["jamba", "qwen3_next"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_transformers(kind: str, padded: bool) -> None:
    model, loss_of = theirs(kind, layers=2)
    ours = from_transformers(model).double()
    for part in ours.modules():
        if isinstance(part, Experts):
            part.balance = 0.3
    x = torch.randint(1, 13, (3, 9))
    lengths = torch.tensor([9, 4, 6]) if padded else torch.tensor([9, 9, 9])
    mask = (torch.arange(9) < lengths[:, None]).long()
    told = model(x, attention_mask=mask, output_router_logits=True)
    each = [loss_of((z,), 5, 2, mask if padded else None) for z in told.router_logits]
    want = 0.3 * sum(each)
    found = costs(ours(x, lengths=lengths)[1])
    assert len(found) == 2 and [t.shape for t in found] == [(3,), (3,)]
    got = sum(t.sum() for t in found) / lengths.sum()
    assert got.item() == pytest.approx(want.item(), abs=1e-6)
    wanted = torch.autograd.grad(
        want, [p for n, p in model.named_parameters() if n.endswith(("router.weight", "mlp.gate.weight"))]
    )
    grads = torch.autograd.grad(got, [p.router.weight for p in ours.modules() if isinstance(p, Experts)])
    assert len(grads) == 2 and all(g.abs().max() > 1e-3 for g in grads)
    for mine, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_one_layer_is_what_transformers_adds_to_its_own_loss() -> None:
    model, _ = theirs("jamba", layers=1)
    ours, x = from_transformers(model).double(), torch.randint(1, 13, (2, 7))
    for part in ours.modules():
        if isinstance(part, Experts):
            part.balance = model.config.router_aux_loss_coef
    both = [model(x, labels=x, output_router_logits=asked).loss for asked in (True, False)]
    (paid,) = costs(ours(x)[1])
    assert (paid.sum() / x.numel()).item() == pytest.approx((both[0] - both[1]).item(), abs=1e-6)


def test_even_use_is_cheapest() -> None:
    even = Load(torch.tensor([[3.0, 3.0], [2.0, 2.0]]), torch.tensor([[3.0, 3.0], [2.0, 2.0]]))
    uneven = Load(torch.tensor([[6.0, 0.0], [3.0, 1.0]]), torch.tensor([[5.0, 1.0], [3.0, 1.0]]))
    assert costs((even,))[0].tolist() == [3.0, 2.0]
    assert costs((uneven,))[0].tolist() == pytest.approx([4.6, 2.8])
    (half,) = costs(uneven, lambda taken: taken + torch.tensor([0.0, 8.0]))  # what another process took
    assert half.tolist() == pytest.approx([3.0, 2.0])
    assert all(t.eq(0).all() for t in (*settled(uneven), *costs(settled(uneven))))


def test_chunks_and_steps_pay_the_same() -> None:
    model, x = SPARSE.build(x_vocab=5, y_width=5).double(), torch.randint(5, (3, 8))
    want = costs(model(x)[1])
    for _, state in (chunked(model, x, [3, 0, 5]), unroll(model, x)):
        torch.testing.assert_close(costs(state), want)
    assert len(want) == 2 and all(t.gt(0).all() for t in want)


def test_without_balance_the_state_is_the_layers() -> None:
    free = replace(SPARSE, balance=0.0).build(x_vocab=5, y_width=5)
    paying = SPARSE.build(x_vocab=5, y_width=5)
    paying.load_state_dict(free.state_dict())
    x = torch.randint(5, (2, 6))
    (y, state), (same, paid) = free(x), paying(x)
    assert torch.equal(y, same) and not costs(state) and torch.equal(state[1], paid[1].layer)


def test_blocks_say_which_have_experts() -> None:
    model = Stack("min_gru,min_gru(experts=3,mlp=1)", width=4, depth=4, active=1).build(x_width=2, y_width=1)
    assert isinstance(model, Residual)
    assert [isinstance(block.mlp, Experts) for block in model.blocks] == [False, True, False, True]
    assert model.blocks[1].mlp.up.shape == (3, 8, 4) and model.blocks[1].mlp.normed  # type: ignore[union-attr]


def test_branches_with_experts_start_as_others_do() -> None:
    torch.manual_seed(0)
    wide, deep = (replace(SPARSE, width=64, depth=d).build(x_vocab=5, y_width=5) for d in (1, 9))
    shrunk = [stack_of(m).blocks[0].mlp.out.std().item() for m in (wide, deep)]  # type: ignore[union-attr]
    assert shrunk[0] / shrunk[1] == pytest.approx(3, rel=0.05)


def uneven(balance: float) -> tuple[float, dict[str, float]]:
    """The largest share of an expert in what a layer takes, after training; 1 / 4 where all are alike."""
    task = Copy(length=6, copied=3)
    model = Stack("min_gru", width=8, depth=2, mlp=1.0, experts=4, active=1, balance=balance)
    kept: dict[str, Tensor] = {}

    def watch(part: nn.Module, _: Any, z: Tensor) -> None:
        kept[str(id(part))] = z.detach().argmax(-1)

    hook = nn.modules.module.register_module_forward_hook(
        lambda part, given, z: watch(part, given, z) if isinstance(part, nn.Linear) and part.out_features == 4 else None
    )
    try:
        result = fit(Experiment(task, model, Train(steps=60, batch=16, lr=0.02)))
    finally:
        hook.remove()
    shares = [taken.bincount(minlength=4) / len(taken) for taken in kept.values()]
    assert len(shares) == 2
    return max(float(s.max()) for s in shares), result.metrics["test"]


def test_training_makes_use_even() -> None:
    (free, _), (paid, scores) = uneven(0.0), uneven(0.1)
    assert paid < 0.5 < free
    assert 0.2 <= scores["cost"] < 0.3  # two layers, each 0.1 where use is even


def test_a_record_without_experts_is_what_it_was() -> None:
    plain = Experiment(Copy(length=4, copied=2), Stack("gru")).record()["model"]
    assert not {"experts", "active", "balance"} & plain.keys()
    sparse = Experiment(Copy(length=4, copied=2), Stack("gru", experts=4, balance=0.01))
    assert Experiment.from_record(sparse.record()) == sparse


@pytest.mark.parametrize(
    "change, words",
    [
        ({"experts": -1}, "experts is -1"),
        ({"experts": 2.0}, "experts is 2.0"),
        ({"experts": 0}, "balance 0.7 without experts"),
        ({"balance": -1.0}, "balance is -1.0"),
        ({"balance": 1e7}, "balance is 1"),
        ({"active": 5}, "active 5; expected at most the number of experts, 4"),
        ({"mlp": 0.0}, "experts 4 of mlp 0.0"),
        ({"layer": "gru(experts=true)"}, "experts is True"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(SPARSE, **change).build(x_vocab=5, y_width=5)  # type: ignore[arg-type]
