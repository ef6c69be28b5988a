"""Batch and purity: rows know nothing of each other, and a call leaves no trace."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...core import clone, leaves, select, where
from ..check import check, no_resets
from ..sample import BATCH, STEPS, Layer, acts_alike, close, inputs, mask, same_bits, warm


@check("batch")
def check_rows_are_independent(layer: Layer) -> None:
    """A row's output and state do not depend on its neighbours' inputs."""
    x, first = inputs(layer), warm(layer)
    y, last = layer(x, first)
    for row in range(BATCH):
        one = torch.tensor([row])
        got, after = layer(x[one], select(first, one))
        close(got, y[one], f"row {row} alone gives another output than among its neighbours")
        acts_alike(layer, after, select(last, one), f"row {row} alone leaves another state than among its neighbours")


@check("batch")
def check_rows_see_no_other_state(layer: Layer) -> None:
    """A row's output does not depend on its neighbours' states."""
    x, keep = inputs(layer), torch.tensor([True, False, False])
    mixed = where(keep, warm(layer), layer.initial_state(BATCH))
    close(layer(x, mixed)[0][1:], layer(x)[0][1:], "a row depends on its neighbours' states")
    for row in (1, 2):
        got, want = layer.step(x[:, 0], mixed)[0], layer.step(x[:, 0], layer.initial_state(BATCH))[0]
        close(got[row], want[row], "in step a row depends on its neighbours' states")


@check("batch")
def check_rows_in_any_order(layer: Layer) -> None:
    """Reordering the rows reorders the outputs."""
    x, order = inputs(layer), torch.tensor([2, 0, 1])
    close(layer(x[order])[0], layer(x)[0][order], "the order of rows matters")


@check("batch")
def check_no_rows(layer: Layer) -> None:
    """B = 0 is legal, forward and step."""
    x = inputs(layer, batch=0)
    y, last = layer(x)
    assert y.shape == (0, STEPS, layer.out_width), f"B = 0 gives y of shape {tuple(y.shape)}"
    assert all(len(s) == 0 for s in leaves(last)), "B = 0 gives a state with rows"
    y, _ = layer.step(x[:, 0], layer.initial_state(0))
    assert y.shape == (0, layer.out_width), f"at B = 0 step gives y of shape {tuple(y.shape)}"
    assert layer(x[:, :0])[0].shape == (0, 0, layer.out_width), "B = 0 with T = 0 gives another shape"


@check("batch")
def check_no_rows_with_lengths(layer: Layer) -> None:
    """B = 0 is legal with lengths too."""
    y, _ = layer(inputs(layer, batch=0), lengths=torch.zeros(0, dtype=torch.int64))
    assert y.shape == (0, STEPS, layer.out_width), f"B = 0 with lengths gives y of shape {tuple(y.shape)}"


@check("batch")
def check_forward_is_pure(layer: Layer) -> None:
    """forward writes to neither x nor the state, the mask or the lengths."""
    given = {"x": inputs(layer), "state": clone(warm(layer)), "lengths": torch.tensor([STEPS, 0, 4])}
    if layer.traits.resets:
        given["reset"] = mask(STEPS, (0, 3), (1, 0))
    before, versions = clone(tuple(given.values())), _versions(given)
    layer(given["x"], given["state"], **{k: v for k, v in given.items() if k in ("reset", "lengths")})
    layer(given["x"], given["state"])
    for name, was in zip(given, before, strict=True):
        same_bits(given[name], was, f"forward writes to {name}")
    assert _versions(given) == versions, "forward writes to its inputs, if only what they held"


@check("batch")
def check_step_is_pure(layer: Layer) -> None:
    """step leaves both arguments as they were."""
    given = {"x": inputs(layer)[:, 0].clone(), "state": clone(warm(layer))}
    before, versions = clone(tuple(given.values())), _versions(given)
    layer.step(given["x"], given["state"])
    for name, was in zip(given, before, strict=True):
        same_bits(given[name], was, f"step writes to {name}")
    assert _versions(given) == versions, "step writes to its arguments, if only what they held"


@check("batch")
def check_backward_is_pure(layer: Layer) -> None:
    """The backward pass writes to neither x nor the state."""
    given = {"x": inputs(layer), "state": clone(warm(layer))}
    before = clone(tuple(given.values()))
    y, _ = layer(given["x"], given["state"])
    if y.requires_grad:
        y.sum().backward()
    for name, was in zip(given, before, strict=True):
        same_bits(given[name], was, f"backward writes to {name}")


@check("batch")
def check_layer_is_not_changed(layer: Layer) -> None:
    """In eval mode a call changes no parameter and no buffer."""
    before = copy.deepcopy(layer.state_dict())
    layer(inputs(layer))
    layer.step(inputs(layer)[:, 0], layer.initial_state(BATCH))
    after = layer.state_dict()
    assert list(after) == list(before), f"a call changes the keys of the state_dict: {sorted({*after} ^ {*before})}"
    for name, was in before.items():
        same_bits(after[name], was, f"a call writes to {name}")


@check("batch")
def check_nothing_is_remembered(layer: Layer) -> None:
    """No tensor is left behind in the layer's attributes."""
    before = _attributes(layer)
    layer(inputs(layer))
    layer.step(inputs(layer)[:, 0], layer.initial_state(BATCH))
    new = _attributes(layer) - before
    assert not new, f"a call leaves tensors in the layer: {', '.join(sorted(new))}"


@check("batch")
def check_equal_calls_are_equal(layer: Layer) -> None:
    """Two equal calls in eval mode give equal bits."""
    x, first = inputs(layer), warm(layer)
    want = layer(x, first)
    layer(inputs(layer, seed=1))
    same_bits(layer(x, first), want, "two equal calls of forward differ")
    one = layer.step(x[:, 0], first)
    layer.step(inputs(layer, seed=1)[:, 0], first)
    same_bits(layer.step(x[:, 0], first), one, "two equal calls of step differ")


@check("batch")
def check_no_chance_in_eval(layer: Layer) -> None:
    """In eval mode no random number is drawn."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        layer(inputs(layer))
        layer.step(inputs(layer)[:, 0], layer.initial_state(BATCH))
        assert torch.equal(torch.get_rng_state(), before), "in eval mode a call draws random numbers"


@check("batch")
def check_outputs_are_separate(layer: Layer) -> None:
    """Writing to the output changes neither the input nor the next call."""
    with torch.no_grad():
        x, first = inputs(layer), warm(layer)
        want = layer(x, first)[0].clone()
        kept = x.clone()
        y, last = layer(x, first)
        held = clone(last)
        y.mul_(3) if y.numel() else y
        same_bits(x, kept, "the output shares storage with x")
        same_bits(last, held, "the output shares storage with the state")
        same_bits(layer(x, first)[0], want, "writing to the output changes the next call")


@check("batch")
def check_not_contiguous(layer: Layer) -> None:
    """Transposed, sliced and offset inputs give what their contiguous copies give."""
    x, first = inputs(layer), warm(layer)
    want, after = layer(x, first)
    wide = torch.zeros(BATCH + 1, STEPS + 2, *x.shape[2:], 2, dtype=x.dtype)
    wide[1:, 1:-1, ..., 0] = x
    layouts = {"time first": x.transpose(0, 1).contiguous().transpose(0, 1), "sliced": wide[1:, 1:-1, ..., 0]}
    if not layer.vocab:
        layouts["channels first"] = x.mT.contiguous().mT
    for name, same in layouts.items():
        y, last = layer(same, first)
        close(y, want, f"x laid out {name} gives another output")
        acts_alike(layer, last, after, f"x laid out {name} leaves another state")
        close(layer.step(same[:, 0], first)[0], want[:, 0], f"x laid out {name} gives another step")


@check("batch")
def check_expanded(layer: Layer) -> None:
    """Inputs of stride 0, over batch or over time, give what their copies give."""
    x, first = inputs(layer), warm(layer)
    for name, same in {"rows": x[:1].expand_as(x), "steps": x[:, :1].expand_as(x)}.items():
        close(layer(same, first)[0], layer(same.clone(), first)[0], f"x expanded over {name} gives another output")
        close(layer(same, first)[1], layer(same.clone(), first)[1], f"x expanded over {name} gives another state")


@check("batch", why_not=no_resets)
def check_masks_not_contiguous(layer: Layer) -> None:
    """A reset mask may be any strided view."""
    x, reset = inputs(layer), mask(STEPS, (0, 3), (1, 0), (2, 6))
    same = reset.t().contiguous().t()
    close(layer(x, reset=same)[0], layer(x, reset=reset)[0], "a transposed reset mask gives another output")


def _versions(tree: dict) -> list[int]:  # type: ignore[type-arg]
    return [s._version for s in leaves(tuple(tree.values()))]


def _attributes(layer: Layer) -> set[str]:
    """Names of tensors that are attributes but neither parameters nor buffers, with their addresses."""
    found = set()
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if isinstance(value, Tensor):
                found.add(f"{path}.{name}@{value.data_ptr()}".lstrip("."))
            elif isinstance(value, tuple | list):
                found |= {f"{path}.{name}[{i}]@{v.data_ptr()}" for i, v in enumerate(value) if isinstance(v, Tensor)}
    return found
