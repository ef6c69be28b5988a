"""LSSL, the linear state-space layer (Gu, Johnson, Goel, Saab, Dao, Rudra & Re 2021, arXiv:2110.13985)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core import Traits, UsageError, check_sizes, near, register_layer, wide
from ..nn import LTI, LinearSystem, bilinear, check_dt, hippo, log_uniform, zero_order_hold
from ..nn.hippo import Measure
from ..nn.lti import read

Rule = Literal["bilinear", "zoh"]
Learn = Literal["fixed", "step", "structured", "dense"]
RULES = {"bilinear": bilinear, "zoh": zero_order_hold}


@register_layer(
    "lssl",
    paper="arXiv:2110.13985",
    examples=[
        dict(width=3, states=4),
        dict(width=2, states=3, measure="legt", rule="zoh", learn="dense"),
        dict(width=2, states=4, measure="lagt", learn="step", channels=2),
        dict(width=2, states=3, measure="legt"),
    ],
    sized=lambda width: dict(width=width, states=64),
    known_failures={
        "step_exports_to_onnx": "a step discretises A anew, and ONNX has neither matrix inverses nor exponentials"
    },
)
class LSSL(LTI):
    """x_t = A_ x_{t-1} + B_ u_t,  y_t = C x_t + D u_t, for each feature alone: x' = A x + B u in steps of dt.

    A and B are shared by all features and begin as HiPPO's for `measure`, "legs", "legt" or "lagt" (`nn.hippo`). dt is
    log-uniform in [dt_min, dt_max], one for each feature; C and D are Gaussian, `channels` outputs for each feature.
    rule: "bilinear", or "zoh" for zero-order hold. The GELU and the linear map that follow in the paper are the model's
    business. State x (B, D, N), float32 or wider.

    learn says what is learned beside C and D: "fixed" nothing, "step" dt, "dense" dt, A and B, "structured" dt and the
    seven vectors of A = -P (T^-1 + diag(shift)) Q and B = P b, T tridiagonal, P and Q diagonal. Nothing keeps a learned
    A stable. A step discretises A anew: of the bilinear rule it solves for the next state alone, 2/3 N^3 operations for
    each feature, of the hold it takes the exponential. `nn.Frozen` streams what has been learned in N^2.

    Raises UsageError for an unknown measure, rule or learn, and unless 0 < dt_min <= dt_max.
    """

    traits = Traits(linear_in_input=True, time_invariant=True)

    log_dt: Tensor  # (D,)
    a: Tensor  # (N, N)
    b: Tensor  # (N,)
    low: Tensor  # (N-1,)
    middle: Tensor  # (N,)
    up: Tensor  # (N-1,)
    left: Tensor  # (N,)
    right: Tensor  # (N,)
    shift: Tensor  # (N,)

    def __init__(
        self,
        width: int,
        states: int = 64,
        *,
        measure: Measure = "legs",
        rule: Rule = "bilinear",
        learn: Learn = "structured",
        channels: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        super().__init__()
        check_sizes("LSSL", width=width, states=states, channels=channels)
        check_dt("LSSL", dt_min, dt_max)
        for what, given, known in (("rule", rule, get_args(Rule)), ("learn", learn, get_args(Learn))):
            if given not in known:
                raise UsageError(f"LSSL: unknown {what} {given!r}; {near(str(given), known)}")
        self.width, self.out_width = width, width * channels
        self.rule, self.learn = rule, learn
        dtype = torch.get_default_dtype()
        a, b = hippo(measure, states)
        vectors = _structure(measure, states) if learn == "structured" else {"a": a, "b": b}
        vectors["log_dt"] = log_uniform(width, dt_min, dt_max)
        for name, value in vectors.items():
            if learn == "fixed" or (learn == "step" and name != "log_dt"):
                self.register_buffer(name, value.to(dtype))
            else:
                self.register_parameter(name, nn.Parameter(value.to(dtype)))
        self.c = nn.Parameter(torch.randn(width, channels, states))
        self.d = nn.Parameter(torch.randn(width, channels))

    def initial_state(self, batch: int) -> Tensor:
        return self.c.new_zeros(batch, self.width, self.c.shape[-1], dtype=wide(self.c.dtype))

    def continuous(self) -> tuple[Tensor, Tensor]:
        """A (N, N) and B (N,) as they are now, in float64."""
        if self.learn != "structured":
            return self.a.double(), self.b.double()
        low, middle, up = (t.double() for t in (self.low, self.middle, self.up))
        left, right, shift, b = (t.double() for t in (self.left, self.right, self.shift, self.b))
        tri = torch.diag(low, -1) + torch.diag(middle) + torch.diag(up, 1)
        a = -left[:, None] * (torch.linalg.inv(tri) + torch.diag(shift)) * right
        return a, left * b

    def system(self) -> LinearSystem:
        high = wide(self.c.dtype)
        a, b = RULES[self.rule](*self.continuous(), self.log_dt.double().exp())
        return LinearSystem(a.to(high), b.to(high), self.c.to(high))

    def transition(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.rule != "bilinear":
            return super().transition(u, state)
        with torch.autocast(u.device.type, enabled=False):
            a, b = self.continuous()
            dt = self.log_dt.double().exp()[:, None]
            eye = torch.eye(len(b), dtype=a.dtype, device=a.device)
            # A_ x + B_ u = (I - dt/2 A)^-1 (2 x + dt B u) - x: solved for one vector, not for all of A_
            right = 2 * state + dt * b * u[..., None]
            x = torch.linalg.solve(eye - dt[..., None] / 2 * a, right.movedim(0, -1)).movedim(-1, 0) - state
            x = x.to(state.dtype)
            return read(self.c.to(x.dtype), x), x

    def decode(self, o: Tensor, x: Tensor) -> Tensor:
        return (o + self.d * x[..., None]).flatten(-2).to(x.dtype)


def _structure(measure: Measure, states: int) -> dict[str, Tensor]:
    """The vectors whose A and B are HiPPO's; for legt up to noise of 0.01 on the diagonal of T."""
    n = torch.arange(states, dtype=torch.float64)
    one, root = torch.ones_like(n), (2 * n + 1).sqrt()
    if measure == "legt":
        corners = torch.zeros_like(n)
        corners[0] += 0.5
        corners[-1] += 0.5
        middle, scale = corners + 0.01 * torch.randn(states, dtype=torch.float64), root / 2**0.5
        tri = {"low": -0.5 * one[1:], "middle": middle, "up": 0.5 * one[1:]}
        return {**tri, "left": scale, "right": scale.clone(), "shift": 0 * one, "b": one / 2**0.5}
    scale, shift = (root, -n / (2 * n + 1)) if measure == "legs" else (one, -0.5 * one)
    tri = {"low": -one[1:], "middle": one.clone(), "up": 0 * one[1:]}
    return {**tri, "left": scale, "right": scale.clone(), "shift": shift, "b": one.clone()}
