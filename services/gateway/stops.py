"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def held_back(text: str, tags: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that one of `tags` begins with (a whole tag not counted)."""
    longest = max(map(len, tags), default=1) - 1
    firsts = {tag[0] for tag in tags}
    for start in range(max(0, len(text) - longest), len(text)):
        if text[start] in firsts and any(tag.startswith(text[start:]) for tag in tags):
            return len(text) - start
    return 0


class StopStrings:
    """Lets text through up to the stop string that is complete first, however the text is cut into pieces."""

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string was met: nothing may be pushed after it)."""
        if not self._stops:
            return text, False
        text = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)[1]], True
        keep = len(text) - held_back(text, self._stops)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held
