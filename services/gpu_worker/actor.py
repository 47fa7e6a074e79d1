"""The worker's asyncio side: it receives, publishes and keeps time. The step loop is engine.py."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator

from common.actor import Actor
from common.bus import Subscription
from common.cores import pin_actor
from common.errors import (
    BusUnavailable,
    ConfigError,
    DeadlineExceeded,
    Draining,
    ExpertsUnavailable,
    InternalError,
    InvalidRequest,
    MoeculeError,
    NotFound,
    Overloaded,
)
from common.fairness import has_room, why_no_room
from common.link import NoLinks
from common.loading import Loading
from common.messages import (
    Abort,
    ExpertMap,
    ForgetPages,
    GatewayBeat,
    Generate,
    GetMap,
    Grammar,
    Message,
    Ok,
    PagesChanged,
    Resume,
    SchedulerBeat,
    StepTokens,
    TokenChunk,
    WorkerBeat,
    subject,
    subject_of_kind,
)
from common.model_config import ModelConfig
from common.pages import PAGE
from common.source import Progress, open_source
from services.gpu_worker.admission import Bounds
from services.gpu_worker.engine import Engine, Stats, StepOutput
from services.gpu_worker.grammar import Constraint, Grammars
from services.gpu_worker.links import ExpertLinks, LinkTimes
from services.gpu_worker.membership import Membership
from services.gpu_worker.metrics import Standing, WorkerMetrics
from services.gpu_worker.model import Model
from services.gpu_worker.pace import Pace
from services.gpu_worker.pages import PageAllocator
from services.gpu_worker.planner import Planner
from services.gpu_worker.runner import CpuRunner
from services.gpu_worker.sampler import Sampler
from services.gpu_worker.spans import RequestSpans
from services.gpu_worker.streams import Streams
from services.gpu_worker.weights import load_weights

GATEWAY_SILENT_SECONDS = 2.0
DEADLINE_TICK_SECONDS = 0.05
ADMISSIONS = 16  # at a time: one whose grammar is being compiled does not hold up the others


class Worker(Actor):
    kind = "worker"
    own_experts = False
    preparing = ""  # what it does once all is loaded
    load: Loading | None = None
    engine: Engine
    links: Membership | NoLinks

    async def start(self) -> None:
        settings = self.settings
        pin_actor(self.kind, settings)
        self.config = await asyncio.to_thread(ModelConfig.load, settings.model, settings.weights)
        self.streams = Streams(self.clock)
        self.load = Loading(self.log)
        self.spans = RequestSpans(self.traces, self._publish)
        self.metered = WorkerMetrics(self.metrics, self._standing)
        self._stats = Stats(0, 0, 0, 0)
        self._compiling = Counter[str]()  # tenant -> its admissions that wait for a grammar
        self._admitted_tokens = 0  # prompt tokens handed to the engine since its last step
        self._gateways: dict[str, tuple[str, float]] = {}  # id -> (boot id, when it was last heard)
        self._pages: set[bytes] = set()
        self._pages_seq = 0
        self._outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._map_wanted = asyncio.Event()
        self.links = await asyncio.to_thread(self._open_links)
        self.links.on_change = self.beat_now
        self.links.on_failure = self.fail
        self.grammars = await asyncio.to_thread(Grammars, settings.model, self.config)
        if self.config.nextn_layers:
            self.log.info("layers that predict several tokens (MTP) are left out", layers=self.config.nextn_layers)
        self.engine = await asyncio.to_thread(self._make_engine)
        self.metrics.register(self.engine.waits)
        self.bounds = Bounds(
            vocab=self.config.vocab,
            context=self.config.context_within(settings.max_context),
            cache=self.engine.planner.allocator.total * PAGE,
            message=self.bus.max_payload,
        )
        self.engine.start()
        self.spawn(self._publish_outputs(), "outputs")
        self.spawn(self._follow_map(), "map")
        self.spawn(self._watch_gateways(), "gateways")
        self.spawn(self._watch_deadlines(), "deadlines")
        self._subscriptions = [
            await self.bus.subscribe("moecule.v1.scheduler.*.beat", self._on_scheduler),
            await self.bus.subscribe("moecule.v1.gateway.*.beat", self._on_gateway),
            await self.bus.subscribe(self._subject("abort"), self._on_abort),
            await self.bus.subscribe(self._subject("resume"), self._on_resume),
            await self.bus.subscribe(self._subject("allpages"), self._on_get_pages),
            await self.bus.subscribe(self._subject("forget"), self._on_forget_pages),
        ]
        self._admissions: Subscription = await self.bus.subscribe(
            self._subject("admit"), self._on_admit, concurrency=ADMISSIONS
        )

    def beat(self) -> Message:
        if self.state == "starting":
            return WorkerBeat(
                id=self.id, boot_id=self.boot_id, node=self.node, model="", state=self.state, map_version=0,
                reason=self._why_not_yet(), own_experts=self.own_experts, load_done=self.load.done if self.load else 0,
                load_total=self.load.total if self.load else 0,
            )  # fmt: skip
        return WorkerBeat(
            id=self.id,
            boot_id=self.boot_id,
            node=self.node,
            model=self.config.fingerprint,
            state=self.state,
            map_version=self.links.version,
            reason=self.links.reason,
            running=self._stats.running,
            waiting=max(0, len(self.streams.live) - self._stats.running),
            queue_limit=self.settings.queue_limit,
            pending_tokens=self._stats.pending_tokens + self._admitted_tokens,
            pages_used=self._stats.pages_used,
            pages_total=self.engine.planner.allocator.total,
            tenants=dict(self.streams.tenants),
            own_experts=self.own_experts,
            prompt_tokens=self.metered.prompt_tokens,
            generation_tokens=self.metered.generation_tokens,
            steps=self.metered.steps.count,
            step_seconds=self.metered.steps.sum,
            waited=tuple((shard, times.waited) for shard, times in self._link_times().items()),
        )

    def _why_not_yet(self) -> str:
        if self.preparing or not (self.load and self.load.total):
            return self.preparing or "the worker is loading the model"
        return f"the worker is loading the {self.load.what}: {self.load.percent} %"

    def _standing(self) -> Standing:
        assert self.load is not None
        load = self.load.done, self.load.total
        if self.state == "starting":
            return Standing(0, 0, *load)
        return Standing(self.engine.planner.allocator.total, self.links.version, *load, self._link_times())

    def _link_times(self) -> dict[str, LinkTimes]:
        return self.links.times() if isinstance(self.links, ExpertLinks) else {}

    async def drain(self) -> None:
        await self._admissions.drain()
        deadline = self.clock.now() + self.settings.drain_seconds
        while self.streams.live and self.clock.now() < deadline:
            await self.clock.sleep(0.02)
        left = tuple(self.streams.live)
        self.engine.abort(left, Draining("the worker is leaving"))
        while self.streams.live and self.clock.now() < deadline + 0.4:
            await self.clock.sleep(0.02)

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.drain()
        await asyncio.to_thread(self.engine.stop)
        self.grammars.close()
        await self.links.close()

    def _subject(self, verb: str) -> str:
        return subject(self.kind, self.id, verb)

    def _open_links(self) -> Membership | NoLinks:
        settings = self.settings
        return ExpertLinks(
            self.bus,
            self.config,
            worker_id=self.id,
            boot_id=self.boot_id,
            node=self.node,
            mode=settings.link,
            decode_rows=settings.max_batch,
            prefill_rows=settings.max_batch + settings.chunk_tokens,
            loop=self._loop,
        )

    def _make_engine(self) -> Engine:
        import torch

        settings = self.settings
        torch.set_num_threads(settings.threads)
        pages = settings.kv_pages or default_pages(self.config)
        check_pages(self.config, pages)
        source = open_source(settings.model, self.config, settings.weights)
        assert isinstance(self.links, ExpertLinks)
        model = Model(self.config, load_weights(self.config, source, progress=self._told("weights")), self.links)
        planner = Planner(
            PageAllocator(pages),
            self.config.fingerprint,
            max_batch=settings.max_batch,
            pace=Pace(settings.chunk_tokens, settings.itl_ms / 1e3),
            prefix_cache=settings.prefix_cache,
        )
        sampler = Sampler(self.config, max_batch=settings.max_batch, threads=settings.threads)
        runner = CpuRunner(model, model.new_cache(pages), sampler, self.log)
        return Engine(self.config, runner, planner, sampler, self._from_engine, self.log)

    def _told(self, what: str) -> Progress:
        assert self.load is not None
        return self.load.of(what)

    # ---- requests

    async def _on_admit(self, _: str, message: Message) -> Message:
        if not isinstance(message, Generate):
            raise InvalidRequest("expected a Generate message")
        self.bounds.check(message)
        ends = None if message.deadline is None else self.clock.now() + message.deadline
        self._refuse_for_now(message, ends)
        constraint = None
        if message.sampling.grammar is not None:
            constraint = await self._constraint(message.tenant, message.sampling.grammar)
            self._refuse_for_now(message, ends)  # others came meanwhile
        self._gateways.setdefault(message.gateway_id, ("", self.clock.now()))
        self.streams.open(message, ends)
        self._admitted_tokens += len(message.prompt)
        self.engine.submit(message, constraint)
        if message.traceparent:
            await self.spans.begin(message, self.links.shards, self.links.version)
        return Ok()

    async def _constraint(self, tenant: str, grammar: Grammar) -> Constraint:
        """Grammars that take long to compile hold admissions, and those are shared as the queue is."""
        places = tenant, self._compiling[tenant], self._compiling.total(), ADMISSIONS
        if not has_room(*places):
            raise Overloaded(why_no_room(*places, f"the grammar compiler of worker {self.id}"))
        self._compiling[tenant] += 1
        try:
            return await self.grammars.constraint(grammar)
        finally:
            self._compiling[tenant] -= 1
            if not self._compiling[tenant]:
                del self._compiling[tenant]

    def _refuse_for_now(self, request: Generate, ends: float | None) -> None:
        if request.request_id in self.streams:
            raise InvalidRequest(f"request {request.request_id} is known already")
        if self.links.reason:
            raise ExpertsUnavailable(self.links.reason)
        if ends is not None and self.clock.now() >= ends:
            raise DeadlineExceeded("the request's deadline passed before it was queued")
        limit = self.settings.queue_limit + self.settings.max_batch
        queue = request.tenant, self.streams.tenants[request.tenant], len(self.streams.live), limit
        if not has_room(*queue):
            raise Overloaded(why_no_room(*queue, f"the queue of worker {self.id}"))

    async def _on_abort(self, _: str, message: Message) -> None:
        if isinstance(message, Abort):
            self.engine.abort(message.request_ids)

    async def _watch_deadlines(self) -> None:
        """Wherever a request is, queued or running, it ends within a tick and a step of its deadline."""
        while True:
            await self.clock.sleep(DEADLINE_TICK_SECONDS)
            if overdue := self.streams.take_overdue():
                self.engine.abort(overdue, DeadlineExceeded("the request's deadline passed"))

    async def _on_resume(self, _: str, message: Message) -> Message:
        if not isinstance(message, Resume) or (chunk := self.streams.chunk(message.request_id, message.index)) is None:
            raise NotFound("this worker does not know the request")
        return StepTokens(worker_id=self.id, boot_id=self.boot_id, chunks=(chunk,))

    async def _on_get_pages(self, _: str, message: Message) -> Message:
        return PagesChanged(
            worker_id=self.id, boot_id=self.boot_id, seq=self._pages_seq, added=tuple(self._pages), full=True
        )

    async def _on_forget_pages(self, _: str, message: Message) -> Message:
        if not isinstance(message, ForgetPages):
            raise InvalidRequest("expected a ForgetPages message")
        await asyncio.wrap_future(self.engine.forget_pages())
        return Ok()

    # ---- what the engine produced

    def _from_engine(self, output: StepOutput) -> None:
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    async def _publish_outputs(self) -> None:
        while True:
            output = await self._outputs.get()
            self._stats, self._admitted_tokens = output.stats, 0
            self.metered.step(output)
            for gateway_id, chunks in output.chunks.items():
                for chunk in chunks:
                    self.streams.take(chunk)
                for part in _messages(chunks):
                    message = StepTokens(worker_id=self.id, boot_id=self.boot_id, chunks=part)
                    await self._publish(subject("gateway", gateway_id, "tokens"), message)
            for times in (*output.ended, *output.cut):
                if times.request_id in self.spans:
                    await self.spans.end(times, self.streams.chunk(times.request_id, 0))
            if output.added or output.evicted:
                await self._tell_pages(output)
            if self.engine.crashed:
                raise InternalError("the step loop crashed") from self.engine.crashed

    async def _publish(self, to: str, message: Message) -> None:
        try:
            await self.bus.publish(to, message)
        except BusUnavailable as error:
            # Nothing is lost: tokens are kept in self.streams, and whoever misses some asks again.
            self.log.warning("not published", subject=to, why=error.message)

    async def _tell_pages(self, output: StepOutput) -> None:
        # One step may evict a page and learn the same hash again: what the cache knows now decides.
        knows = self.engine.planner.allocator.knows
        added = {h for h in output.added if knows(h)}
        evicted = {h for h in output.evicted if not knows(h)}
        self._pages = (self._pages | added) - evicted
        self._pages_seq += 1
        message = PagesChanged(
            worker_id=self.id,
            boot_id=self.boot_id,
            seq=self._pages_seq,
            added=tuple(added),
            evicted=tuple(evicted),
        )
        await self._publish(self._subject("pages"), message)

    # ---- who else is there

    async def _on_scheduler(self, _: str, message: Message) -> None:
        if isinstance(message, SchedulerBeat) and message.map_version > self.links.version:
            self._map_wanted.set()

    async def _follow_map(self) -> None:
        while True:
            await self._map_wanted.wait()
            self._map_wanted.clear()
            try:
                new_map = await self.bus.request(subject_of_kind("map"), GetMap())
                if isinstance(new_map, ExpertMap) and self._is_newer(new_map):
                    await self.links.set_map(new_map)
                    self.log.info("expert map", version=new_map.version, reason=self.links.reason)
                    self.beat_now()
            except MoeculeError as error:
                # The next heartbeat of the scheduler wakes this again.
                self.log.warning("the expert map could not be taken over", why=error.message)

    def _is_newer(self, new_map: ExpertMap) -> bool:
        return new_map.model == self.config.fingerprint and new_map.version > self.links.version

    async def _on_gateway(self, _: str, message: Message) -> None:
        if not isinstance(message, GatewayBeat):
            return
        before, _when = self._gateways.get(message.id, ("", 0.0))
        if message.boot_id < before:
            return  # an earlier life's word, on its way for long
        if before and before != message.boot_id:
            self._drop_gateway(message.id, "it was restarted")
        self._gateways[message.id] = (message.boot_id, self.clock.now())

    async def _watch_gateways(self) -> None:
        """Silence counts only while our own connection stands, and from when it was made."""
        while True:
            await self.clock.sleep(GATEWAY_SILENT_SECONDS / 8)
            now = self.clock.now()
            for gateway_id, (_, heard) in list(self._gateways.items()):
                if min(now - heard, self.bus.connected_for()) > GATEWAY_SILENT_SECONDS:
                    self._drop_gateway(gateway_id, "it is silent")
                    del self._gateways[gateway_id]

    def _drop_gateway(self, gateway_id: str, why: str) -> None:
        if requests := self.streams.of_gateway(gateway_id):
            self.log.warning("gateway lost, its requests end", gateway=gateway_id, requests=len(requests), why=why)
            self.engine.abort(requests)


def _messages(chunks: list[TokenChunk]) -> Iterator[tuple[TokenChunk, ...]]:
    """One message, and one more for each chunk that fills one nearly by itself."""
    large = [chunk for chunk in chunks if chunk.prompt_logprobs is not None]
    if small := [chunk for chunk in chunks if chunk.prompt_logprobs is None]:
        yield tuple(small)
    for chunk in large:
        yield (chunk,)


def default_pages(config: ModelConfig) -> int:
    """A sixteenth of the machine's memory, at most 4096 pages."""
    return max(16, min(4096, machine_memory() // 16 // page_bytes(config)))


def check_pages(config: ModelConfig, pages: int) -> None:
    """Raises ConfigError if the KV cache alone is larger than the machine's memory, which is handed out only as it is
    written: the kernel would end somebody later."""
    size, memory = pages * page_bytes(config), machine_memory()
    if size > memory:
        raise ConfigError(
            f"MOECULE_KV_PAGES is {pages}: such a KV cache takes {size / 1e9:.1f} GB, and this machine has "
            f"{memory / 1e9:.1f} GB of memory, which holds {memory // page_bytes(config)} pages at most"
        )


def page_bytes(config: ModelConfig) -> int:
    """Of a page of the CPU's KV cache, over all layers."""
    return config.layers * PAGE * config.latent * 4


def machine_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
