"""An actor's life on the in-memory bus: states, heartbeats, drain, crash, kill; and its process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.actor import BEAT_SECONDS, DRAIN_GRACE_SECONDS, Actor, Running, running
from common.clock import FakeClock, RealClock, within
from common.errors import BusUnavailable, ConfigError, Draining, NoResponders
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import GatewayBeat, GetMetrics, Message, Metrics, Ok
from common.settings import Settings
from tests.conftest import REPO, NatsServer

SETTINGS = Settings(drain_seconds=2.0)


class Toy(Actor):
    """Writes down what happens to it; `loading` holds start() up, `working` drain()."""

    kind = "gateway"

    def __init__(self, bus, settings=SETTINGS, **others) -> None:
        super().__init__(bus, settings, **others)
        self.steps: list[str] = []
        self.loading, self.working = asyncio.Event(), asyncio.Event()
        self.loading.set()
        self.working.set()

    async def start(self) -> None:
        self.steps.append("start")
        await self.loading.wait()
        self.spawn(self._idle(), "idle")
        await self.bus.subscribe("work", self._work)
        self.steps.append("started")

    async def drain(self) -> None:
        self.steps.append("drain")
        await self.working.wait()
        self.steps.append("drained")

    async def stop(self) -> None:
        self.steps.append("stop")

    def beat(self) -> Message:
        return GatewayBeat(id=self.id, boot_id=self.boot_id, state=self.state)

    async def _idle(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.steps.append("idle ended")

    async def _work(self, _: str, message: Message) -> Message:
        if self.state == "draining":
            raise Draining("leaving")
        return Ok()


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


class Ear:
    def __init__(self) -> None:
        self.states: list[str] = []

    async def listen(self, broker: MemoryBroker) -> MemoryBus:
        bus = MemoryBus(broker)
        await bus.connect()
        await bus.subscribe("moecule.v1.gateway.*.beat", self._hear)
        return bus

    async def _hear(self, _: str, message: Message) -> None:
        assert isinstance(message, GatewayBeat)
        self.states.append(message.state)


async def test_a_life_in_order():
    broker, ear = MemoryBroker(), Ear()
    await ear.listen(broker)
    async with running(Toy(MemoryBus(broker), actor_id="a")) as live:
        toy = live.actor
        assert isinstance(toy, Toy) and toy.state == "ready" and toy.steps == ["start", "started"]
    await settle()
    assert toy.steps == ["start", "started", "drain", "drained", "idle ended", "stop"]
    assert ear.states == ["starting", "ready", "draining"]
    assert not toy.bus.connected and not broker.buses[1:]


async def test_heartbeats_keep_their_pace_and_show_loading():
    broker, ear, clock = MemoryBroker(), Ear(), FakeClock()
    await ear.listen(broker)
    toy = Toy(MemoryBus(broker), clock=clock, actor_id="a")
    toy.loading.clear()
    async with running(toy, wait_ready=False) as live:
        await clock.advance(4 * BEAT_SECONDS)
        assert ear.states == ["starting"] * 5
        toy.loading.set()
        await live.ready()
        await settle()
        assert ear.states == ["starting"] * 5 + ["ready"], "a change is told at once"
        toy.beat_now()
        await settle()
        assert ear.states.count("ready") == 2
        await clock.advance(2 * BEAT_SECONDS)
        assert ear.states.count("ready") == 4


async def test_no_heartbeat_of_the_past_after_an_outage():
    broker, ear, clock = MemoryBroker(), Ear(), FakeClock()
    await ear.listen(broker)
    async with running(Toy(MemoryBus(broker), clock=clock, actor_id="a")):
        await settle()
        broker.disconnect()
        heard = len(ear.states)
        await clock.advance(40 * BEAT_SECONDS)
        broker.reconnect()
        await settle()
        assert len(ear.states) == heard + 1, "one at once after the reconnect, none from the buffer"


async def test_drain_is_bounded_by_the_clock():
    broker, clock = MemoryBroker(), FakeClock()
    toy = Toy(MemoryBus(broker), clock=clock, actor_id="a")
    toy.working.clear()
    await toy.bus.connect()
    live = Running(toy)
    await live.ready()
    live.leave.set()
    await clock.advance(SETTINGS.drain_seconds)
    assert not live.life.done() and toy.steps[-1] == "drain"
    await clock.advance(DRAIN_GRACE_SECONDS)
    await asyncio.wait_for(live.life, 2)
    assert toy.steps[-2:] == ["idle ended", "stop"] and "drained" not in toy.steps


async def test_it_answers_while_it_drains():
    broker = MemoryBroker()
    asker = MemoryBus(broker)
    await asker.connect()
    toy = Toy(MemoryBus(broker), actor_id="a")
    toy.working.clear()
    async with running(toy) as live:
        assert await asker.request("work", Ok()) == Ok()
        live.leave.set()
        await settle()
        with pytest.raises(Draining):
            await asker.request("work", Ok())
        toy.working.set()
    with pytest.raises(NoResponders):
        await asker.request("work", Ok())


async def test_leaving_while_it_loads_does_not_wait_for_the_load():
    toy = Toy(MemoryBus(MemoryBroker()), actor_id="a")
    toy.loading.clear()
    async with running(toy, wait_ready=False):
        await settle()
    assert toy.steps == ["start"] and toy.state == "starting"


async def test_a_start_that_fails_says_why():
    class Broken(Toy):
        async def start(self) -> None:
            raise ConfigError("no such model")

    toy = Broken(MemoryBus(MemoryBroker()), actor_id="a")
    with pytest.raises(ConfigError, match="no such model"):
        async with running(toy):
            pytest.fail("it is not ready")
    assert toy.steps == []


async def test_a_task_that_crashes_ends_the_actor_with_its_error():
    toy = Toy(MemoryBus(MemoryBroker()), actor_id="a")

    async def crash() -> None:
        raise ZeroDivisionError("in a task")

    with pytest.raises(ZeroDivisionError, match="in a task"):
        async with running(toy) as live:
            toy.spawn(crash(), "crash")
            await asyncio.wait({live.life})
    assert toy.steps[-2:] == ["idle ended", "stop"] and "drain" not in toy.steps


async def test_a_failure_told_by_a_thread_ends_the_actor_with_it():
    toy = Toy(MemoryBus(MemoryBroker()), actor_id="a")
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        async with running(toy) as live:
            await asyncio.to_thread(toy.fail, ZeroDivisionError("in a thread"))
            await asyncio.wait({live.life})
    assert toy.steps[-2:] == ["idle ended", "stop"] and "drain" not in toy.steps


async def test_killed_means_silent():
    broker, ear = MemoryBroker(), Ear()
    asker = await ear.listen(broker)
    async with running(Toy(MemoryBus(broker), actor_id="a")) as live:
        toy = live.actor
        await settle()
        heard = len(ear.states)
        await live.kill()
        await settle()
        assert len(ear.states) == heard and ear.states[-1] == "ready"
        with pytest.raises(NoResponders):
            await asker.request("work", Ok())
    assert isinstance(toy, Toy) and "drain" not in toy.steps and toy.steps[-1] == "stop"


async def test_a_connection_closed_for_good_ends_the_actor():
    toy = Toy(MemoryBus(MemoryBroker()), actor_id="a")
    with pytest.raises(BusUnavailable):
        async with running(toy) as live:
            await toy.bus.close()
            toy.beat_now()
            await asyncio.wait_for(asyncio.wait({live.life}), 2)


async def test_metrics_are_of_one_actor():
    broker = MemoryBroker()
    asker = MemoryBus(broker)
    await asker.connect()
    async with running(Toy(MemoryBus(broker), actor_id="a")), running(Toy(MemoryBus(broker), actor_id="b")):
        for name, other in ("ab", "ba"):
            reply = await asker.request(f"moecule.v1.gateway.{name}.metrics", GetMetrics())
            assert isinstance(reply, Metrics) and f'id="{name}"' in reply.text and f'id="{other}"' not in reply.text


async def test_within():
    clock = FakeClock()
    never = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(within(clock, 3.0, never))
    await clock.advance(2.99)
    assert not waiting.done()
    await clock.advance(0.02)
    with pytest.raises(TimeoutError):
        await waiting
    assert never.cancelled()
    assert await within(RealClock(), 5.0, asyncio.sleep(0, "value")) == "value"


# ---- an actor's process

TOY_MAIN = """
import asyncio, os, time
from common.actor import Actor, run_process
from common.messages import GatewayBeat

class Toy(Actor):
    kind = "gateway"
    async def start(self):
        print("started", flush=True)
        if "TOY_FAILS" in os.environ:
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
            self.fail(ZeroDivisionError("in a thread"))
    async def drain(self):
        print("draining", flush=True)
        await asyncio.sleep(float(os.environ["TOY_DRAIN"]))
        print("drained", flush=True)
    def beat(self): return GatewayBeat(id=self.id, boot_id=self.boot_id, state=self.state)

run_process("toy", lambda: Toy)
"""


class Process:
    def __init__(self, folder: Path, nats_url: str, drain: float = 0.0, **settings: str) -> None:
        script = folder / "toy_main.py"
        script.write_text(TOY_MAIN)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MOECULE_")}
        env |= {"PYTHONPATH": str(REPO), "MOECULE_NATS_URL": nats_url, "TOY_DRAIN": str(drain)}
        env |= {f"MOECULE_{key.upper()}": value for key, value in settings.items()}
        self.popen = subprocess.Popen(
            [sys.executable, str(script)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def end(self) -> tuple[int, str, str]:
        try:
            out, err = self.popen.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise
        return self.popen.returncode, out, err


def test_sigterm_drains_and_ends_well(nats_url: str, tmp_path: Path):
    process = Process(tmp_path, nats_url)
    assert process.line() == "started"
    process.popen.send_signal(signal.SIGTERM)
    code, out, err = process.end()
    assert (code, out) == (0, "draining\ndrained\n") and "Traceback" not in err


def test_a_second_signal_leaves_at_once(nats_url: str, tmp_path: Path):
    process = Process(tmp_path, nats_url, drain=60)
    assert process.line() == "started"
    process.popen.send_signal(signal.SIGTERM)
    assert process.line() == "draining"
    process.popen.send_signal(signal.SIGTERM)
    assert process.end()[0] == 128 + signal.SIGTERM


def test_a_failure_waits_for_no_thread(nats_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_FAILS", "1")
    code, _, err = Process(tmp_path, nats_url).end()
    assert code == 1 and "Traceback" in err and "ZeroDivisionError: in a thread" in err


def test_a_malformed_setting_is_one_sentence(nats_url: str, tmp_path: Path):
    code, out, err = Process(tmp_path, nats_url, max_batch="many").end()
    assert (code, out, err) == (78, "", "moecule: MOECULE_MAX_BATCH is 'many': use a whole number\n")


def test_it_waits_for_nats(nats_server: NatsServer, tmp_path: Path):
    nats_server.kill()
    with socket.create_server(("127.0.0.1", nats_server.port)) as not_nats:
        process = Process(tmp_path, nats_server.url)
        not_nats.settimeout(10)
        not_nats.accept()[0].close()  # it has tried
    nats_server.start()
    assert process.line() == "started"
    process.popen.send_signal(signal.SIGINT)
    assert process.end()[0] == 0


def test_a_log_line_names_the_actor(nats_url: str, tmp_path: Path):
    process = Process(tmp_path, nats_url, log_json="1", id="gate-7")
    assert process.line() == "started"
    process.popen.send_signal(signal.SIGTERM)
    _, _, err = process.end()
    lines = [line for line in err.splitlines() if '"event": "ready"' in line]
    assert len(lines) == 1 and '"kind": "gateway"' in lines[0] and '"id": "gate-7"' in lines[0]
    assert not re.search(r"\x1b\[", err)


async def test_a_second_actor_under_the_same_id_is_refused_and_the_first_goes_on():
    broker = MemoryBroker()
    async with running(Toy(MemoryBus(broker), actor_id="one")) as first:
        with pytest.raises(ConfigError, match=r"one runs already.*MOECULE_ID"):
            async with running(Toy(MemoryBus(broker), actor_id="one")):
                pass
        assert not first.life.done()
        async with running(Toy(MemoryBus(broker), actor_id="two")):
            pass
    async with running(Toy(MemoryBus(broker), actor_id="one")):
        pass
