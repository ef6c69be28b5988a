"""Ids as text while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what decoders put for bytes that are not a character (yet)


LINE = 512  # ids kept at most while all of them can be shown
FEW = 16  # ids among which a place to cut is looked for


class TextStream:
    """Text that can be shown at once, id by id: a character waits for its last byte, and what may be the beginning of
    a stop string waits until it is known to be none. Nothing from a stop string on is ever shown.

    decode: ids to text. Keeps the ids of the last line, not of the whole text.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []  # of the text since the last break
        self.shown = 0  # characters of it that were handed out
        self.ended = False

    def add(self, id: int) -> str:
        """What may be shown now, often one word or character, sometimes nothing."""
        self.ids.append(int(id))
        text = self.decode(self.ids)
        # a character is at most four bytes: three may wait for the fourth
        return self._until(text, len(text) - min(3, len(text) - len(text.rstrip(UNFINISHED))))

    def rest(self) -> str:
        """What still waits when no more ids come."""
        text, self.ids = self.decode(self.ids), []
        found, self.shown = "" if self.ended else text[self.shown :], 0
        return found

    def _until(self, text: str, end: int) -> str:
        if self.ended:
            return ""
        stops = [at for s in self.stop if (at := text.find(s, max(0, self.shown - len(s)))) >= 0]
        if stops:
            end, self.ended = min(stops), True
        else:
            end = min([end, *(end - n for s in self.stop for n in range(1, len(s)) if text[:end].endswith(s[:n]))])
        found = text[self.shown : end]
        self.shown = max(self.shown, end)
        if text.endswith("\n") or len(self.ids) >= LINE:
            self._forget(text)
        return found

    def _forget(self, text: str) -> None:
        """Let go of the ids that were shown, but for those that what follows may still change the meaning of."""
        if self.shown == len(text):
            self.ids, self.shown = [], 0
            return
        for kept in range(1, min(len(self.ids), FEW)):
            before, after = self.decode(self.ids[:-kept]), self.decode(self.ids[-kept:])
            if len(before) <= self.shown and before + after == text:  # a character cut in two would read otherwise
                self.ids, self.shown = self.ids[-kept:], self.shown - len(before)
                return
