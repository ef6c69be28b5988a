"""Writing with a model of ids: greedy, drawn, by beams, with a draft; uses only initial_state, forward, step, select.

`generate` is the front door. `read`, `advance` and `Sampling.choose` are what it is made of, `write` yields ids one by
one; `beam_search` and `speculate` say more than `generate` does about what they found.
"""

from .beams import Beam, Beams, beam_search
from .generate import Token, Written, generate, write
from .position import Position, advance, read
from .prefixes import PrefixCache
from .sampling import GREEDY, Sampling, draw
from .speculative import Speculation, Speculative, speculate
from .stopping import Stop
from .text import TextStream

__all__ = [
    "GREEDY", "Beam", "Beams", "Position", "PrefixCache", "Sampling", "Speculation", "Speculative", "Stop",
    "TextStream", "Token", "Written", "advance", "beam_search", "draw", "generate", "read", "speculate",
    "write",
]  # fmt: skip
