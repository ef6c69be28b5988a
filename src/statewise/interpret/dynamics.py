"""Linear layers as time-varying linear systems (Sieber et al. 2024, arXiv:2405.15731)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import RecurrentLayer, ResourceError, UsageError, check_input, leaves, tree_map, where
from ..core.machine import free_memory
from ..nn import LTI
from ..ops import Op, nothing_seen, observe, softmax_step, use_backend


@dataclass(frozen=True)
class Dynamics:
    """h_t = Lambda_t h_{t-1} + B_t x_t,  y_t = C_t h_t + D x_t, from h_0 = 0: H systems side by side, V copies of each.

    In float64; R inputs and E outputs a step, N numbers of state. x is what enters the recurrence, the values of an
    attention, say, and y is what it gives, before any gate or map that acts on each time alone; for a layer that is
    linear and time-invariant x and y are the layer's own input and output.
    """

    op: str  # the op that was called, or "step" for a layer that was probed, "system" for one that gives it
    transition: Tensor  # Lambda: (B, T, H, N) where diagonal, else (B, T, H, N, N)
    write: Tensor  # B: (B, T, H, N, R)
    read: Tensor  # C: (B, T, H, E, N)
    through: Tensor  # D: (E, R)
    x: Tensor  # (B, T, H, R, V)
    y: Tensor  # (B, T, H, E, V)

    @property
    def matrix(self) -> Tensor:
        """M with y = M x: C_t Lambda_t ... Lambda_{s+1} B_s at (t, s), the implicit attention matrix.

        (B, H, T, T), or (B, H, T E, T R) where a step has several inputs or outputs. Takes O(N T^2) operations.
        """
        batch, steps, heads, states, inputs = self.write.shape
        outputs = self.read.shape[3]
        past = self.write.new_zeros(batch, heads, states, steps, inputs)  # of h_t, by the input it stems from
        rows = []
        for t in range(steps):
            old = past[..., :t, :].flatten(3)
            moved = self.transition[:, t, ..., None] * old if self.diagonal else self.transition[:, t] @ old
            past = past.clone()
            past[..., :t, :] = moved.unflatten(3, (t, inputs))
            past[..., t, :] = self.write[:, t]
            row = (self.read[:, t] @ past.flatten(3)).unflatten(3, (steps, inputs))  # (B, H, E, T, R)
            row[..., t, :] += self.through
            rows.append(row)
        return torch.stack(rows, 2).reshape(batch, heads, steps * outputs, steps * inputs)

    @property
    def diagonal(self) -> bool:
        return self.transition.ndim == 4

    def apply(self, x: Tensor) -> Tensor:
        """M x without M: the recurrence, step by step. x (B, T, H, R, V) -> y (B, T, H, E, V)."""
        h = x.new_zeros(*self.write[:, 0].shape[:-1], x.shape[-1])
        ys = []
        for t in range(x.shape[1]):
            moved = self.transition[:, t, ..., None] * h if self.diagonal else self.transition[:, t] @ h
            h = moved + self.write[:, t] @ x[:, t]
            ys.append(self.read[:, t] @ h + self.through @ x[:, t])
        return torch.stack(ys, 1)

    def eigenvalues(self) -> Tensor:
        """Of every Lambda_t: (B, T, H, N)."""
        return self.transition if self.diagonal else torch.linalg.eigvals(self.transition)


def dynamics(layer: RecurrentLayer[Any], x: Tensor) -> Dynamics:
    """The linear system that `layer` is while it answers x (B, T, D) from its first state.

    A layer that is linear and time-invariant by its traits is probed through `step`: Lambda, B, C and D are those of
    its whole map. In any other the one call of a linear op is read: given the gates that x has opened, the op is linear
    in the values that stream through it.

    Raises UsageError for a layer that is neither, such as a GRU, and for a model that calls several linear ops: take
    one of its layers.
    """
    if not isinstance(layer, RecurrentLayer):
        raise UsageError(f"dynamics: a {type(layer).__name__}; expected a layer, as one of statewise.layers")
    layer = _in_float64(layer)
    check_input(layer, x.double() if x.is_floating_point() else x, None, None, None)
    with torch.no_grad():
        if layer.traits.linear_in_input and layer.traits.time_invariant:
            return _probed(layer, x.double())
        if isinstance(layer, LTI):
            return _time_invariant(layer, x.double())
        calls: list[tuple[Op, Mapping[str, Any]]] = []

        def note(op: Op, _: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            calls.append((op, inspect.signature(op.reference).bind(*args, **kwargs).arguments))

        with observe(note), use_backend("reference"):  # other backends may call linear ops of their own
            layer(x.double() if x.is_floating_point() else x)
        linear = [(op, arguments) for op, arguments in calls if op.name in SYSTEMS]
        name = type(layer).__name__
        if not linear:
            called = ", ".join(sorted({op.name for op, _ in calls})) or "no op"
            raise UsageError(f"{name} is not linear in its state: it calls {called}; linear: {', '.join(SYSTEMS)}")
        if len(linear) > 1:
            raise UsageError(f"{name} calls {len(linear)} linear ops; take one of its layers")
        op, arguments = linear[0]
        return SYSTEMS[op.name](op, dict(arguments))


def _in_float64(layer: RecurrentLayer[Any]) -> RecurrentLayer[Any]:
    return copy.deepcopy(layer).double().eval()


def _probed(layer: RecurrentLayer[Any], x: Tensor) -> Dynamics:
    """Lambda and C from unit states, B and D from unit inputs."""
    zero = layer.initial_state(1)
    sizes = [real(leaf).numel() for leaf in leaves(zero)]
    states, width = sum(sizes), layer.width
    need, have = 24 * states**2, free_memory()
    if have is not None and need > have:
        raise ResourceError(
            f"{type(layer).__name__}: Lambda of {states} states takes {need >> 30} GiB; try a smaller layer"
        )
    units = torch.eye(states, dtype=torch.float64).split(sizes, 1)
    columns = iter(units)
    state = tree_map(lambda leaf: as_leaf(leaf, next(columns)), zero)
    y, after = layer.step(x.new_zeros(states, width), state)
    transition, read = _flat(after).mT, y.mT
    y, after = layer.step(torch.eye(width, dtype=x.dtype), layer.initial_state(width))
    enter = torch.cat([_flat(after).mT, y.mT])
    # y_t is a function of the state before t: it joins the state, where the next step does not look at it
    outputs = len(read)
    dense = torch.cat([torch.cat([transition, read]), enter.new_zeros(states + outputs, outputs)], 1)
    out = torch.eye(states + outputs, dtype=x.dtype)[states:]
    batch, steps = x.shape[:2]
    ones = (batch, steps, 1, 1, 1)
    return Dynamics(
        "step",
        dense.expand(*ones[:3], *dense.shape),
        enter.expand(*ones[:3], *enter.shape),
        out.expand(*ones[:3], *out.shape),
        x.new_zeros(outputs, width),
        x[:, :, None, :, None],
        layer(x)[0][:, :, None, :, None],
    )


def _time_invariant(layer: LTI, x: Tensor) -> Dynamics:
    """The system of each feature between an encode and a decode that are not linear."""
    a, b, c = layer.system()
    if a.is_complex():  # pairs of real states
        a = torch.diag_embed(a) if a.ndim == 2 else a
        a = torch.cat([torch.cat([a.real, -a.imag], 2), torch.cat([a.imag, a.real], 2)], 1)
        b, c = torch.cat([b.real, b.imag], 1), torch.cat([c.real, -c.imag], 2)
    u = layer.encode(x)
    o, _ = layer.scan(u, layer.initial_state(len(x)), None, None)
    shape = (*u.shape[:2], u.shape[2])
    a, b, c = a.expand(u.shape[2], *a.shape[1:]), b.expand(u.shape[2], -1), c.expand(u.shape[2], *c.shape[1:])
    return Dynamics(
        "system", a.expand(*shape, *a.shape[1:]), b[..., None].expand(*shape, -1, 1), c.expand(*shape, *c.shape[1:]),
        c.new_zeros(c.shape[1], 1), u[..., None, None], o[..., None],
    )  # fmt: skip


def real(leaf: Tensor) -> Tensor:
    """Real numbers as they are, complex ones as pairs."""
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def _flat(state: Any) -> Tensor:
    return torch.cat([real(leaf).flatten(1).double() for leaf in leaves(state)], 1)


def as_leaf(like: Tensor, rows: Tensor) -> Tensor:
    """rows (B, n) of real numbers in the shape and dtype of a leaf."""
    rows = rows.to(real(like).dtype).reshape(len(rows), *real(like).shape[1:])
    return torch.view_as_complex(rows.contiguous()) if like.is_complex() else rows


def _linear_scan(op: Op, given: dict[str, Any]) -> Dynamics:
    x = given["x"]
    flat = (*x.shape[:2], -1, 1)
    decay = _forgotten(given["a"].expand(x.shape).reshape(flat), given)
    one = torch.ones(1, 1, 1, 1, 1, dtype=decay.dtype).expand(*decay.shape, 1)
    y, _ = op(given["a"], x, torch.zeros_like(given["h0"]), reset=given.get("reset"))
    return Dynamics(op.name, decay, one, one, one[0, 0, 0] * 0, x.reshape(*flat, 1), y.reshape(*flat, 1))


def _outer_scan(op: Op, given: dict[str, Any]) -> Dynamics:
    q, k, v, state = given["q"], given["k"], given["v"], given["state"]
    y = _from_zero(op, given)
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
    log_decay = given.get("log_decay")
    per_value = log_decay is not None and log_decay.ndim > 0 and log_decay.shape[-1] > 1
    if log_decay is None:
        log_decay = torch.zeros(1, 1, dtype=state.dtype)
    if per_value:  # every value channel is a system of its own
        decay = log_decay.exp().expand(*v.shape[:3], *state.shape[2:]).mT.flatten(2, 3)
        q, k = (t.repeat_interleave(v.shape[3], 2) for t in (q, k))
        v, y = (t.flatten(2)[..., None] for t in (v, y))
    else:
        decay = log_decay.exp().expand(*v.shape[:3], state.shape[2], 1)[..., 0]
    return Dynamics(
        op.name, _forgotten(decay, given), k[..., None], q[..., None, :], v.new_zeros(1, 1), v[..., None, :],
        y[..., None, :],
    )  # fmt: skip


def _delta_scan(op: Op, given: dict[str, Any]) -> Dynamics:
    q, k, v, beta, state = given["q"], given["k"], given["v"], given["beta"], given["state"]
    y = _from_zero(op, given)
    if k.ndim == 4:
        k, v, beta = k[:, :, None], v[:, :, None], beta[:, :, None]
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    writes: list[Tensor] = []
    moved = _diagonal(given, q, state)
    for j in range(k.shape[2]):
        keep = eye - (beta[:, :, j, :, None] * k[:, :, j])[..., None] * k[:, :, j, :, None]
        moved = keep @ moved
        writes = [keep @ w for w in writes] + [(beta[:, :, j, :, None] * k[:, :, j])[..., None]]
    return Dynamics(
        op.name, _forgotten(moved, given), torch.cat(writes, -1), q[..., None, :], v.new_zeros(1, len(writes)),
        v.transpose(2, 3), y[..., None, :],
    )  # fmt: skip


def _dplr_scan(op: Op, given: dict[str, Any]) -> Dynamics:
    q, k, v, a, b, state = (given[name] for name in ("q", "k", "v", "a", "b", "state"))
    moved = _diagonal(given, q, state) + b[..., None] * a[..., None, :]
    y = _from_zero(op, given)
    return Dynamics(
        op.name, _forgotten(moved, given), k[..., None], q[..., None, :], v.new_zeros(1, 1), v[..., None, :],
        y[..., None, :],
    )  # fmt: skip


def _selective_scan(op: Op, given: dict[str, Any]) -> Dynamics:
    x, dt, a, b, c = (given[name] for name in ("x", "dt", "a", "b", "c"))
    decay = _forgotten((dt[..., None] * a).exp(), given)
    write = (dt[..., None] * b[:, :, None])[..., None]
    read = c[:, :, None, None].expand(*x.shape, 1, -1)
    y = _from_zero(op, given)
    return Dynamics(op.name, decay, write, read, x.new_zeros(1, 1), x[..., None, None], y[..., None, None])


def _softmax_scan(op: Op, given: dict[str, Any]) -> Dynamics:
    """w_t = exp(m_{t-1} - m_t) w_{t-1} + exp(score_t - m_t) v_t, read by 1 / u_t."""
    score, v, reset = given["score"], given["v"], given.get("reset")
    fresh = nothing_seen(*given["state"].w.shape, like=given["state"].w)
    y, _ = op(score, v, fresh, reset=reset)
    states = [fresh]
    for t in range(v.shape[1]):
        before = states[-1] if reset is None else where(reset[:, t], fresh, states[-1])
        states.append(softmax_step(score[:, t], v[:, t], before)[1])
    m, u = (torch.stack(leaf, 1) for leaf in list(zip(*states, strict=True))[:2])
    decay = _forgotten((m[:, :-1] - m[:, 1:]).exp()[..., None], given)
    write, read = (score - m[:, 1:]).exp()[..., None, None], torch.where(u == 0, 0, 1 / u)[:, 1:, :, None, None]
    return Dynamics(op.name, decay, write, read, v.new_zeros(1, 1), v[..., None, :], y[..., None, :])


def _from_zero(op: Op, given: dict[str, Any]) -> Tensor:
    return op(**{**given, "state": torch.zeros_like(given["state"])})[0]


def _diagonal(given: dict[str, Any], q: Tensor, state: Tensor) -> Tensor:
    log_decay = given.get("log_decay")
    log_decay = torch.zeros(1, 1, dtype=state.dtype) if log_decay is None else log_decay
    return torch.diag_embed(log_decay.exp().expand(*q.shape[:3], state.shape[2], 1)[..., 0])


def _forgotten(transition: Tensor, given: dict[str, Any]) -> Tensor:
    """Lambda_t is 0 where a reset cuts the past off."""
    reset = given.get("reset")
    if reset is None:
        return transition
    return transition.masked_fill(reset.view(*reset.shape, *[1] * (transition.ndim - 2)), 0)


SYSTEMS: dict[str, Callable[[Op, dict[str, Any]], Dynamics]] = {
    "linear_scan": _linear_scan,
    "outer_scan": _outer_scan,
    "delta_scan": _delta_scan,
    "dplr_scan": _dplr_scan,
    "selective_scan": _selective_scan,
    "softmax_scan": _softmax_scan,
}
