"""Weights for streaming: the same numbers, or nearly; the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from statewise.core import NumericError, UsageError, stream
from statewise.decoding import Sampling, generate
from statewise.models import LanguageModel
from statewise.serving import StreamedWeight, for_streaming
from statewise.serving.weights import FEW

LAYERS = ["gru", "lstm", "mamba", "mamba2", "gated_delta_net", "mlstm", "rwkv7", "s5", "window_attention"]


def language_model(name: str, **fields):
    torch.manual_seed(0)
    return LanguageModel(name, width=80, depth=2, **fields).build(x_vocab=97, y_width=97).eval()


@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (333, 129), (64, 1024)])
def test_products(rows, shape):
    torch.manual_seed(0)
    w, x, bias = torch.randn(shape), torch.randn(rows, shape[1]), torch.randn(shape[0])
    want = x.double() @ w.double().mT + bias
    size = x.abs().double() @ w.abs().double().mT + bias.abs()
    plain, rounded = (StreamedWeight.of(w, kind) for kind in ("float32", "int8"))
    off = (nn.functional.linear(x, plain, bias) - want).abs()
    assert (off <= 1e-6 * size).all()
    step = w.abs().amax(1) / 127
    assert ((rounded.dense() - w).abs() <= 0.5001 * step[:, None]).all()
    exact = x.double() @ rounded.dense().double().mT + bias
    assert ((nn.functional.linear(x, rounded, bias) - exact).abs() <= 1e-6 * size).all()
    assert rounded.stored_bytes < 0.26 * plain.stored_bytes + 4 * shape[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_not_finite_stays_so(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w, x = torch.randn(300, 200), torch.randn(2, 200)
        x[0, 7], w[5, 9] = torch.nan, torch.inf
        y = nn.functional.linear(x, StreamedWeight.of(w, "float32"))
    finally:
        torch.set_num_threads(before)
    assert y[0].isnan().all() and y[1].isfinite().sum() == 299 and not y[1, 5].isfinite()


def test_a_row_of_zeros_and_rows_looked_up():
    w = torch.randn(50, 100)
    w[3] = 0
    for kind in ("float32", "int8"):
        streamed = StreamedWeight.of(w, kind)
        assert torch.equal(streamed.dense()[3], w[3])
        ids = torch.tensor([[3, 4], [49, 0]])
        assert torch.equal(nn.functional.embedding(ids, streamed), streamed.dense()[ids])
        for wrong in (-1, 50):
            with pytest.raises(IndexError):
                nn.functional.embedding(torch.tensor([wrong]), streamed)


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_for_streaming_is_the_model(name):
    model, ids = language_model(name), torch.randint(97, (2, 20))
    fast, small = for_streaming(model), for_streaming(model, weights="int8")
    with torch.no_grad():
        want = model(ids)[0]
        torch.testing.assert_close(fast(ids)[0], want, rtol=1e-4, atol=1e-5)
        got = torch.stack([y for y, _ in stream(fast, ids.unbind(1))], 1)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        rounded = torch.stack([y for y, _ in stream(small, ids.unbind(1))], 1)
        torch.testing.assert_close(rounded, small(ids)[0], rtol=1e-3, atol=1e-4)
        off = (rounded.log_softmax(-1) - want.log_softmax(-1)).abs().max()
    assert 0 < off < 0.2
    state = model(ids)[1]
    torch.testing.assert_close(fast.step(ids[:, 0], state)[0], model.step(ids[:, 0], state)[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(generate(fast, ids, 12).ids, generate(model, ids, 12).ids)


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_are_a_quarter_and_the_original_is_untouched(tied):
    model = LanguageModel("mamba", width=256, depth=2, mlp=1.0, tied=tied).build(x_vocab=300, y_width=300)
    before = copy.deepcopy(model.state_dict())
    small, fast = for_streaming(model, weights="int8"), for_streaming(model)
    assert model.training and not small.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = {id(b): b for b in small.buffers() if isinstance(b, StreamedWeight)}.values()
    assert sum(w.stored_bytes for w in weights) < 0.27 * sum(4 * w.numel() for w in weights)
    assert sum(w.numel() for w in weights) > 0.9 * sum(p.numel() for p in model.parameters())
    shared = {b.kept.data_ptr() for b in fast.buffers() if isinstance(b, StreamedWeight)}
    assert shared <= {p.data_ptr() for p in model.parameters()}  # float32: not one byte more
    rng = torch.Generator().manual_seed(0)
    assert generate(small, torch.tensor([[1]]), 5, Sampling(top_p=0.9), rng=rng).lengths.tolist() == [5]
    same = fast.state_dict()
    assert all(torch.equal(same[name], before[name]) for name in before)


def test_what_can_not_stream_is_refused():
    model = language_model("gru")
    with pytest.raises(UsageError, match="one of float32, bfloat16, int8"):
        for_streaming(model, weights="int4")  # type: ignore[arg-type]
    with pytest.raises(NumericError, match="not finite"):
        StreamedWeight.of(torch.tensor([[1.0, torch.inf]]), "int8")
    with pytest.raises(UsageError, match="float64"):
        for_streaming(model.double())


@pytest.mark.parametrize("name", ["cfc", "elman", "gru", "jordan", "lstm"])
def test_what_is_recurrent_streams_too(name):
    model = language_model(name)
    small = for_streaming(model, weights="int8")
    assert sum(p.numel() for p in small.parameters() if p.ndim > 1) == 0
    ids = torch.randint(97, (2, 12))
    with torch.no_grad():
        for m in (small, copy.deepcopy(small)):
            by_step = torch.stack([y for y, _ in stream(m, ids.unbind(1))], 1)
            torch.testing.assert_close(by_step, m(ids)[0], rtol=1e-3, atol=1e-4)
        plain = torch.stack([y for y, _ in stream(model, ids.unbind(1))], 1)
    assert 0 < (by_step.log_softmax(-1) - plain.log_softmax(-1)).abs().max() < 0.2
