"""Splits a model's output into its reasoning (inside <think>) and its answer."""

from __future__ import annotations

from services.gateway.stops import held_back

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Text in pieces -> (reasoning, answer) in pieces; the tags and the newlines that open either part are left out.

    R1's template ends the prompt inside <think>, so that the output begins as reasoning without an opening tag
    (`inside`). Otherwise the output is reasoning only if it begins with the tag itself.
    """

    __slots__ = ("_fresh", "_held", "_part")

    def __init__(self, inside: bool) -> None:
        self._part = "reasoning" if inside else "start"
        self._held = ""
        self._fresh = True  # nothing of this part has been shown yet

    @property
    def in_reasoning(self) -> bool:
        return self._part == "reasoning"

    def push(self, text: str) -> tuple[str, str]:
        text = self._held + text
        self._held = ""
        if self._part == "start":
            text = self._open(text)
        if self._part != "reasoning":
            return "", self._trimmed(text)
        before, tag, after = text.partition(CLOSE)
        if not tag:
            keep = len(text) - held_back(text, (CLOSE,))
            before, self._held = text[:keep], text[keep:]
            return self._trimmed(before), ""
        reasoning = self._trimmed(before)
        self._part, self._fresh = "answer", True
        return reasoning, self._trimmed(after)

    def flush(self) -> tuple[str, str]:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return (held, "") if self._part == "reasoning" else ("", held)

    def _open(self, text: str) -> str:
        """Decide what the output begins with; until that is clear, hold all of it back."""
        head = text.lstrip()
        if head.startswith(OPEN):
            self._part = "reasoning"
            return head[len(OPEN) :]
        if OPEN.startswith(head):
            self._held = text
            return ""
        self._part, self._fresh = "answer", False  # no tag was there: the newlines are the answer's own
        return text

    def _trimmed(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text
