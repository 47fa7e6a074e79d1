import pytest

from common.errors import NoWorker, Overloaded
from common.messages import Assign, PagesChanged, WorkerBeat
from services.scheduler.placement import Placement, why_none_serves


def worker(name: str, boot_id: str = "1", **others) -> WorkerBeat:
    fields = dict(node="n", model="m", state="ready", map_version=1, queue_limit=4)
    return WorkerBeat(id=name, boot_id=boot_id, **(fields | others))


def request(tokens: int, *hashes: bytes) -> Assign:
    return Assign(request_id="r", prompt_tokens=tokens, max_tokens=8, page_hashes=hashes)


def all_pages(name: str, *hashes: bytes, seq: int = 0, boot_id: str = "1") -> PagesChanged:
    return PagesChanged(worker_id=name, boot_id=boot_id, seq=seq, added=hashes, full=True)


def change(name: str, seq: int, *added: bytes, evicted: tuple[bytes, ...] = (), boot_id: str = "1") -> PagesChanged:
    return PagesChanged(worker_id=name, boot_id=boot_id, seq=seq, added=added, evicted=evicted)


@pytest.fixture
def placement() -> Placement:
    return Placement(max_batch=2)


def test_the_least_queued_worker_is_picked(placement):
    workers = [worker("a", pending_tokens=50), worker("b", pending_tokens=49)]
    assert placement.pick(request(10), workers).worker_id == "b"


def test_what_was_assigned_counts_until_the_next_heartbeat(placement):
    workers = [worker("a"), worker("b", pending_tokens=30)]
    picked = [placement.pick(request(20), workers).worker_id for _ in range(4)]
    assert picked == ["a", "a", "b", "a"]  # queued before each: 0/30, 20/30, 40/30, 40/50
    placement.heard(workers[1])
    assert placement.pick(request(20), workers).worker_id == "b"  # 60/30


def test_a_burst_of_equal_requests_is_spread(placement):
    workers = [worker(name) for name in "abc"]
    picked = sorted(placement.pick(request(7), workers).worker_id for _ in range(9))
    assert picked == list("aaabbbccc")


def test_running_requests_break_a_tie(placement):
    assert placement.pick(request(7), [worker("a", running=2), worker("b", running=1)]).worker_id == "b"


def test_only_the_unbroken_prefix_counts_as_cached(placement):
    placement.pages_changed(all_pages("a", b"1", b"3", b"4"))  # 64 tokens
    placement.pages_changed(all_pages("b", b"1", b"2"))  # 128 tokens
    workers = [worker("a"), worker("b", pending_tokens=63)]
    assert placement.pick(request(300, b"1", b"2", b"3", b"4"), workers).worker_id == "b"  # 236 against 172 + 63
    workers = [worker("a"), worker("b", pending_tokens=300)]
    assert placement.pick(request(300, b"1", b"2", b"3", b"4"), workers).worker_id == "a"


def test_pages_come_and_go_in_order(placement):
    placement.pages_changed(all_pages("a", b"1", seq=3))
    placement.pages_changed(change("a", 4, b"2"))
    placement.pages_changed(change("a", 5, evicted=(b"1",)))
    placement.pages_changed(change("a", 4, b"9"))  # late: it is known already
    assert placement._known["a"].pages == {b"2"} and not placement.unsynced([worker("a")])


def test_after_a_gap_nothing_is_believed_until_all_pages_come(placement):
    a, b = worker("a"), worker("b", pending_tokens=100)
    placement.pages_changed(all_pages("a"))
    placement.pages_changed(all_pages("b", b"1", b"2"))
    placement.pages_changed(change("b", 2, b"3"))
    assert placement.unsynced([a, b]) == [b]
    assert placement.pick(request(128, b"1", b"2"), [a, b]).worker_id == "a"
    placement.pages_changed(all_pages("b", b"1", b"2", b"3", seq=2))
    assert placement.unsynced([a, b]) == []
    assert placement.pick(request(128, b"1", b"2"), [a, b]).worker_id == "b"  # 128 + 128 against 100


def test_another_life_of_a_worker_has_none_of_the_pages(placement):
    placement.pages_changed(all_pages("a", b"1"))
    again = worker("a", boot_id="2")
    assert placement.unsynced([again]) == [again]
    assert placement._uncached(request(64, b"1"), again) == 64


def test_workers_that_are_starting_are_not_asked(placement):
    assert placement.unsynced([worker("a", state="starting"), worker("b", state="draining")]) == []


def test_full_queues_refuse_and_what_was_just_assigned_fills_them(placement):
    full = worker("a", running=2, waiting=4)
    with pytest.raises(Overloaded, match=r"every queue is full \(4 requests wait\)"):
        placement.pick(request(1), [full])
    almost = worker("b", running=2, waiting=2, pending_tokens=10_000)
    assert [placement.pick(request(1), [full, almost]).worker_id for _ in range(2)] == ["b", "b"]
    with pytest.raises(Overloaded):
        placement.pick(request(1), [full, almost])


def test_who_cannot_serve_is_passed_over(placement):
    others = [
        worker("a", state="starting"),
        worker("b", state="draining"),
        worker("c", reason="experts are missing"),
        worker("d", role="decode"),
    ]
    assert placement.pick(request(1), [*others, worker("e", pending_tokens=999)]).worker_id == "e"
    with pytest.raises(NoWorker) as refused:
        placement.pick(request(1), others)
    assert refused.value.message == (
        "worker a is starting; worker b is leaving; worker c cannot serve: experts are missing; worker d only decodes"
    )


def test_reasons_are_empty_when_one_serves():
    assert why_none_serves([worker("a", state="starting"), worker("b")]) == ""
    assert why_none_serves([]) == "no worker is running"
