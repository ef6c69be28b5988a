"""The bench of decoding counts the bytes that a token reads, and every way takes the same steps."""

from __future__ import annotations

import pytest

from statewise.bench import decoding


@pytest.mark.parametrize("layer", ["gru", "mamba"])
def test_every_way_is_measured(layer):
    rows = decoding.run(layer, width=128, depth=1, vocab=500, tokens=2, rounds=2)
    ways = {row["way"]: row for row in rows}
    assert len(rows) >= 3 and all(row["ms"] > 0 and row["fraction"] > 0 for row in rows)
    plain, small = ways["step"], ways["step, for_streaming int8"]
    assert plain["bytes"] == ways["step, for_streaming"]["bytes"] == 4 * plain["parameters"]  # the head is tied
    assert plain["bytes"] / 4 < small["bytes"] < 0.4 * plain["bytes"]
    if layer == "mamba" and "transformers" in ways:
        assert ways["transformers"]["speedup"] == 1
