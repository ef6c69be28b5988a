"""Text shown id by id is the text, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.decoding import TextStream, text


def text_of_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def shown(data: bytes, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(text_of_bytes, stop)
    return [*(stream.add(b) for b in data), stream.rest()]


@given(st.text())
@settings(max_examples=100)
def test_the_parts_make_the_text(words):
    assert "".join(shown(words.encode())) == words


@given(st.binary(max_size=40))
@settings(max_examples=100)
def test_any_bytes_can_be_shown(data):
    assert "".join(shown(data)) == text_of_bytes(data)


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=200)
def test_nothing_from_a_stop_string_on_is_shown(text, stops):
    ends = []
    for n in range(len(text) + 1):  # the string that is complete first ends it
        ends = [text[:n].index(s) for s in stops if s in text[:n]]
        if ends:
            break
    want = text[: min(ends)] if ends else text
    assert "".join(shown(text.encode(), tuple(stops))) == want


def test_what_is_sure_is_shown_at_once():
    assert shown("aé".encode()) == ["a", "", "é", ""]
    assert shown(b"ENxEND", ("END",)) == ["", "", "ENx", "", "", "", ""]


@pytest.mark.parametrize(
    "data",
    [b"some words in a line\n" * 20 + b"x" * 5000, b"\x80" * 5000, "😀".encode() * 900, b"\xf0\x9f" * 2000],
)
def test_little_is_kept(data):
    stream, parts = TextStream(text_of_bytes, ["no such"]), []
    for b in data:
        parts.append(stream.add(b))
        assert len(stream.ids) <= 512
    assert "".join([*parts, stream.rest()]) == text_of_bytes(data)


@given(st.binary(max_size=60), st.integers(1, 9))
@settings(max_examples=200)
def test_bytes_are_let_go_of_where_that_changes_nothing(data, line):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "LINE", line)
        assert "".join(shown(data)) == text_of_bytes(data)


@pytest.mark.parametrize("tail", [b"\x80", b"\xf0\x9f\x98", b"\xff\xff\xff\xff", b"\xc3"])
def test_a_tail_that_is_no_text_comes_at_the_end(tail):
    parts = shown(b"so" + tail)
    assert "".join(parts) == "so" + tail.decode("utf-8", "replace") and "\ufffd" in parts[-1]
