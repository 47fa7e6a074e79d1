from common.messages import SchedulerBeat
from services.scheduler.membership import Members


def beat(actor_id: str = "a", boot_id: str = "1", version: int = 0) -> SchedulerBeat:
    return SchedulerBeat(id=actor_id, boot_id=boot_id, state="ready", map_version=version)


def test_what_heartbeats_tell():
    members: Members[SchedulerBeat] = Members()
    assert members.heard(beat(), 0.0) == "joined"
    assert members.heard(beat(), 0.1) == "same"
    assert members.heard(beat(version=2), 0.2) == "changed"
    assert members.heard(beat(boot_id="2"), 0.3) == "reborn"
    assert list(members) == [beat(boot_id="2")]


def test_an_earlier_life_is_ignored():
    members: Members[SchedulerBeat] = Members()
    members.heard(beat(), 0.0)
    members.heard(beat(boot_id="2"), 0.1)
    assert members.heard(beat(version=9), 0.2) == "stale"
    assert members.get("a") == beat(boot_id="2") and members.lives("a", "2") and not members.lives("a", "1")
    assert not members.bury(beat()) and len(members) == 1


def test_what_a_buried_life_wrote_does_not_bury_the_one_after_it():
    members: Members[SchedulerBeat] = Members()
    members.heard(beat(boot_id="1"), 0.0)
    assert members.bury(beat(boot_id="1"))
    assert members.heard(beat(boot_id="2"), 0.1) == "joined"
    assert members.heard(beat(boot_id="1"), 0.2) == "stale" and members.lives("a", "2")


def test_silence_counts_from_the_last_heartbeat_and_from_our_own_connection():
    members: Members[SchedulerBeat] = Members()
    members.heard(beat("a"), 0.0)
    members.heard(beat("b"), 4.0)
    assert members.silent(5.0, 4.9, 0.0) == []
    assert members.silent(5.0, 5.0, 0.0) == [beat("a")]
    assert members.silent(5.0, 9.0, 0.0) == [beat("a"), beat("b")]
    assert members.silent(5.0, 9.0, 4.5) == []


def test_who_was_only_cut_off_joins_again():
    members: Members[SchedulerBeat] = Members()
    members.heard(beat(), 0.0)
    assert members.bury(beat()) and len(members) == 0 and members.get("a") is None
    assert members.heard(beat(), 9.0) == "joined"


def test_members_are_in_the_order_of_their_ids():
    members: Members[SchedulerBeat] = Members()
    for name in "cab":
        members.heard(beat(name), 0.0)
    assert [b.id for b in members] == ["a", "b", "c"]
