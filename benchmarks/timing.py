"""What the moments of a stream's chunks say: TTFT, TPOT, ITL, and their medians and 99th percentiles.

TPOT = (last chunk - first chunk) / (tokens - 1), one figure a request.
ITL is one figure a token: a chunk that brings k tokens after a pause of g seconds counts as k intervals of g / k. Their
sum is then the time that the stream took, as with one token a chunk. What this hides, the longest pause shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec


class Spread(msgspec.Struct):
    """In milliseconds; NaN where there is nothing to tell of, which JSON has as null."""

    median: float
    p99: float

    @classmethod
    def of_seconds(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(1e3 * percentile(ordered, 50), 1e3 * percentile(ordered, 99))

    def __str__(self) -> str:
        return f"{number(self.median)} / {number(self.p99)}"


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, between two of them in proportion; NaN of none."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def tpot(times: Sequence[float], tokens: int) -> float:
    """Seconds a token after the first one; NaN where there is none."""
    return (times[-1] - times[0]) / (tokens - 1) if times and tokens > 1 else math.nan


def intervals(times: Sequence[float], counts: Sequence[int]) -> Iterator[tuple[float, float]]:
    """(when its chunk came, ITL) of each token after the first chunk. `counts`: tokens so far, after each chunk."""
    last = 0  # the chunk before that brought tokens
    for i in range(1, len(times)):
        if tokens := counts[i] - counts[last]:
            interval = (times[i] - times[last]) / tokens
            for _ in range(tokens):
                yield times[i], interval
            last = i


def spread_tokens(counts: Sequence[int], tokens: int) -> list[int]:
    """Tokens so far after each chunk, where the chunks did not tell and `tokens` came in all: in even shares."""
    told = counts[-1] if counts else 0
    return list(counts) if told == tokens else [(2 * count * tokens + told) // (2 * told) for count in counts]


def number(value: float) -> str:
    """Three digits that count, or all before the point."""
    if math.isnan(value):
        return "-"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 0.01 else f"{value:.2f}"
