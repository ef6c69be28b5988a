"""Layers over the outer-product scan: each equals the T x T matrix that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from own_xlstm import without_the_xlstm_package
from statewise.core import UsageError
from statewise.layers import GLA, HGRN2, MLSTM, LightNet, LinearAttention, MatrixMemory, MLSTMLarge, RetNet
from statewise.layers.mlstm import Gated, memory_scan, memory_step

B, T = 2, 37


def double(layer, seed=0):
    """The layer in float64, its parameters away from those of its birth."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer.double()


def inputs(layer, steps=T):
    return torch.randn(B, steps, layer.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def heads_of(layer, x):
    q, k, v = layer.qkv(x).unflatten(-1, (layer.heads, -1)).split([layer.key, layer.key, layer.value], -1)
    return q, k, v


def causal(matrix):
    """(B, H, T, T) with zeros above the diagonal."""
    return matrix.tril()


def read(matrix, v):
    """M v per head: (B, H, T, S), (B, S, H, V) -> (B, T, H, V)"""
    return torch.einsum("bhts,bshv->bthv", matrix, v)


def layer_norm(o, weight, eps=1e-6):
    return F.layer_norm(o, o.shape[-1:], eps=eps).flatten(-2) * weight


def rms_norm(o, weight):
    return F.rms_norm(o, o.shape[-1:], eps=1e-6).flatten(-2) * weight


@pytest.mark.parametrize(
    "feature, phi", [("elu", lambda x: F.elu(x) + 1), ("relu", F.relu), ("softmax", lambda x: x.softmax(-1))]
)
def test_linear_attention_is_its_normalised_quadratic_form(feature, phi):
    layer = double(LinearAttention(5, heads=2, key=3, value=4, feature=feature))
    x = inputs(layer)
    q, k, v = heads_of(layer, x)
    score = causal(torch.einsum("bthk,bshk->bhts", phi(q), phi(k)))
    want = read(score / (score.sum(-1, keepdim=True) + 1e-6), v)
    torch.testing.assert_close(layer(x)[0], layer.out(want.flatten(-2)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("feature, phi", [("identity", lambda x: x), ("silu", F.silu)])
@pytest.mark.parametrize("normaliser", ["learnt", "none", "rms"])
def test_linear_attention_without_a_sum_is_its_quadratic_form(feature, phi, normaliser):
    layer = double(LinearAttention(5, heads=2, key=3, value=4, feature=feature, normaliser=normaliser))
    x = inputs(layer)
    q, k, v = heads_of(layer, x)
    o = read(causal(torch.einsum("bthk,bshk->bhts", phi(q), phi(k))) / 3**0.5, v)
    if normaliser == "learnt":
        o = o / (x @ layer.log_z.weight.mT).exp()[..., None]
    o = rms_norm(o, layer.norm.weight) if normaliser == "rms" else o.flatten(-2)
    torch.testing.assert_close(layer(x)[0], layer.out(o), rtol=1e-10, atol=1e-12)


def test_linear_attention_of_equal_keys_is_the_mean_of_the_values():
    layer = LinearAttention(3, heads=1, key=2, value=3).double()
    with torch.no_grad():
        layer.qkv.weight[:4] = 0
        layer.qkv.weight[4:], layer.out.weight[:] = torch.eye(3), torch.eye(3)
    x = inputs(layer)
    mean = x.cumsum(1) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(layer(x)[0], mean, rtol=1e-6, atol=1e-6)


def test_linear_attention_of_a_query_that_no_key_answers_is_zero():
    layer = LinearAttention(2, heads=1, key=2, value=2, feature="relu").double()
    with torch.no_grad():
        layer.qkv.weight[:] = -layer.qkv.weight.abs()
    x = inputs(layer).abs().requires_grad_()
    y = layer(x)[0]
    assert not y.any()
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_linear_attention_refuses_what_cannot_be_normalised():
    with pytest.raises(UsageError, match="feature 'identity' may be negative and its sum zero; take one of elu"):
        LinearAttention(2, heads=1, key=2, value=2, feature="identity")
    with pytest.raises(UsageError, match="normaliser 'softmax'; expected one of sum, learnt"):
        LinearAttention(2, heads=1, key=2, value=2, normaliser="softmax")


def test_retention_is_rotated_and_forgets_by_the_closed_form():
    layer = double(RetNet(5, heads=3, key=4, value=6))
    x = inputs(layer)
    q, k, v = heads_of(layer, x)
    late = torch.arange(T)[:, None] - torch.arange(T)
    decay = (1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64)))[:, None, None] ** late.clamp(min=0)
    # the angle sees the difference of times, in complex numbers: pair i is channels i and i + K/2
    q, k = (torch.complex(z[..., :2], z[..., 2:]) for z in (q, k))
    turn = torch.polar(
        torch.ones(1, dtype=torch.float64), late[..., None] * 10_000.0 ** (-torch.arange(2) / 2).double()
    )
    score = torch.einsum("bthi,bshi,tsi->bhts", q, k.conj(), turn).real / 4**0.5
    want = layer_norm(read(causal(score * decay), v), layer.norm.weight)
    torch.testing.assert_close(layer(x)[0], layer.out(want * F.silu(layer.gate(x))), rtol=1e-9, atol=1e-11)


def test_retention_sees_differences_of_time_only():
    layer = double(RetNet(3, heads=2, key=4, value=4))
    x = inputs(layer)
    first = layer.initial_state(B)
    torch.testing.assert_close(
        layer(x, first._replace(seen=first.seen + 10**6))[0], layer(x, first)[0], rtol=1e-7, atol=1e-9
    )


def gated_matrix(q, k, log_decay):
    """M_ts = sum_i q_ti k_si prod_{s < r <= t} a_ri, by the product itself."""
    a, m = log_decay.exp(), torch.zeros(q.shape[0], q.shape[2], T, T, dtype=q.dtype)
    for s in range(T):
        kept = k[:, s]
        for t in range(s, T):
            kept = kept if t == s else a[:, t] * kept
            m[:, :, t, s] = (q[:, t] * kept).sum(-1)
    return m


def test_gla_is_its_matrix():
    layer = double(GLA(5, heads=2, key=3, value=4, rank=2, temper=2.0))
    x = inputs(layer)
    q, k, v = heads_of(layer, x)
    log_decay = F.logsigmoid(layer.decay(x)).unflatten(-1, (2, 3)) / 2
    o = rms_norm(read(gated_matrix(q / 3**0.5, k, log_decay), v), layer.norm.weight)
    torch.testing.assert_close(layer(x)[0], layer.out(o * F.silu(layer.gate(x))), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lower_bound", [0.0, 0.7])
def test_hgrn2_is_its_matrix(lower_bound):
    layer = double(HGRN2(5, heads=2, key=3, value=4, lower_bound=lower_bound))
    x = inputs(layer)
    q, f, v = heads_of(layer, x)
    f = lower_bound + (1 - lower_bound) * f.sigmoid()
    assert f.min() > lower_bound
    o = rms_norm(read(gated_matrix(F.silu(q), 1 - f, f.log()), v), layer.norm.weight)
    torch.testing.assert_close(layer(x)[0], layer.out(o), rtol=1e-10, atol=1e-12)


def test_hgrn2_keeps_what_enters_when_its_gate_is_shut():
    layer = HGRN2(2, heads=1, key=2, value=2, lower_bound=0.5)
    open_ = layer.encode(torch.full((1, 2), 1.0))
    with torch.no_grad():
        layer.qkv.weight[2:4] = 20.0
    shut = layer.encode(torch.full((1, 2), 1.0))
    torch.testing.assert_close(shut.k.double(), -shut.log_decay[..., 0].double().expm1(), rtol=1e-6, atol=0)
    assert 0 < shut.k.max() < 1e-16 < open_.k.min()  # 1 - f as written would be 0


def test_lightnet_is_a_causal_softmax_of_every_key_channel():
    layer = double(LightNet(5, heads=2, key=3, value=4, rank=2))
    x = inputs(layer)
    q, k, v = heads_of(layer, x)
    late = torch.ones(T, T, dtype=torch.bool).triu(1)[:, :, None, None]  # (T, S, 1, 1)
    weight = (k[:, None] + torch.zeros(T, 1, 1, 1)).masked_fill(late, -torch.inf).softmax(2)  # (B, T, S, H, K)
    o = torch.einsum("bthk,btshk,bshv->bthv", F.silu(q), weight, v)
    want = layer.out(rms_norm(o, layer.norm.weight) * layer.gate(x).sigmoid())
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-10, atol=1e-12)


def test_lightnet_in_float32_averages_a_constant_to_itself_for_long():
    layer = LightNet(2, heads=1, key=3, value=2, rank=1)
    u = layer.encode(torch.randn(1, 2000, 2))
    u = u._replace(q=torch.ones_like(u.q), k=10 * u.k, v=torch.ones_like(u.v))
    o, _ = layer.scan(u, layer.initial_state(1), None, None)
    torch.testing.assert_close(o, torch.full_like(o, 3.0), rtol=3e-5, atol=0)  # the weights of a channel sum to one


def gated(size=1.0, *, seed=0, steps=T, dtype=torch.float64, shift=0.0):
    """q, k, v and gates whose input gate is about e^(shift +- size)."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, steps, 2, n, generator=rng, dtype=torch.float64) for n in (3, 3, 4))
    i, f = (size * torch.randn(B, steps, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    return Gated(*(z.to(dtype).requires_grad_() for z in (q, k, v, i + shift, F.logsigmoid(f + 1))))


def no_memory(dtype=torch.float64):
    c = torch.zeros(B, 2, 3, 4, dtype=dtype)
    return MatrixMemory(c, c[..., 0].clone(), c[..., 0, 0].clone())


def plain(u):
    """The recurrence as the paper first states it: no m, every gate an exponential or a sigmoid outright."""
    c, n, out = 0, 0, []
    for q, k, v, i, f in zip(*(z.unbind(1) for z in u)):
        q, i, f = q / q.shape[-1] ** 0.5, i.exp()[..., None], f.exp()[..., None]
        c, n = f[..., None] * c + (i * k)[..., None] * v[..., None, :], f * n + i * k
        z = (n * q).sum(-1, keepdim=True).abs().clamp_min(1)
        out.append((q[..., None] * c).sum(-2) / z)
    return torch.stack(out, 1)


def parallel(u):
    """((Q K^T e^(D - m)) / max(|row sum|, e^-m)) V with D_ts = sum_{s < r <= t} log f_r + log i_s, m its row max."""
    total = u.log_forget.cumsum(1).mT  # (B, H, T)
    d = total[..., None] - total[..., None, :] + u.log_input.mT[..., None, :]
    d = d.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    m = d.amax(-1, keepdim=True)
    s = torch.einsum("bthk,bshk->bhts", u.q, u.k) / u.q.shape[-1] ** 0.5 * (d - m).exp()
    return read(s / torch.maximum(s.sum(-1, keepdim=True).abs(), (-m).exp()), u.v)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 3.0])  # the denominator 1 rules, either, |n . q| rules
def test_the_mlstm_memory_is_its_parallel_form(shift):
    u = gated(shift=shift)
    h = memory_scan(u, no_memory(), None, None)[0]
    torch.testing.assert_close(h, parallel(u), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(h, plain(u), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 3.0])
def test_the_mlstm_memory_has_the_gradients_of_the_plain_recurrence_the_normalisers_too(shift):
    u = gated(shift=shift)
    cotangent = torch.randn(B, T, 2, 4, dtype=torch.float64)
    got = torch.autograd.grad((memory_scan(u, no_memory(), None, None)[0] * cotangent).sum(), list(u))
    want = torch.autograd.grad((plain(u) * cotangent).sum(), list(u))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_normaliser_held_constant_would_be_noticed():
    u = gated(shift=3.0)
    q, k, v, i, f = u
    c, n, out = 0, 0, []
    for t in range(T):
        fade, enter = f[:, t].exp()[..., None], i[:, t].exp()[..., None]
        c = fade[..., None] * c + (enter * k[:, t])[..., None] * v[:, t, :, None]
        n = fade * n + enter * k[:, t]
        query = q[:, t] / 3**0.5
        z = (n * query).sum(-1, keepdim=True).abs().clamp_min(1).detach()
        out.append((query[..., None] * c).sum(-2) / z)
    wrong = torch.autograd.grad(torch.stack(out, 1).sin().sum(), [q, k, i, f])
    right = torch.autograd.grad(memory_scan(u, no_memory(), None, None)[0].sin().sum(), [q, k, i, f])
    for w, r in zip(wrong, right):
        assert (w - r).norm() > 0.1 * r.norm()


@pytest.mark.parametrize("shift", [-30.0, 7.0, 30.0])
def test_the_mlstm_memory_does_not_depend_on_its_scale(shift):
    u, later = gated(), gated(seed=1)
    _, (c, n, m) = memory_scan(u, no_memory(), None, None)
    scale = torch.tensor(-shift, dtype=torch.float64).exp()
    moved = MatrixMemory(scale * c, scale * n, m + shift)
    want = memory_scan(later, MatrixMemory(c, n, m), None, None)[0]
    torch.testing.assert_close(memory_scan(later, moved, None, None)[0], want, rtol=1e-9, atol=1e-11)
    empty = no_memory()
    torch.testing.assert_close(
        memory_scan(u, empty._replace(m=empty.m + shift), None, None)[0], plain(u), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("way", ["scan", "step"])
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_gates_of_any_size_do_not_overflow(way, shift):
    high = gated(50.0, shift=shift)
    low = Gated(*(z.detach().float().requires_grad_() for z in high))
    if way == "scan":
        h, last = memory_scan(low, no_memory(torch.float32), None, None)
    else:
        last, hs = no_memory(torch.float32), []
        for t in range(T):
            h, last = memory_step(Gated(*(z[:, t] for z in low)), last)
            hs.append(h)
        h = torch.stack(hs, 1)
    assert h.isfinite().all() and all(s.isfinite().all() for s in last)
    assert all(g.isfinite().all() for g in torch.autograd.grad(h.sum() + last.c.sum() + last.n.sum(), list(low)))
    want = parallel(high)
    error = ((h - want).abs() / (1e-6 + want.abs())).median()  # some answers divide by an n . q of nearly zero
    assert error < 1e-4


def test_a_slow_decay_is_not_lost_under_a_large_scale():
    """At m = 12 a float32 cannot show one step of log f = -1e-7; ten thousand of them must still count."""
    steps = 10_000
    one = torch.ones(1, steps, 1, 1)
    gate = torch.full((1, steps, 1), -40.0)
    gate[:, 0] = 12.0
    u = Gated(1e-5 * one, one, one, gate, torch.full((1, steps, 1), -1e-7))
    zero = torch.zeros(1, 1, 1, 1)
    _, (c, _, m) = memory_scan(u, MatrixMemory(zero, zero[..., 0], zero[..., 0, 0]), None, None)
    want = torch.tensor(12 - 1e-7 * (steps - 1)).double()
    torch.testing.assert_close(m.double() + c.double().log().flatten(), want.view(1, 1), rtol=0, atol=1e-5)


def test_an_mlstm_layer_is_its_equations():
    layer = double(MLSTM(4, heads=2, block=2, taps=3))
    x = inputs(layer)
    u, z = layer.up(x).chunk(2, -1)
    taps = F.pad(u, (0, 0, 2, 0)).unfold(1, 3, 1)  # (B, T, N, P), oldest first
    c = F.silu((taps * layer.conv.weight.flip(0).mT).sum(-1) + layer.conv.bias)
    q, k, v = (a @ torch.block_diag(*w.weight).mT for a, w in ((c, layer.q), (c, layer.k), (u, layer.v)))
    i, f = layer.gates(torch.cat([q, k, v], -1)).chunk(2, -1)
    h = parallel(Gated(*(a.unflatten(-1, (2, -1)) for a in (q, k, v)), i, F.logsigmoid(f)))
    want = layer.out((layer_norm(h, layer.norm.weight, eps=1e-5) + layer.skip * c) * F.silu(z))
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-8, atol=1e-10)


def test_mlstm_gates_start_open_to_remember():
    for layer in (MLSTM(8, heads=4), MLSTM(8, heads=4, forget="exponential")):
        with torch.no_grad():
            gated, _ = layer._gated(torch.randn(1, 16), torch.randn(1, 16))
        torch.testing.assert_close(gated.log_forget[0].exp(), torch.linspace(3, 6, 4).sigmoid())
        assert gated.log_input.abs().max() < 0.6


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: HGRN2(2, heads=1, key=2, value=2, lower_bound=1.0), r"lower_bound 1\.0; expected 0, or at least 1e-6"),
        (lambda: GLA(2, heads=1, key=2, value=2, temper=0.0), r"temper 0\.0; expected more than 0"),
        (lambda: MLSTM(3, heads=4), "6 inner channels .* not a multiple of heads 4"),
        (lambda: MLSTM(3, heads=2, block=4), "6 is not a multiple of the block size 4"),
        (lambda: MLSTM(4, heads=2, forget="tanh"), "forget 'tanh'; expected 'sigmoid' or 'exponential'"),
        (lambda: MLSTMLarge(3, heads=2, key=2, value=2, gate_cap=0.0), "gate_cap 0.0; expected more than 0, or None"),
        (lambda: MLSTMLarge(3, heads=2, key=2, value=2, eps=-1.0), "eps -1.0; expected at least 0"),
    ],
)
def test_bad_arguments_are_refused_in_words(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_mlstm_large_is_the_xlstm_layer_of_transformers():
    pytest.importorskip("transformers")
    from transformers import xLSTMConfig

    options = dict(mode="train", chunk_size=16, autocast_kernel_dtype="float32", norm_reduction_force_float32=False)
    layer = without_the_xlstm_package().xLSTMLayer
    peer = layer(xLSTMConfig(hidden_size=64, num_heads=2, qk_dim_factor=1.0, num_hidden_layers=1, **options))
    peer = peer.double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 1))
    ours = MLSTMLarge(64, heads=2, key=32, value=32, eps=1e-6).double()
    pairs = {"q": "q", "k": "k", "v": "v", "out_gate": "ogate_preact", "norm": "multihead_norm", "out": "out_proj"}
    weights = {f"{mine}.weight": getattr(peer, its).weight for mine, its in pairs.items()}
    for what in ("weight", "bias"):
        both = [getattr(getattr(peer, gate), what) for gate in ("igate_preact", "fgate_preact")]
        weights[f"gates.{what}"] = torch.cat(both)
    ours.load_state_dict(weights)
    x = torch.randn(2, 48, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], peer(x)[0], rtol=1e-10, atol=1e-10)


def test_births():
    torch.manual_seed(0)
    layer = MLSTM(64, heads=64)
    assert layer.gates.bias[:64].std().item() == pytest.approx(0.1, rel=0.3) and layer.skip.eq(1).all()
    assert (
        not layer.gates.weight.any()
        and not LinearAttention(4, heads=1, key=2, value=2, feature="identity", normaliser="learnt").log_z.weight.any()
    )
    gla = GLA(64, heads=2, key=4, value=4)
    assert gla.decay[0].out_features == 16
    decay = gla.encode(torch.randn(1000, 64)).log_decay.exp()
    assert decay.min() > 0.9 and decay.max() < 1  # sigmoid(about 0)^(1/16) = 0.96
    assert decay.mean().item() == pytest.approx(0.5 ** (1 / 16), abs=0.01)


def test_a_learnt_normaliser_of_any_size_leaves_numbers():
    layer = LinearAttention(2, heads=1, key=2, value=2, feature="identity", normaliser="learnt")
    with torch.no_grad():
        layer.log_z.weight.fill_(1.0)
    for size in (1e3, -1e3):  # z = e^+-20 instead of infinity or 0
        x = torch.full((1, 3, 2), size, requires_grad=True)
        y = layer(x)[0]
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and y.abs().sum() > 0 and grad.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps_joins_the_denominator_of_the_memory_as_it_is_kept(eps):
    """One step from nothing: c = i k v^T, n = i k at the scale e^m, m = max(log f, log i)."""
    u = gated(shift=1.0, steps=1)
    h, _ = memory_scan(u, no_memory(), None, None, eps=eps)
    m = torch.maximum(u.log_forget, u.log_input)
    z = (u.q * u.k).sum(-1) / 3**0.5 * (u.log_input - m).exp()
    want = (z / (torch.maximum(z.abs(), (-m).exp()) + eps))[..., None] * u.v
    torch.testing.assert_close(h, want, rtol=1e-10, atol=1e-12)
    step, _ = memory_step(Gated(*(t[:, 0] for t in u)), no_memory(), eps=eps)
    torch.testing.assert_close(step, want[:, 0], rtol=1e-10, atol=1e-12)
