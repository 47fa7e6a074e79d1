"""How many prompt tokens a step may compute beside running decodes."""

from __future__ import annotations

ROUND = 128  # prompt tokens: what a step's share of a prompt is a multiple of, and its least
MARGIN = 0.85  # of the bound that is planned with: steps differ, and a prompt's later tokens cost more than its earlier
WEIGHT = 0.3  # of the newest step in what is expected of the next


class Pace:
    """Learns what decodes and prompt tokens cost, and plans steps that keep the time between two tokens of a running
    request within a bound. A prompt gets ROUND tokens a step at least, whatever that does to the bound: none starves.
    """

    def __init__(self, most: int, bound: float = 0.0) -> None:
        """`most` prompt tokens in any step; `bound` in seconds, 0: none."""
        self.most = most
        self._bound = bound
        self._decode = 0.0  # seconds of a step without prompt tokens
        self._token = 0.0  # seconds that a prompt token adds

    def tokens(self, decodes: int) -> int:
        """For a step with so many decodes."""
        if not decodes or not self._bound:
            return self.most
        if not self._token:  # nothing is known yet: a small step tells
            return min(self.most, ROUND)
        room = (MARGIN * self._bound - self._decode) / self._token
        return min(self.most, max(ROUND, int(room) // ROUND * ROUND))

    def learn(self, decodes: int, tokens: int, seconds: float) -> None:
        """A step of so many decodes and prompt tokens took so long."""
        if not tokens:
            self._decode = _towards(self._decode, seconds)
        elif tokens >= ROUND:
            self._token = _towards(self._token, max(0.0, seconds - (self._decode if decodes else 0.0)) / tokens)


def _towards(old: float, new: float) -> float:
    return new if not old else old + WEIGHT * (new - old)
