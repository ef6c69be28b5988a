"""Our ops beside independent implementations from PyPI: values and gradients, through outputs and last states.

Each test names its peer. Peers that compute in float32 are made to compute in float64, so that agreement is to 1e-10.
Where a peer is wrong, a test says how, so that the day it is mended is noticed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from in_float64 import InFloat64
from own_xlstm import without_the_xlstm_package
from statewise.layers.mlstm import Gated, MatrixMemory, memory_scan
from statewise.ops import Op, delta_scan, dplr_scan, linear_scan, outer_scan, selective_scan

# What is imported, and what must be installed for it. Module -> packages.
PEERS = {
    "accelerated_scan.ref": ("accelerated_scan",),
    "fla.ops.gla.naive": ("fla", "einops", "triton"),
    "mambapy.pscan": ("mambapy",),
    "mlstm_kernels.torch": ("mlstm_kernels",),
    "s5.s5_model": ("s5",),
    "transformers": ("transformers",),
}
TOLERANCE = 1e-10
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # s5-pytorch
    pytest.mark.filterwarnings("ignore:Triton is not supported"),  # fla, of a machine without a GPU
]


def missing(module: str) -> str | None:
    return next((name for name in PEERS[module] if importlib.util.find_spec(name) is None), None)


def needs(module: str) -> pytest.MarkDecorator:
    """Skip the test, with the reason, unless a peer is here."""
    return pytest.mark.skipif(missing(module) is not None, reason=f"peer {module} needs {missing(module)}")


@pytest.mark.skipif("CI" not in os.environ, reason="peers may be missing outside CI")
def test_no_peer_is_missing_in_ci():
    assert [name for name in PEERS if missing(name)] == []


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def log_decay(*shape: int, seed: int = 0) -> Tensor:
    """Logs of decays of all sizes, some very near 1 and some near 0."""
    return -(draw(*shape, seed=seed) * 2 - 1).exp()


def outcome(run: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of every input, each output weighted by fixed random numbers."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    outs = run(**leaves)
    outs = list(outs) if isinstance(outs, tuple | list) else [outs]
    loss = sum((out * draw(*out.shape, seed=7)).real.sum() for out in outs)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [*outs, *(torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), grads))]


def apart(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Largest difference of each pair, relative to the largest value."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    return [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(got, want)]


def agree(
    op: Op, ours: Callable[..., Any], theirs: Callable[..., Any], tolerance: float = TOLERANCE, **inputs: Tensor
) -> None:
    """ours(run, **inputs) with every backend of the op that runs here, theirs(**inputs)."""
    with InFloat64():
        want = outcome(theirs, inputs)
    assert all(torch.isfinite(torch.view_as_real(w) if w.is_complex() else w).all() for w in want)
    tried = 0
    for backend in [*op.backends, "reference"]:
        if backend != "reference" and why_not(op, backend) is not None:
            continue
        run = lambda *args, backend=backend, **kwargs: op(*args, backend=backend, **kwargs)
        off = apart(outcome(lambda run=run, **values: ours(run, **values), inputs), want)
        assert max(off) < tolerance, f"{op.name} by {backend}: {off}"
        tried += 1
    assert tried >= 1


def why_not(op: Op, backend: str) -> str | None:
    sample = next(iter(op.samples("cpu", torch.float64)))
    sample = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in sample.items()}
    return op.backends[backend].why_not((), sample)


def torch_path(model: str, name: str) -> Callable[..., Any]:
    """A function of transformers in plain torch, also where an installed package would take its place."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return inspect.unwrap(getattr(module, name))


# ---- linear_scan


@needs("accelerated_scan.ref")
def test_linear_scan_equals_accelerated_scan():
    scan = importlib.import_module("accelerated_scan.ref").scan
    agree(
        linear_scan,
        lambda run, a, x: run(a, x, torch.zeros(2, 5).double())[0],
        lambda a, x: scan(a.mT.contiguous(), x.mT.contiguous()).mT,
        a=draw(2, 128, 5).sigmoid(),
        x=draw(2, 128, 5),
    )


@needs("mambapy.pscan")
def test_linear_scan_equals_mambapy():
    pscan = importlib.import_module("mambapy.pscan").pscan
    agree(
        linear_scan,
        lambda run, a, x: run(a, x, torch.zeros(2, 5, 3).double())[0],
        lambda a, x: pscan(a, x),
        a=draw(2, 77, 5, 3).sigmoid(),
        x=draw(2, 77, 5, 3),
    )


@needs("s5.s5_model")
def test_linear_scan_of_complex_numbers_equals_s5_pytorch():
    s5 = importlib.import_module("s5.s5_model")
    scan, combine = s5.associative_scan, s5.binary_operator
    a = torch.polar(draw(60, 5).sigmoid(), 3 * draw(60, 5, seed=1))
    x = torch.complex(draw(60, 5, seed=2), draw(60, 5, seed=3))
    agree(
        linear_scan,
        lambda run, a, x: run(a[None], x[None], torch.zeros(1, 5, dtype=torch.complex128))[0][0],
        lambda a, x: scan(combine, (a, x))[1],
        a=a,
        x=x,
    )


@needs("fla.ops.gla.naive")
def test_linear_scan_equals_fla_naive_hgrn():
    naive = importlib.import_module("fla.ops.hgrn.naive").naive_recurrent_hgrn
    agree(
        linear_scan,
        lambda run, x, g, h0: run(g.exp(), x, h0),
        lambda x, g, h0: naive(x.clone(), g, initial_state=h0, output_final_state=True),
        x=draw(2, 30, 5),
        g=log_decay(2, 30, 5),
        h0=draw(2, 5),
    )


# ---- selective_scan


@needs("mambapy.pscan")
def test_selective_scan_equals_mambapy():
    pscan = importlib.import_module("mambapy.pscan").pscan

    def theirs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        h = pscan((dt[..., None] * a).exp(), (dt * x)[..., None] * b[:, :, None])
        return (h @ c[..., None])[..., 0]

    agree(
        selective_scan,
        lambda run, x, dt, a, b, c: run(x, dt, a, b, c, torch.zeros(2, 6, 4).double())[0],
        theirs,
        **mamba_inputs(2, 75, 6, 4),
    )


def mamba_inputs(batch: int, steps: int, width: int, states: int) -> dict[str, Tensor]:
    return dict(
        x=draw(batch, steps, width),
        dt=F.softplus(draw(batch, steps, width, seed=1)),
        a=-draw(width, states).exp(),
        b=draw(batch, steps, states),
        c=draw(batch, steps, states, seed=1),
    )


@needs("transformers")
def test_selective_scan_equals_transformers_mamba():
    scan = torch_path("mamba", "mamba_selective_scan")

    def theirs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        y, last = scan(x.mT, dt.mT, a, b.mT, c.mT, return_last_state=True)
        return y.mT, last

    agree(
        selective_scan,
        lambda run, x, dt, a, b, c: run(x, dt, a, b, c, torch.zeros(2, 6, 4).double()),
        theirs,
        **mamba_inputs(2, 75, 6, 4),
    )


# ---- outer_scan


@needs("transformers")
def test_outer_scan_with_a_scalar_decay_and_groups_equals_transformers_mamba2():
    scan = torch_path("mamba2", "mamba2_chunk_scan")
    heads = 6

    def ours(run: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Any:
        y, last = run(c, b, dt[..., None] * x, state, log_decay=(dt * a)[..., None, None])
        return y, last

    def theirs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Any:
        y, last = scan(x, dt, a, b, c, 16, initial_states=state.mT, return_final_states=True)
        return y, last.mT

    agree(
        outer_scan,
        ours,
        theirs,
        x=draw(2, 300, heads, 4),
        dt=F.softplus(draw(2, 300, heads)),
        a=-draw(heads).exp(),
        b=draw(2, 300, 2, 5),
        c=draw(2, 300, 2, 5, seed=1),
        state=draw(2, heads, 5, 4),
    )


def attention_inputs(steps: int, key: int = 5, value: int = 4, *, heads: int = 3, time: int = 1) -> dict[str, Tensor]:
    """q, k, v and a state; time is the axis of time, 2 where heads come before it."""
    lead = (2, steps, heads) if time == 1 else (2, heads, steps)
    return dict(q=draw(*lead, key), k=draw(*lead, key, seed=1), v=draw(*lead, value), state=draw(2, heads, key, value))


@needs("fla.ops.gla.naive")
def test_outer_scan_with_a_decay_per_key_equals_fla_naive_gla():
    naive = importlib.import_module("fla.ops.gla.naive").naive_recurrent_gla
    agree(
        outer_scan,
        lambda run, q, k, v, state, g: run(q * 5**-0.5, k, v, state, log_decay=g[..., None]),
        lambda q, k, v, state, g: naive(q, k, v, g, initial_state=state, output_final_state=True),
        **attention_inputs(70),
        g=log_decay(2, 70, 3, 5),
    )


@needs("fla.ops.gla.naive")
def test_outer_scan_with_a_scalar_decay_equals_fla_naive_simple_gla():
    naive = importlib.import_module("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    agree(
        outer_scan,
        lambda run, q, k, v, state, g: run(q * 5**-0.5, k, v, state, log_decay=g[..., None, None]),
        lambda q, k, v, state, g: naive(q, k, v, g, initial_state=state, output_final_state=True),
        **attention_inputs(70),
        g=log_decay(2, 70, 3),
    )


@needs("fla.ops.gla.naive")
def test_outer_scan_with_fixed_decays_equals_fla_naive_retention():
    naive = importlib.import_module("fla.ops.retention.naive").naive_retention
    inputs = attention_inputs(70, heads=3)
    inputs.pop("state")
    decay = torch.log1p(-(2.0 ** -(5 + torch.arange(3, dtype=torch.float64))))
    swap = lambda t: t.transpose(1, 2)
    agree(
        outer_scan,
        lambda run, q, k, v: run(
            q * 5**-0.5, k, v, torch.zeros(2, 3, 5, 4).double(), log_decay=decay.view(1, 1, 3, 1, 1)
        )[0],
        lambda q, k, v: swap(naive(swap(q), swap(k), swap(v))),
        **inputs,
    )


@needs("fla.ops.gla.naive")
def test_outer_scan_without_decay_equals_fla_naive_linear_attention():
    naive = importlib.import_module("fla.ops.linear_attn.naive").naive_recurrent_linear_attn
    inputs = attention_inputs(70)
    inputs.pop("state")
    agree(
        outer_scan,
        lambda run, q, k, v: run(q * 5**-0.5, k, v, torch.zeros(2, 3, 5, 4).double())[0],
        lambda q, k, v: naive(q, k, v)[0],
        **inputs,
    )


# ---- delta_scan


def unit(t: Tensor) -> Tensor:
    return F.normalize(t, dim=-1)


@needs("transformers")
@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_delta_scan_with_a_gate_equals_transformers_qwen3_next(name: str):
    rule = torch_path("qwen3_next", name)

    def theirs(q: Tensor, k: Tensor, v: Tensor, state: Tensor, beta: Tensor, g: Tensor) -> Any:
        return rule(q, unit(k), v, g=g, beta=beta.sigmoid(), initial_state=state, output_final_state=True)

    agree(
        delta_scan,
        lambda run, q, k, v, state, beta, g: run(
            q * 5**-0.5, unit(k), v, beta.sigmoid(), state, log_decay=g[..., None, None]
        ),
        theirs,
        **attention_inputs(300),
        beta=draw(2, 300, 3),
        g=log_decay(2, 300, 3),
    )


@needs("fla.ops.gla.naive")
def test_delta_scan_equals_fla_naive_delta_rule():
    naive = importlib.import_module("fla.ops.delta_rule.naive").delta_rule_recurrence
    swap = lambda t: t.transpose(1, 2)

    def theirs(q: Tensor, k: Tensor, v: Tensor, state: Tensor, beta: Tensor) -> Any:
        o, last = naive(swap(q), swap(unit(k)), swap(v), swap(2 * beta.sigmoid()), initial_state=state)
        return swap(o), last

    agree(
        delta_scan,
        lambda run, q, k, v, state, beta: run(q * 5**-0.5, unit(k), v, 2 * beta.sigmoid(), state),
        theirs,
        **attention_inputs(70),
        beta=draw(2, 70, 3),
    )


@needs("fla.ops.gla.naive")
def test_delta_scan_with_a_gate_equals_fla_naive_gated_delta_rule():
    naive = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    agree(
        delta_scan,
        lambda run, q, k, v, state, beta, g: run(
            q * 5**-0.5, unit(k), v, beta.sigmoid(), state, log_decay=g[..., None, None]
        ),
        lambda q, k, v, state, beta, g: naive(
            q, unit(k), v, beta.sigmoid(), g, initial_state=state, output_final_state=True
        ),
        **attention_inputs(70),
        beta=draw(2, 70, 3),
        g=log_decay(2, 70, 3),
    )


@needs("fla.ops.gla.naive")
def test_delta_scan_with_three_corrections_a_step_equals_fla_naive_gated_delta_product():
    naive = importlib.import_module("fla.ops.gated_delta_product.naive").naive_recurrent_gated_delta_product
    n, steps = 3, 40

    def theirs(q: Tensor, k: Tensor, v: Tensor, state: Tensor, beta: Tensor, g: Tensor) -> Any:
        flat = lambda t: t.flatten(1, 2)
        return naive(
            q, flat(unit(k)), flat(v), g, flat(2 * beta.sigmoid()), 1.0,
            initial_state=state, output_final_state=True, num_householder=n,
        )  # fmt: skip

    agree(
        delta_scan,
        lambda run, q, k, v, state, beta, g: run(
            q, unit(k), v, 2 * beta.sigmoid(), state, log_decay=g[..., None, None]
        ),
        theirs,
        q=draw(2, steps, 3, 5),
        k=draw(2, steps, n, 3, 5),
        v=draw(2, steps, n, 3, 4),
        state=draw(2, 3, 5, 4),
        beta=draw(2, steps, n, 3),
        g=log_decay(2, steps, 3),
    )


# ---- dplr_scan


@needs("fla.ops.gla.naive")
def test_dplr_scan_equals_fla_naive_dplr():
    naive = importlib.import_module("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence
    swap = lambda t: t.transpose(1, 2)

    def theirs(q: Tensor, k: Tensor, v: Tensor, state: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Any:
        o, last = naive(
            swap(q), swap(k), swap(v), swap(-unit(a)), swap(unit(a) * b.sigmoid()), swap(g), initial_state=state
        )
        return swap(o), last

    agree(
        dplr_scan,
        lambda run, q, k, v, state, a, b, g: run(
            q * 5**-0.5, k, v, -unit(a), unit(a) * b.sigmoid(), state, log_decay=g[..., None]
        ),
        theirs,
        **attention_inputs(70),
        a=draw(2, 70, 3, 5, seed=4),
        b=draw(2, 70, 3, 5, seed=5),
        g=log_decay(2, 70, 3, 5, seed=6),
    )


# ---- the memory of mLSTM, which is outer_scan with a normaliser

MLSTM = dict(
    q=draw(2, 3, 64, 5),
    k=draw(2, 3, 64, 5, seed=1),
    v=draw(2, 3, 64, 4),
    i=3 * draw(2, 3, 64),
    f=3 + 3 * draw(2, 3, 64, seed=1),
    c=draw(2, 3, 5, 4),
    n=draw(2, 3, 5),
)


def our_mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    q, k, v, i, f = (t.transpose(1, 2) for t in (q, k, v, i, f))  # time before heads
    state = MatrixMemory(c, n, torch.zeros_like(n[..., 0]))
    h, (c, n, m) = memory_scan(Gated(q, k, v, i, F.logsigmoid(f)), state, None, None)
    return h.transpose(1, 2), m.exp()[..., None, None] * c, m.exp()[..., None] * n


def their_mlstm(kernel: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        m = torch.zeros(2, 3, 1)
        h, (c, n, m) = kernel(
            q, k, v, i, f, c_initial=c, n_initial=n, m_initial=m, return_last_states=True, eps=0.0, **how
        )
        return h, m.exp()[..., None] * c, m.exp() * n

    return run


def mlstm_kernel(name: str) -> Callable[..., Any]:
    return importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel(name)


@needs("mlstm_kernels.torch")
def test_mlstm_equals_mlstm_kernels_native_by_autograd():
    with InFloat64():
        want = outcome(their_mlstm(mlstm_kernel("chunkwise--native_autograd"), chunk_size=16), MLSTM)
    assert max(apart(outcome(our_mlstm, MLSTM), want)) < TOLERANCE


@needs("mlstm_kernels.torch")
def test_mlstm_kernels_own_backward_drops_the_gradient_of_the_normaliser():
    """Its values are right; its gradients are those of another function, and those of the first n are zero."""
    with InFloat64():
        theirs = outcome(their_mlstm(mlstm_kernel("chunkwise--native_custbw"), chunk_size=16), MLSTM)
    ours = outcome(our_mlstm, MLSTM)
    names = ("h", "last c", "last n", *MLSTM)
    off = dict(zip(names, apart(theirs, ours), strict=True))
    assert all(off[name] < TOLERANCE for name in ("h", "last c", "last n", "v", "c"))
    assert all(off[name] > 0.1 for name in ("q", "k", "i", "f", "n")), off
    assert theirs[-1].abs().max() == 0


@needs("transformers")
def test_mlstm_equals_transformers_xlstm():
    kernel = without_the_xlstm_package().mlstm_chunkwise_native_autograd
    with InFloat64():
        want = outcome(their_mlstm(kernel, chunk_size=16), MLSTM)
    assert max(apart(outcome(our_mlstm, MLSTM), want)) < TOLERANCE


# ---- where transformers rounds


@needs("transformers")
def test_transformers_gated_delta_rule_of_float64_inputs_is_only_as_good_as_float32():
    rule = torch_path("qwen3_next", "torch_chunk_gated_delta_rule")
    x = attention_inputs(75)
    q, k, v, state = x["q"], unit(x["k"]), x["v"], x["state"]
    g, beta = log_decay(2, 75, 3), draw(2, 75, 3).sigmoid()
    theirs, last = rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    want, _ = delta_scan(q * 5**-0.5, k, v, beta, state, log_decay=g[..., None, None], backend="reference")
    assert theirs.dtype == torch.float64 and last.dtype == torch.float32
    assert 1e-9 < apart([theirs], [want])[0] < 1e-4
