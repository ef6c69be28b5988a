"""Pictures of examples: a PNG of a time series' channels, written with the standard library alone."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

WARM, COOL = (224, 102, 43), (47, 111, 223)  # above and below zero; transparent at zero, so it suits any background


def heat(rows: Sequence[Sequence[float]]) -> str:
    """rows (T, D) -> a data: URI of a T x D picture, time to the right, channel 0 at the bottom.

    Each channel is scaled by its own largest magnitude; the sign gives the hue, the magnitude the opacity.
    """
    steps, channels = len(rows), len(rows[0])
    peak = [max((abs(row[c]) for row in rows), default=0) or 1 for c in range(channels)]
    lines = []
    for c in reversed(range(channels)):
        line = bytearray(b"\0")  # filter type: none
        for t in range(steps):
            v = rows[t][c] / peak[c]
            line += bytes((*(WARM if v > 0 else COOL), round(255 * min(abs(v), 1))))
        lines.append(bytes(line))
    return "data:image/png;base64," + base64.b64encode(_png(steps, channels, b"".join(lines))).decode()


def _png(width: int, height: int, rgba: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rgba, 9)) + chunk(b"IEND", b"")
