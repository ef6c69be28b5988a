"""The backbone of every model here: recurrent layers with skips between an embedding and a head."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import layers as _register_all  # noqa: F401
from ..core import (
    Cost,
    Load,
    RecurrentLayer,
    Traits,
    UsageError,
    check_input,
    check_sizes,
    clear_past_end,
    clone,
    layers,
    near,
    past_end,
    tree_map,
    wide,
)
from ..core.layer import WRONG_CALL, check_step
from ..core.vary import LATER
from ..layers import Attention, EchoAttention, Sight
from ..nn import GLU, Experts, GatedMLP, RMSNorm
from .classifier import Classifier
from .halting import Halting
from .pattern import Place, places

OF_BLOCK = ("mlp", "experts")  # what a place of a pattern may say of its block, besides what its layer takes
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms": RMSNorm,
    "layer": nn.LayerNorm,
    "none": lambda width: nn.Identity(),
}


@dataclass(frozen=True)
class Stack:
    """Describes a residual stack of `depth` registered layers; `build` makes it for a task's widths.

    layer: a name, or a pattern that repeats to the depth, as "mamba2*7,attention" (see `pattern`). args override the
    layers' own `sized(width)` arguments, in a hybrid those of every layer that takes them. mlp is the expansion of the
    gated MLP after each layer, 0 for none. pool="mean" answers with the running mean of the outputs (`Classifier`),
    "none" with the outputs. residual_scale: what each branch is multiplied by before it is added.
    depth_embedding: a learned vector for each depth is added to what enters it, so that a block that stands at several
    can tell them apart. ponder: each place decides how deep to think (`Halting`), and this times the depths that it
    uses is added to the loss; None for the last depth's outputs. The Universal Transformer (Dehghani et al. 2019,
    arXiv:1807.03819) is Stack("attention@one", depth=6, depth_embedding=True, ponder=0.01).
    experts: that many gated MLPs in place of one, of which each step takes `active` (`Experts`); 0 for one alone. In a
    pattern also of some blocks: "mamba,mamba(experts=8)". balance: what uneven use adds to the loss; 0.01 is usual.
    Every field is a number, a registry name or a mapping of those, so a description can be written down as JSON.
    """

    layer: str = "gru"
    width: int = 64
    depth: int = 2
    args: Mapping[str, Any] = field(default_factory=dict)
    mlp: float = 2.0
    norm: str = "rms"
    dropout: float = 0.0
    pool: Literal["none", "mean"] = "none"
    residual_scale: float = field(default=1.0, metadata=LATER)
    depth_embedding: bool = field(default=False, metadata=LATER)
    ponder: float | None = field(default=None, metadata=LATER)
    experts: int = field(default=0, metadata=LATER)
    active: int = field(default=2, metadata=LATER)
    balance: float = field(default=0.0, metadata=LATER)

    def build(self, *, x_width: int | None = None, x_vocab: int | None = None, y_width: int) -> RecurrentLayer[Any]:
        """A model from x (B, T, x_width), or ids (B, T) below x_vocab, to y (B, T, y_width), on torch's generator.

        Raises UsageError for a field out of range, Unknown for a layer that no registry holds.
        """
        self.check()
        if self.pool not in ("none", "mean"):
            raise UsageError(f"Stack: pool {self.pool!r}; expected 'none' or 'mean'")
        model = self.residual(embedding(self.width, x_width, x_vocab), nn.Linear(self.width, y_width))
        return Classifier(model) if self.pool == "mean" else model

    def check(self) -> None:
        """Raise UsageError unless every field is in range."""
        check_sizes("Stack", width=self.width, depth=self.depth)
        ends = {"mlp": math.inf, "dropout": 1, "residual_scale": math.inf, "balance": math.inf}
        for name, end in ends.items():
            _check_number(name, getattr(self, name), end)
        if not isinstance(self.depth_embedding, bool):
            raise UsageError(f"Stack: depth_embedding is {self.depth_embedding!r}; expected true or false")
        if self.ponder is not None:
            _check_number("ponder", self.ponder, math.inf)
            if self.depth < 2:
                raise UsageError(f"Stack: ponder {self.ponder} at depth {self.depth}; expected 2 depths to choose from")
        if self.norm not in NORMS:
            raise UsageError(f"Stack: unknown norm {self.norm!r}; {near(self.norm, NORMS)}")
        found = places(self.layer, self.depth)
        if self.balance and not any(place.args.get("experts", self.experts) for place in found):
            raise UsageError(f"Stack: balance {self.balance} without experts; expected some, or 0")
        taken = set().union(*(self._arguments(place) for place in found))
        for name in self.args:
            if name not in taken:  # by any layer: let the first say what it does take
                self._refuse(name, found[0])

    def residual(self, embed: nn.Linear | nn.Embedding, head: nn.Linear | None) -> Residual:
        """The stack between an embedding and a head."""
        blocks, norm, order = self.blocks(), self.last_norm(), self.order()
        halting = None
        if self.ponder is not None:
            halting = Halting(self.width, self.depth, NORMS[self.norm](self.width), ponder=self.ponder)
        signal = nn.Parameter(torch.randn(self.depth, self.width) * self.width**-0.5) if self.depth_embedding else None
        return Residual(embed, blocks, norm, head, order=order, signal=signal, halting=halting)

    def blocks(self) -> list[Block]:
        """The blocks of the pattern, each once, in the order of their first places."""
        return [self._block(place) for place in self._distinct()]

    def order(self) -> tuple[int, ...]:
        """Which of `blocks` stands at each depth."""
        distinct = self._distinct()
        own = iter(range(len(distinct)))
        first: dict[str, int] = {}
        order = []
        for place in places(self.layer, self.depth):
            known = first.get(place.label) if place.label else None
            order.append(next(own) if known is None else known)
            if place.label:
                first.setdefault(place.label, order[-1])
        return tuple(order)

    def last_norm(self) -> nn.Module:
        """The norm in front of the head."""
        return NORMS[self.norm](self.width)

    def _distinct(self) -> list[Place]:
        found, labels = [], set()
        for place in places(self.layer, self.depth):
            if not place.label or place.label not in labels:
                found.append(place)
            labels.add(place.label)
        return found

    def _block(self, place: Place) -> Block:
        arguments = self._arguments(place)
        mlp_size, experts = (arguments.pop(name, getattr(self, name)) for name in OF_BLOCK)
        try:
            layer = _class(place)(**arguments)
        except TypeError as error:
            raise UsageError(f"Stack: {place.layer} does not take {arguments}: {error}") from error
        mlp = self._mlp(mlp_size, experts)  # after the layer: a seed gives the weights that it always gave
        norms = [NORMS[self.norm](self.width) for _ in range(1 if mlp is None else 2)]
        block = Block(layer, norms, mlp, dropout=self.dropout, scale=self.residual_scale)
        with torch.no_grad():  # the sum of all branches starts with the variance of one
            for weight in block.last_weights():
                weight /= math.sqrt(self.depth * len(norms))
        return block

    def _mlp(self, expansion: object, experts: object) -> GatedMLP | Experts | None:
        _check_number("mlp", expansion, math.inf)
        if isinstance(experts, bool) or not isinstance(experts, int) or not 0 <= experts <= 1 << 16:
            raise UsageError(f"Stack: experts is {experts!r}; expected a whole number from 0 to {1 << 16}")
        hidden = round(self.width * expansion)  # type: ignore[operator]
        if experts and not hidden:
            raise UsageError(f"Stack: experts {experts} of mlp {expansion}; expected an expansion above 0")
        if experts:
            return Experts(self.width, hidden, experts=experts, active=self.active, normed=True, balance=self.balance)
        return GatedMLP(self.width, hidden) if expansion else None

    def _arguments(self, place: Place) -> dict[str, Any]:
        known = {name for name in inspect.signature(_class(place)).parameters if name != "width"}
        own = {name: value for name, value in place.args.items() if name != "echo"}
        for name in own:
            if name not in known.union(OF_BLOCK):
                self._refuse(name, place)
        if "width" in self.args:
            self._refuse("width", place)
        return {**layers[place.layer].sized(self.width), **{n: v for n, v in self.args.items() if n in known}, **own}

    def _refuse(self, name: str, place: Place) -> None:
        layer = f"{place.layer}(echo=true)" if place.args.get("echo") else place.layer
        if name == "width":
            raise UsageError(f"Stack: args may not set the width of {layer}; set the width of the stack")
        known = [n for n in inspect.signature(_class(place)).parameters if n != "width"]
        raise UsageError(f"Stack: {layer} has no argument {name!r}; {near(name, known)}")


def _class(place: Place) -> type[RecurrentLayer[Any]] | type[EchoAttention]:
    """What stands at a place. Raises UsageError for echo=true of what is no attention."""
    cls: type[RecurrentLayer[Any]] = layers[place.layer].cls
    echo = place.args.get("echo", False)
    if not isinstance(echo, bool) or (echo and cls is not Attention):
        raise UsageError(f"Stack: {place.layer}(echo={echo}); expected true or false, of attention")
    return EchoAttention if echo else cls


def _check_number(name: str, value: object, end: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < end:
        raise UsageError(f"Stack: {name} is {value!r}; expected a number from 0 to below {end}")


class Balanced(NamedTuple):
    """The state of a block whose experts are paid for uneven use."""

    layer: Any
    load: Load


class Block(RecurrentLayer[Any]):
    """x + s W layer(norm(x)), then x + s mlp(norm(x)), s = scale; the state is the layer's, or `Balanced`.

    An EchoAttention sees by what an attention before it saw, so `along` alone can run it. A layer that is linear in its
    input (LRU, S5, short convolution) is followed by GELU and a gated linear unit in
    place of W, as in the blocks of its paper. norms: one for the layer, one more if there is an mlp. Dropout acts on
    what each branch adds, in training mode only. back: what stands in place of W; nn.Identity() for none.
    """

    def __init__(
        self,
        layer: RecurrentLayer[Any] | EchoAttention,
        norms: list[nn.Module],
        mlp: GatedMLP | Experts | None,
        *,
        dropout: float = 0.0,
        back: nn.Module | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.width = self.out_width = layer.width
        self.traits = Traits(resets=layer.traits.resets)
        self.norms, self.layer, self.mlp = nn.ModuleList(norms), layer, mlp
        usual = GLU if layer.traits.linear_in_input else nn.Linear
        self.back = usual(layer.out_width, layer.width) if back is None else back
        self.dropout, self.scale = nn.Dropout(dropout), scale

    def last_weights(self) -> list[Tensor]:
        """The weights of the linear maps of this block whose outputs are added to x."""
        back = self.back.out if isinstance(self.back, GLU) else self.back
        maps = [back] if self.mlp is None else [back, self.mlp.out]
        return [m.weight if isinstance(m, nn.Linear) else m for m in maps if isinstance(m, nn.Linear | nn.Parameter)]

    @property
    def balanced(self) -> bool:
        """Whether it has experts that are paid for uneven use."""
        return isinstance(self.mlp, Experts) and self.mlp.balance > 0

    def initial_state(self, batch: int) -> Any:
        first = self.layer.initial_state(batch)
        if not self.balanced:
            return first
        router = self.mlp.router.weight  # type: ignore[union-attr]
        zeros = router.new_zeros(batch, len(router), dtype=wide(router.dtype))  # type: ignore[arg-type, operator]
        return Balanced(first, Load(zeros, zeros.clone()))

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        y, after = self.layer(self.norms[0](x), self._of_layer(state), reset=reset, lengths=lengths)
        return self._end(x, y, state, after, lengths)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, after = self.layer.step(self.norms[0](x), self._of_layer(state))  # type: ignore[operator]
        return self._end(x, y, state, after, None)

    def along(
        self,
        x: Tensor,
        state: Any,
        sight: Sight | None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any, Sight | None]:
        """forward of a block of attention, with what the last attention saw by; gives on what the next may see by."""
        if x.shape[1] == 0:
            return x, self.initial_state(len(x)) if state is None else clone(state), sight
        u = self.norms[0](x)
        u = u if lengths is None else clear_past_end(u, lengths)
        if isinstance(self.layer, Attention):
            y, after, sight = self.layer.look(u, self._of_layer(state), reset, lengths)
        else:
            y, after = self.layer(u, self._of_layer(state), sight)  # type: ignore[operator]
        return *self._end(x, y, state, after, lengths), sight

    def _of_layer(self, state: Any) -> Any:
        return state.layer if isinstance(state, Balanced) else state

    def _end(self, x: Tensor, y: Tensor, before: Any, after: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """x (B, T, D), or (B, D) of a step, with what the layer y and then the MLP add; and the block's state."""
        x = x + self._scaled(self.back(y))
        if self.balanced:
            y, used = self.mlp.weighed(self.norms[1](x))  # type: ignore[union-attr, operator]
            if lengths is not None:
                over = past_end(lengths.to(x.device), x.shape[1])[..., None]
                used = tree_map(lambda t: t.masked_fill(over, 0), used)
            load = used if x.ndim == 2 else tree_map(lambda t: t.sum(1), used)
            after = Balanced(after, load if before is None else tree_map(torch.add, before.load, load))
            x = x + self._scaled(y)
        elif self.mlp is not None:
            x = x + self._scaled(self.mlp(self.norms[1](x)))
        return (x if lengths is None else clear_past_end(x, lengths)), after

    def _scaled(self, branch: Tensor) -> Tensor:
        branch = self.dropout(branch)
        return branch if self.scale == 1 else self.scale * branch


class Residual(RecurrentLayer[tuple[Any, ...]]):
    """y_t = head(norm(block_n(... block_1(embed(x)))))_t, where all but the blocks act on each time alone.

    order: which of `blocks` stands at each depth, where some stand at several: they share weights, not states. Without
    a head y is what the norm gives. The state is the tuple of the states at each depth. recompute: in training keep
    only what enters each block, and compute its inside again for the gradient: less memory, the same numbers. Under
    autocast the sum that runs through the blocks stays in the dtype of the parameters. y has the dtype of x, or of the
    parameters where x is ids.

    An attention whose matrix later ones take over, and those, are run by `Block.along`. signal (depth, D): added to
    what enters each depth. halting: the head reads sum_n w_n h_n over the depths n in place of the last h, and the
    state ends in a Cost: the sum over time of what the places paid (`Halting`).
    """

    recompute = False

    def __init__(
        self,
        embed: nn.Linear | nn.Embedding,
        blocks: list[Block],
        norm: nn.Module,
        head: nn.Linear | None,
        *,
        order: tuple[int, ...] | None = None,
        signal: nn.Parameter | None = None,
        halting: Halting | None = None,
    ):
        super().__init__()
        if isinstance(embed, nn.Embedding):
            self.vocab = self.width = embed.num_embeddings
        else:
            self.width = embed.in_features
        self.out_width = blocks[-1].width if head is None else head.out_features
        self.traits = Traits(resets=all(block.traits.resets for block in blocks))
        self.embed, self.blocks, self.norm, self.head = embed, nn.ModuleList(blocks), norm, head
        self.order = tuple(range(len(blocks))) if order is None else order
        self.signal, self.halting = signal, halting
        self.shared = _shared([block.layer for block in self.at_depths()])

    def at_depths(self) -> list[Block]:
        """The block at each depth; shared ones several times."""
        return [self.blocks[i] for i in self.order]  # type: ignore[misc]

    def initial_state(self, batch: int) -> tuple[Any, ...]:
        states = tuple(block.initial_state(batch) for block in self.at_depths())
        if self.halting is None:
            return states
        weight = self.embed.weight
        return (*states, Cost(weight.new_zeros(batch, dtype=wide(weight.dtype))))

    def forward(
        self,
        x: Tensor,
        state: tuple[Any, ...] | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        check_input(self, x, state, reset, lengths)
        if lengths is not None:
            lengths = lengths.to(x.device)
            x = clear_past_end(x, lengths)
        again = self.recompute and self.training and torch.is_grad_enabled()

        def run(depth: int, h: Tensor, before: Any, sight: Sight | None) -> tuple[Any, ...]:
            block: Any = self.blocks[self.order[depth]]
            function, given = (block.along, (h, before, sight)) if depth in self.shared else (block, (h, before))
            function = partial(function, reset=reset, lengths=lengths)
            found: tuple[Any, ...] = checkpoint(function, *given, use_reentrant=False) if again else function(*given)
            return found

        h, used, after = self._deepen(self._embed(x), state, run)
        if used is not None:
            used = used if lengths is None else used.masked_fill(past_end(lengths, x.shape[1]), 0)
            after = self._pay(used.sum(1), state, after)
        y = self._head(h, x)
        return (y if lengths is None else clear_past_end(y, lengths)), after

    def step(self, x: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        def run(depth: int, h: Tensor, before: Any, sight: Sight | None) -> tuple[Any, ...]:
            block: Any = self.blocks[self.order[depth]]
            if depth not in self.shared:
                return block.step(h, before)  # type: ignore[no-any-return]
            h, after, sight = block.along(h[:, None], before, sight)
            return h[:, 0], after, sight

        try:
            h, used, after = self._deepen(self._embed(x), state, run)
            return self._head(h, x), after if used is None else self._pay(used, state, after)
        except WRONG_CALL:
            check_step(self, x, state)
            raise

    def _deepen(
        self,
        h: Tensor,
        state: tuple[Any, ...] | None,
        run: Callable[[int, Tensor, Any, Sight | None], tuple[Any, ...]],
    ) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        """Through all depths: what the head reads, what each place used (...), the states of the depths.

        run(depth, h, state, sight) -> h, state and, at the depths that share attention, the sight that goes on.
        """
        after: list[Any] = []
        sight: Sight | None = None
        pondered = None if self.halting is None else self.halting.begin(h)
        for depth in range(len(self.order)):
            before = h
            h = h if self.signal is None else h + self.signal[depth]
            h, new, *seen = run(depth, h, None if state is None else state[depth], sight)
            sight = seen[0] if seen else sight
            after.append(new)
            if self.halting is not None and pondered is not None:
                pondered = self.halting.weigh(depth, before, h, pondered)
        if pondered is None:
            return h, None, tuple(after)
        return pondered.answer.to(h.dtype), pondered.used, tuple(after)

    def _pay(self, used: Tensor, state: tuple[Any, ...] | None, after: tuple[Any, ...]) -> tuple[Any, ...]:
        """The states of the depths with the cost of what was used (B,)."""
        assert self.halting is not None
        paid = self.halting.ponder * used
        return (*after, Cost(paid if state is None else state[-1].total + paid))

    def _embed(self, x: Tensor) -> Tensor:
        return self.embed(x).to(self.embed.weight.dtype)

    def _head(self, h: Tensor, x: Tensor) -> Tensor:
        y = self.norm(h) if self.head is None else self.head(self.norm(h))
        return y.to(x.dtype if x.is_floating_point() else h.dtype)


def _shared(at_depths: list[nn.Module]) -> frozenset[int]:
    """The depths of attention by whose matrix others see, and of those others.

    Raises UsageError where there is no attention before one of those, or not of its sizes.
    """
    found, leader = set(), None
    for depth, layer in enumerate(at_depths):
        if isinstance(layer, Attention):
            leader = depth
        elif isinstance(layer, EchoAttention):
            if leader is None:
                raise UsageError("attention(echo=true) comes first; expected an attention before it, to see by")
            layer.check(at_depths[leader])  # type: ignore[arg-type]
            found |= {leader, depth}
    return frozenset(found)


def embedding(width: int, x_width: int | None, x_vocab: int | None) -> nn.Linear | nn.Embedding:
    """What brings x to `width`: a linear map of numbers or a table of ids, Gaussian with variance 1 / width."""
    if (x_width is None) == (x_vocab is None):
        raise UsageError(f"build: x_width {x_width} and x_vocab {x_vocab}; expected exactly one of them")
    if x_width is not None:
        return nn.Linear(x_width, width)
    assert x_vocab is not None
    table = nn.Embedding(x_vocab, width)
    nn.init.normal_(table.weight, std=width**-0.5)  # so that a tied head starts with logits of order one
    return table
