"""POST /reset_prefix_cache: every worker forgets the pages it keeps for later prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from common.bus import Bus
from common.errors import MoeculeError, Unavailable
from common.messages import ForgetPages, subject


class Forgotten(msgspec.Struct, frozen=True):
    """How many workers emptied their prefix cache: all that are there."""

    workers: int


async def forget_pages(bus: Bus, workers: Sequence[str]) -> Forgotten:
    """Raises Unavailable, naming the workers that did not answer: asking again is right then."""
    failures = await asyncio.gather(*(_forget(bus, worker) for worker in workers))
    failed = [f"{worker}: {why}" for worker, why in zip(workers, failures, strict=True) if why]
    if failed:
        done = len(workers) - len(failed)
        raise Unavailable(f"{done} of {len(workers)} workers emptied their prefix cache; {'; '.join(failed)}")
    return Forgotten(workers=len(workers))


async def _forget(bus: Bus, worker: str) -> str:
    """Why the worker did not, empty if it did."""
    try:
        await bus.request(subject("worker", worker, "forget"), ForgetPages())
    except MoeculeError as error:
        return error.message
    return ""
