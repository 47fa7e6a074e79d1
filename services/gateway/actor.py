"""The gateway: the HTTP and the NATS front door, and the bus side of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from common.actor import Actor
from common.errors import Draining, MoeculeError, NoWorker
from common.messages import GatewayBeat, Message, WorkerBeat
from common.model_config import ModelConfig
from common.telemetry import render
from services.gateway.app import App
from services.gateway.asyncapi import Broker, asyncapi_page
from services.gateway.cache import Forgotten, forget_pages
from services.gateway.cluster import ClusterView
from services.gateway.cors import Cors, origins_of
from services.gateway.door import Door
from services.gateway.generate import Generator
from services.gateway.keys import Keys
from services.gateway.metrics import GatewayMetrics, everyones_metrics
from services.gateway.page import page_routes
from services.gateway.peers import Peers
from services.gateway.prepare import Preparer
from services.gateway.server import HttpServer
from services.gateway.streams import Streams
from services.gateway.tokenizer import Tokenizer

TELL_SECONDS = 0.1  # for the answers that say we leave
LEAVING = "the gateway is leaving"


class Gateway(Actor):
    kind = "gateway"
    server: HttpServer

    @property
    def port(self) -> int:
        return self.server.port

    async def start(self) -> None:
        settings = self.settings
        config = await asyncio.to_thread(ModelConfig.load, settings.model, settings.weights)
        tokenizer = await asyncio.to_thread(Tokenizer, settings.model)
        self.keys = await asyncio.to_thread(Keys, settings.api_keys, self.clock, self.log)
        metrics = GatewayMetrics(self.metrics)
        self.leaving = False
        self.peers = Peers(self.bus, self.clock)
        self.cluster = ClusterView(self.bus, self.clock, self.id, settings.served_name, config, self._why_not_ready)
        self.streams = Streams(self.bus, self.id, self.peers, metrics, self.clock, self._spawn_unless_leaving, self.log)
        preparer = Preparer(settings, config, tokenizer, self.peers.most_cached_tokens)
        limits = settings.body_limit, settings.receive_seconds
        self.generator = Generator(preparer, self.streams, metrics, self.clock, self.log, *limits, self.traces)
        broker = Broker(
            settings.nats_url,
            preparer.name,
            config.vocab,
            keys_wanted=self.keys.wanted,
            users=bool(settings.nats_passwords),
            tls=bool(settings.nats_ca) or settings.nats_url.startswith("tls:"),
        )
        app = App(
            self.generator,
            self.keys,
            metrics,
            self._not_ready,
            self._metrics_text,
            self._forget_pages,
            page_routes(self.cluster),
            int(time.time()),
            self.log,
            asyncapi_page(broker),
        )
        self.door = Door(
            self.bus,
            self.id,
            self.generator,
            self.keys,
            app.model_list,
            self.clock,
            self._spawn_unless_leaving,
            self.log,
        )
        whole = Cors(app, origins_of(settings.cors_origins))
        self.server = HttpServer(
            whole, settings.host, settings.port, self.clock, settings.receive_seconds, settings.send_seconds
        )
        self._subscriptions = [
            await self.bus.subscribe("moecule.v1.*.*.beat", self._on_beat),
            await self.streams.start(),
        ]
        self.spawn(self.keys.follow(), "keys")
        self.spawn(self._serve(), "http")
        await self.door.open()
        self.log.info("listening", url=f"http://{settings.host}:{self.port}", model=settings.served_name)

    def beat(self) -> Message:
        return GatewayBeat(id=self.id, boot_id=self.boot_id, state=self.state)

    async def drain(self) -> None:
        self.generator.refusal = LEAVING
        await self.door.leave()
        await self._until_idle(self.settings.drain_seconds)
        self.streams.fail_all(Draining(LEAVING))
        await self._until_idle(TELL_SECONDS)
        await self.door.close()
        await self.server.finish()

    async def stop(self) -> None:
        self.leaving = True
        await self.door.close()
        for subscription in self._subscriptions:
            await subscription.drain()

    async def _until_idle(self, seconds: float) -> None:
        deadline = self.clock.now() + seconds
        while self.generator.active and self.clock.now() < deadline:
            await self.clock.sleep(0.02)

    async def _serve(self) -> None:
        try:
            await self.server.run_until_finished()
        finally:
            self.leaving = True

    def _spawn_unless_leaving(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        """Requests that are cut off at the very end have no one left to speak for them."""
        if self.leaving:
            coro.close()
        else:
            self.spawn(coro, name)

    async def _on_beat(self, subject: str, message: Message) -> None:
        self.peers.take(subject, message)
        self.cluster.take(subject, message)
        if isinstance(message, WorkerBeat):
            self.streams.take_beat(message)
        elif isinstance(message, GatewayBeat):
            self.door.take_beat(message)

    def _not_ready(self) -> MoeculeError | None:
        if self.state == "draining":
            return Draining(LEAVING)
        why = self.peers.why_not_ready()
        return NoWorker(why) if why else None

    def _why_not_ready(self) -> str:
        error = self._not_ready()
        return error.message if error else ""

    async def _metrics_text(self) -> str:
        return await everyones_metrics(self.bus, self.peers.live(), (self.id, render(self.metrics).text))

    async def _forget_pages(self) -> Forgotten:
        return await forget_pages(self.bus, [peer for kind, peer in self.peers.live() if kind == "worker"])
