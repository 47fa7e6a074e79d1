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

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string itself is let through too."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str, *, counts: bool = True) -> tuple[str, str | None]:
        """(text that may be shown now, the stop string that was met: nothing may be pushed after it).

        Where the piece does not count, stop strings that it completes are text like any other."""
        if not self._stops:
            return text, None
        known, text = len(self._held), self._held + text
        if counts and (met := self._first(text, known)):
            end, start, stop = met
            self._held = ""
            return text[: end if self._include else start], stop
        keep = len(text) - held_back(text, self._stops)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, known: int) -> tuple[int, int, str] | None:
        """(end, start, stop string) of the one that ends first after the first `known` characters; of several that end
        there the longest."""
        hits = []
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                hits.append((start + len(stop), start, stop))
        return min(hits, default=None)
