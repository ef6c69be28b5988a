"""Diverse beam search (Vijayakumar et al. 2018, arXiv:1610.02424): groups of beams, each of which pays for what the
groups before it chose; here on a model of bytes that continues the text it was not trained on."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from ..core.paper import Paper
from ..decoding import Beam, Sampling, beam_search, generate, read
from ..models import LanguageModel
from ..tasks import Text
from ..training import Experiment, Train
from .generation import trained
from .recipe import Claim, Measure, Recipe, Run, Scale
from .verdict import Reader


@torch.no_grad()
def continuations(
    seed: int, *, width: int, length: int, batch: int, steps: int, prompts: int, before: int, after: int, beams: int
) -> dict[str, float]:
    """Train a GRU on the text; continue `prompts` places of its test part by `after` bytes in `beams` ways each.

    oracle_NAME: of the best of the ways, 1 less the edit distance to the true text per byte of it; top_NAME: of the
    likeliest way; distinct_N_NAME: different N-grams in all ways together over N-grams. NAME: "beam" is plain beam
    search; "two", "half" and "diverse" have 2 groups, groups of 2, groups of 1, with a penalty of 0.5; "weak" and
    "strong" are "diverse" with 0.2 and 0.8, "ngram" with the penalty on 4-grams; "drawn" is no search but sampling.
    overhead: time of "diverse" over that of "beam", medians of three. bits_per_byte: of the model.
    """
    task = Text(length=length)
    train = Train(steps=steps, batch=batch, lr=4e-3, warmup=20, evaluate_every=0)
    result, model = trained(Experiment(task, LanguageModel("gru", width=width), train, seed))
    text = task.text("test").long()
    places = torch.linspace(0, len(text) - before - after, prompts).long()
    rows = text[places[:, None] + torch.arange(before + after)]
    prompt, truth = rows.split([before, after], 1)
    searches = {
        "beam": Beam(beams),
        "two": Beam(beams, groups=2),
        "half": Beam(beams, groups=beams // 2),
        "diverse": Beam(beams, groups=beams),
        "weak": Beam(beams, groups=beams, penalty=0.2),
        "strong": Beam(beams, groups=beams, penalty=0.8),
        "ngram": Beam(beams, groups=beams, ngram=4),
    }
    at, numbers = read(model, prompt), {"bits_per_byte": result.score}
    for name, how in searches.items():
        found = beam_search(model, at, after, how)
        numbers |= {f"{number}_{name}": value for number, value in scores(found.ids, found.scores, truth).items()}
    drawn = generate(
        model, prompt.repeat_interleave(beams, 0), after, Sampling(), rng=torch.Generator().manual_seed(seed)
    )
    ways = drawn.ids.view(prompts, beams, after), drawn.scores.view(prompts, beams)
    numbers |= {f"{number}_drawn": value for number, value in scores(*ways, truth).items()}
    took: dict[str, list[float]] = {"beam": [], "diverse": []}
    for _ in range(3):
        for name, times in took.items():
            began = time.perf_counter()
            beam_search(model, at, after, searches[name])
            times.append(time.perf_counter() - began)
    return {**numbers, "overhead": statistics.median(took["diverse"]) / statistics.median(took["beam"])}


def scores(ids: Tensor, logp: Tensor, truth: Tensor) -> dict[str, float]:
    """Of ways ids (P, K, n) to continue P prompts, their log-probabilities (P, K) and the true text (P, n)."""
    ways, after = ids.shape[1:]
    near = 1 - edit_distance(ids.flatten(0, 1), truth.repeat_interleave(ways, 0)).view(-1, ways) / after
    numbers = {"oracle": near.amax(1), "top": near.gather(1, logp.argmax(1, keepdim=True))}
    numbers |= {f"distinct_{n}": distinct(ids, n) for n in range(1, 5)}
    return {name: float(values.mean()) for name, values in numbers.items()}


def edit_distance(a: Tensor, b: Tensor) -> Tensor:
    """a (N, n), b (N, m) -> (N,) fewest insertions, deletions and replacements that make the one of the other."""
    place = torch.arange(b.shape[1] + 1)
    row = place.expand(len(a), -1)
    for i in range(a.shape[1]):
        replaced = row[:, :-1] + (a[:, i, None] != b)
        row = torch.cat([row[:, :1], torch.minimum(row[:, 1:], replaced - 1)], 1) + 1
        row = (row - place).cummin(1).values + place  # one more for each id of b put in
    return row[:, -1]


def distinct(ids: Tensor, n: int) -> Tensor:
    """ids (P, K, t) of bytes -> (P,) different n-grams over n-grams."""
    grams = (ids.unfold(2, n, 1) * 256 ** torch.arange(n)).sum(-1).flatten(1)
    different = 1 + (grams.sort(1).values.diff(dim=1) != 0).sum(1)
    return different / grams.shape[1]


def runs(scale: Scale) -> dict[str, Run]:
    sizes = {
        "smoke": {"width": 8, "length": 512, "batch": 2, "steps": 2, "prompts": 4, "before": 8, "after": 6, "beams": 4},
        "small": {
            "width": 96, "length": 128, "batch": 16, "steps": 400, "prompts": 256, "before": 64, "after": 24,
            "beams": 12,
        },
        "paper": {
            "width": 512, "length": 256, "batch": 64, "steps": 50_000, "prompts": 1000, "before": 256, "after": 60,
            "beams": 20,
        },
    }[scale]  # fmt: skip
    return {"text": Measure(continuations, "oracle_diverse", sizes)}


def oracle(r: Reader) -> bool:
    ours, plain = r("text"), r("text", "oracle_beam")
    return all(a > b for a, b in zip(ours, plain, strict=True))


def more_ngrams(r: Reader) -> bool:
    pairs = [(r("text", f"distinct_{n}_diverse"), r("text", f"distinct_{n}_beam")) for n in range(1, 5)]
    return all(ours.mean > plain.mean for ours, plain in pairs)


def more_groups(r: Reader) -> bool:
    kinds = ("beam", "two", "half", "diverse")
    different = [r("text", f"distinct_4_{kind}").mean for kind in kinds]
    best = [r("text", f"oracle_{kind}").mean for kind in kinds]
    return different == sorted(different) and max(best) == best[-1]


def any_strength(r: Reader) -> bool:
    plain = r("text", "oracle_beam")
    ours = [r("text", f"oracle_{kind}").mean for kind in ("weak", "diverse", "strong")]
    return min(ours) > plain.mean


def hamming(r: Reader) -> bool:
    ours, theirs = r("text"), r("text", "oracle_ngram")
    return ours.mean > theirs.mean


def top(r: Reader) -> bool:
    ours, plain = r("text", "top_diverse"), r("text", "top_beam")
    return ours.mean > plain.mean


def little_more_time(r: Reader) -> bool:
    return r("text", "overhead").mean < 1.5


RECIPE = Recipe(
    paper=Paper(
        "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models",
        "Vijayakumar et al.", 2018, "arXiv:1610.02424",
    ),
    runs=runs,
    claims=(
        Claim(
            "experiments, oracle accuracy",
            "the text found that is nearest to the true one is nearer than that of beam search with as many beams",
            oracle,
        ),
        Claim("experiments, diversity", "they have more different n-grams, for n of 1 to 4", more_ngrams),
        Claim(
            "sensitivity analysis",
            "the more groups, the more different n-grams; the oracle's choice is best with as many groups as beams",
            more_groups,
        ),
        Claim("sensitivity analysis", "any strength of the penalty from 0.2 to 0.8 helps the oracle", any_strength),
        Claim(
            "sensitivity analysis", "a penalty for the same id at the same time does so more than one for n-grams",
            hamming,
        ),
        Claim("abstract", "the likeliest text found is nearer to the true one as well", top),
        Claim("abstract", "for little more time (here: less than half as much again)", little_more_time),
    ),
)  # fmt: skip
