"""The protocol's own functions, on a cell small enough to know the answer of."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from statewise.core import Cell, UsageError, check_input, check_sizes, chunked, ragged, stream, unroll, where


class Memory(NamedTuple):
    total: Tensor  # (B, D)
    steps: Tensor  # (B,) int64


class RunningMean(Cell[Memory]):
    """total_t = total_{t-1} + x_t,  n_t = n_{t-1} + 1,  y_t = w total_t / n_t."""

    def __init__(self, width: int):
        super().__init__()
        self.width = self.out_width = width
        self.weight = nn.Parameter(torch.ones(width))

    def initial_state(self, batch: int) -> Memory:
        return Memory(self.weight.new_zeros(batch, self.width), torch.zeros(batch, dtype=torch.int64))

    def transition(self, u: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        state = Memory(state.total + u, state.steps + 1)
        return state.total / state.steps[:, None], state

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.weight * o


class Letters(RunningMean):
    """The running mean of an embedding: y_t = mean of e[x_s], s <= t."""

    def __init__(self, vocab: int, width: int):
        super().__init__(width)
        self.vocab = vocab
        self.table = nn.Embedding(vocab, width)

    def encode(self, x: Tensor) -> Tensor:
        return self.table(x)


@pytest.fixture
def layer() -> RunningMean:
    return RunningMean(2)


def shapes(x: Float[Tensor, "B T D"], y: Float[Tensor, "B T D"], total: Float[Tensor, "B D"]) -> None:
    assert (*x.shape[::2],) == (*total.shape,) and x.shape == y.shape


def test_forward_gives_the_known_answer(layer):
    x = torch.tensor([[[1.0, 0.0], [3.0, 1.0]]])
    y, state = layer(x)
    torch.testing.assert_close(y, torch.tensor([[[1.0, 0.0], [2.0, 0.5]]]))
    shapes(x, y, state.total)
    assert state.steps.tolist() == [2]


@pytest.mark.parametrize("sizes", [[7], [3, 0, 4], [0, 0, 7], [1] * 7])
def test_chunked_is_forward(layer, sizes):
    x, reset, lengths = torch.randn(3, 7, 2), torch.rand(3, 7) < 0.3, torch.tensor([7, 0, 4])
    y, state = layer(x, reset=reset, lengths=lengths)
    got, last = chunked(layer, x, sizes, reset=reset, lengths=lengths)
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("sizes", [[], [3, 3], [8], [9, -2]])
def test_chunked_refuses_sizes_that_do_not_sum_to_the_length(layer, sizes):
    with pytest.raises(UsageError, match="sum T = 7"):
        chunked(layer, torch.randn(1, 7, 2), sizes)


def test_stream_answers_one_by_one(layer):
    x = torch.randn(3, 7, 2)
    ys = torch.stack([y for y, _ in stream(layer, x.unbind(1))], 1)
    torch.testing.assert_close(ys, layer(x)[0])


def test_no_steps_give_ids_no_dtype_to_the_output():
    y, _ = Letters(5, 2)(torch.zeros(3, 0, dtype=torch.int64))
    assert y.shape == (3, 0, 2) and y.dtype == torch.float32


# Each is (B, T, lengths); the answer is every row run alone.
RAGGED = [
    (3, 7, [7, 0, 4]), (3, 7, [0, 0, 0]), (3, 7, [7, 7, 7]), (4, 7, [2, 5, 2, 0]), (1, 7, [3]), (3, 0, [0, 0, 0]),
    (0, 7, []), (0, 0, []),
]  # fmt: skip


@pytest.mark.parametrize("batch, steps, ends", RAGGED)
@pytest.mark.parametrize("resets", [False, True])
def test_ragged_is_each_row_alone(layer, batch, steps, ends, resets):
    x, lengths = torch.randn(batch, steps, 2), torch.tensor(ends, dtype=torch.int64)
    reset = torch.rand(batch, steps) < 0.4 if resets else None
    _, state = layer(torch.randn(batch, 2, 2))
    calls = []

    def run(x: Tensor, state: Memory, reset: Tensor | None) -> tuple[Tensor, Memory]:
        calls.append(x.shape)
        return layer(x, state, reset=reset)

    y, last = ragged(run, x.masked_fill(torch.arange(steps)[:, None] >= lengths[:, None, None], torch.nan), state,
                     reset, lengths)  # fmt: skip
    assert y.shape == (batch, steps, 2) and len(calls) <= len({*ends, steps})
    for row, end in enumerate(ends):
        alone = Memory(*(leaf[row : row + 1] for leaf in state))
        want, after = layer(x[row : row + 1, :end], alone, reset=None if reset is None else reset[row : row + 1, :end])
        torch.testing.assert_close(y[row : row + 1, :end], want)
        assert not y[row, end:].any()
        torch.testing.assert_close(Memory(*(leaf[row : row + 1] for leaf in last)), after)


def test_ragged_gradients_are_those_of_lengths(layer):
    lengths = torch.tensor([5, 0, 3])
    grads = []
    for run in (
        lambda x: ragged(lambda x, s, r: layer(x, s, reset=r), x, layer.initial_state(3), None, lengths),
        lambda x: layer(x, lengths=lengths),
        lambda x: unroll(layer, x, lengths=lengths),
    ):
        torch.manual_seed(0)
        x = torch.randn(3, 5, 2, requires_grad=True)
        y, state = run(x)
        grads.append(torch.autograd.grad(y.sin().sum() + state.total.cos().sum(), [x, layer.weight]))
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[2], grads[1])


def test_reset_clears_what_is_not_finite(layer):
    x = torch.ones(2, 4, 2)
    x[0, 1] = torch.inf
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[0, 2] = True
    y, state = layer(x, reset=reset)
    assert y[0, 2:].isfinite().all() and state.total.isfinite().all() and state.steps.tolist() == [2, 4]


def test_where_takes_rows_and_leaves_of_any_rank():
    yes, no = (torch.ones(2), torch.ones(2, 3), None), (torch.zeros(2), torch.zeros(2, 3), None)
    got = where(torch.tensor([True, False]), yes, no)
    assert got[0].tolist() == [1, 0] and got[1].sum(1).tolist() == [3, 0] and got[2] is None


X = torch.zeros(3, 7, 2)
IDS = torch.zeros(3, 7, dtype=torch.int64)
REAL, TOKENS = RunningMean(2), Letters(5, 2)
# What is given, and the parts that the one line must hold. Rows of the bad-input table in the comments.
REFUSED = {
    "rank 2": (REAL, dict(x=X[0]), ["(7, 2)", "(B, T, D)"]),  # 1
    "rank 4": (REAL, dict(x=X[None]), ["(1, 3, 7, 2)", "(B, T, D)"]),  # 1
    "width": (REAL, dict(x=torch.zeros(3, 7, 4)), ["RunningMean", "(3, 7, 4)", "2"]),  # 2
    "state batch": (REAL, dict(x=X, state=REAL.initial_state(4)), ["batch 4", "batch 3"]),  # 3
    "state of another": (REAL, dict(x=X, state=RunningMean(6).initial_state(3)), ["'total'", "(B, 6)", "(B, 2)"]),  # 4
    "state names": (REAL, dict(x=X, state=torch.zeros(3, 2)), ["['state']", "['total', 'steps']"]),  # 4
    "state dtype": (REAL, dict(x=X, state=Memory(X[:, 0].double(), IDS[:, 0])), ["float64", "float32"]),  # 4, 25
    "state kind": (REAL, dict(x=X, state={"total": X}), ["dict"]),
    "integers": (REAL, dict(x=X.int()), ["int32", ".float()"]),  # 5
    "bools": (REAL, dict(x=X.bool()), ["bool", ".float()"]),  # 5
    "complex": (REAL, dict(x=X + 0j), ["complex64"]),  # 11
    "double": (REAL, dict(x=X.double()), ["float64", "float32"]),
    "id too large": (TOKENS, dict(x=IDS.clone().index_put_((torch.tensor(1), torch.tensor(4)), torch.tensor(5))),
                     ["id 5", "row 1", "step 4", "0 to 4"]),  # 6
    "id negative": (TOKENS, dict(x=IDS - 1), ["id -1", "row 0", "step 0"]),  # 6
    "float ids": (TOKENS, dict(x=X[..., 0]), ["float32", "int64"]),  # 7
    "ids rank": (TOKENS, dict(x=IDS[..., None]), ["(3, 7, 1)", "(B, T)"]),  # 1
    "meta": (REAL, dict(x=X.to("meta")), ["meta"]),  # 9
    "sparse": (REAL, dict(x=X.to_sparse()), ["layout"]),  # 10
    "list": (REAL, dict(x=[[1.0]]), ["list", "tensor"]),
    "lengths long": (REAL, dict(x=X, lengths=torch.tensor([7, 8, 7])), ["lengths[1]", "8", "T = 7"]),  # 13
    "lengths negative": (REAL, dict(x=X, lengths=torch.tensor([7, 7, -1])), ["lengths[2]", "-1"]),  # 13
    "lengths float": (REAL, dict(x=X, lengths=torch.ones(3)), ["float32", "integers"]),  # 13
    "lengths shape": (REAL, dict(x=X, lengths=torch.tensor([1, 2])), ["(2,)", "(3,)"]),  # 13
    "lengths list": (REAL, dict(x=X, lengths=[1, 2, 3]), ["lengths", "list"]),  # 13
    "reset shape": (REAL, dict(x=X, reset=torch.zeros(3, 6, dtype=torch.bool)), ["(3, 6)", "(3, 7)"]),  # 15
    "reset dtype": (REAL, dict(x=X, reset=torch.zeros(3, 7)), ["float32", "bool"]),  # 15
    "reset device": (REAL, dict(x=X, reset=torch.zeros(3, 7, dtype=torch.bool, device="meta")), ["meta", "cpu"]),  # 8
    "state device": (REAL, dict(x=X, state=Memory(X[:, 0].to("meta"), IDS[:, 0].to("meta"))), ["meta", "cpu"]),  # 8
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_refuses_in_one_line(row):
    layer, given, parts = REFUSED[row]
    with pytest.raises(UsageError) as caught:
        layer(**given)
    line = str(caught.value)
    assert "\n" not in line and len(line) <= 200 and [p for p in parts if p not in line] == [], line
    assert layer(IDS if layer.vocab else X)[0].isfinite().all()  # and it serves a good request after


def test_buffers_tell_the_dtype_of_a_layer_without_parameters():
    frozen = RunningMean(2)
    del frozen.weight
    frozen.register_buffer("weight", torch.ones(2))
    with pytest.raises(UsageError, match="float64"):
        check_input(frozen, X.double(), None, None, None)


@pytest.mark.parametrize("size", [0, -1, 2.5, "4", True])
def test_sizes_are_refused_by_name(size):
    check_sizes("Own", width=3, hidden=1)
    with pytest.raises(UsageError, match=f"^Own: hidden is {size!r}; expected a whole number of at least 1$"):
        check_sizes("Own", width=3, hidden=size)
