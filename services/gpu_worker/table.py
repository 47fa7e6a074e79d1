"""Which shard gets which row of a step: an expert map and the peers that live, as a value."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from common.messages import ExpertMap
from services.gpu_worker.peers import Peer


@dataclass(frozen=True, eq=False)
class Table:
    """Two tables of one map differ only in the peers that lived when they were made."""

    expert_map: ExpertMap
    peers: tuple[Peer, ...]  # sorted by shard id: the order in which partial sums are added
    missing: tuple[int, ...]  # partitions that live on none of them
    choose: Callable[[int], np.ndarray]
    """step -> int32 [peers, experts + 1], a look-up for each peer: id -> id if it gets that in this step, else -1."""


def make_table(expert_map: ExpertMap, peers: Iterable[Peer], experts: int, worker_id: str) -> Table:
    named = (peer for peer in peers if not peer.lost and peer.shard_id in expert_map.shards)
    live = tuple(sorted(named, key=lambda peer: peer.shard_id))
    index = {peer.shard_id: i for i, peer in enumerate(live)}
    copies = [[index[owner] for owner in owners if owner in index] for owners in expert_map.owners]
    missing = tuple(partition for partition, owners in enumerate(copies) if not owners)
    return Table(expert_map, live, missing, _chooser(copies, len(live), experts, worker_id))


def _chooser(copies: list[list[int]], peers: int, experts: int, worker_id: str) -> Callable[[int], np.ndarray]:
    """A pure function of worker and step: the copies of a partition take turns, from another start for each worker."""
    if not copies:
        return lambda _: np.empty((0, experts + 1), np.int32)
    width = max([len(owners) for owners in copies] + [1])
    owner = np.array([(owners * width or [-1] * width)[:width] for owners in copies], dtype=np.int32)
    counts = np.array([max(1, len(owners)) for owners in copies])
    starts = np.array([zlib.crc32(f"{worker_id} {partition}".encode()) for partition in range(len(copies))])
    ids, everyone = np.arange(experts, dtype=np.int32), np.arange(peers)[:, None]
    nobody = np.full((peers, 1), -1, np.int32)
    partition_of = ids % max(1, len(copies))

    def choose(step: int) -> np.ndarray:
        chosen = owner[np.arange(len(copies)), (starts + step) % counts][partition_of]  # [experts]
        return np.hstack((np.where(chosen == everyone, ids, nobody), nobody))

    if width > 1:
        return choose
    only = choose(0)
    return lambda _: only


def missing_reason(missing: Sequence[int], total: int, failures: dict[str, str]) -> str:
    """One sentence; empty if nothing is missing. `failures`: what is known about the shards that are not there."""
    if not missing:
        return ""
    named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    some = f"{len(missing)} of {total} expert partitions ({named}) live"
    known = "; ".join(f"{shard} {why}" for shard, why in sorted(failures.items()))
    which = "all experts live" if len(missing) == total else some
    return f"{which} on no shard that this worker reaches" + (f": {known}" if known else "")
