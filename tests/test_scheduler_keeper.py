"""The map keeper against a cluster that is three small tables: what shards hold, what workers have acknowledged."""

from dataclasses import dataclass, field

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.expert_map import faults, members, missing, partitions_of
from common.messages import ExpertMap, ShardBeat, ShardEntry, State, WorkerBeat
from services.scheduler.keeper import GRACE_SECONDS, HEAR_SECONDS, SETTLE_SECONDS, Decision, MapKeeper

MODEL = "model"


@dataclass
class FakeShard:
    id: str
    boot_id: str = "1"
    state: State = "ready"
    held: set[int] = field(default_factory=set)
    wanted: set[int] | None = None
    loaded: int = 0  # partitions read so far, over all its lives

    def beat(self) -> ShardBeat:
        return ShardBeat(
            id=self.id, boot_id=self.boot_id, node="node", model=MODEL, state=self.state, map_version=0,
            held=tuple(sorted(self.held)),
        )  # fmt: skip

    def finish_loading(self) -> None:
        if self.wanted is not None:
            self.loaded += len(self.wanted - self.held)
            self.held = set(self.wanted)

    def restart(self) -> None:
        self.boot_id, self.held, self.wanted = str(int(self.boot_id) + 1), set(), None


class Cluster:
    def __init__(self, partitions: int = 8, copies: int = 1) -> None:
        self.now = 0.0
        self.shards: dict[str, FakeShard] = {}
        self.acks: dict[str, int] = {"w": 0}  # worker -> map version
        self.maps: list[ExpertMap] = []
        self.partitions, self.copies = partitions, copies
        self.keeper = MapKeeper(MODEL, partitions, copies, self.now)

    def new_keeper(self) -> None:
        self.keeper = MapKeeper(MODEL, self.partitions, self.copies, self.now)
        self.keeper.announced = max(self.acks.values())

    def join(self, *ids: str) -> None:
        for shard_id in ids:
            self.shards[shard_id] = FakeShard(shard_id)

    def kill(self, shard_id: str) -> FakeShard:
        shard = self.shards.pop(shard_id)
        self.keeper.shard_died(shard_id, self.now)
        return shard

    def workers(self) -> list[WorkerBeat]:
        return [
            WorkerBeat(id=w, boot_id="1", node="node", model=MODEL, state="ready", map_version=v)
            for w, v in self.acks.items()
        ]

    def decide(self) -> Decision:
        decision = self.keeper.decide(self.now, [s.beat() for s in self.shards.values()], self.workers())
        if decision.new_map:
            self.keeper.published(decision.new_map)
            self.maps.append(decision.new_map)
        for shard_id, wanted in decision.loads.items():
            self.shards[shard_id].wanted = set(wanted)
        return decision

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def acknowledge(self) -> None:
        if self.keeper.map:
            self.acks = dict.fromkeys(self.acks, self.keeper.map.version)

    def come_to_rest(self) -> ExpertMap:
        """All loads end, all workers acknowledge, and time passes."""
        for _ in range(3):
            self.advance(max(GRACE_SECONDS, HEAR_SECONDS, SETTLE_SECONDS))
            for _ in range(4):
                self.decide()
                for shard in self.shards.values():
                    shard.finish_loading()
                self.acknowledge()
        assert self.keeper.map is not None
        return self.keeper.map

    def held(self) -> dict[str, set[int]]:
        return {s.id: s.held for s in self.shards.values()}


def two_shards() -> Cluster:
    cluster = Cluster()
    cluster.join("a", "b")
    cluster.come_to_rest()
    return cluster


def test_shards_that_start_together_load_each_partition_once():
    cluster = Cluster()
    cluster.join("a")
    cluster.advance(0.6)
    cluster.decide()
    cluster.join("b")
    cluster.advance(0.6)
    assert cluster.decide() == Decision()  # `a` alone would have settled by now
    found = cluster.come_to_rest()
    assert found.owners == (("a",), ("b",)) * 4
    assert [s.loaded for s in cluster.shards.values()] == [4, 4]
    assert len(cluster.maps) == 1


def test_nothing_is_decided_before_everyone_could_be_heard():
    cluster = Cluster()
    cluster.join("a")
    cluster.shards["a"].held = set(range(8))
    cluster.advance(HEAR_SECONDS - 0.01)
    assert cluster.decide() == Decision()
    cluster.advance(0.01)
    assert cluster.decide().new_map is not None


def test_no_map_before_all_partitions_are_held():
    cluster = Cluster()
    cluster.join("a", "b")
    cluster.decide()
    cluster.advance(1.1)
    assert cluster.decide() == Decision(None, {"a": (0, 2, 4, 6), "b": (1, 3, 5, 7)})
    cluster.shards["a"].finish_loading()
    assert cluster.decide().new_map is None
    assert cluster.keeper.reason(s.beat() for s in cluster.shards.values()) == "experts are being loaded by b (ready)"
    cluster.shards["b"].finish_loading()
    first = cluster.decide().new_map
    assert first == ExpertMap(
        version=1,
        model=MODEL,
        partitions=8,
        owners=(("a",), ("b",)) * 4,
        shards={"a": ShardEntry("1", "node"), "b": ShardEntry("1", "node")},
    )


def test_a_newcomer_loads_first_serves_after_the_flip_and_old_owners_drop_after_the_acknowledgement():
    cluster = two_shards()
    cluster.join("c")
    cluster.decide()
    cluster.advance(SETTLE_SECONDS)
    decision = cluster.decide()
    assert decision.new_map is None and len(decision.loads["c"]) == 2
    assert decision.loads["a"] == (0, 2, 4, 6) and decision.loads["b"] == (1, 3, 5, 7)  # still serving
    cluster.shards["c"].held = {decision.loads["c"][0]}
    assert cluster.decide().new_map is None  # one flip for all, not one a partition
    cluster.shards["c"].finish_loading()
    flip = cluster.decide()
    assert flip.new_map and partitions_of(flip.new_map.owners, "c") == set(decision.loads["c"])
    assert cluster.decide().loads["a"] == (0, 2, 4, 6)  # the worker has not acknowledged
    cluster.acknowledge()
    after = cluster.decide().loads
    assert sorted(after["a"] + after["b"] + after["c"]) == list(range(8))


def test_a_worker_that_is_starting_holds_nothing_up():
    cluster = two_shards()
    cluster.shards["b"].state = "draining"
    cluster.decide()
    cluster.shards["a"].finish_loading()
    cluster.decide()
    cluster.acknowledge()
    starting = WorkerBeat(id="w2", boot_id="1", node="n", model=MODEL, state="starting", map_version=0)
    shards = [s.beat() for s in cluster.shards.values()]
    assert cluster.keeper.decide(cluster.now, shards, [*cluster.workers(), starting]).loads["b"] == ()


def test_a_death_leaves_the_map_at_once_and_the_return_gets_the_same_partitions_without_waiting():
    cluster = two_shards()
    shard = cluster.kill("b")
    cluster.advance(0.01)
    pruned = cluster.decide()
    assert pruned.new_map and missing(pruned.new_map.owners) == (1, 3, 5, 7)
    assert pruned.new_map.shards.keys() == {"a"}
    assert pruned.loads == {"a": (0, 2, 4, 6)}  # what `b` had is kept for it
    assert cluster.keeper.reason([cluster.shards["a"].beat()]) == (
        "no live shard holds expert partitions 1, 3, 5, 7 of 8; gone: b"
    )
    shard.restart()
    cluster.shards["b"] = shard
    cluster.advance(0.5)
    assert cluster.decide().loads["b"] == (1, 3, 5, 7)
    shard.finish_loading()
    back = cluster.decide().new_map
    assert back and back.shards["b"].boot_id == "2" and not missing(back.owners)


def test_a_shard_that_does_not_return_within_the_grace_is_replaced():
    cluster = two_shards()
    cluster.kill("b")
    cluster.advance(GRACE_SECONDS - 0.1)
    assert cluster.decide().loads["a"] == (0, 2, 4, 6)
    cluster.advance(0.2)
    assert cluster.decide().loads["a"] == tuple(range(8))
    assert cluster.come_to_rest().owners == (("a",),) * 8


def test_the_loss_of_one_of_two_copies_leaves_a_complete_map():
    cluster = Cluster(copies=2)
    cluster.join("a", "b", "c")
    cluster.come_to_rest()
    cluster.kill("b")
    after = cluster.decide().new_map
    assert after and not missing(after.owners) and members(after.owners) == {"a", "c"}
    assert cluster.keeper.complete


def test_a_return_is_taken_in_although_another_shard_is_still_loading():
    cluster = Cluster(partitions=4)
    cluster.join("a", "b")
    cluster.come_to_rest()
    cluster.join("c")
    cluster.decide()
    cluster.advance(SETTLE_SECONDS)
    assert cluster.decide().loads == {"a": (0, 2), "b": (1, 3), "c": (0,)}
    shard = cluster.kill("b")
    cluster.decide()
    shard.restart()
    cluster.shards["b"] = shard
    cluster.decide()
    shard.finish_loading()
    mended = cluster.decide().new_map
    assert mended and mended.owners == (("a",), ("b",)) * 2  # `c` has loaded nothing
    cluster.shards["c"].finish_loading()
    assert members(cluster.decide().new_map.owners) == {"a", "b", "c"}


def test_a_leaving_shard_serves_until_its_partitions_are_elsewhere():
    cluster = two_shards()
    cluster.shards["b"].state = "draining"
    decision = cluster.decide()  # no settling: it has little time
    assert decision.loads == {"a": tuple(range(8)), "b": (1, 3, 5, 7)}
    cluster.shards["a"].finish_loading()
    assert members(cluster.decide().new_map.owners) == {"a"}
    assert cluster.decide().loads["b"] == (1, 3, 5, 7)
    cluster.acknowledge()
    assert cluster.decide().loads["b"] == ()


def test_the_only_shard_serves_while_it_leaves():
    cluster = Cluster()
    cluster.join("a")
    cluster.come_to_rest()
    cluster.shards["a"].state = "draining"
    decision = cluster.decide()
    assert decision.new_map is None and decision.loads == {"a": tuple(range(8))}


def test_a_new_scheduler_rebuilds_the_map_from_what_is_held_above_all_versions():
    cluster = two_shards()
    cluster.acks["w"] = 41
    cluster.new_keeper()
    cluster.decide()
    cluster.advance(HEAR_SECONDS)
    rebuilt = cluster.decide().new_map
    assert rebuilt and rebuilt.version == 42 and rebuilt.owners == (("a",), ("b",)) * 4
    before = {s.id: s.loaded for s in cluster.shards.values()}
    cluster.come_to_rest()
    assert {s.id: s.loaded for s in cluster.shards.values()} == before


def test_a_new_scheduler_keeps_the_map_it_finds_if_it_is_still_true():
    cluster = two_shards()
    found = cluster.maps[-1]
    cluster.new_keeper()
    assert cluster.keeper.adopt(found)
    cluster.come_to_rest()
    assert cluster.keeper.map == found


def test_a_found_map_of_another_model_only_raises_the_version():
    cluster = two_shards()
    foreign = ExpertMap(version=70, model="other", partitions=8, owners=((),) * 8, shards={})
    assert not cluster.keeper.adopt(foreign)
    assert cluster.come_to_rest().version == 71


def test_an_older_map_is_not_taken_over():
    cluster = two_shards()
    cluster.kill("b")
    older, newer = cluster.maps[0], cluster.decide().new_map
    assert not cluster.keeper.adopt(older) and cluster.keeper.map == newer


def test_a_dense_model_needs_no_shards():
    keeper = MapKeeper(MODEL, 0, 1, 0.0)
    assert keeper.complete and keeper.reason([]) == "" and keeper.decide(9.0, [], []) == Decision()


def test_reasons_name_what_is_missing():
    cluster = Cluster()
    assert cluster.keeper.reason([]) == "no expert shard is running"
    loading = ShardBeat(
        id="a", boot_id="1", node="n", model=MODEL, state="ready", map_version=0, load_done=30, load_total=120
    )
    assert cluster.keeper.reason([loading]) == "experts are being loaded by a (25 %)"


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens in whatever order: maps are true, nothing is dropped that is used, and rest is reached."""

    @initialize(partitions=st.integers(1, 9), copies=st.integers(1, 3))
    def begin(self, partitions: int, copies: int) -> None:
        self.cluster = Cluster(partitions, copies)
        self.version = 0
        self.lives = 0

    def decide(self) -> None:
        decision = self.cluster.decide()
        if decision.new_map:
            assert decision.new_map.version > self.version
            self.version = decision.new_map.version
            self.check_is_true(decision.new_map)

    @rule(shard=st.sampled_from("abcd"))
    def starts(self, shard: str) -> None:
        if shard not in self.cluster.shards:
            self.lives += 1
            self.cluster.shards[shard] = FakeShard(shard, boot_id=str(1000 * self.lives), state="starting")
            self.decide()

    @rule()
    def all_are_ready(self) -> None:
        for shard in self.cluster.shards.values():
            shard.state = "ready" if shard.state == "starting" else shard.state
        self.decide()

    @rule(shard=st.sampled_from("abcd"), what=st.sampled_from(["dies", "restarts", "drains"]))
    def something_happens(self, shard: str, what: str) -> None:
        if known := self.cluster.shards.get(shard):
            if what == "dies":
                self.cluster.kill(shard)
            elif what == "restarts":
                known.restart()
            else:
                known.state = "draining"
            self.decide()

    @rule(shards=st.sampled_from(["a", "b", "abcd", "abcd"]))
    def load(self, shards: str) -> None:
        for shard in shards:
            if known := self.cluster.shards.get(shard):
                known.finish_loading()
        self.decide()

    @rule()
    def worker_acknowledges(self) -> None:
        self.cluster.acknowledge()
        self.decide()

    @rule(seconds=st.sampled_from([0.1, 1.0, 1.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.advance(seconds)
        self.decide()

    @rule(store_is_kept=st.booleans())
    def scheduler_restarts(self, store_is_kept: bool) -> None:
        published = self.cluster.keeper.map if store_is_kept else None
        self.cluster.new_keeper()
        self.cluster.keeper.announced = self.version
        if published:
            self.cluster.keeper.adopt(published)
        self.decide()

    def check_is_true(self, found: ExpertMap) -> None:
        assert faults(found) == []
        for shard_id, entry in found.shards.items():
            shard = self.cluster.shards[shard_id]
            assert shard.boot_id == entry.boot_id and partitions_of(found.owners, shard_id) <= shard.held

    @invariant()
    def nothing_is_dropped_that_is_used(self) -> None:
        for used in self.cluster.maps:
            if used.version < min(self.cluster.acks.values()):
                continue
            for shard_id, entry in used.shards.items():
                shard = self.cluster.shards.get(shard_id)
                if shard and shard.boot_id == entry.boot_id and shard.wanted is not None:
                    assert partitions_of(used.owners, shard_id) <= shard.wanted

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        self.cluster.shards = {s.id: s for s in self.cluster.shards.values() if s.state != "draining"}
        for shard in self.cluster.shards.values():
            shard.state = "ready"
        if not self.cluster.shards:
            self.cluster.join("z")
        found = self.cluster.come_to_rest()
        count = min(self.cluster.copies, len(self.cluster.shards))
        assert all(len(owners) == count for owners in found.owners)
        assert self.cluster.held() == {s: partitions_of(found.owners, s) for s in self.cluster.shards}
        assert found.version >= self.version


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)
