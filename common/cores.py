"""Binding an actor that computes to processor cores of its own (MOECULE_PIN).

A worker and its shards take turns within a layer, so each of them is idle for much of the time. A scheduler that packs
what is often idle onto few cores, as small virtual machines do, then runs them one after another on one core.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from common.settings import Settings, place_in_procfile


def cores_of(kind: str, place: int, threads: int, available: Sequence[int]) -> set[int]:
    """Workers take cores from the front and shards from the back, by their place in the Procfile (from 1), around."""
    ordered = sorted(available, reverse=kind != "worker")
    first = (place - 1) * threads
    return {ordered[(first + i) % len(ordered)] for i in range(threads)}


def pin_actor(kind: str, settings: Settings) -> None:
    """Bind the calling thread and all that it starts, if that is set and honcho gave this process a place.

    The event loop goes with the compute thread: they hand the interpreter to each other, which costs more across cores.
    """
    place = place_in_procfile()
    if settings.pin and place:
        os.sched_setaffinity(0, cores_of(kind, place, settings.threads, list(os.sched_getaffinity(0))))
