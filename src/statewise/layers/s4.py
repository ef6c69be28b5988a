"""S4, structured state spaces (Gu, Goel & Re 2022, arXiv:2111.00396)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Traits, UsageError, check_sizes, register_layer, wide
from ..nn import LTI, LinearSystem, check_dt, legs_dplr, log_uniform
from ..nn.lti import moved

SPAN = 512  # frequencies whose Cauchy sums are formed at a time, times N/2 complex numbers for each feature


@register_layer(
    "s4",
    paper="arXiv:2111.00396",
    examples=[dict(width=3, states=8), dict(width=2, states=4, copies=2, dt_max=0.5)],
    sized=lambda width: dict(width=width, states=64),
)
class S4(LTI):
    """x' = A x + B u,  y = C x + D u,  A = diag(lam) - p p^*, for each feature alone, by the bilinear rule.

    A_ = (I - dt/2 A)^-1 (I + dt/2 A), B_ = (I - dt/2 A)^-1 dt B. x is complex and holds one of each conjugate pair:
    `states` real dimensions are states / 2 numbers. At birth A and B are HiPPO-LegS in the eigenvectors of its normal
    part (imaginary parts of B within 2), C is a complex Gaussian, D Gaussian, dt log-uniform in [dt_min, dt_max], one
    for each feature. lam = -exp(log_decay) + i frequency, so every learned system is stable. copies: how many A and B
    there are; features share them in turn.

    step solves by Woodbury's identity in O(N). The kernel of L steps is the inverse transform of its generating
    function: Cauchy sums of C (I - A_^L w^L), made anew for each L, at w around a circle, so that it is the kernel of
    the step whatever L is. The GELU and gated linear unit of the paper's block are the model's business. State
    x (B, D, N/2), complex64 or wider.

    Raises UsageError for an odd number of states, a width that is no multiple of copies, and unless
    0 < dt_min <= dt_max.
    """

    traits = Traits(linear_in_input=True, time_invariant=True)

    def __init__(self, width: int, states: int = 64, *, copies: int = 1, dt_min: float = 0.001, dt_max: float = 0.1):
        super().__init__()
        check_sizes("S4", width=width, states=states, copies=copies)
        check_dt("S4", dt_min, dt_max)
        if width % copies:
            raise UsageError(f"S4: width {width}, copies {copies}; expected width to be a multiple of copies")
        self.width = self.out_width = width
        self.copies = copies
        dtype = torch.get_default_dtype()
        lam, p, b = legs_dplr(states)
        b = torch.complex(b.real, b.imag.clamp(-2, 2))

        def repeated(t: Tensor) -> nn.Parameter:
            return nn.Parameter(t.to(dtype).expand(copies, *t.shape).clone())

        self.log_decay, self.frequency = repeated((-lam.real).log()), repeated(lam.imag)  # (copies, N/2)
        self.p, self.b = repeated(torch.view_as_real(p)), repeated(torch.view_as_real(b))  # (copies, N/2, 2)
        self.c = nn.Parameter(torch.randn(width, states // 2, 2) / 2**0.5)
        self.d = nn.Parameter(torch.randn(width))
        self.log_dt = nn.Parameter(log_uniform(width, dt_min, dt_max).to(dtype))

    def initial_state(self, batch: int) -> Tensor:
        zero = self.c.new_zeros(batch, *self.c.shape[:2], dtype=wide(self.c.dtype))
        return torch.complex(zero, zero)

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        high = wide(self.c.dtype)
        lam, p, b, c, dt = self._parts()
        x = self._step(lam, p, dt, state, 2 * b * u.to(high)[..., None])
        return 2 * (c * x).real.sum(-1, keepdim=True), x

    def scan(self, u: Tensor, state: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        # p^* x mixes the pairs with their conjugates: linear in real and imaginary parts, not in x
        o, x = super().scan(u, torch.view_as_real(state.resolve_conj()).flatten(-2), reset, lengths)
        return o, torch.view_as_complex(x.unflatten(-1, (-1, 2)))

    def system(self) -> LinearSystem:
        """The step on real and imaginary parts (N), by the step of each unit vector."""
        lam, p, b, c, dt = self._parts()
        n = 2 * lam.shape[-1]
        eye = torch.eye(n, dtype=dt.dtype, device=dt.device).unflatten(-1, (-1, 2))
        unit = torch.view_as_complex(eye)[:, None]  # (N, 1, N/2)
        a = self._step(lam, p, dt, unit, torch.zeros_like(unit))  # (N, D, N/2)
        start = self._step(lam, p, dt, torch.zeros_like(b), 2 * b)
        return LinearSystem(_pairs(a).movedim(0, -1), _pairs(start), 2 * _pairs(c.conj())[:, None])

    def kernel(self, system: LinearSystem, squares: list[Tensor], steps: int) -> Tensor:
        lam, p, b, c, dt = self._parts()
        # On the circle w^L = 1/2, and not 1, C (I - A_^L w^L) keeps its digits where A_^L is near I
        ahead = moved([a.mT for a in squares], system.c.movedim(1, 0), steps)[0]  # 2 C A_^L
        c = c - torch.view_as_complex(ahead.unflatten(-1, (-1, 2)).contiguous()).conj() / 4
        time = torch.arange(steps, dtype=dt.dtype, device=dt.device) / steps
        w = torch.polar(torch.full_like(time, 0.5 ** (1 / steps)), -2 * torch.pi * time)[: steps // 2 + 1]
        products = torch.stack([c * b, c * p, p.conj() * b, p.conj() * p])  # (4, D, N/2)
        spectrum = torch.cat([self._generated(products, lam, dt, part) for part in w.split(SPAN)], -1)
        return (torch.fft.irfft(spectrum, steps) * 2**time)[:, None]

    @staticmethod
    def _generated(products: Tensor, lam: Tensor, dt: Tensor, w: Tensor) -> Tensor:
        """sum_l C A_^l B_ w^l, from products of C (I - A_^L w^L): (D, frequencies).

        (I - w A_)^-1 B_ = 2 dt (alpha - beta A)^-1 B, alpha = 2 (1 - w), beta = dt (1 + w), and Woodbury's identity.
        """
        alpha, beta = 2 * (1 - w), dt * (1 + w)  # (F,), (D, F)
        many = beta[:, None]
        under = alpha**2 - 2 * alpha * many * lam.real[..., None] + many**2 * (lam.abs() ** 2)[..., None]  # (D, N/2, F)
        # v / (alpha - beta lam) and its conjugate pair's share a denominator; the rest is real
        over = torch.stack([products.real, (products * lam.conj()).real]).to(under.dtype)  # (2, 4, D, N/2)
        direct, crossed = torch.einsum("kvdn,dnf->kvdf", over, under.reciprocal())
        cb, cp, pb, pp = 2 * (alpha * direct - beta * crossed)
        return 2 * dt * (cb - beta * cp * pb / (1 + beta * pp))

    @staticmethod
    def _step(lam: Tensor, p: Tensor, dt: Tensor, x: Tensor, bu: Tensor) -> Tensor:
        """(2/dt - A)^-1 ((2/dt + A) x + bu), for halves of conjugate pairs (..., D, N/2)."""

        def across(v: Tensor) -> Tensor:  # p^* v, the other halves included
            return 2 * (p.conj() * v).real.sum(-1, keepdim=True)

        inverse = 1 / (2 / dt - lam)
        v = inverse * ((2 / dt + lam) * x - p * across(x) + bu)
        return v - inverse * p * (across(v) / (1 + across(inverse * p)))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """lam, p, b, c (D, N/2) complex and dt (D, 1)."""
        high, each = wide(self.c.dtype), self.width // self.copies

        def complex_(t: Tensor) -> Tensor:
            return torch.view_as_complex(t.to(high).contiguous())

        lam = torch.complex(-self.log_decay.to(high).exp(), self.frequency.to(high))
        lam, p, b = (t.repeat(each, 1) for t in (lam, complex_(self.p), complex_(self.b)))
        return lam, p, b, complex_(self.c), self.log_dt.to(high).exp()[:, None]

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return (o[..., 0] + self.d * x).to(x.dtype)


def _pairs(t: Tensor) -> Tensor:
    """Real and imaginary parts side by side: (..., N/2) complex -> (..., N)."""
    return torch.view_as_real(t.resolve_conj()).flatten(-2)
