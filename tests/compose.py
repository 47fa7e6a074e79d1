"""A whole cluster of real actors in one test process, on the in-memory bus, and a client that speaks its subjects."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from common.actor import Actor, Running, running
from common.bus import Bus
from common.clock import Clock
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import (
    Abort,
    Assign,
    Assigned,
    GatewayBeat,
    Generate,
    Message,
    Sampling,
    StepTokens,
    TokenChunk,
    subject,
    subject_of_kind,
)
from common.model_config import ModelConfig
from common.pages import page_hashes
from common.settings import Settings
from services.expert_shard.actor import ExpertShard
from services.gpu_worker.actor import Worker
from services.scheduler.actor import Scheduler

TINY = "models/tiny"


def greedy(max_tokens: int = 16, **others) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **others)


@dataclass
class Result:
    """What one request produced."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[TokenChunk] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last(self) -> TokenChunk:
        return self.chunks[-1]


class Client:
    """A front door in miniature: it assigns, admits, collects tokens and keeps beating."""

    def __init__(self, bus: Bus, config: ModelConfig) -> None:
        self.bus, self.config, self.id = bus, config, "client"
        self.results: dict[str, Result] = {}
        self.worker_of: dict[str, str] = {}
        self._numbers = itertools.count()

    async def start(self) -> None:
        await self.bus.subscribe(subject("gateway", self.id, "tokens"), self._on_tokens)

    async def beat_forever(self) -> None:
        while True:
            beat = GatewayBeat(id=self.id, boot_id="boot", state="ready")
            await self.bus.publish(subject("gateway", self.id, "beat"), beat)
            await asyncio.sleep(0.2)

    async def _on_tokens(self, _: str, message: Message) -> None:
        assert isinstance(message, StepTokens)
        for chunk in message.chunks:
            result = self.results[chunk.request_id]
            assert chunk.index == len(result.tokens), "tokens arrive in order, each once"
            result.tokens += chunk.tokens
            result.chunks.append(chunk)
            if chunk.finish:
                result.done.set()

    async def send(
        self, prompt: list[int], sampling: Sampling, *, worker: str = "", salt: str = "", **others: object
    ) -> str:
        """Admit a request; its id. Raises what the scheduler or the worker refuses it with."""
        request_id = f"r{next(self._numbers)}"
        if not worker:
            hashes = tuple(page_hashes(prompt, self.config.fingerprint, salt))
            ask = Assign(
                request_id=request_id, prompt_tokens=len(prompt), max_tokens=sampling.max_tokens, page_hashes=hashes
            )
            assigned = await self.bus.request(subject_of_kind("assign"), ask)
            assert isinstance(assigned, Assigned)
            worker = assigned.worker_id
        self.results[request_id] = Result()
        self.worker_of[request_id] = worker
        message = Generate(
            request_id=request_id, gateway_id=self.id, prompt=tuple(prompt), sampling=sampling, salt=salt, **others
        )
        await self.bus.request(subject("worker", worker, "admit"), message)
        return request_id

    async def wait(self, request_id: str, seconds: float = 60) -> Result:
        result = self.results[request_id]
        await asyncio.wait_for(result.done.wait(), seconds)
        return result

    async def ask(self, prompt: list[int], sampling: Sampling, **where) -> Result:
        return await self.wait(await self.send(prompt, sampling, **where))

    async def ask_all(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        """All at once; the output tokens of each."""
        ids = [await self.send(prompt, sampling) for prompt in prompts]
        return [(await self.wait(request_id)).tokens for request_id in ids]

    async def abort(self, request_id: str) -> None:
        message = Abort(request_ids=(request_id,))
        await self.bus.publish(subject("worker", self.worker_of[request_id], "abort"), message)


@dataclass
class Composed:
    client: Client
    scheduler: Scheduler
    workers: list[Worker]
    shards: list[ExpertShard]
    broker: MemoryBroker
    stack: contextlib.AsyncExitStack
    settings: Settings
    beating: asyncio.Task[None]  # the client's heartbeats
    lives: dict[str, Running] = field(default_factory=dict)

    async def start(self, actor: Actor) -> None:
        self.lives[actor.id] = await self.stack.enter_async_context(running(actor))

    async def kill(self, actor: Actor) -> None:
        """An abrupt end: nothing is drained, nobody is told."""
        await self.lives[actor.id].kill()

    async def ready(self, seconds: float = 30) -> None:
        """Every worker has a complete map, and the scheduler has heard so."""
        async with asyncio.timeout(seconds):
            while any(w.state != "ready" or w.links.reason for w in self.workers) or self.scheduler.beat().reason:
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def compose(
    model: str = TINY, *, workers: int = 1, shards: int = 2, clock: Clock | None = None, **settings
) -> AsyncIterator[Composed]:
    """`clock`: the workers'."""
    settings = replace(Settings(model=str(model), drain_seconds=0.5, kv_pages=256), **settings)
    broker = MemoryBroker()
    async with contextlib.AsyncExitStack() as stack:

        async def bus() -> Bus:
            made = MemoryBus(broker)
            await made.connect()
            stack.push_async_callback(made.close)
            return made

        client = Client(await bus(), ModelConfig.load(settings.model, settings.weights))
        beating = asyncio.create_task(client.beat_forever())
        stack.callback(beating.cancel)
        await client.start()
        made = Composed(
            client=client,
            scheduler=Scheduler(await bus(), settings, actor_id="scheduler-1"),
            workers=[Worker(await bus(), settings, clock=clock, actor_id=f"worker-{n + 1}") for n in range(workers)],
            shards=[ExpertShard(await bus(), settings, actor_id=f"shard-{n + 1}") for n in range(shards)],
            broker=broker,
            stack=stack,
            settings=settings,
            beating=beating,
        )
        await made.start(made.scheduler)
        for actor in (*made.shards, *made.workers):
            await made.start(actor)
        await made.ready()
        yield made
