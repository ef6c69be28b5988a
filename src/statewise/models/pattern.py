"""Which layer stands at which depth, as one line of text: "mamba2*7,attention" is seven to one, again and again.

    pattern  item "," item ...        ("+" may stand for "," where commas already separate patterns)
    item     NAME                     a registered layer
             NAME(FIELD=VALUE, ...)   with arguments of its own; mlp=... is the expansion of this block alone;
                                      attention(echo=true) sees by the matrix of the last attention before it
             ...@LABEL                one block for all places with this label: its weights are shared, its states not
             ...*COUNT                that many in a row

The whole repeats to the depth of the stack. Known hybrids: Jamba (arXiv:2403.19887) is "mamba*4,attention,mamba*3";
Zamba (arXiv:2405.16712) "mamba2(mlp=0)*6,attention@shared"; Griffin-like "min_gru*2,window_attention"; "gru@one" runs
the same block at every depth; EchoAtt (arXiv:2409.14595) "attention,attention(echo=true)*2" shares each third matrix.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from ..core import UsageError

_ITEM = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*(?:@(\w+))?\s*(?:\*\s*(\d{1,4}))?\s*(,|\+|$)")


@dataclass(frozen=True)
class Place:
    """What stands at one depth."""

    layer: str
    args: dict[str, Any] = field(default_factory=dict)
    label: str = ""  # places with the same label share their weights


def places(pattern: str, depth: int | None = None) -> list[Place]:
    """The layers of a pattern, one for each depth; the pattern once where no depth is given.

    Raises UsageError for text that is no pattern, a depth that cuts the pattern short, and a label on two descriptions.

    >>> [place.layer for place in places("gru*2,attention(window=8)", 4)]
    ['gru', 'gru', 'attention', 'gru']
    """
    if not any(sign in pattern for sign in ",+(@*"):
        return [Place(pattern)] * (1 if depth is None else depth)
    once, at = [], 0
    while True:
        found = _ITEM.match(pattern, at)
        if found is None or not (found[4] is None or int(found[4])):
            raise UsageError(
                f"layer {pattern[:99]!r}: not a pattern at {pattern[at : at + 20]!r}; expected as in mamba2*3,attention"
            )
        once += [Place(found[1], _arguments(found[2] or "", pattern), found[3] or "")] * int(found[4] or 1)
        at = found.end()
        if not found[5]:
            break
    for place in once:
        if place.label and any(place != other for other in once if other.label == place.label):
            raise UsageError(f"layer {pattern[:100]!r}: @{place.label} stands on two different layers")
    if depth is None:
        return once
    if depth < len(once):
        raise UsageError(f"layer {pattern[:99]!r}: the pattern has {len(once)} layers, the depth is {depth}; raise it")
    return [once[i % len(once)] for i in range(depth)]


def _arguments(text: str, pattern: str) -> dict[str, Any]:
    """FIELD=VALUE, ...: numbers, true, false and null as in JSON, else a text."""
    found: dict[str, Any] = {}
    for part in text.split(",") if text.strip() else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and name.isidentifier()) or name in found:
            raise UsageError(f"layer {pattern[:100]!r}: {part.strip()!r}; expected FIELD=VALUE, each field once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
