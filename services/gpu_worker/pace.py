"""How many prompt tokens a step may compute beside running decodes."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.sizes import holding

ROUND = 128  # prompt tokens: what a step's share of a prompt is a multiple of, and its least
WINDOW = 64  # steps with prompt tokens: what is known of costs is known from so many
RIDGE = 0.01  # steps' worth of belief in costs of 0: what steps that are all alike leave open is shared out by it
UNIT = 4 * ROUND  # prompt tokens: a smaller step is thought to cost little more than its fixed part
REACH = 8192  # positions: over so many a token's cost is thought to grow by what it is at the first
GROWTH = 2  # times the largest step in the window: how far costs are trusted
QUANTILE = 0.98  # of the steps, which end in time
UNSURE = 1.1  # time taken to time expected, before steps have told
LATEST = 1.25  # that, as far as it is planned for: smaller steps do not help against noise that is larger
OUTLIER = 1.5  # times what is expected: longer is a mishap, and counts as this, but twice in a row
MARGIN = 0.96  # of the bound that is planned with: tokens have a way to go after their step
ANYWAY = 0.2  # of what a step takes without prompt tokens: what they add to it where the bound is lost anyway
WEIGHT = 0.3  # of the newest step in what is expected of the next decodes


@dataclass(frozen=True)
class Costs:
    """Seconds that prompts add to a step: once, for a token, and for a token and a position that it attends to."""

    fixed: float = 0.0
    token: float = 0.0
    pair: float = 0.0

    def seconds(self, tokens: int, pairs: float) -> float:
        return self.fixed + self.token * tokens + self.pair * pairs

    def rows(self, seconds: float, start: int) -> float:
        """How many from position `start` on are computed in so many seconds: token * rows + pair * pairs."""
        if seconds <= 0:
            return 0.0
        if not (self.token or self.pair):
            return math.inf
        token = self.token + self.pair * start
        return 2 * seconds / (token + math.sqrt(token * token + 2 * self.pair * seconds))


class Room:
    """What a step may take of prompts. It is full once time is short: that is false."""

    def __init__(self, tokens: int, seconds: float, costs: Costs, sizes: Sequence[int] = ()) -> None:
        """`seconds` beside the fixed costs; `sizes` as Pace has them."""
        self._tokens, self._seconds, self._costs, self._sizes = tokens, seconds, costs, sizes
        self._taken, self._least = 0, ROUND

    def __bool__(self) -> bool:
        return self._tokens > 0

    def take(self, left: int, start: int) -> int:
        """The rows for a prompt of which so many are left, from position `start` on. Only the first surely gets any."""
        rows, fit = min(left, self._tokens), self._costs.rows(self._seconds, start)
        self._tokens -= rows
        if self._sizes:
            fit = _largest(self._sizes, self._taken + fit) - self._taken
        if fit < rows:
            whole = int(fit) if self._sizes else int(fit) // ROUND * ROUND
            rows, self._tokens = min(rows, max(self._least, whole)), 0
        self._seconds -= self._costs.seconds(rows, _pairs(start, rows)) - self._costs.fixed
        self._taken, self._least = self._taken + rows, 0
        return rows


class Pace:
    """Learns what decodes and prompt tokens cost, and plans steps that keep the time between two tokens of a running
    request within a bound. A prompt gets ROUND tokens a step at least, whatever that does to the bound: none starves.
    Where not even so few keep it, the least would only make the time longer during which it is broken: they get more.

    What decodes take is learned from steps without prompt tokens. Where prompts come without a pause and it changes,
    the fixed cost makes up for it: that is fitted to what the steps took beyond what their decodes were thought to.
    """

    def __init__(self, most: int, bound: float = 0.0, sizes: Sequence[int] = ()) -> None:
        """`most` prompt tokens in any step; `bound` in seconds, 0: none. `sizes`: the numbers of prompt tokens that
        steps are computed for, `most` the last; what is between two of them costs what the next one does."""
        self._most = most
        self._bound = bound
        self._sizes = sizes
        self._decode = 0.0  # seconds of a step without prompt tokens
        self._costs = Costs()
        self._steps = deque[tuple[int, float, float]](maxlen=WINDOW)  # prompt tokens, pairs, seconds beside decodes
        # Of steps with both, time taken to time expected. Two values are what it takes to decide the quantile.
        self._late = deque([UNSURE, UNSURE], maxlen=WINDOW)
        self._lateness = UNSURE
        self._outlier = False  # whether the last step with prompt tokens was one

    def room(self, decodes: int) -> Room:
        """For a step with so many decodes."""
        if not decodes or not self._bound:
            return Room(self._most, math.inf, Costs())
        largest = max((tokens for tokens, _, _ in self._steps), default=0)
        tokens = min(self._most, max(ROUND, GROWTH * largest // ROUND * ROUND))
        least = self._decode + self._costs.fixed
        seconds = MARGIN * self._bound / min(self._lateness, LATEST) - least
        if (self._decode + self._costs.seconds(ROUND, 0)) * self._lateness > self._bound:
            seconds = max(seconds, ANYWAY * least)
        if self._sizes:
            tokens = _largest(self._sizes, tokens)
        return Room(tokens, seconds, self._costs, self._sizes)

    def learn(self, decodes: int, prompts: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step of so many decodes, and of prompts from (position, so many rows) on, took so long."""
        if not self._bound:
            return
        prompts, decode = list(prompts), self._decode if decodes else 0.0
        if not prompts:
            self._decode = decode + WEIGHT * (min(seconds, OUTLIER * decode) - decode) if decode else seconds
            return
        tokens, pairs = sum(rows for _, rows in prompts), sum(_pairs(*prompt) for prompt in prompts)
        if self._sizes:
            tokens = holding(self._sizes, tokens)
        if self._steps:
            expected = decode + self._costs.seconds(tokens, pairs)
            late, before = seconds / expected, self._outlier
            self._outlier = late > OUTLIER
            if before and self._outlier:  # costs have changed: beside old steps, that were fast, tokens would seem free
                self._steps.clear()
            else:
                seconds = min(seconds, OUTLIER * expected)
            if decodes:
                self._late.append(min(late, OUTLIER))
                self._lateness = max(1.0, float(np.quantile(self._late, QUANTILE)))
        self._steps.append((tokens, pairs, max(0.0, seconds - decode)))
        self._costs = _fit(self._steps)

    def rehearse(self, decode: Callable[[], float], prefill: Callable[[int, int], float], max_context: int) -> None:
        """So that the first prompts go through in large steps. Each computes a step and tells its seconds: `decode` of
        decodes alone, `prefill` of so many rows, the last of so long a context. They are asked twice: the first time
        may have to load kernels."""
        self.learn(1, [], min(decode() for _ in range(2)))
        few, longest = min(512, self._most), max(self._most, min(max_context, REACH))
        for rows, context in ((self._most, self._most), (few, few), (self._most, longest)):
            seconds = min(prefill(rows, context) for _ in range(2))
            self.learn(0, [(context - rows, rows)], seconds)


def _largest(sizes: Sequence[int], most: float) -> int:
    """Of `sizes`, up to `most`; 0 if none is."""
    fitting = bisect.bisect_right(sizes, most)
    return sizes[fitting - 1] if fitting else 0


def _pairs(start: int, rows: int) -> float:
    """Of a row and a position that it attends to."""
    return rows * (start + rows / 2)


def _fit(steps: Sequence[tuple[int, float, float]]) -> Costs:
    """By least squares, none negative: those that would be are left out."""
    tokens, pairs, seconds = np.array(steps).T
    unit = max(UNIT, tokens.max())
    x = np.stack((np.ones_like(tokens), tokens / unit, pairs / (unit * REACH)))  # [3, steps]
    gram, moment = x @ x.T + RIDGE * np.eye(3), x @ seconds
    kept, found = [0, 1, 2], np.zeros(3)
    while (part := np.linalg.solve(gram[np.ix_(kept, kept)], moment[kept])).min() < 0:
        del kept[part.argmin()]
    found[kept] = part
    fixed, token, pair = found.tolist()
    return Costs(fixed, token / unit, pair / (unit * REACH))
