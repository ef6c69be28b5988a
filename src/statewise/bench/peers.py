"""The linear family beside other implementations of the same work, and beside the speed of matrix products.

Everything of one case is timed in one run, in turn, and every row says by how much it differs from ours where both
compute the same function: a rival with other numbers is no rival.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Unknown, UsageError, near
from ..core.machine import cores
from ..models import from_transformers
from ..ops import delta_scan, dplr_scan, outer_scan
from .clock import seconds
from .memory import peak_memory

Row = dict[str, Any]
Work = Callable[[], Tensor]  # forward and backward; returns the outputs
ONCE = 20.0  # seconds of a first call beyond which a contender is not called again
CPU = torch.device("cpu")


@dataclass
class Contender:
    """One way to do a case's work. make imports, builds and draws; why_not is the reason why it cannot be tried."""

    way: str
    make: Callable[[], Work]
    why_not: str | None = None
    comparable: bool = True  # the outputs are those of ours
    work: Work | None = None
    out: Tensor | None = None
    first: float | None = None
    peak: int | None = None
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """Work, described, with those who can do it; the first contender is ours."""

    name: str
    shape: str
    contenders: Callable[[], list[Contender]]


def run(
    names: Sequence[str] = (), *, repeats: int = 5, small: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Rows of seconds, the medians of `repeats` rounds, in each of which all contenders of a case take turns.

    names: of CASES, all of them if empty. small: tiny sizes, to try whether everything runs. say: told what comes next.
    A row has case, shape, way, time (forward and backward), ratio (time over ours), first (seconds of the first call in
    this process; what is compiled and not yet cached counts), peak (bytes that a call adds to the resident memory),
    off (largest difference of the outputs from ours, relative to the largest value), rounds, load and noisy.
    A contender that needs more than 20 s for its first call is not called again: that is its time, with rounds 1.
    A peer that is missing, or fails, has a row with `failed`.
    Rows of the case "gemm" instead have op, the ways "forward" and "training", gflops (of the matrix products of the
    chunked algorithm, per second; see Products), gemm (of torch's product of two large matrices), batched (of its
    products of as many chunks by d x d matrices as there are), fraction and of_batched (gflops over these), and least,
    the fraction if only products with d x d states are counted. Of each the fastest round counts: what disturbs a
    machine slows down some rounds and never speeds one up.
    """
    unknown = [name for name in names if name not in CASES and name != "gemm"]
    if unknown:
        raise Unknown(f"bench peers: no case {unknown[0]!r}; {near(unknown[0], [*CASES, 'gemm'])}")
    if repeats < 1:
        raise UsageError(f"bench peers: repeats {repeats}; expected 1 or more")
    rows: list[Row] = []
    for name in names or [*CASES, "gemm"]:
        rows += _gemm(repeats, small, say) if name == "gemm" else _case(CASES[name](small), repeats, say)
    return rows


def _case(case: Case, repeats: int, say: Callable[[str], None]) -> list[Row]:
    found = case.contenders()
    for one in found:
        say(f"{case.name}: {one.way} ...")
        _warm_up(one)
    for _ in range(repeats):
        for one in found:
            if one.work is not None and one.first is not None and one.first < ONCE:
                one.times.append(seconds(one.work, CPU))
    ours = found[0]
    return [_row(case, one, ours) for one in found]


def _warm_up(one: Contender) -> None:
    if one.why_not is not None:
        return
    try:
        one.work = one.make()
        outs: list[Tensor] = []
        one.first = seconds(lambda: outs.append(one.work()), CPU)  # type: ignore[misc]
        one.out = outs[0]
        if one.first < ONCE:
            one.peak = peak_memory(one.work, CPU)  # type: ignore[arg-type]
        else:
            one.times.append(one.first)
    except (RuntimeError, ImportError, TypeError, ValueError, AttributeError, KeyError) as error:
        one.why_not, one.work = (str(error).splitlines() or [type(error).__name__])[0][:100], None


def _row(case: Case, one: Contender, ours: Contender) -> Row:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    row: Row = {"case": case.name, "shape": case.shape, "way": one.way}
    if one.why_not is not None:
        return {**row, "failed": one.why_not}
    time = statistics.median(one.times)
    row |= {"time": time, "ratio": time / statistics.median(ours.times) if ours.times else None}
    row |= {"first": one.first, "peak": one.peak, "rounds": len(one.times)}
    if one.comparable and one.out is not None and ours.out is not None:
        row["off"] = float((one.out - ours.out).abs().max() / ours.out.abs().max())
    return {**row, "load": load, "noisy": load is not None and load > cores()}


def missing(*packages: str) -> str | None:
    """Why a peer cannot be tried, or None."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed (pip install 'statewise[peers]')" if absent else None


# ---- models: a training step without the optimiser


def _training(model: nn.Module, ids: Tensor, logits: Callable[[Tensor], Tensor]) -> Work:
    """Loss of the next id, and gradients of all parameters."""

    def work() -> Tensor:
        y = logits(ids)
        loss = F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        model.zero_grad(set_to_none=True)
        return y.detach()

    return work


def _language_model_case(name: str, architecture: str, small: bool, **sizes: Any) -> Case:
    """A model of transformers, and ours with its weights."""
    batch, steps, width = (2, 16, 32) if small else (4, 512, 256)
    vocab = 64

    def theirs(**changes: Any) -> nn.Module:
        torch.manual_seed(0)
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, f"{architecture}Config")(
            vocab_size=vocab, hidden_size=width, num_hidden_layers=2, use_cache=False, pad_token_id=0, eos_token_id=0,
            **(sizes | changes),
        )  # fmt: skip
        return getattr(transformers, f"{architecture}ForCausalLM")(config)

    ids = torch.randint(vocab, (batch, steps), generator=torch.Generator().manual_seed(0))

    def ours() -> Work:
        model = from_transformers(theirs()).train()
        return _training(model, ids, lambda x: model(x)[0])

    def peer(**changes: Any) -> Work:
        model = theirs(**changes).train()
        return _training(model, ids, lambda x: model(input_ids=x).logits)

    def contenders() -> list[Contender]:
        found = [
            Contender("statewise", ours, missing("transformers")),
            Contender("transformers", peer, missing("transformers")),
        ]
        if architecture == "Mamba":
            mixed = lambda: peer(use_mambapy=True)
            found += [
                Contender("transformers, mambapy's scan", mixed, missing("transformers", "mambapy")),
                Contender("mambapy", lambda: _mambapy(vocab, width, ids), missing("mambapy"), comparable=False),
            ]
        return found

    return Case(name, f"B {batch}, T {steps}, 2 layers of width {width}", contenders)


def _mambapy(vocab: int, width: int, ids: Tensor) -> Work:
    module = importlib.import_module("mambapy.mamba")
    torch.manual_seed(0)
    body = module.Mamba(module.MambaConfig(d_model=width, n_layers=2))
    model = nn.Sequential(nn.Embedding(vocab, width), body, nn.RMSNorm(width), nn.Linear(width, vocab, bias=False))
    return _training(model, ids, model)


# ---- ops: forward, and backward to every input


def _differentiated(run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Work:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    seeds: list[Tensor] = []

    def work() -> Tensor:
        y = run(**leaves)
        if not seeds:
            seeds.append(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        torch.autograd.grad(y, list(leaves.values()), seeds[0], allow_unused=True)
        return y.detach()

    return work


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sizes(small: bool) -> tuple[int, int, int, int]:
    return (2, 64, 2, 8) if small else (4, 2048, 4, 64)


def _words(batch: int, steps: int, heads: int, size: int) -> str:
    return f"B {batch}, T {steps}, H {heads}, d {size}"


def _torch_path(model: str, name: str) -> Callable[..., Any]:
    """A function of transformers in plain torch, also where an installed package would take its place."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return inspect.unwrap(getattr(module, name))


def _state_space_dual(small: bool) -> Case:
    batch, steps, heads, d = _sizes(small)
    inputs = dict(
        x=_draw(batch, steps, heads, d), dt=F.softplus(_draw(batch, steps, heads) - 3), a=-_draw(heads).exp(),
        b=_draw(batch, steps, 1, d, seed=1), c=_draw(batch, steps, 1, d, seed=2),
    )  # fmt: skip
    zero = torch.zeros(batch, heads, d, d)

    def ours(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return outer_scan(c, b, dt[..., None] * x, zero, log_decay=(dt * a)[..., None, None])[0]

    def theirs() -> Work:
        scan = _torch_path("mamba2", "mamba2_chunk_scan")
        return _differentiated(lambda x, dt, a, b, c: scan(x, dt, a, b, c, 256), inputs)

    return Case(
        "mamba2 scan",
        _words(batch, steps, heads, d),
        lambda: [
            Contender("statewise", lambda: _differentiated(ours, inputs)),
            Contender("transformers", theirs, missing("transformers")),
        ],
    )


def _gated_delta(small: bool) -> Case:
    batch, steps, heads, d = _sizes(small)
    inputs = dict(
        q=_draw(batch, steps, heads, d), k=F.normalize(_draw(batch, steps, heads, d, seed=1), dim=-1),
        v=_draw(batch, steps, heads, d, seed=2), beta=_draw(batch, steps, heads).sigmoid(),
        g=-F.softplus(_draw(batch, steps, heads, seed=3) - 3),
    )  # fmt: skip
    zero = torch.zeros(batch, heads, d, d)

    def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return delta_scan(q * d**-0.5, k, v, beta, zero, log_decay=g[..., None, None])[0]

    def theirs() -> Work:
        rule = _torch_path("qwen3_next", "torch_chunk_gated_delta_rule")
        return _differentiated(lambda q, k, v, beta, g: rule(q, k, v, g=g, beta=beta)[0], inputs)

    return Case(
        "gated delta rule",
        _words(batch, steps, heads, d),
        lambda: [
            Contender("statewise", lambda: _differentiated(ours, inputs)),
            Contender("transformers", theirs, missing("transformers")),
        ],
    )


def _mlstm(small: bool) -> Case:
    from ..layers.mlstm import Gated, MatrixMemory, memory_scan

    batch, steps, heads, d = _sizes(small)
    inputs = {name: _draw(batch, steps, heads, d, seed=seed) for seed, name in enumerate("qkv")}
    inputs |= dict(i=_draw(batch, steps, heads), f=3 + _draw(batch, steps, heads, seed=1))
    empty = MatrixMemory(torch.zeros(batch, heads, d, d), torch.zeros(batch, heads, d), torch.zeros(batch, heads))

    def ours(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        return memory_scan(Gated(q, k, v, i, F.logsigmoid(f)), empty, None, None)[0]

    def theirs(name: str) -> Work:
        kernel = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel(name)
        swap = lambda *ts: (t.transpose(1, 2) for t in ts)
        # without a dtype for its matrix products it would take bfloat16
        call = lambda q, k, v, i, f: kernel(*swap(q, k, v, i, f), eps=0.0, autocast_kernel_dtype=torch.float32)
        return _differentiated(lambda q, k, v, i, f: call(q, k, v, i, f).transpose(1, 2), inputs)

    def contenders() -> list[Contender]:
        found = [Contender("statewise", lambda: _differentiated(ours, inputs))]
        for kernel in ("native_autograd", "native_custbw"):
            make = lambda kernel=kernel: theirs(f"chunkwise--{kernel}")
            found.append(Contender(f"mlstm_kernels {kernel}", make, missing("mlstm_kernels")))
        return found

    return Case("mlstm", _words(batch, steps, heads, d), contenders)


CASES: dict[str, Callable[[bool], Case]] = {
    "mamba": lambda small: _language_model_case("mamba", "Mamba", small),
    "mamba2": lambda small: _language_model_case(
        "mamba2", "Mamba2", small, num_heads=2 if small else 8, head_dim=32 if small else 64,
        state_size=8 if small else 64, n_groups=1, chunk_size=8 if small else 256,
    ),
    "mamba2_scan": _state_space_dual,
    "gated_delta": _gated_delta,
    "mlstm": _mlstm,
}  # fmt: skip


# ---- as a fraction of the speed of matrix products

SHAPES = ((4, 2048, 4, 64), (1, 8192, 8, 128))
CHUNK = 64  # steps in a chunk of ours


class Products(NamedTuple):
    """Products of the chunked algorithm, for each step and head of size d, forward and backward.

    What a backward pass computes again counts once, and nothing counts beyond the products.
    """

    triangles: tuple[int, ...]  # half of CHUNK x CHUNK x d: scores within a chunk, or such scores times a row
    squares: tuple[int, ...]  # d x d: a row times a state, or an outer product added to one

    def operations(self, d: int, way: str) -> float:
        parts = slice(0, 2 if way == "training" else 1)
        return sum(self.triangles[parts]) * CHUNK * d + sum(self.squares[parts]) * 2 * d * d


OUTER, DELTA, DPLR = Products((2, 4), (2, 4)), Products((4, 8), (3, 6)), Products((8, 16), (4, 8))


def _gemm(repeats: int, small: bool, say: Callable[[str], None]) -> list[Row]:
    n = 128 if small else 2048
    a, b = _draw(n, n), _draw(n, n, seed=1)
    gemm = lambda: torch.mm(a, b)
    rows = []
    for shape in ((2, 64, 2, 8),) if small else SHAPES:
        batch, steps, heads, d = shape
        units = batch * steps * heads
        left, right, out = _draw(units // CHUNK, CHUNK, d), _draw(units // CHUNK, d, d), _draw(units // CHUNK, CHUNK, d)
        batched = lambda: torch.bmm(left, right, out=out)  # noqa: B023
        for name, run, inputs, work in _chunked(*shape):
            calls = {"forward": lambda: _no_grad(run, inputs), "training": _differentiated(run, inputs)}  # noqa: B023
            for way, one in calls.items():
                say(f"gemm: {name} {way} at {shape} ...")
                one(), gemm(), batched()
                done, own = (units * w.operations(d, way) for w in (work, work._replace(triangles=(0, 0))))
                took, large, small_ones = [], [], []
                for _ in range(repeats):
                    large.append(2 * n**3 / seconds(gemm, CPU))
                    small_ones.append(2 * units * d * d / seconds(batched, CPU))
                    took.append(seconds(one, CPU))
                rows.append(
                    {
                        "case": "gemm", "shape": _words(*shape), "op": name, "way": way,
                        "time": min(took), "gflops": done / min(took) / 1e9,
                        "gemm": max(large) / 1e9, "batched": max(small_ones) / 1e9,
                        "fraction": done / min(took) / max(large), "of_batched": done / min(took) / max(small_ones),
                        "least": own / min(took) / max(large),
                        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                    }
                )  # fmt: skip
    return rows


def _chunked(batch: int, steps: int, heads: int, d: int) -> list[tuple[str, Callable[..., Tensor], Any, Products]]:
    """Name, function, inputs, and its products."""
    lead = (batch, steps, heads)
    q, k, v = (_draw(*lead, d, seed=s) for s in range(3))
    k = F.normalize(k, dim=-1)
    beta, scalar = _draw(*lead).sigmoid(), -F.softplus(_draw(*lead, 1, 1, seed=4) - 3)
    per_key = -F.softplus(_draw(*lead, d, 1, seed=5) - 3)
    zero, qkv = torch.zeros(batch, heads, d, d), dict(q=q, k=k, v=v)
    outer = lambda **x: outer_scan(**x, state=zero)[0]
    delta = lambda **x: delta_scan(**x, state=zero)[0]
    dplr = lambda **x: dplr_scan(**x, state=zero)[0]
    return [
        ("outer_scan", outer, qkv, OUTER),
        ("outer_scan, scalar decay", outer, dict(qkv, log_decay=scalar), OUTER),
        ("outer_scan, decay per key", outer, dict(qkv, log_decay=per_key), OUTER),
        ("delta_scan", delta, dict(qkv, beta=beta, log_decay=scalar), DELTA),
        ("dplr_scan", dplr, dict(qkv, a=-k, b=k * beta[..., None], log_decay=per_key), DPLR),
    ]


@torch.no_grad()
def _no_grad(run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    return run(**inputs)
