"""Whose turn it is among tenants: a worker's tokens are shared evenly, however many requests each of them sends."""

from __future__ import annotations

from collections.abc import Iterable


class Turns:
    """A counter a tenant of the tokens computed for it; the lowest is next (the virtual token counters of Sheng et al.,
    OSDI 2024).

    A tenant that comes (back) to the queue begins no lower than those that are there: what it left unused earlier is
    not made up for at their cost.
    """

    def __init__(self) -> None:
        self._had: dict[str, int] = {}

    def of(self, tenant: str) -> int:
        return self._had.get(tenant, 0)

    def had(self, tenant: str, tokens: int) -> None:
        self._had[tenant] = self.of(tenant) + tokens

    def comes(self, tenant: str, present: Iterable[str]) -> None:
        """`present`: the others that have requests here."""
        there = {other: self.of(other) for other in present}
        least = min(there.values(), default=0)
        # Whoever is not there and below the least would begin at the least, and needs no counter.
        above = {other: had for other, had in self._had.items() if there and had > least}
        self._had = above | there | {tenant: max(self.of(tenant) if there else 0, least)}
