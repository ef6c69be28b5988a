"""A student that starts as its teacher: what is alike is copied, what stands for attention is made of it.

Mamba-2 from attention: Wang et al. 2024, "The Mamba in the Llama", arXiv:2408.15237; Li et al. 2025, MaTVLM,
arXiv:2503.13440. Attention by another's matrix: Rajabzadeh et al. 2024, EchoAtt, arXiv:2409.14595.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import UsageError
from ..layers import Attention, EchoAttention, Mamba2
from .stack import Block, Residual

Inherit = Literal["all", "same", "none"]


def stack_of(model: nn.Module) -> Residual:
    """The stack within a model. Raises UsageError where there is none or more than one."""
    found = [part for part in model.modules() if isinstance(part, Residual)]
    if len(found) != 1:
        raise UsageError(f"{type(model).__name__} holds {len(found)} stacks; expected one")
    return found[0]


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, what: Inherit = "all") -> set[str]:
    """Copy to the student all that both have, depth by depth; the names of its parameters that are no copies.

    "all": a layer that differs is made of the teacher's where that is known: EchoAttention or Mamba2 of Attention, as
    `echo_of` and `mamba2_of` say. "same": it stays as it was born. "none": nothing is copied.

    Raises UsageError where the two are no stacks of one width and depth, or attention cannot become what stands there.
    """
    if what not in ("all", "same", "none"):
        raise UsageError(f"inherit is {what!r}; takes all, same, none")
    if what == "none":
        return {name for name, _ in student.named_parameters()}
    ours, theirs = stack_of(student), stack_of(teacher)
    sizes = [(len(s.order), s.blocks[0].width) for s in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"inherit: depth and width {sizes[0]} from {sizes[1]}; expected the same")
    copied = _copy(student, teacher, without=("blocks.",))
    for to, of in zip(ours.at_depths(), theirs.at_depths(), strict=True):
        copied |= _inherit_block(to, of, what)
    return {name for name, p in student.named_parameters() if id(p) not in copied}


def _inherit_block(to: Block, of: Block, what: Inherit) -> set[int]:
    copied = _copy(to, of, without=("layer.",))
    if _alike(to.layer, of.layer):
        return copied | _copy(to.layer, of.layer)
    make = MAKES.get((type(to.layer), type(of.layer)))
    if what == "all" and make is not None:
        make(to.layer, of.layer)
    return copied


def _alike(a: nn.Module, b: nn.Module) -> bool:
    shapes = [{name: p.shape for name, p in m.state_dict().items()} for m in (a, b)]
    return type(a) is type(b) and shapes[0] == shapes[1]


def _copy(to: nn.Module, of: nn.Module, without: tuple[str, ...] = ()) -> set[int]:
    """Parameters and buffers of the same name and shape; which parameters those are."""
    there = dict(of.named_parameters()) | dict(of.named_buffers())
    copied = set()
    for name, p in (*to.named_parameters(), *to.named_buffers()):
        if any(part in name for part in without) or name not in there or there[name].shape != p.shape:
            continue
        p.copy_(there[name])
        copied.add(id(p))
    return copied


@torch.no_grad()
def echo_of(to: EchoAttention, attention: Attention) -> None:
    """The values, gate and last map of attention; its queries and keys are let go.

    Raises UsageError where the two are not of one size.
    """
    to.check(attention)
    rows = [attention.qkv.weight, *([] if attention.qkv.bias is None else [attention.qkv.bias])]
    _, _, v, gate = zip(*(r.split(attention.sizes) for r in rows), strict=True)
    if to.values.weight.shape[0] != len(v[0]) + len(gate[0]) or (to.values.bias is None) != (len(rows) == 1):
        raise UsageError("attention(echo=true): gate and bias differ from those of the attention that it is made of")
    _fill(to.values, [torch.cat(part) for part in zip(v, gate, strict=True)])
    _copy(to.out, attention.out)


@torch.no_grad()
def mamba2_of(to: Mamba2, attention: Attention) -> None:
    """x <- V, B <- K, C <- Q and the last map from attention; gate, step size, convolution and decay as they were born.

    Each head keeps its queries, keys and values, as S_t = a S + B x^T and y = S^T C is attention without its softmax;
    keys and values that several heads share are repeated. Positions, norms of q and k, and the scale 1 / sqrt(K) go.

    Raises UsageError unless heads = groups = the attention's heads, and key = value = its key.
    """
    heads, key = attention.heads, attention.key
    if (to.heads, to.groups, to.key, to.value) != (heads, heads, key, key) or to.width != attention.width:
        raise UsageError(
            f"Mamba2 of attention: heads {to.heads}, groups {to.groups}, key {to.key}, value {to.value}; expected "
            f"mamba2(heads={heads},groups={heads},key={key},value={key})"
        )
    linears = [(to.in_proj, attention.qkv), (to.out_proj, attention.out)]
    for part in ("weight", "bias"):
        (ours, theirs), (out, other) = ((getattr(m, part) for m in pair) for pair in linears)
        if ours is None or theirs is None:
            continue
        q, k, v, _ = theirs.split(attention.sizes)
        k, v = (
            z.unflatten(0, (-1, key)).repeat_interleave(heads // attention.kv_heads, 0).flatten(0, 1) for z in (k, v)
        )
        inner = heads * key
        ours[inner : 4 * inner] = torch.cat([v, k, q])
        out.copy_(other)


MAKES: dict[tuple[type, type], Callable[[Any, Any], None]] = {
    (EchoAttention, Attention): echo_of,
    (Mamba2, Attention): mamba2_of,
}


def _fill(linear: nn.Linear, parts: list[Tensor]) -> None:
    linear.weight.copy_(parts[0])
    if len(parts) > 1:
        linear.bias.copy_(parts[1])


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, each forward pass adds to the list what enters each depth of the model's stack and what leaves the last,
    (B, T, D) each: one more tensor than there are depths."""
    stack = stack_of(model)
    seen: list[Tensor] = []
    parts: list[Any] = [block.norms[0] for block in stack.blocks] + [stack.norm]  # type: ignore[union-attr, index]
    hooks = [part.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for part in parts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
