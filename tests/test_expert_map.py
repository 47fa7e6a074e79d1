from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.expert_map import Assignment, faults, members, missing, partitions_of, plan
from common.messages import ExpertMap, ShardEntry

SHARDS = [f"shard-{i}" for i in range(9)]


@st.composite
def situations(draw: st.DrawFn, most_copies: int = 4) -> tuple[dict[str, set[int]], int, int]:
    """(what each shard holds, partitions, copies): anything a cluster may have come to."""
    partitions = draw(st.integers(1, 24))
    shards = draw(st.lists(st.sampled_from(SHARDS), unique=True, min_size=1, max_size=8))
    held = {s: draw(st.sets(st.integers(0, partitions - 1))) for s in shards}
    return held, partitions, draw(st.integers(1, most_copies))


def loads(held: Mapping[str, set[int]], owners: Assignment) -> int:
    return sum(len(partitions_of(owners, s) - held.get(s, set())) for s in members(owners))


def as_held(owners: Assignment, shards: list[str]) -> dict[str, set[int]]:
    return {s: set(partitions_of(owners, s)) for s in shards}


@given(situations())
def test_every_partition_has_its_copies_and_loads_are_even(situation):
    held, partitions, copies = situation
    owners = plan(held, partitions, copies)
    assert len(owners) == partitions
    for shards in owners:
        assert list(shards) == sorted(set(shards)) and set(shards) <= held.keys()
        assert len(shards) == min(copies, len(held))
    sizes = [len(partitions_of(owners, s)) for s in held]
    assert max(sizes) - min(sizes) <= 1


@given(situations())
def test_a_plan_that_is_carried_out_stays(situation):
    held, partitions, copies = situation
    owners = plan(held, partitions, copies)
    assert plan(as_held(owners, list(held)), partitions, copies) == owners


@given(situations(most_copies=1), st.data())
def test_with_one_holder_each_the_fewest_partitions_are_loaded(situation, data):
    held, partitions, _ = situation
    held = {s: set() for s in held}
    for p in range(partitions):
        if (s := data.draw(st.sampled_from([None, *held]))) is not None:
            held[s].add(p)
    owners = plan(held, partitions, 1)
    floor, extra = divmod(partitions, len(held))
    # Those that hold most keep most: `extra` shards may keep one above the floor.
    most_first = sorted((len(h) for h in held.values()), reverse=True)
    kept = sum(min(size, floor + (i < extra)) for i, size in enumerate(most_first))
    assert loads(held, owners) == partitions - kept


@given(st.integers(1, 24), st.integers(1, 3), st.integers(1, 7))
def test_a_join_moves_only_what_the_newcomer_takes(partitions, copies, count):
    shards = SHARDS[:count]
    before = plan({s: () for s in shards}, partitions, copies)
    held = as_held(before, shards) | {"newcomer": set()}
    after = plan(held, partitions, copies)
    assert loads(held, after) == len(partitions_of(after, "newcomer"))


@given(st.integers(1, 24), st.integers(2, 8), st.data())
def test_a_leave_moves_only_what_the_leaver_had(partitions, count, data):
    shards = SHARDS[:count]
    before = plan({s: () for s in shards}, partitions, 1)
    leaver = data.draw(st.sampled_from(shards))
    held = as_held(before, [s for s in shards if s != leaver])
    assert loads(held, plan(held, partitions, 1)) == len(partitions_of(before, leaver))


@given(situations())
def test_the_order_of_the_shards_does_not_matter(situation):
    held, partitions, copies = situation
    backwards = {s: held[s] for s in reversed(list(held))}
    assert plan(backwards, partitions, copies) == plan(held, partitions, copies)


def test_two_shards_start_with_every_other_partition():
    assert plan({"b": (), "a": ()}, 4) == (("a",), ("b",), ("a",), ("b",))


def test_without_shards_everything_is_missing():
    owners = plan({}, 3)
    assert owners == ((), (), ()) and missing(owners) == (0, 1, 2)


def test_partitions_that_the_model_does_not_have_are_ignored():
    assert plan({"a": {0, 7, 99}}, 2) == (("a",), ("a",))


def a_map(owners: Assignment, partitions: int = 2, shards: tuple[str, ...] = ("a", "b")) -> ExpertMap:
    entries = {s: ShardEntry("boot", "node") for s in shards}
    return ExpertMap(version=1, model="m", partitions=partitions, owners=owners, shards=entries)


def test_a_map_with_a_gap_is_no_fault():
    assert faults(a_map((("a", "b"), ()))) == []


@pytest.mark.parametrize(
    ("owners", "said"),
    [
        ((("a",), ("b",), ()), "owners of 3 partitions, not 2"),
        ((("b", "a"), ()), "owners of partition 0 are not sorted and distinct"),
        ((("a", "a"), ("b",)), "owners of partition 0 are not sorted and distinct"),
        ((("a",), ("c",)), "`shards` and the shards that `owners` names differ"),
        ((("a",), ()), "`shards` and the shards that `owners` names differ"),
    ],
)
def test_faults_are_named(owners, said):
    assert faults(a_map(owners)) == [said]
