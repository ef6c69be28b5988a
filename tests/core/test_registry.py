"""Names to entries."""

from __future__ import annotations

import pytest

from statewise.core import LayerInfo, RecurrentLayer, Registry, Unknown, UsageError, layers, register_layer


@pytest.fixture
def scratch() -> Registry[int]:
    registry: Registry[int] = Registry("thing")
    registry.add("alpha", 1)
    registry.add("beta", 2)
    return registry


def test_knows_what_was_added(scratch):
    assert scratch["alpha"] == 1 and "beta" in scratch and len(scratch) == 2 and list(scratch) == [1, 2]
    assert scratch.names() == ["alpha", "beta"]


def test_an_unknown_name_says_what_is_near(scratch):
    with pytest.raises(Unknown, match=r"^unknown thing 'alpah'; near: alpha$"):
        scratch["alpah"]
    with pytest.raises(UsageError, match="known: alpha, beta"):
        scratch["zzz"]


def test_refuses_a_name_twice(scratch):
    with pytest.raises(ValueError, match=r"thing 'alpha' is already registered by 1"):
        scratch.add("alpha", 3)


def test_register_layer_leaves_the_class_as_it_was():
    class Own(RecurrentLayer):
        """h_t = x_t.

        More.
        """

    try:
        same = register_layer("own_for_test", paper="none", examples=[{"width": 2}], sized=lambda w: {"width": w})(Own)
        info = layers["own_for_test"]
        assert same is Own and isinstance(info, LayerInfo) and info.summary == "h_t = x_t."
        assert info.examples == ({"width": 2},) and info.sized(3) == {"width": 3} and info.known_failures == {}
    finally:
        layers._entries.pop("own_for_test", None)
