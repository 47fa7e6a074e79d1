"""How many places of a queue one tenant may hold: those before the worker's planner would else be the first's alone."""

from __future__ import annotations

NOBODY = ""  # the tenant of requests that nobody is told apart by; it has no share to keep to


def may_hold(limit: int, taken: int) -> int:
    """Places that a tenant may hold of `limit` where all tenants together hold `taken`: as many as are free.

    A tenant that is alone gets half, k busy ones 1 / (k + 1) each, and the rest stays free for whoever comes next
    (the dynamic thresholds of Choudhury and Hahne's shared-memory switches): no number of tenants has to be known.
    """
    return limit - taken


def has_room(tenant: str, held: int, taken: int, limit: int) -> bool:
    """Whether a tenant that holds `held` places gets one more."""
    return taken < limit and (tenant == NOBODY or held < may_hold(limit, taken))


def why_no_room(tenant: str, held: int, taken: int, limit: int, queue: str) -> str:
    """One sentence for a tenant that has_room() refuses. `queue`: what is full, as the sentence's subject."""
    if taken >= limit:
        return f"{queue} is full ({taken} requests)"
    return f"{queue} keeps its {limit - taken} free places for others: {tenant!r} has {held} requests in it"
