"""Language models of transformers on our layers: their logits, their text, their files.

Every parameter is drawn at random first: constant initial values would hide a tensor in the wrong place.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from in_float64 import InFloat64
from statewise import chunked, unroll
from statewise.core import DataError, Unknown, UsageError, read_tensors, write_tensors
from statewise.decoding import generate
from statewise.models import from_transformers
from statewise.testing import check_layer, checks
from statewise.testing.sample import prepare

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB = 37
SMALL = dict(vocab_size=VOCAB, num_hidden_layers=2, pad_token_id=0, bos_token_id=0, eos_token_id=None)


def mamba(**changes: Any) -> nn.Module:
    config = transformers.MambaConfig(**{**SMALL, "hidden_size": 24, "state_size": 5, **changes})
    return transformers.MambaForCausalLM(config)


def falcon_mamba(**changes: Any) -> nn.Module:
    config = transformers.FalconMambaConfig(
        **{**SMALL, "hidden_size": 24, "state_size": 5, "mixer_rms_eps": 0.01, **changes}
    )
    return transformers.FalconMambaForCausalLM(config)


def mamba2(**changes: Any) -> nn.Module:
    sizes = dict(hidden_size=24, num_heads=6, head_dim=8, state_size=5, n_groups=2, chunk_size=4)
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**{**SMALL, **sizes, **changes}))


def xlstm(**changes: Any) -> nn.Module:
    sizes = dict(hidden_size=64, num_heads=2, qk_dim_factor=1.0, chunk_size=8, autocast_kernel_dtype="float32")
    config = transformers.xLSTMConfig(**{**SMALL, **sizes, **changes})
    with pytest.MonkeyPatch.context() as patch:  # theirs copies 2 H biases into H where the weights are fused
        patch.setattr(transformers.xLSTMPreTrainedModel, "_init_weights", lambda self, module: None)
        return transformers.xLSTMForCausalLM(config)


ATTENDING = dict(
    hidden_size=24, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64
)


def bamba(**changes: Any) -> nn.Module:
    sizes = dict(
        num_attention_heads=6, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=5, mamba_n_groups=2, mamba_chunk_size=4
    )
    config = transformers.BambaConfig(**{**SMALL, **ATTENDING, **sizes, "attn_layer_indices": [1], **changes})
    return transformers.BambaForCausalLM(config)


def jamba(**changes: Any) -> nn.Module:
    sizes = dict(mamba_d_state=5, num_experts=1, attn_layer_period=2, attn_layer_offset=1)
    return transformers.JambaForCausalLM(transformers.JambaConfig(**{**SMALL, **ATTENDING, **sizes, **changes}))


def qwen3_next(**changes: Any) -> nn.Module:
    sizes = dict(
        head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=5, linear_value_head_dim=3,
        num_experts=0, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    config = transformers.Qwen3NextConfig(**{**SMALL, **ATTENDING, **sizes, **changes})
    return transformers.Qwen3NextForCausalLM(config)


def in_plain_loops(model: nn.Module) -> nn.Module:
    """Experts one after the other; their grouped product knows no float64."""
    model.set_experts_implementation("eager")
    return model


def jamba_experts(**changes: Any) -> nn.Module:
    sizes = dict(num_experts=4, num_experts_per_tok=2, expert_layer_period=1, expert_layer_offset=0)
    return in_plain_loops(jamba(**{**sizes, **changes}))


def qwen3_next_experts(**changes: Any) -> nn.Module:
    sizes = dict(
        num_experts=5, num_experts_per_tok=3, moe_intermediate_size=6, shared_expert_intermediate_size=10,
        mlp_only_layers=[1],
    )  # fmt: skip
    return in_plain_loops(qwen3_next(**{**sizes, **changes}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mamba": mamba,
    "mamba_untied_wide_biased": lambda: mamba(
        tie_word_embeddings=False, use_bias=True, use_conv_bias=False, expand=3, conv_kernel=2, time_step_rank=3
    ),
    "falcon_mamba": falcon_mamba,
    "mamba2": mamba2,
    "mamba2_tied_biased": lambda: mamba2(
        tie_word_embeddings=True, use_bias=True, use_conv_bias=False, n_groups=3, conv_kernel=2
    ),
    "xlstm": xlstm,
    "xlstm_fused": lambda: xlstm(
        weight_mode="fused",
        hidden_size=128,
        qk_dim_factor=0.5,
        num_heads=1,
        norm_eps=0.01,
        eps=0.001,
        ffn_proj_factor=1.3,
        gate_soft_cap=2.0,
        output_logit_soft_cap=1.5,
    ),
    "bamba": bamba,
    "bamba_tied_biased": lambda: bamba(
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        mamba_proj_bias=True,
        mamba_conv_bias=False,
        attn_layer_indices=[0],
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    ),
    "jamba": jamba,
    "qwen3_next": qwen3_next,
    "qwen3_next_biased": lambda: qwen3_next(
        attention_bias=True,
        linear_num_value_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=0.1,
        linear_conv_kernel_dim=2,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    ),
    "jamba_experts": jamba_experts,
    "qwen3_next_experts": qwen3_next_experts,
    "qwen3_next_experts_as_they_are": lambda: qwen3_next_experts(norm_topk_prob=False, num_experts_per_tok=1),
    "falcon_mamba_untied": lambda: falcon_mamba(tie_word_embeddings=False, layer_norm_epsilon=0.1),
}


@pytest.fixture(autouse=True)
def in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take the kernels of fla where that is installed, and they need a GPU."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))


def random(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """One of MODELS with all parameters drawn anew."""
    return shuffled(MODELS[name](), dtype, seed)


def shuffled(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model with all parameters drawn anew."""
    model = model.to(dtype).eval()
    for module in model.modules():  # made in float32, so rounded by now
        if dtype == torch.float64 and hasattr(module, "inv_freq"):
            pairs, base = len(module.inv_freq), module.config.rope_parameters["rope_theta"]
            module.inv_freq = base ** -(torch.arange(pairs, dtype=dtype) / pairs)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            fan = parameter.shape[-1] if parameter.ndim == 2 and "A_log" not in key else 4
            around_one = parameter.ndim == 1 and "norm" in key
            parameter.copy_(1 + 0.5 * noise if around_one else noise * (2 if "embed" in key else 1.5) / fan**0.5)
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, *, exact: bool = False) -> Tensor:
    if not exact:
        return model(input_ids=x, use_cache=False).logits
    with InFloat64():
        return model(input_ids=x, use_cache=False).logits


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_float32(name: str):
    theirs, x = random(name), ids(3, 21)
    ours = from_transformers(theirs)
    want = logits(theirs, x)
    assert want.std() > 0.1  # there is something to compare
    # xLSTM divides by sums that may be near 0: there theirs, too, is off by 8e-5 from what float64 makes of the weights
    theirs_off = error(want, copy.deepcopy(ours).double()(x)[0])
    assert error(ours(x)[0], want) < max(1e-4, 2 * theirs_off) and theirs_off < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_float64(name: str):
    theirs, x = random(name, torch.float64), ids(3, 21)
    ours = from_transformers(theirs)
    y, _ = ours(x)
    assert y.dtype == torch.float64
    assert error(y, logits(theirs, x, exact=True)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_transformers_rounds_float64_to_float32_on_the_way(name: str):
    theirs, x = random(name, torch.float64), ids(3, 21)
    off = error(logits(theirs, x), logits(theirs, x, exact=True))
    assert 1e-9 < off < 1e-4
    assert error(from_transformers(theirs)(x)[0], logits(theirs, x)) < 2 * off  # ours is not to blame


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_matters(name: str):
    theirs, x = random(name), ids(2, 12)
    ours = from_transformers(theirs)
    before = ours(x)[0]
    for key, parameter in theirs.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_(parameter.roll(1, 0) if parameter.ndim < 2 or len(parameter) > 1 else -parameter)
        after = from_transformers(theirs)(x)[0]
        assert error(after, logits(theirs, x)) < 1e-4, key
        assert error(after, before) > 1e-5, key
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_token_for_token(name: str):
    for seed in range(3):
        theirs, x = random(name, seed=seed), ids(2, 7)
        with torch.no_grad():
            want = theirs.generate(
                x, attention_mask=torch.ones_like(x), max_new_tokens=24, do_sample=False, eos_token_id=None
            )
        got = generate(from_transformers(theirs), x, 24).ids
        assert torch.equal(got, want[:, 7:])
        assert len(got.unique()) > 3


@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_two_chunks_is_prefill_in_one(name: str):
    ours, x = from_transformers(random(name, torch.float64)), ids(2, 17)
    whole, last = ours(x)
    parts, state = chunked(ours, x, [9, 0, 8])
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(unroll(ours, x)[0], whole, rtol=1e-10, atol=1e-12)
    next_ids = ids(2)
    torch.testing.assert_close(ours.step(next_ids, state)[0], ours.step(next_ids, last)[0], rtol=1e-10, atol=1e-12)


def test_transformers_mamba_forgets_its_state_in_a_second_chunk():
    """With a warm cache and more than one new token, the state space part of theirs starts again from zero."""
    theirs, x = random("mamba"), ids(2, 16)
    want = logits(theirs, x)[:, 8:]
    with torch.no_grad():
        cache = theirs(input_ids=x[:, :8], use_cache=True).cache_params
        second = theirs(input_ids=x[:, 8:], cache_params=cache, use_cache=True).logits
    ours = from_transformers(theirs)
    _, state = ours(x[:, :8])
    assert error(ours(x[:, 8:], state)[0], want) < 1e-4
    assert error(second, want) > 1e-2


def test_transformers_mamba2_forgets_the_step_limit_when_it_streams():
    """Their forward holds dt within time_step_limit; their step of one token does not."""
    theirs, x = shuffled(mamba2(time_step_limit=(0.2, 0.4))), ids(2, 9)
    want, ours = logits(theirs, x), from_transformers(theirs)
    assert error(ours(x)[0], want) < 1e-4
    assert error(unroll(ours, x)[0], want) < 1e-4
    with torch.no_grad():
        cache = theirs(input_ids=x[:, :8], use_cache=True).cache_params
        stepped = theirs(input_ids=x[:, 8:], cache_params=cache, use_cache=True).logits
    assert error(stepped, want[:, 8:]) > 1e-2


@pytest.mark.parametrize("text", ["[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]', "[0, 1e30]"])
def test_an_endless_step_limit_is_read_however_it_is_written(text: str, tmp_path: Path):
    theirs, x = random("mamba2"), ids(2, 9)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    file.write_text(json.dumps(config | {"time_step_limit": "HERE"}).replace('"HERE"', text))
    assert error(from_transformers(tmp_path)(x)[0], logits(theirs, x)) < 1e-4
    file.write_text(json.dumps(config | {"time_step_limit": [0.0]}))
    with refused(UsageError, "time_step_limit", "two numbers"):
        from_transformers(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_directory_gives_the_same_model(name: str, tmp_path: Path):
    theirs, x = random(name), ids(2, 9)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    want = from_transformers(theirs)
    for path in (tmp_path / "whole", str(tmp_path / "shards")):
        got = from_transformers(path)
        assert got.state_dict().keys() == want.state_dict().keys()
        assert torch.equal(got(x)[0], want(x)[0])
        assert not got.training
    if name != "xlstm_fused":
        again = type(theirs).from_pretrained(tmp_path / "whole").eval()
        if "experts" in name:
            in_plain_loops(again)  # their grouped product wants rows of 16 bytes
        assert error(want(x)[0], logits(again, x)) < 1e-4


def test_transformers_cannot_read_the_fused_xlstm_that_it_wrote(tmp_path: Path):
    random("xlstm_fused").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="broadcast shape"):
        transformers.xLSTMForCausalLM.from_pretrained(tmp_path)
    assert from_transformers(tmp_path)(ids(1, 3))[0].isfinite().all()


def test_broken_xlstm_configurations_are_one_line(tmp_path: Path):
    random("xlstm").save_pretrained(tmp_path)
    for name, wrong in (
        ("use_bias", True), ("add_out_norm", False), ("weight_mode", "split"), ("embedding_dim", 32), ("num_heads", 7),
    ):  # fmt: skip
        kept = json.loads((tmp_path / "config.json").read_text())[name]
        change_config(tmp_path, **{name: wrong})
        with refused(UsageError, str(wrong)):
            from_transformers(tmp_path)
        change_config(tmp_path, **{name: kept})
    from_transformers(tmp_path)


def test_an_intermediate_size_counts_and_not_expand(tmp_path: Path):
    """falcon-mamba-7b says expand 16 and an intermediate_size of twice its width, and means the latter."""
    theirs, x = shuffled(falcon_mamba(expand=16, intermediate_size=48)), ids(2, 9)
    assert theirs.config.expand == 16 and theirs.backbone.layers[0].mixer.intermediate_size == 48
    theirs.save_pretrained(tmp_path)
    for ours in (from_transformers(theirs), from_transformers(tmp_path)):
        assert error(ours(x)[0], logits(theirs, x)) < 1e-4
    change_config(tmp_path, intermediate_size=50)
    with refused(UsageError, "intermediate_size", "50", "24"):
        from_transformers(tmp_path)


def test_half_precision_weights_are_held_in_float32(tmp_path: Path):
    theirs, x = random("mamba", torch.bfloat16), ids(2, 9)
    theirs.save_pretrained(tmp_path)
    ours = from_transformers(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert error(ours(x)[0], logits(theirs.float(), x)) < 1e-4


def test_the_generator_is_left_as_it_was():
    theirs = random("mamba")
    before = torch.get_rng_state()
    from_transformers(theirs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random("mamba").save_pretrained(tmp_path)
    return tmp_path


def change_config(path: Path, **values: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_unknown_architecture_is_one_line(saved: Path):
    change_config(saved, model_type="mambo")
    with refused(Unknown, "mambo", "near: mamba"):
        from_transformers(saved)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=9))
    with refused(Unknown, "GPT2LMHeadModel", "gpt2"):
        from_transformers(gpt)
    with refused(UsageError, "Linear", "transformers"):
        from_transformers(nn.Linear(2, 2))


def test_broken_tensors_are_one_line(saved: Path):
    file, name = saved / "model.safetensors", "backbone.layers.1.mixer.A_log"
    tensors, _ = read_tensors(file)
    a_log = tensors.pop(name)
    write_tensors(file, tensors)
    with refused(DataError, str(saved), f"no tensor '{name}'", "near: backbone.layers.1.mixer."):
        from_transformers(saved)
    write_tensors(file, tensors | {name.replace("A_log", "A_lag"): a_log})
    with refused(DataError, f"no tensor '{name}'", "near: backbone.layers.1.mixer.A_lag"):
        from_transformers(saved)
    write_tensors(file, tensors | {name: a_log[:, 1:].contiguous()})
    with refused(DataError, name, "(48, 4)", "(48, 5)"):
        from_transformers(saved)
    write_tensors(file, tensors | {name: a_log, "backbone.layers.7.norm.weight": torch.ones(24)})
    with refused(DataError, "backbone.layers.7.norm.weight", "no place"):
        from_transformers(saved)
    file.write_bytes(b"\x80\x04 a pickle, or what the name says")
    with refused(DataError, "pickle"):
        from_transformers(saved)
    file.unlink()
    (saved / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with refused(DataError, "safetensors", "pickles are not read"):
        from_transformers(saved)


def test_a_broken_configuration_is_one_line(saved: Path):
    change_config(saved, hidden_size="24")
    with refused(UsageError, "hidden_size", "'24'", "int"):
        from_transformers(saved)
    change_config(saved, hidden_size=True)
    with refused(UsageError, "hidden_size", "True"):
        from_transformers(saved)
    change_config(saved, hidden_size=24, hidden_act="gelu")
    with refused(UsageError, "hidden_act", "gelu", "silu"):
        from_transformers(saved)
    change_config(saved, hidden_act="silu", state_size=0)
    with refused(UsageError, "states", "0"):
        from_transformers(saved)
    (saved / "config.json").unlink()
    with refused(DataError, "config.json"):
        from_transformers(saved)
    with refused(DataError, "nowhere"):
        from_transformers(saved / "nowhere")


def test_shards_outside_the_directory_are_not_read(saved: Path):
    (saved / "model.safetensors").rename(saved.parent / "model.safetensors")
    index = {"weight_map": {"backbone.embeddings.weight": "../model.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(DataError, "weight_map"):
        from_transformers(saved)


def test_context_is_how_far_attention_sees():
    theirs, x = random("jamba"), ids(2, 21)
    want = from_transformers(theirs)(x)[0]
    near_sighted = from_transformers(theirs, context=4)
    assert near_sighted.initial_state(1)[1].k.shape == (1, 3, 2, 6)
    assert error(near_sighted(x)[0][:, :4], want[:, :4]) < 1e-5 < 1e-2 < error(near_sighted(x)[0], want)


def test_experts_are_read_one_by_one_as_in_published_files(tmp_path: Path):
    for name, part in (("jamba_experts", "feed_forward"), ("qwen3_next_experts", "mlp")):
        theirs, x = random(name), ids(2, 9)
        theirs.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = read_tensors(file)[0]
        for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
            base = key.removesuffix("gate_up_proj")
            ups, downs = tensors.pop(key), tensors.pop(base + "down_proj")
            for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
                gate, up = up.chunk(2)
                for which, t in (("gate", gate), ("up", up), ("down", down)):
                    tensors[f"{base}{e}.{which}_proj.weight"] = t.contiguous()
        assert f"model.layers.0.{part}.experts.1.up_proj.weight" in tensors
        write_tensors(file, tensors)
        assert error(from_transformers(tmp_path / name)(x)[0], logits(theirs, x)) < 1e-4


def test_what_hybrids_have_that_is_not_built_is_one_line(tmp_path: Path):
    for build, changes, words in (
        (jamba, dict(num_experts=4, num_experts_per_tok=5), ["active 5", "at most the number of experts, 4"]),
        (bamba, dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}), ["scaled"]),
        (bamba, dict(hidden_act="gelu"), ["gelu"]),
    ):
        with refused(UsageError, *words):
            from_transformers(build(**changes))
    dense = shuffled(qwen3_next(num_experts=4, mlp_only_layers=[0, 1]))
    assert error(from_transformers(dense)(ids(2, 9))[0], logits(dense, ids(2, 9))) < 1e-4
    random("qwen3_next").save_pretrained(tmp_path)
    for name, wrong in (
        ("layer_types", ["linear_attention"]),
        ("linear_num_value_heads", 3),
        ("num_key_value_heads", 3),
    ):
        kept = json.loads((tmp_path / "config.json").read_text())[name]
        change_config(tmp_path, **{name: wrong})
        with refused(UsageError, str(wrong)):
            from_transformers(tmp_path)
        change_config(tmp_path, **{name: kept})
    from_transformers(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mamba", "falcon_mamba", "mamba2", "xlstm", "bamba", "jamba", "qwen3_next", "jamba_experts",
        "qwen3_next_experts",
    ],
)  # fmt: skip
def test_what_is_built_obeys_the_protocol(name: str):
    report = check_layer(from_transformers(random(name, torch.float64)), name=name)
    # which rows share an expert decides the shape of its product, and so the last bit of the others
    rounding = {"nan_in_a_state_stays_in_its_row"} if "experts" in name else set()
    assert {outcome.name for outcome in report.failed} <= rounding, report
    assert len(report.outcomes) > 100


def test_gradients_through_a_read_of_almost_nothing_are_checked_to_their_conditioning():
    """A query nearly orthogonal to the only key: the norm after it multiplies rounding by 300, forward's and step's."""
    model = prepare(from_transformers(random("qwen3_next_experts", torch.float64)))
    check = checks["float32_gradients_near_float64"]
    delta, reads = model.body.blocks[0].layer, []
    watch = delta.norm.register_forward_pre_hook(lambda _, args: reads.append(args[0].detach().square().mean(-1)))
    check(model)
    watch.remove()
    read = torch.cat([r.double().flatten() for r in reads]).sqrt()
    assert read.min() < 1e-5 and read.median() > 1e-2 and len(reads) > 2  # it is there, and was measured by

    def rounded(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        if y.dtype == torch.float32:
            y.register_hook(lambda g: g.bfloat16().float())

    delta.qkv.register_forward_hook(rounded)
    with pytest.raises(AssertionError, match="in float32 the gradient to"):
        check(model)


def test_something_was_found():
    kinds = {re.match("[a-z0-9]*(_mamba|_next)?", name)[0] for name in MODELS}  # type: ignore[index]
    assert kinds >= {"mamba", "falcon_mamba", "mamba2", "xlstm", "bamba", "jamba", "qwen3_next"}
