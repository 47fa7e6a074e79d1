"""What every actor is: start, ready, serve, drain, stop; one TaskGroup; heartbeats; metrics; logs.

starting --start()--> ready --stop event--> draining --drain(), tasks cancelled, stop()--> gone
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

from common.bus import Bus
from common.cli import read_settings
from common.clock import Clock, RealClock, within
from common.errors import (
    EXIT_CONFIG,
    EXIT_FAILURE,
    EXIT_UNAVAILABLE,
    BusUnavailable,
    ConfigError,
    MoeculeError,
    NoResponders,
)
from common.log import actor_log, setup_logs
from common.messages import GetMetrics, Message, State, new_boot_id, subject
from common.settings import Settings, node_id
from common.settings import actor_id as place_in_cluster
from common.telemetry import count_tasks, new_registry, render
from common.tracing import open_traces

BEAT_SECONDS = 0.25
SILENT_SECONDS = 5.0  # a peer without a heartbeat for so long is dead, counted while our own bus is connected
TWIN_SECONDS = 1.0
DRAIN_GRACE_SECONDS = 0.5  # on top of drain_seconds, for telling the rest


T = TypeVar("T")


class Actor:
    kind: ClassVar[str]  # the word in subjects

    def __init__(
        self, bus: Bus, settings: Settings, *, clock: Clock | None = None, actor_id: str | None = None
    ) -> None:
        self.bus = bus
        self.settings = settings
        self.clock = clock or RealClock()
        self.id = actor_id or place_in_cluster(self.kind, settings)
        self.boot_id = new_boot_id()
        self.node = node_id()
        self.state: State = "starting"
        self.metrics = new_registry(self.kind, self.id, self.boot_id)
        self.log = actor_log(self.kind, self.id)
        self.traces = open_traces(settings, self.kind, self.id, self.log)
        self._is_ready = asyncio.Event()
        self._beat_due = asyncio.Event()
        self._spawned: set[asyncio.Task[Any]] = set()
        self._failures: asyncio.Queue[Exception] = asyncio.Queue()
        self._group: asyncio.TaskGroup | None = None

    # ---- what an actor overrides

    async def start(self) -> None:
        """Load and subscribe. The actor is ready when this returns; heartbeats go out meanwhile."""

    async def drain(self) -> None:
        """Stop taking, and finish what is in flight within settings.drain_seconds."""

    async def stop(self) -> None:
        """Free what start() made; runs if start() returned, after the tasks have ended. The bus may be closed."""

    def beat(self) -> Message:
        """The heartbeat; called from before start() on."""
        raise NotImplementedError

    # ---- what an actor uses

    def beat_now(self) -> None:
        """The heartbeat goes out at once: something changed."""
        self._beat_due.set()

    def spawn(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A task that lives until the actor drained; if it raises, the actor ends with that error."""
        assert self._group is not None, "spawn works from start() on"
        task = self._group.create_task(coro, name=f"{self.id}:{name}")
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    def fail(self, error: Exception) -> None:
        """The actor ends with `error`, as if a task of `spawn` had raised it: for threads and callbacks."""
        self.log.error("failed", error=repr(error))
        self._loop.call_soon_threadsafe(self._failures.put_nowait, error)

    async def ready(self) -> None:
        await self._is_ready.wait()

    async def run(self, stop: asyncio.Event) -> None:
        """The whole life. Raises what ended it early, a ConfigError of start() for one."""
        started = False
        self._loop = asyncio.get_running_loop()
        count_tasks(self.metrics, self._loop)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self.bus.on_reconnect(self._beat_after_reconnect)
                await self._refuse_a_twin()
                await self.bus.subscribe(subject(self.kind, self.id, "metrics"), self._on_metrics)
                beats = self.spawn(self._beat_forever(), "beats")
                self.spawn(self._end_with_a_failure(), "failures")
                if await unless(stop, self.start()):
                    started = True
                    self._enter("ready")
                    self._is_ready.set()
                    await stop.wait()
                    self._enter("draining")
                    await self._drain_within_limit()
                await cancelled(self._spawned - {beats})
                await cancelled({beats})
        except BaseExceptionGroup as failures:
            raise first_leaf(failures) from failures
        finally:
            self._group = None
            try:
                if started:
                    await self.stop()
            finally:
                await self.traces.close()

    # ---- the base's own part

    def _enter(self, state: State) -> None:
        self.state = state
        self.log.info(state)
        self.beat_now()

    async def _refuse_a_twin(self) -> None:
        """Two lives under one id would take each other for dead. Whoever answers there was first, and stays."""
        try:
            await self.bus.request(subject(self.kind, self.id, "metrics"), GetMetrics(), timeout=TWIN_SECONDS)
        except NoResponders:
            return
        except MoeculeError as error:
            self.log.warning("somebody may run under this id", why=error.message)
            return
        raise ConfigError(f"{self.id} runs already: to start another {self.kind}, give it a name with MOECULE_ID")

    async def _drain_within_limit(self) -> None:
        limit = self.settings.drain_seconds + DRAIN_GRACE_SECONDS
        try:
            await within(self.clock, limit, self.drain())
        except TimeoutError:
            self.log.warning("not all in flight was finished", limit_seconds=limit)
        except BusUnavailable as error:
            self.log.warning("drained without NATS", why=error.message)

    async def _beat_forever(self) -> None:
        while True:
            self._beat_due.clear()
            if self.bus.closed:
                raise BusUnavailable("the connection to NATS is closed")
            # A heartbeat kept in the buffer of a lost connection would tell of the past.
            if self.bus.connected:
                with contextlib.suppress(BusUnavailable):
                    await self.bus.publish(subject(self.kind, self.id, "beat"), self.beat())
            with contextlib.suppress(TimeoutError):
                await within(self.clock, BEAT_SECONDS, self._beat_due.wait())

    async def _end_with_a_failure(self) -> None:
        raise await self._failures.get()

    async def _beat_after_reconnect(self) -> None:
        self.beat_now()

    async def _on_metrics(self, _: str, message: Message) -> Message:
        return render(self.metrics)


async def unless(stop: asyncio.Event, coro: Coroutine[Any, Any, None]) -> bool:
    """Whether `coro` ran to its end before `stop` was set; it is cancelled when `stop` comes first."""
    work, stopped = asyncio.create_task(coro), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return False
        work.result()
        return True
    finally:
        await cancelled({work, stopped})


async def cancelled(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that began it; those after it are mostly its consequences."""
    first = group.exceptions[0]
    return first_leaf(first) if isinstance(first, BaseExceptionGroup) else first


# ---- an actor inside a test or a composed process


class Running:
    def __init__(self, actor: Actor) -> None:
        self.actor = actor
        self.leave = asyncio.Event()
        self.life = asyncio.create_task(actor.run(self.leave), name=actor.id)
        self.killed = False

    async def ready(self) -> None:
        """Raises what ended the actor, if it never became ready."""
        waiting = asyncio.create_task(self.actor.ready())
        await asyncio.wait({waiting, self.life}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.life.done():
            self.life.result()

    async def kill(self) -> None:
        """As kill -9: no drain and not a word to anyone. Only this process's memory and threads are freed."""
        self.killed = True
        await self.actor.bus.close()
        self.life.cancel()
        await asyncio.wait({self.life})


@contextlib.asynccontextmanager
async def running(actor: Actor, *, wait_ready: bool = True) -> AsyncIterator[Running]:
    """The actor in the background; it drains at the end. Connects its bus if that is not connected, and closes it."""
    if not actor.bus.connected:
        await actor.bus.connect()
    live = Running(actor)
    try:
        if wait_ready:
            await live.ready()
        yield live
    finally:
        live.leave.set()
        await asyncio.wait({live.life})
        await actor.bus.close()
        if not live.killed:
            live.life.result()


# ---- an actor's process


def run_process(kind: str, load: Callable[[], Callable[[Bus, Settings], Actor]]) -> NoReturn:
    """The body of services/<actor>/__main__.py. A configuration error ends it with one sentence and exit code 78.

    `load` imports the actor and returns what makes it: whoever asks for --help does not wait for torch.
    """
    import uvloop

    try:
        settings = read_settings(sys.argv[1:])
        setup_logs(settings)
        uvloop.run(_live_or_leave(kind, load(), settings))
    except ConfigError as error:
        leave(EXIT_CONFIG, f"moecule: {error.message}")
    except BusUnavailable as error:
        leave(EXIT_UNAVAILABLE, f"moecule: {error.message}")
    leave(0)


def leave(code: int, sentence: str = "") -> NoReturn:
    """Everything is stopped and closed by now; taking torch's interpreter down in order would take seconds more."""
    if sentence:
        print(sentence, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _live_or_leave(kind: str, make: Callable[[Bus, Settings], Actor], settings: Settings) -> None:
    try:
        await _live(kind, make, settings)
    except (ConfigError, BusUnavailable):
        raise
    except Exception:
        traceback.print_exc()
        leave(EXIT_FAILURE)  # without waiting for threads: one may be in a call to a GPU that failed


async def _live(kind: str, make: Callable[[Bus, Settings], Actor], settings: Settings) -> None:
    from common.nats_bus import NatsBus
    from common.nats_login import Login

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stop, number)
    name = os.environ.get("HONCHO_PROCESS_NAME", f"moecule-{os.getpid()}")
    bus = NatsBus(settings.nats_url, name, partial(Login.of, settings, kind))
    try:
        if await unless(stop, bus.connect()):
            actor = make(bus, settings)
            freezing = asyncio.create_task(_freeze_when_ready(actor))
            await actor.run(stop)
            freezing.cancel()
    finally:
        await bus.close()


async def _freeze_when_ready(actor: Actor) -> None:
    """What an actor has made by now stays; a full collection would look through all of it, torch's part for 50 ms."""
    await actor.ready()
    gc.collect()
    gc.freeze()


def _on_signal(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        os._exit(128 + number)
    stop.set()
