"""States: a closed type, batch first, told apart by what they do next; selected, joined, saved, detached."""

from __future__ import annotations

import pathlib
import tempfile

import torch
from torch import Tensor

from ...core import (
    chunked,
    clone,
    costs,
    detach,
    join,
    leaves,
    load_state,
    names,
    nbytes,
    save_state,
    select,
    settled,
    tree_map,
    unroll,
)
from ..check import check, no_costs
from ..sample import BATCH, Layer, acts_alike, close, inputs, same_bits, state_dtype, trainable, warm


@check("state")
def check_state_is_a_tree(layer: Layer) -> None:
    """A state is made of tensors, None, tuples and NamedTuples, and no leaf stands in it twice by mistake."""
    state = layer.initial_state(BATCH)
    found = names(state)  # raises for other types
    assert len(set(found)) == len(found), f"leaves share a name: {found}"


@check("state")
def check_state_is_closed(layer: Layer) -> None:
    """forward and step give back states of the type they take: the same leaves, shapes, dtypes and devices."""
    first, x = layer.initial_state(BATCH), inputs(layer)
    after = {"step": layer.step(x[:, 0], first)[1], "forward": layer(x)[1], "forward at T = 0": layer(x[:, :0])[1]}
    for name, state in after.items():
        assert type(state) is type(first), f"{name} turns a {type(first).__name__} into a {type(state).__name__}"
        assert names(state) == names(first), f"{name} turns leaves {names(first)} into {names(state)}"
        for leaf, a, b in zip(names(first), leaves(first), leaves(state), strict=True):
            was, now = (tuple(a.shape), a.dtype, a.device), (tuple(b.shape), b.dtype, b.device)
            assert was == now, f"{name} turns leaf {leaf!r} from {was} into {now}"


@check("state")
def check_state_is_batch_first(layer: Layer) -> None:
    """Dimension 0 of every leaf is the batch."""
    for batch in (BATCH, 1, 5):
        for leaf, s in zip(names(layer.initial_state(batch)), leaves(layer.initial_state(batch)), strict=True):
            assert s.ndim and s.shape[0] == batch, f"leaf {leaf!r} has shape {tuple(s.shape)} at batch {batch}"
    _, last = layer(inputs(layer, batch=5))
    for leaf, s in zip(names(last), leaves(last), strict=True):
        assert s.ndim and s.shape[0] == 5, f"leaf {leaf!r} of the last state has shape {tuple(s.shape)} at batch 5"


@check("state")
def check_state_is_wide(layer: Layer) -> None:
    """Floating leaves are as wide as the parameters, and float32 at least."""
    want = state_dtype(layer)
    for leaf, s in zip(names(layer.initial_state(1)), leaves(layer.initial_state(1)), strict=True):
        if s.is_floating_point() or s.is_complex():
            assert s.dtype.to_real() == want, f"leaf {leaf!r} is {s.dtype}, expected {want}: use core.wide"


@check("state")
def check_state_size_is_constant(layer: Layer) -> None:
    """A state takes as many bytes after 40 steps as before the first."""
    with torch.no_grad():
        before, after = nbytes(layer.initial_state(BATCH)), nbytes(layer(inputs(layer, 40))[1])
    assert before == after, f"the state grows from {before} to {after} bytes in 40 steps"


@check("state")
def check_initial_state_is_the_default(layer: Layer) -> None:
    """No state given means the initial state, the same every time."""
    x = inputs(layer)
    same_bits(layer.initial_state(BATCH), layer.initial_state(BATCH), "two initial states differ")
    (y, last), (want, after) = layer(x), layer(x, layer.initial_state(BATCH))
    close(y, want, "without a state forward does not begin from the initial state")
    acts_alike(layer, last, after, "without a state forward does not begin from the initial state")


@check("state")
def check_initial_state_of_no_rows(layer: Layer) -> None:
    """initial_state(0) is a state of no rows and the same type."""
    none, one = layer.initial_state(0), layer.initial_state(1)
    assert names(none) == names(one), f"initial_state(0) has leaves {names(none)}, initial_state(1) {names(one)}"
    for leaf, a, b in zip(names(one), leaves(none), leaves(one), strict=True):
        assert (a.shape[1:], a.dtype) == (b.shape[1:], b.dtype), f"leaf {leaf!r} of initial_state(0) is of another type"


@check("state")
def check_state_leaves_are_separate(layer: Layer) -> None:
    """Rows and leaves may be written to one by one: a clone has storage of its own."""
    state = clone(warm(layer))
    found = [s for s in leaves(state) if s.numel()]
    assert len({s.data_ptr() for s in found}) == len(found), "cloned leaves share storage"
    x = inputs(layer)
    close(layer(x, state)[0], layer(x, warm(layer))[0], "a clone of a state is another state")


@check("state")
def check_no_leaf_shares_storage(layer: Layer) -> None:
    """No two leaves of a state lie in the same memory: one may be written to alone."""
    x, first = inputs(layer), layer.initial_state(BATCH)
    with torch.no_grad():
        states = {"initial_state": first, "forward": layer(x)[1], "step": layer.step(x[:, 0], first)[1]}
    for what, state in states.items():
        owners: dict[int, str] = {}
        for leaf, s in zip(names(state), leaves(state), strict=True):
            other = owners.setdefault(s.untyped_storage().data_ptr(), leaf) if s.numel() else leaf
            assert other == leaf, f"from {what} the leaves {other!r} and {leaf!r} share memory: make a tensor for each"


@check("state")
def check_select(layer: Layer) -> None:
    """Rows of a state can be kept, repeated and reordered."""
    x, rows, first = inputs(layer), torch.tensor([2, 0, 0, 1]), warm(layer)
    (y, last), (want, after) = layer(x[rows], select(first, rows)), layer(x, first)
    close(y, want[rows], "rows of the state cannot be reordered")
    acts_alike(layer, last, select(after, rows), "after reordering, the last state is another")


@check("state")
def check_join(layer: Layer) -> None:
    """States of two batches are the state of one."""
    x, a, b = inputs(layer, batch=3), warm(layer, 2, seed=1), warm(layer, 1, seed=2)
    joined = layer(x, join([a, b]))[0]
    close(joined[:2], layer(x[:2], a)[0], "joined states are not the states they were joined from")
    close(joined[2:], layer(x[2:], b)[0], "joined states are not the states they were joined from")


@check("state")
def check_fork(layer: Layer) -> None:
    """Two continuations of one state do not disturb each other."""
    x, first = inputs(layer), warm(layer)
    want = layer(x, first)[0]
    layer(inputs(layer, seed=3), first)
    for x_t in inputs(layer, 3, seed=4).unbind(1):
        layer.step(x_t, first)
    same_bits(layer(x, first)[0], want, "a state that another stream went on from has changed")


@check("state")
def check_streams_interleave(layer: Layer) -> None:
    """Two streams stepped in turn give what each gives alone: nothing is remembered in the layer."""
    a, b = inputs(layer, seed=1), inputs(layer, seed=2)
    want, state_a, state_b = layer(a)[0], layer.initial_state(BATCH), layer.initial_state(BATCH)
    for t in range(a.shape[1]):
        y, state_a = layer.step(a[:, t], state_a)
        _, state_b = layer.step(b[:, t], state_b)
        close(y, want[:, t], f"stepped in turn with another stream, step {t} is another")


@check("state")
def check_state_saves_and_loads(layer: Layer) -> None:
    """A state written to a file and read again acts bit for bit as it did."""
    x, state = inputs(layer), warm(layer)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "state.safetensors")
        save_state(path, layer, state)
        read = load_state(path, layer)
    same_bits(read, state, "a saved state is another")
    same_bits(layer(x, read)[0], layer(x, state)[0], "a saved state acts otherwise")


@check("state")
def check_state_holds_no_history(layer: Layer) -> None:
    """The last state of 64 steps is no view that keeps all 64 in memory: streams run in constant memory."""
    x = inputs(layer, 64)
    with torch.no_grad():
        for what, state in {
            "forward": layer(x)[1],
            "forward with lengths": layer(x, lengths=torch.full((BATCH,), 60))[1],
        }.items():
            for leaf, s in zip(names(state), leaves(state), strict=True):
                held, own = s.untyped_storage().nbytes(), s.numel() * s.element_size()
                assert held <= 16 * own, f"after {what} leaf {leaf!r} of {own} bytes keeps {held} in memory: clone it"


@check("state")
def check_detach(layer: Layer) -> None:
    """A detached state acts alike and cuts the gradient: truncated back-propagation through time."""
    _, state = layer(inputs(layer), trainable(layer.initial_state(BATCH)))
    cut = detach(state)
    assert not any(s.requires_grad for s in leaves(cut)), "a detached state still carries gradients"
    same_bits(
        layer(inputs(layer, seed=1), cut)[0], layer(inputs(layer, seed=1), state)[0], "detached, a state is another"
    )


@check("state")
def check_state_not_contiguous(layer: Layer) -> None:
    """States may be any strided view: a transposed or sliced state acts as its contiguous copy."""
    x, first = inputs(layer), warm(layer)

    def strided(s: Tensor) -> Tensor:
        wide = torch.empty(*s.shape, 2, dtype=s.dtype, device=s.device)
        wide[..., 0] = s
        return wide[..., 0]

    (y, last), (want, after) = layer(x, tree_map(strided, first)), layer(x, first)
    close(y, want, "a state that is not contiguous gives another output")
    acts_alike(layer, last, after, "a state that is not contiguous gives another state")
    close(layer.step(x[:, 0], tree_map(strided, first))[0], want[:, 0], "step takes contiguous states only")


@check("state", why_not=no_costs)
def check_costs_add_up(layer: Layer) -> None:
    """Costs are sums over steps, however they are run; a row's end ends its costs, and no answer depends on them."""
    x, first, ends = inputs(layer, 11), warm(layer), torch.tensor([11, 0, 4])
    y, last = layer(x, first)
    assert any(total.ne(0).any() for total in costs(last)), "nothing costs anything"
    for way, (_, after) in (
        ("step repeated", unroll(layer, x, first)),
        ("chunks", chunked(layer, x, [4, 0, 7], first)),
    ):
        close(tuple(costs(last)), tuple(costs(after)), f"forward costs something else than {way}")
    padded, alone = layer(x, first, lengths=ends)[1], unroll(layer, x, first, lengths=ends)[1]
    close(tuple(costs(padded)), tuple(costs(alone)), "with lengths, steps cost something else")
    same_bits(layer(x, settled(first))[0], y, "answers depend on what was paid before")
