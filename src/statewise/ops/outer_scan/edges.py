"""What every backend does before its kernel: one form of the decays, and inputs that end with their rows."""

from __future__ import annotations

from torch import Tensor

from ...core import clear_past_end


def kind_of(log_decay: Tensor | None) -> str:
    """scalar, key, value or full: by the last two sizes."""
    if log_decay is None:
        return "scalar"
    key, value = log_decay.ndim > 1 and log_decay.shape[-2] > 1, log_decay.ndim > 0 and log_decay.shape[-1] > 1
    return {(0, 0): "scalar", (1, 0): "key", (0, 1): "value", (1, 1): "full"}[key, value]


def normal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str]:
    """Inputs that end with their rows, and log decays (B, T, H, 1), (B, T, H, K), (B, T, H, V) or (B, T, H, K, V).

    Past the end q, k, v and the log decay are zero, so o is zero there and the state rests.
    """
    kind, g = kind_of(log_decay), None
    if log_decay is not None:
        g = log_decay.to(state.dtype)
        g = g.view(*[1] * (5 - g.ndim), *g.shape)
        g = g.expand(*v.shape[:3], *g.shape[3:])
        g = g if kind == "full" else g.flatten(3)
    if lengths is not None:
        lengths = lengths.to(v.device)
        q, k, v = (clear_past_end(t, lengths) for t in (q, k, v))
        g = None if g is None else clear_past_end(g, lengths)
        reset = None if reset is None else clear_past_end(reset, lengths)
    return q, k, v, g, state, reset, kind
