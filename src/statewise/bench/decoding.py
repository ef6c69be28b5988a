"""How fast a model writes at batch 1, beside the time that reading its weights once would take, and transformers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import RecurrentLayer
from ..models import LanguageModel, from_transformers
from ..serving import StreamedWeight, for_streaming
from .peers import missing

Step = Callable[[], None]
MAMBA = "mamba"  # the one that transformers has too


def run(
    layer: str = MAMBA, *, width: int = 768, depth: int = 24, vocab: int = 50280, tokens: int = 8, rounds: int = 7
) -> list[dict[str, Any]]:
    """One row per way to take a step: tokens per second, milliseconds, bytes of weights that a token needs, `limit`,
    the milliseconds that reading so many bytes takes (one pass over an array of that size on the same threads), and
    `fraction`, limit / time, the median over rounds in which all ways and both passes take turns.

    Random weights. The layer mamba: the shape of mamba-130m by default, the weights of a model of transformers, which
    takes its own steps with its cache beside ours. Other layers: a LanguageModel of that width and depth.
    """
    torch.manual_seed(0)
    theirs = _transformers_mamba(width, depth, vocab) if layer == MAMBA else missing("transformers")
    if isinstance(theirs, nn.Module):
        model: RecurrentLayer[Any] = from_transformers(theirs)
    else:
        model = LanguageModel(layer, width=width, depth=depth).build(x_vocab=vocab, y_width=vocab).eval()
    ours = {
        "step": model,
        "step, for_streaming": for_streaming(model),
        "step, for_streaming bfloat16": for_streaming(model, weights="bfloat16"),
        "step, for_streaming int8": for_streaming(model, weights="int8"),
    }
    ways = {way: _stepper(m) for way, m in ours.items()}
    sizes = {way: _bytes(m) for way, m in ours.items()}
    if isinstance(theirs, nn.Module):
        ways["transformers"], sizes["transformers"] = _their_stepper(theirs), sizes["step"]
        half = "transformers bfloat16"
        ways[half], sizes[half] = _their_stepper(copy.deepcopy(theirs).bfloat16()), sizes["step"] // 2
    arrays = {size: torch.ones(size // 4) for size in set(sizes.values())}
    times: dict[str, list[float]] = {way: [] for way in ways}
    reads: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for way, step in ways.items():
                read = arrays[sizes[way]]
                took = min(_seconds(lambda: read.sum()) for _ in range(3))  # noqa: B023
                each = _seconds(lambda: [step() for _ in range(tokens)]) / tokens  # noqa: B023
                if turn:  # the first turn compiles and fills caches
                    reads[way].append(took)
                    times[way].append(each)
    parameters = sum(p.numel() for p in model.parameters())
    rows = []
    for way in ways:
        row = {
            "layer": layer,
            "way": way,
            "parameters": parameters,
            "tokens_per_second": 1 / statistics.median(times[way]),
            "ms": statistics.median(times[way]) * 1e3,
            "bytes": sizes[way],
            "limit": statistics.median(reads[way]) * 1e3,
            "fraction": statistics.median(r / t for r, t in zip(reads[way], times[way], strict=True)),
        }
        if "transformers" in times:
            row["speedup"] = statistics.median(t / o for t, o in zip(times["transformers"], times[way], strict=True))
        rows.append(row)
    return rows


def _stepper(model: RecurrentLayer[Any]) -> Step:
    state, ids = model.initial_state(1), torch.tensor([1])

    def step() -> None:
        nonlocal state, ids
        logits, state = model.step(ids, state)
        ids = logits.argmax(-1)

    return step


def _their_stepper(model: Any) -> Step:
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[1, 2]]), use_cache=True)
    cache, ids = found.cache_params, torch.tensor([[1]])

    def step() -> None:
        nonlocal ids
        ids = model(input_ids=ids, cache_params=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    return step


def _transformers_mamba(width: int, depth: int, vocab: int) -> Any:
    """A random Mamba of transformers, or why there is none."""
    if reason := missing("transformers"):
        return reason
    import transformers

    config = transformers.MambaConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=depth)
    return transformers.MambaForCausalLM(config).eval()


def _bytes(model: RecurrentLayer[Any]) -> int:
    """Bytes of weights that a token needs. Of an embedding that is not the head too, one row, which is nothing."""
    kept: dict[int, Tensor] = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    body: Any = getattr(model, "body", None)
    if body is not None and getattr(model, "head", None) is not None:
        kept.pop(id(body.embed.weight))
    sizes = [t.stored_bytes if isinstance(t, StreamedWeight) else t.numel() * t.element_size() for t in kept.values()]
    return sum(sizes) // 4 * 4


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
