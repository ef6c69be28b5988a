"""The template of time-invariant layers: one convolution in training, one small step in streaming, one set of numbers.

Time is cut into blocks. Within a block the output is a convolution of its input, by `long_conv`, plus what the state
before the block shows; a block leaves the state that it got, moved on, plus what its input left. So kernels are no
longer than a block, memory does not grow with the square of anything, and a state enters and leaves anywhere: at the
ends of chunks, at resets and where a row ends.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Cell, UsageError, wide
from ..ops import linear_scan, long_conv

BLOCK = 128  # steps in a block: long enough for few blocks, short enough for small powers of A


class LinearSystem(NamedTuple):
    """x_t = a x_{t-1} + b u_t, o_t = Re(c x_t), for each of D features, or 1 for all; n states, M outputs.

    Real, or complex with the half of each conjugate pair and c doubled.
    """

    a: Tensor  # (D, n) diagonal, or (D, n, n)
    b: Tensor  # (D, n)
    c: Tensor  # (D, M, n)


class LTI(Cell[Tensor]):
    """x_t = A x_{t-1} + B u_t,  o_t = Re(C x_t), feature by feature. Write `system`; the state is x (B, D, n).

    `kernel` and `transition` may be overridden by faster ways to the same numbers; u is what `encode` gives.

    For each step and feature this costs the convolution and n (M + 1) multiplications for the states between blocks;
    for each call, the powers of A: n^3 log2(block) where it is dense. Resets cost what they cost in `long_conv`.
    """

    @abc.abstractmethod
    def system(self) -> LinearSystem:
        """The recurrence as it is now, in float32 or wider."""

    def kernel(self, system: LinearSystem, squares: list[Tensor], steps: int) -> Tensor:
        """C A^l B for l < steps: (D, M, steps). squares: A, A^2, A^4 ..."""
        c, states = _as_real(system.c, -1), _powers(squares, system.b[..., None], steps)[..., 0]
        return c @ _as_real(states.conj(), 1)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            a, b, c = self.system()
            x = _times(a, state) + b * u.to(wide(u.dtype))[..., None]
            return read(c, x), x

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """u (B, T, D) -> o (B, T, D, M) and the state after the last step, or at each row's end."""
        with torch.autocast(u.device.type, enabled=False):
            return self._scan(u.to(wide(u.dtype)), state, reset, lengths)

    def _scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, size = u.shape[1], min(u.shape[1], BLOCK)
        system = self.system()
        squares = _squares(system.a, size)
        left = _powers(squares, system.b[..., None], size)[..., 0]  # (D, n, l): what u leaves l steps later
        u = _blocks(u, size)  # (B, blocks, size, D)
        segment = None if reset is None else _blocks(reset, size).cumsum(2)

        within = None if reset is None else _blocks(reset, size).flatten(0, 1)
        o = long_conv(u.flatten(0, 1)[..., None], self.kernel(system, squares, size), reset=within)
        o = o.unflatten(0, u.shape[:2])  # (B, blocks, size, D, M)
        states = _between(squares, _remains(u, left, segment), state, size, segment)
        o = o + _shown(system.c, squares, states[:, :-1], size, segment)
        o = o.flatten(1, 2)[:, :steps]
        if lengths is None and steps % size == 0:
            return o, states[:, -1].clone()
        ends = torch.full((len(u),), steps, device=u.device) if lengths is None else lengths.long()
        return o, _state_at(ends, states, u, segment, squares, left)


class Frozen(LTI):
    """x_t = A x_{t-1} + B u_t,  o_t = C x_t  with the A, B, C that `layer` has now, in buffers of D N (N + M + 1).

    For streaming: a step of a layer that discretises A anew costs N^3 for each feature, this one N^2. States, outputs,
    encode and decode are the layer's; what its system learns later is not seen here.

    Raises UsageError for a layer whose state is complex (S4, S4D): its own step is cheap.
    """

    a: Tensor  # (D, N, N)
    b: Tensor  # (D, N)
    c: Tensor  # (D, M, N)

    def __init__(self, layer: LTI):
        super().__init__()
        if layer.initial_state(0).is_complex():
            raise UsageError(f"Frozen: the state of {type(layer).__name__} is complex; expected a real one, as LSSL's")
        self.layer, self.traits = layer, layer.traits
        self.width, self.out_width = layer.width, layer.out_width
        for name, value in zip("abc", layer.system(), strict=True):
            self.register_buffer(name, value.detach().clone())

    def initial_state(self, batch: int) -> Tensor:
        return self.layer.initial_state(batch)

    def system(self) -> LinearSystem:
        high = wide(self.a.dtype)
        return LinearSystem(self.a.to(high), self.b.to(high), self.c.to(high))

    def encode(self, x: Tensor) -> Tensor:
        return self.layer.encode(x)

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return self.layer.decode(o, x)


def _blocks(t: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (B, blocks, size, ...), zeros behind the end."""
    more = -t.shape[1] % size
    if more:
        t = torch.cat([t, t.new_zeros(len(t), more, *t.shape[2:])], 1)
    return t.unflatten(1, (-1, size))


def _remains(u: Tensor, left: Tensor, segment: Tensor | None) -> Tensor:
    """What the inputs (B, blocks, size, D) of a block leave at its end: (B, blocks, D, n)."""
    if segment is not None:
        u = torch.where((segment == segment[..., -1:])[..., None], u, 0)
    left = left.flip(-1)
    if not left.is_complex():
        return torch.einsum("bisd,dns->bidn", u, left)
    return torch.complex(*torch.einsum("bisd,dns->bidn", u, _as_real(left, 1)).chunk(2, -1))


def _between(squares: list[Tensor], remains: Tensor, state: Tensor, size: int, segment: Tensor | None) -> Tensor:
    """The states before each block and after the last: (B, blocks + 1, D, n)."""
    cut = None if segment is None else segment[..., -1] > 0
    if squares[0].ndim == 2:
        after, _ = linear_scan(moved(squares, torch.ones_like(squares[0]), size), remains, state, reset=cut)
        return torch.cat([state[:, None], after], 1)
    states = [state]
    for i, new in enumerate(remains.unbind(1)):
        before = states[-1] if cut is None else torch.where(cut[:, i, None, None], 0, states[-1])
        states.append(moved(squares, before, size) + new)
    return torch.stack(states, 1)


def _shown(c: Tensor, squares: list[Tensor], states: Tensor, size: int, segment: Tensor | None) -> Tensor:
    """What states (B, blocks, D, n) show in the outputs of the block after them: (B, blocks, size, D, M)."""
    transposed = [a.mT if a.ndim == 3 else a for a in squares]
    seen = _powers(transposed, _on_columns(transposed[0], c.mT), size)  # (D, n, size, M): C A^(l+1)
    if segment is None:
        return torch.einsum("bidn,dnsm->bisdm", _as_real(states.conj(), -1), _as_real(seen, 1))
    known = segment == 0  # outputs before the first reset of the block
    states = torch.where(known[:, :, 0, None, None], states, 0)
    shown = torch.einsum("bidn,dnsm->bisdm", _as_real(states.conj(), -1), _as_real(seen, 1))
    return torch.where(known[..., None, None], shown, 0)


def _state_at(
    ends: Tensor, states: Tensor, u: Tensor, segment: Tensor | None, squares: list[Tensor], left: Tensor
) -> Tensor:
    """The state after ends (B,) steps: that before the block in which the row ends, moved on, and what u left since."""
    rows, size = torch.arange(len(u), device=u.device), u.shape[2]
    block = ends // size
    rest = (ends - block * size)[:, None]
    state, block = states[rows, block], block.clamp(max=u.shape[1] - 1)
    t, u = torch.arange(size, device=u.device), u[rows, block]  # (B, size, D)
    if segment is not None:
        segment = segment[rows, block]
        last = segment.gather(1, (rest - 1).clamp(min=0)) * (rest > 0)
        u = torch.where((segment == last)[..., None], u, 0)
        state = torch.where((last > 0)[..., None], 0, state)
    back = t - (size - rest)  # the row's last step is to stand last
    u = torch.where((back >= 0)[..., None], u.gather(1, back.clamp(min=0)[..., None].expand_as(u)), 0)
    return moved(squares, state, rest[..., None]) + _remains(u[:, None], left, None)[:, 0]


def moved(squares: list[Tensor], x: Tensor, steps: int | Tensor) -> Tensor:
    """A^steps x, x (B, D, n), steps a number or (B, 1, 1)."""
    for k, a in enumerate(squares):
        bit = steps >> k & 1
        if isinstance(bit, Tensor):
            x = torch.where(bit > 0, _times(a, x), x)
        elif bit:
            x = _times(a, x)
    return x


def read(c: Tensor, x: Tensor) -> Tensor:
    """Re(C x) (B, D, M) for c (D, M, n), x (B, D, n)."""
    if c.shape[1] == 1:  # a batch of D products of two vectors: slow as matrices
        return (c[:, 0] * x).real.sum(-1, keepdim=True)
    return torch.einsum("dmn,bdn->bdm", _as_real(c, -1), _as_real(x.conj(), -1))


def _times(a: Tensor, x: Tensor) -> Tensor:
    """A x for x (B, D, n)."""
    return torch.einsum("dij,bdj->bdi", a, x) if a.ndim == 3 else a * x


def _on_columns(a: Tensor, v: Tensor) -> Tensor:
    """A v for v (D, n, K)."""
    return a @ v if a.ndim == 3 else a[..., None] * v


def _squares(a: Tensor, steps: int) -> list[Tensor]:
    """A, A^2, A^4 ... as many as there are binary digits in steps."""
    squares = [a]
    for _ in range(1, steps.bit_length()):
        squares.append(squares[-1] @ squares[-1] if a.ndim == 3 else squares[-1] ** 2)
    return squares


def _powers(squares: list[Tensor], v: Tensor, steps: int) -> Tensor:
    """A^l v for l < steps, by doubling what there is: v (D, n, K) -> (D, n, steps, K)."""
    found, count = v, v.shape[-1]
    for a in squares:
        if found.shape[-1] < steps * count:
            found = torch.cat([found, _on_columns(a, found)], -1)
    return found[..., : steps * count].unflatten(-1, (steps, count))


def _as_real(t: Tensor, dim: int) -> Tensor:
    """Complex numbers as twice as many real ones: sum_n Re(c_n x_n) is that of _as_real(c) _as_real(conj(x))."""
    return torch.cat([t.real, t.imag], dim) if t.is_complex() else t
