"""The expert map as pure functions: which shard holds which partition.

A partition is the experts with the same id modulo P, over all layers. An assignment is a tuple over partitions of the
sorted ids of the shards that hold a copy, as `ExpertMap.owners` has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from common.messages import ExpertMap

Assignment = tuple[tuple[str, ...], ...]  # [partitions] -> shard ids, sorted


def plan(current: Mapping[str, Collection[int]], partitions: int, copies: int = 1) -> Assignment:
    """Who shall hold what, given what each shard that may be used holds now.

    Loads differ by at most one; each partition lies on `copies` distinct shards, or on all if there are fewer; and
    little is loaded that is not held already: the fewest partitions possible when each has at most one holder now.
    """
    copies = min(copies, len(current))
    held = {shard: {p for p in current[shard] if 0 <= p < partitions} for shard in sorted(current)}
    load = {shard: set(held[shard]) for shard in held}
    for partition in range(partitions):
        _fit_copies(load, partition, copies)
    while load and not _balanced(load):
        _move_one(load, held)
    return tuple(tuple(shard for shard in load if p in load[shard]) for p in range(partitions))


def _fit_copies(load: dict[str, set[int]], partition: int, copies: int) -> None:
    holders = [shard for shard in load if partition in load[shard]]
    while len(holders) > copies:
        fullest = max(holders, key=lambda shard: len(load[shard]))
        holders.remove(fullest)
        load[fullest].remove(partition)
    while len(holders) < copies:
        emptiest = min((shard for shard in load if shard not in holders), key=lambda shard: len(load[shard]))
        holders.append(emptiest)
        load[emptiest].add(partition)


def _balanced(load: dict[str, set[int]]) -> bool:
    sizes = [len(partitions) for partitions in load.values()]
    return max(sizes) - min(sizes) <= 1


def _move_one(load: dict[str, set[int]], held: dict[str, set[int]]) -> None:
    fullest = max(load, key=lambda shard: len(load[shard]))
    emptiest = min(load, key=lambda shard: len(load[shard]))
    # Cheapest first: what the fullest would have to load anyway, then what the emptiest has already.
    moved = min(load[fullest] - load[emptiest], key=lambda p: (p in held[fullest], p not in held[emptiest], p))
    load[fullest].remove(moved)
    load[emptiest].add(moved)


def partitions_of(owners: Assignment, shard: str) -> frozenset[int]:
    return frozenset(p for p, shards in enumerate(owners) if shard in shards)


def members(owners: Assignment) -> frozenset[str]:
    return frozenset(shard for shards in owners for shard in shards)


def missing(owners: Assignment) -> tuple[int, ...]:
    """The partitions that lie on no shard."""
    return tuple(p for p, shards in enumerate(owners) if not shards)


def faults(expert_map: ExpertMap) -> list[str]:
    """One sentence for each way in which the map contradicts itself; a partition without owners is no fault."""
    found = []
    if len(expert_map.owners) != expert_map.partitions:
        found.append(f"owners of {len(expert_map.owners)} partitions, not {expert_map.partitions}")
    for p, shards in enumerate(expert_map.owners):
        if list(shards) != sorted(set(shards)):
            found.append(f"owners of partition {p} are not sorted and distinct")
    if members(expert_map.owners) != expert_map.shards.keys():
        found.append("`shards` and the shards that `owners` names differ")
    return found
