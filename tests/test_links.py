"""One conformance suite for the local, mailbox and bus links, then what each of them does when something dies."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import Checkpoint
from common.errors import ConfigError, ExpertsUnavailable
from common.link import LocalLink, PeerLost
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import LoadPartitions, ShardBeat, subject
from common.nats_bus import NatsBus
from common.settings import node_id
from services.expert_shard.experts import ExpertStore
from services.gpu_worker import membership as links_module
from services.gpu_worker.links import ExpertLinks
from services.gpu_worker.peers import BusPeer, MailboxPeer
from services.gpu_worker.table import make_table
from tests.conftest import REPO
from tests.expert_rig import (
    HIDDEN,
    LAYERS,
    Rig,
    dealt,
    map_of,
    reference,
    rig,
    rows,
    through,
    until,
    whole_step,
    write_experts,
)

KINDS = {"mailbox": MailboxPeer, "bus": BusPeer}


@pytest.fixture
def folder(tmp_path):
    return write_experts(tmp_path)


@pytest.fixture
def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def broker():
    return MemoryBroker(max_payload=20_000)


@pytest.fixture
async def cluster(folder, broker):
    async def bus():
        made = MemoryBus(broker)
        await made.connect()
        return made

    async with rig(folder, bus) as made:
        yield made


async def link_of(kind: str, cluster: Rig, shards: int, **settings):
    if kind == "local":
        store = ExpertStore(cluster.config, Checkpoint(cluster.folder))
        store.load(range(cluster.config.partitions))
        return LocalLink(store.compute)
    made = [await cluster.shard(f"s{n}", list(range(n, cluster.config.partitions, shards))) for n in range(shards)]
    links = await cluster.links(kind, **settings)
    await links.set_map(cluster.map(made))
    assert links.reason == "" and links.version == cluster.version
    assert {type(peer) for peer in links._newest.peers} == {KINDS[kind]}
    return links


def close(got, tensors, layer, batch):
    torch.testing.assert_close(got, reference(tensors, layer, *batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["local", "mailbox", "bus"])
async def test_sums_are_those_of_a_loop_over_tokens(cluster, tensors, kind, shards):
    """Decode sized, exactly full, prefill sized, and more than one window of prefill; the bus in several chunks."""
    link = await link_of(kind, cluster, shards)
    for count in (1, 8, 9, 40, 41, 130):
        batch = rows(count, seed=count)
        for layer, out in zip(LAYERS, await asyncio.to_thread(whole_step, link, batch), strict=True):
            close(out, tensors, layer, batch)


@pytest.mark.parametrize("kind", ["local", "mailbox", "bus"])
async def test_sums_are_added_to_what_is_there_and_kept_apart_from_inference_mode(cluster, tensors, kind):
    link = await link_of(kind, cluster, 2)
    batch = rows(6)

    def step():
        with torch.inference_mode():
            x = batch[0].clone()
            out = torch.full_like(x, 3.0)
            link.begin_step()
            link.dispatch(1, x, batch[1].to(torch.int32), batch[2])
            link.combine(out)
            return out.clone()

    for _ in range(3):
        close(await asyncio.to_thread(step) - 3.0, tensors, 1, batch)


async def test_mailbox_and_bus_give_the_same_bits(cluster):
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    new_map = cluster.map(shards)
    results = []
    for kind in ("mailbox", "bus"):
        links = await cluster.links(kind)
        await links.set_map(new_map)
        results.append([await asyncio.to_thread(whole_step, links, rows(count)) for count in (1, 8, 30)])
    for by_mailbox, by_bus in zip(*results, strict=True):
        for ours, theirs in zip(by_mailbox, by_bus, strict=True):
            assert torch.equal(ours, theirs)


async def test_rows_go_only_where_they_have_an_expert(cluster, tensors):
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    links = await cluster.links()
    await links.set_map(cluster.map(shards, [["s0"]] * 5 + [["s1"]] * 5))
    x, _, weights = rows(4)
    ids = torch.tensor([[0, 1, 2], [5, 6, 7], [4, 5, 6], [3, 2, 1]])
    close(await asyncio.to_thread(through, links, 1, (x, ids, weights)), tensors, 1, (x, ids, weights))
    assert [shard.server.rows_served for shard in shards] == [3, 2]


@pytest.mark.parametrize("kind", ["mailbox", "bus"])
async def test_two_workers_share_the_shards_and_each_gets_its_own(cluster, tensors, kind):
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    new_map = cluster.map(shards)

    def many(links, seed):
        for turn in range(40):
            batch = rows((1, 8, 100)[turn % 3], seed=seed + turn)
            close(through(links, 1 + turn % 2, batch), tensors, 1 + turn % 2, batch)

    workers = [await cluster.links(kind, worker=f"w{n}") for n in range(2)]
    for links in workers:
        await links.set_map(new_map)
    await asyncio.gather(*(asyncio.to_thread(many, links, 1000 * n) for n, links in enumerate(workers)))


async def test_seq_wraps_without_a_wrong_answer(cluster, tensors):
    links = await link_of("mailbox", cluster, 2)
    for peer in links._newest.peers:
        peer._seq = 2**32 - 5
    for turn in range(10):
        batch = rows((8, 30)[turn % 2], seed=turn)
        close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)
    assert [peer._seq for peer in links._newest.peers] == [6, 6]


# ---- the expert map


async def test_without_a_map_or_with_a_hole_in_it_a_step_is_refused_with_the_reason(cluster):
    links = await cluster.links()
    assert links.reason == "there is no expert map yet" and links.version == 0
    with pytest.raises(ExpertsUnavailable, match="no expert map yet"):
        links.begin_step()
    shard = await cluster.shard("s")
    await links.set_map(cluster.map([shard], [["s"]] * 8 + [[]] * 2))
    assert "2 of 10 expert partitions (8, 9)" in links.reason
    with pytest.raises(ExpertsUnavailable, match="8, 9"):
        links.begin_step()
    await links.set_map(cluster.map([shard]))
    assert links.reason == ""
    links.begin_step()


async def test_a_dense_model_needs_no_map(tmp_path, broker):
    folder = write_experts(tmp_path, first_k_dense_replace=3, n_routed_experts=0)

    async def bus():
        made = MemoryBus(broker)
        await made.connect()
        return made

    async with rig(folder, bus) as made:
        links = await made.links()
        assert links.reason == ""
        links.begin_step()


async def test_a_map_of_another_model_is_refused(cluster):
    links = await cluster.links()
    shard = await cluster.shard("s")
    with pytest.raises(ConfigError, match="not of this model"):
        await links.set_map(
            map_of(cluster.config, 9, {"s": (shard.boot_id, shard.node)}, dealt(cluster.config, "s")[:-1])
        )


async def test_an_older_map_changes_nothing(cluster):
    links = await cluster.links()
    shard = await cluster.shard("s")
    older, newer = cluster.map([shard], [[]] * 10), cluster.map([shard])
    await links.set_map(newer)
    await links.set_map(older)
    assert (links.version, links.reason) == (newer.version, "")


async def test_a_step_keeps_its_map_and_set_map_returns_when_none_uses_the_older(cluster, tensors):
    first, second = await cluster.shard("s0"), await cluster.shard("s1")
    links = await cluster.links()
    await links.set_map(cluster.map([first]))
    batch = rows(8)
    outs = [torch.zeros_like(batch[0]) for _ in LAYERS]
    links.begin_step()
    flip = asyncio.create_task(links.set_map(cluster.map([second])))
    await until(lambda: links._newest.peers[0].shard_id == "s1")
    before = links.version
    for layer, out in zip(LAYERS, outs, strict=True):
        assert not flip.done() and links.version == before
        await asyncio.to_thread(links.dispatch, layer, *batch)
        await asyncio.to_thread(links.combine, out)
        close(out, tensors, layer, batch)
    await flip
    assert (first.server.rows_served, second.server.rows_served) == (8 * len(LAYERS), 0)
    assert links.version == cluster.version
    await asyncio.to_thread(whole_step, links, batch)
    assert second.server.rows_served == 8 * len(LAYERS)
    await until(lambda: first.server.attached == ())


async def test_copies_take_turns_and_are_the_same_for_the_same_worker_and_step(cluster, tensors):
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    new_map = cluster.map(shards, [["s0", "s1"]] * 10)
    links = await cluster.links()
    await links.set_map(new_map)
    for turn in range(4):
        batch = rows(8, seed=turn)
        close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)
    assert all(shard.server.rows_served > 0 for shard in shards)

    peers = links._newest.peers
    table, again = (make_table(new_map, peers, 10, "w") for _ in range(2))
    for step in range(4):
        first, second = table.choose(step)
        assert all((a == b).all() for a, b in zip(table.choose(step), again.choose(step), strict=True))
        assert sorted([*first[first >= 0], *second[second >= 0]]) == list(range(10)), "each expert once"
        assert (first[:10] >= 0).tolist() == (table.choose(step + 1)[1][:10] >= 0).tolist()
    other = make_table(new_map, peers, 10, "another worker")
    assert any((a != b).any() for a, b in zip(table.choose(0), other.choose(0), strict=True))


# ---- who is slow


@contextlib.contextmanager
def held_back(*shards):
    """shard id -> an event until which it answers nothing; at the end they all do."""
    gates = {shard.id: threading.Event() for shard in shards}

    def behind(gate, compute):
        return lambda *arguments: gate.wait() and compute(*arguments)

    for shard in shards:
        shard.server._experts.compute = behind(gates[shard.id], shard.server._experts.compute)
    try:
        yield gates
    finally:
        for gate in gates.values():
            gate.set()


@pytest.mark.parametrize("kind", ["mailbox", "bus"])
@pytest.mark.parametrize("first,last", [("s0", "s1"), ("s1", "s0")])
async def test_each_shard_is_charged_for_the_time_until_its_own_answer(cluster, kind, first, last, monkeypatch):
    """Whichever of them the sums are added of first."""
    monkeypatch.setattr("services.gpu_worker.links.COUNT_SECONDS", 0.01)
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    worker = await cluster.links(kind)
    await worker.set_map(cluster.map(shards))
    with held_back(*shards) as gates:
        step = asyncio.create_task(asyncio.to_thread(through, worker, 1, rows(8)))
        await until(lambda: len(worker.times()) == 2 and all(one.waited > 0.05 for one in worker.times().values()))
        gates[first].set()
        await until(lambda: worker.times()[first].trips.count == 1)
        charged = worker.times()[first].waited
        assert charged <= worker.times()[last].waited and worker.times()[last].trips.count == 0, "it is late still"
        await until(lambda: worker.times()[last].waited > charged + 0.05)
        gates[last].set()
        await step
    times = worker.times()
    assert times[first].waited == charged and times[last].waited > charged + 0.05
    assert times[last].trips.count == 1 and times[first].trips.sum + 0.05 < times[last].trips.sum
    assert all(one.waited < one.trips.sum for one in times.values()), "the rows were on their way before the wait"


async def test_who_has_answered_before_the_wait_is_charged_nothing(cluster):
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    worker = await cluster.links("bus")
    await worker.set_map(cluster.map(shards))
    batch = rows(8)
    out = torch.zeros_like(batch[0])
    worker.begin_step()
    worker.dispatch(1, *batch)
    await until(lambda: all(sent.peer.answered() for sent in worker._sent))
    worker.combine(out)
    assert all(one.waited < one.trips.sum / 2 for one in worker.times().values())


async def test_a_shard_that_the_map_no_longer_names_is_not_told_of(cluster, monkeypatch):
    shards = [await cluster.shard(f"s{n}") for n in range(3)]
    worker = await cluster.links()
    await worker.set_map(cluster.map(shards))
    await asyncio.to_thread(whole_step, worker, rows(40))
    before = {shard: times.trips.count for shard, times in worker.times().items()}
    assert before == {f"s{n}": len(LAYERS) for n in range(3)}
    await worker.set_map(cluster.map(shards[1:]))
    assert worker.times().keys() == {"s1", "s2"}
    await asyncio.to_thread(whole_step, worker, rows(40))
    assert {shard: times.trips.count for shard, times in worker.times().items()} == {
        "s1": 2 * len(LAYERS), "s2": 2 * len(LAYERS),
    }  # fmt: skip
    await worker.set_map(cluster.map(shards))
    assert worker.times()["s0"].trips.count == len(LAYERS), "it was only away: counters do not go back"
    monkeypatch.setattr("services.gpu_worker.links.MOST_TIMES", 2)
    await worker.set_map(cluster.map(shards[1:]))
    assert worker.times().keys() == worker._times.keys() == {"s1", "s2"}, "the times of shards that left have a bound"


# ---- death


async def test_a_death_moves_its_rows_to_the_copies_and_a_return_is_attached(cluster, tensors):
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    links = await cluster.links()
    changes = []
    await links.set_map(cluster.map(shards, [["s0", "s1"]] * 10))
    links.on_change = lambda: changes.append(links.reason)
    await shards[0].life.kill()
    await until(lambda: len(links._newest.peers) == 1)
    assert changes == [""] and links.reason == ""
    batch = rows(8)
    close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)
    await shards[1].life.kill()
    await until(lambda: bool(links.reason))
    assert "s0 died" in links.reason or "s0 cannot be attached" in links.reason
    assert changes[-1] == links.reason or "cannot be attached" in links.reason
    with pytest.raises(ExpertsUnavailable):
        await asyncio.to_thread(through, links, 1, batch)
    returned = await cluster.shard("s0")
    await links.set_map(cluster.map([returned]))
    assert links.reason == ""
    close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)


async def test_an_error_while_attaching_again_is_told(cluster, monkeypatch):
    """One that is no handshake's: a GPU that failed does not come back."""
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    links, failures = await cluster.links(), []
    await links.set_map(cluster.map(shards))
    links.on_failure = failures.append

    async def fails(expert_map):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(links, "_attach_missing", fails)
    await shards[0].life.kill()
    await until(lambda: bool(failures))
    assert str(failures[0]) == "an illegal memory access"


async def test_another_life_than_the_map_names_is_refused(cluster):
    shard = await cluster.shard("s")
    links = await cluster.links()
    await links.set_map(map_of(cluster.config, 50, {"s": ("earlier", shard.node)}, dealt(cluster.config, "s")))
    assert "another life" in links.reason
    with pytest.raises(ExpertsUnavailable, match="another life"):
        links.begin_step()
    await links.set_map(map_of(cluster.config, 51, {"s": (shard.boot_id, shard.node)}, dealt(cluster.config, "s")))
    assert links.reason == ""


@pytest.mark.parametrize("kind", ["mailbox", "bus"])
async def test_an_expert_that_the_shard_does_not_hold_breaks_the_step_instead_of_missing_in_it(cluster, kind):
    shard = await cluster.shard("s", [0, 1, 2])
    links = await cluster.links(kind)
    await links.set_map(cluster.map([shard]))
    with pytest.raises(PeerLost, match="does not hold") as lost:
        await asyncio.to_thread(through, links, 1, rows(8))
    assert lost.value.shard_id == "s"


async def test_a_shard_that_could_not_be_reached_is_attached_when_it_can_be(cluster, broker, tensors):
    shard = await cluster.shard("s")
    links = await cluster.links()
    broker.disconnect()
    await links.set_map(cluster.map([shard]))
    assert "cannot be attached" in links.reason
    broker.reconnect()
    await until(lambda: links.reason == "")
    batch = rows(8)
    close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)


async def test_the_mailbox_needs_no_bus_once_it_is_attached(cluster, broker, tensors):
    links = await link_of("mailbox", cluster, 2)
    broker.disconnect()
    batch = rows(8)
    close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)
    broker.reconnect()


async def test_the_bus_link_says_so_when_the_bus_is_gone_and_comes_back_with_it(cluster, broker, tensors):
    links = await link_of("bus", cluster, 2)
    broker.disconnect()
    with pytest.raises(PeerLost):
        await asyncio.to_thread(through, links, 1, rows(8))
    broker.reconnect()
    await until(lambda: links.reason == "" and len(links._newest.peers) == 2)
    batch = rows(8)
    close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)


async def test_a_shard_frees_the_mailbox_of_a_worker_that_left(cluster):
    shard = await cluster.shard("s")
    links = await cluster.links()
    await links.set_map(cluster.map([shard]))
    await until(lambda: len(shard.server.attached) == 1)
    await links.close()
    await until(lambda: shard.server.attached == ())
    assert shard.server._thread.is_alive()


# ---- real processes


class ShardProcess:
    """`python -m services.expert_shard`, with all experts once it is told."""

    def __init__(self, folder, nats_url: str, shard_id: str) -> None:
        settings = dict(MOECULE_NATS_URL=nats_url, MOECULE_MODEL=str(folder), MOECULE_ID=shard_id, OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.expert_shard"], cwd=REPO, env=os.environ | settings
        )
        self.id = shard_id
        self.beat: ShardBeat | None = None

    async def held(self, made: Rig) -> None:
        bus = await made.bus()

        async def on_beat(_, beat):
            if beat.id == self.id:
                self.beat = beat

        await bus.subscribe("moecule.v1.shard.*.beat", on_beat)
        await until(lambda: self.beat is not None and self.beat.state == "ready")
        everything = LoadPartitions(version=1, partitions=tuple(range(made.config.partitions)))
        await bus.request(subject("shard", self.id, "load"), everything)
        await until(lambda: len(self.beat.held) == made.config.partitions)

    @property
    def boot_id(self) -> str:
        return self.beat.boot_id

    @property
    def node(self) -> str:
        return self.beat.node

    async def stand_still(self) -> None:
        """SIGSTOP reaches each thread in its own time: until the last has stopped, a step may still be answered."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        await until(lambda: all("T (stopped)" in (task / "status").read_text() for task in tasks.iterdir()))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
async def apart(folder, nats_url):
    """(rig over NATS, a shard in a process of its own)"""
    buses = []

    async def bus():
        made = NatsBus(nats_url, "test")
        await made.connect()
        buses.append(made)
        return made

    process = ShardProcess(folder, nats_url, "far")
    async with rig(folder, bus) as made:
        await process.held(made)
        yield made, process
    process.end()
    for made in buses:
        await made.close()


@pytest.mark.parametrize("kind,limit", [("mailbox", 0.5), ("bus", 2.0)])
async def test_kill_9_in_mid_wait_breaks_the_step_off(apart, tensors, kind, limit):
    made, process = apart
    near = await made.shard("near")
    links = await made.links(kind)
    await links.set_map(made.map([near, process]))
    batch = rows(8)
    close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)
    # Stopped, it holds the step in its wait until it is killed.
    await process.stand_still()
    step = asyncio.create_task(asyncio.to_thread(through, links, 1, batch))
    await until(lambda: bool(links._sent))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(step), 0.1)
    assert not step.done(), "late is not dead"
    killed = time.monotonic()
    process.end()
    with pytest.raises(PeerLost) as lost:
        await step
    assert time.monotonic() - killed < limit
    assert lost.value.shard_id == "far"
    with pytest.raises(ExpertsUnavailable, match="far"):
        await asyncio.to_thread(through, links, 1, batch)
    # The broken step's answer of the other shard must not pass for one of the rerun.
    await links.set_map(made.map([near]))
    for seed in range(3):
        batch = rows(8, seed=seed)
        close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)


async def test_a_hung_shard_is_given_up_after_the_bound(apart, tensors):
    made, process = apart
    links = await made.links(bound=0.3)
    await links.set_map(made.map([process]))
    await process.stand_still()
    began = time.monotonic()
    with pytest.raises(PeerLost, match=r"has not answered for 0\.3 s"):
        await asyncio.to_thread(through, links, 1, rows(8))
    assert 0.3 <= time.monotonic() - began < 5
    with pytest.raises(ExpertsUnavailable):
        links.begin_step()
    process.process.send_signal(signal.SIGCONT)
    await until(lambda: links.reason == "")
    batch = rows(8)
    close(await asyncio.to_thread(through, links, 1, batch), tensors, 1, batch)


class CountingSocket(socket.socket):
    """Counts what passes through it, whichever way it is asked to."""

    passed: list[int]

    def sendmsg(self, *args, **kwargs):
        sent = super().sendmsg(*args, **kwargs)
        self.passed.append(sent)
        return sent

    def send(self, *args):
        sent = super().send(*args)
        self.passed.append(sent)
        return sent

    def recvmsg(self, *args, **kwargs):
        received = super().recvmsg(*args, **kwargs)
        self.passed.append(len(received[0]))
        return received

    def recv(self, *args):
        received = super().recv(*args)
        self.passed.append(len(received))
        return received


def open_sockets() -> list[int]:
    with os.scandir("/proc/self/fd") as entries:
        return [int(entry.name) for entry in entries if os.readlink(entry.path).startswith("socket:")]


def tcp_bytes() -> int:
    """What the kernel counts over all TCP connections of this process: acknowledged plus received."""
    total = 0
    for fd in open_sockets():
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM:
                total += sum(struct.unpack_from("=QQ", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 120))
    return total


@pytest.mark.parametrize("kind", ["mailbox", "bus"])
async def test_bytes_of_rows_that_pass_a_socket(apart, monkeypatch, kind):
    """None over the mailbox: only the handshake passes its socket, and the bus hears no more than heartbeats."""
    made, process = apart
    sockets = []

    def counting() -> CountingSocket:
        sock = CountingSocket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        sock.passed = []
        sockets.append(sock)
        return sock

    monkeypatch.setattr(links_module, "handshake_socket", counting)
    links = await made.links(kind)
    await links.set_map(made.map([process]))
    handshake = [sum(sock.passed) for sock in sockets]
    before, steps, batch = tcp_bytes(), 200, rows(8)

    def run():
        for _ in range(steps):
            through(links, 1, batch)

    await asyncio.to_thread(run)
    over_tcp, row_bytes = tcp_bytes() - before, steps * 8 * HIDDEN * 4 * 2
    assert [sum(sock.passed) for sock in sockets] == handshake
    if kind == "mailbox":
        assert len(sockets) == 1 and 0 < handshake[0] < 1000
        assert over_tcp < row_bytes / 20
    else:
        assert over_tcp > row_bytes, "the count must see rows where they do pass"


async def test_nothing_is_left_of_a_killed_shard(apart):
    made, process = apart
    links = await made.links()
    await links.set_map(made.map([process]))
    listening = Path("/proc/net/unix").read_text
    assert process.boot_id in listening()
    process.end()
    await until(lambda: bool(links.reason))
    assert process.boot_id not in listening()
    assert not [name for name in os.listdir("/dev/shm") if "moecule" in name]


def left_open() -> tuple[int, int]:
    """File descriptors of mailboxes and their sockets, and threads; a mapping goes with the last cycle that held it."""
    gc.collect()
    kinds = ("moecule", "socket:")
    with os.scandir("/proc/self/fd") as entries:
        names = [os.readlink(entry.path) for entry in entries if os.path.lexists(entry.path)]
    return sum(any(kind in name for kind in kinds) for name in names), threading.active_count()


async def test_the_links_of_many_maps_leave_no_file_descriptor_and_no_thread(cluster):
    shards = [await cluster.shard(f"s{n}") for n in range(2)]
    bus = await cluster.bus()
    before = left_open()
    links = ExpertLinks(
        bus, cluster.config, worker_id="w", boot_id="b", node=node_id(), mode="mailbox",
        decode_rows=8, prefill_rows=40, loop=asyncio.get_running_loop(),
    )  # fmt: skip
    for turn in range(6):
        await links.set_map(cluster.map([shards[turn % 2]]))
    assert left_open() > before
    await links.close()
    await until(lambda: not any(shard.server.attached for shard in shards))
    del links
    assert left_open() == before
