"""What a gateway makes of the heartbeats it hears."""

from __future__ import annotations

from common.clock import FakeClock
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import SchedulerBeat, WorkerBeat
from services.gateway.peers import LISTEN_SECONDS, SCHEDULER_SILENT_SECONDS, Peers


def scheduler_beats(peers: Peers, reason: str = "") -> None:
    beat = SchedulerBeat(id="s", boot_id="1", state="ready", map_version=1, reason=reason)
    peers.take("moecule.v1.scheduler.s.beat", beat)


def worker_beats(peers: Peers, name: str) -> None:
    beat = WorkerBeat(id=name, boot_id="1", node="n", model="m", state="ready", map_version=1)
    peers.take(f"moecule.v1.worker.{name}.beat", beat)


async def test_a_gateway_is_ready_when_it_has_heard_whoever_is_alive() -> None:
    """One that serves after the scheduler's first heartbeat shows metrics without the worker that it streams from."""
    clock = FakeClock()
    bus = MemoryBus(MemoryBroker(clock=clock))
    await bus.connect()
    peers = Peers(bus, clock)
    clock.jump(100)
    assert peers.why_not_ready() == "the scheduler does not answer"
    scheduler_beats(peers)
    just_started = "the gateway has just begun to listen and does not know yet who is there"
    assert peers.why_not_ready() == just_started
    worker_beats(peers, "a")
    clock.jump(LISTEN_SECONDS - 0.01)
    worker_beats(peers, "b")
    assert peers.why_not_ready() == just_started
    clock.jump(0.01)
    assert peers.why_not_ready() == "" and peers.live() == [("scheduler", "s"), ("worker", "a"), ("worker", "b")]
    scheduler_beats(peers, "no shard is there")
    assert peers.why_not_ready() == "no shard is there"
    clock.jump(SCHEDULER_SILENT_SECONDS + 0.01)
    assert peers.why_not_ready() == "the scheduler does not answer"
    scheduler_beats(peers)
    assert peers.why_not_ready() == "", "it knows who is there: a scheduler's return needs no second wait"
    bus.disconnect()
    clock.jump(10)
    bus.reconnect()
    scheduler_beats(peers)
    assert peers.why_not_ready() == just_started, "whom it knew may be forgotten by now"
    clock.jump(LISTEN_SECONDS)
    assert peers.why_not_ready() == ""
    await bus.close()
