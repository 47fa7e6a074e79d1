"""The expert shard: it holds the partitions the scheduler names and answers whoever asks for their sums."""

from __future__ import annotations

import asyncio
import os
import socket

import torch

from common.actor import BEAT_SECONDS, Actor
from common.cores import pin_actor
from common.errors import InvalidRequest, MoeculeError, Unavailable
from common.futex import Bell
from common.loading import Loading
from common.mailbox import (
    LAYOUT,
    HandshakeError,
    Rows,
    Slab,
    handshake_socket,
    receive_with_fds,
    same_user,
    send_with_fds,
    socket_name,
)
from common.messages import (
    Attach,
    Attached,
    ExpertRows,
    ExpertSums,
    LoadPartitions,
    Message,
    Ok,
    ShardBeat,
    Watch,
    WorkerBeat,
    subject,
)
from common.model_config import ModelConfig
from common.source import open_source
from services.expert_shard.experts import ExpertStore
from services.expert_shard.metrics import ShardCounts, ShardMetrics
from services.expert_shard.server import Attachment, ExpertServer, Job
from services.expert_shard.watch import Watches

BUS_CONCURRENCY = 16
DRAIN_POLL_SECONDS = 0.02
AFTER_WORKERS_SECONDS = 0.4  # within the base's DRAIN_GRACE_SECONDS
WORKER_GONE_SECONDS = 3 * BEAT_SECONDS
MOST_ROWS = 1 << 20  # of a slab; a worker asks for what its settings say


class ExpertShard(Actor):
    kind = "shard"

    async def start(self) -> None:
        pin_actor(self.kind, self.settings)
        self.config, self.store = await asyncio.to_thread(self._open_checkpoint)
        self.server = self._make_server()
        self.server.start()
        self._wanted = LoadPartitions(version=0, partitions=())
        self._new_wanted = asyncio.Event()
        self.loading = Loading(self.log)
        self._bus_workers: dict[str, float] = {}  # those that sent rows over the bus -> when they were last heard
        self._sockets: dict[socket.socket, Attachment | None] = {}
        ShardMetrics(self.metrics, self._counts)
        self._watches = Watches(self.traces, self._counts)
        self._listen()
        self.spawn(self._follow_wanted(), "load")
        self._subscriptions = [
            await self.bus.subscribe(self._subject("load"), self._on_load),
            await self.bus.subscribe(self._subject("attach"), self._on_attach),
            await self.bus.subscribe(self._subject("experts"), self._on_experts, concurrency=BUS_CONCURRENCY),
            await self.bus.subscribe(self._subject("watch"), self._on_watch),
            await self.bus.subscribe("moecule.v1.worker.*.beat", self._on_worker),
        ]

    def beat(self) -> Message:
        if self.state == "starting":
            return ShardBeat(
                id=self.id, boot_id=self.boot_id, node=self.node, model="", state="starting", map_version=0
            )
        counts = self._counts()
        return ShardBeat(
            id=self.id,
            boot_id=self.boot_id,
            node=self.node,
            model=self.config.fingerprint,
            state=self.state,
            map_version=self._wanted.version,
            held=tuple(sorted(self.store.held)),
            load_done=counts.load_done,
            load_total=counts.load_total,
            rows=counts.rows,
            busy_seconds=counts.busy_seconds,
            expert_tokens=counts.expert_tokens,
        )

    async def drain(self) -> None:
        """Serve until the scheduler has moved everything elsewhere, or until no worker is left to serve.

        Workers that leave at the same moment need their experts to the last: a shard waits a little longer than they.
        """
        limit = self.clock.now() + self.settings.drain_seconds + AFTER_WORKERS_SECONDS
        while self.store.held and (self.server.attached or self._asked_over_bus()) and self.clock.now() < limit:
            await self.clock.sleep(DRAIN_POLL_SECONDS)

    def _asked_over_bus(self) -> bool:
        """Whether a worker that sent rows over the bus is still there."""
        horizon = self.clock.now() - WORKER_GONE_SECONDS
        return any(heard >= horizon for heard in self._bus_workers.values())

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.drain()
        self._watches.close()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for sock in list(self._sockets):
            self._hang_up(sock)
        await asyncio.to_thread(self.server.stop)

    def _open_checkpoint(self) -> tuple[ModelConfig, ExpertStore]:
        torch.set_num_threads(self.settings.threads)
        model, weights = self.settings.model, self.settings.weights
        config = ModelConfig.load(model, weights)
        store = ExpertStore(config, open_source(model, config, weights))
        store.check()
        return config, store

    def _make_server(self) -> ExpertServer:
        return ExpertServer(self.store, self.fail)

    def _subject(self, verb: str) -> str:
        return subject(self.kind, self.id, verb)

    def _counts(self) -> ShardCounts:
        return ShardCounts(
            partitions=len(self.store.held),
            mailboxes=len(self.server.attached),
            rows=self.server.rows_served,
            busy_seconds=self.server.busy_seconds,
            expert_tokens=self._expert_tokens(),
            load_done=self.loading.done,
            load_total=self.loading.total,
        )

    def _expert_tokens(self) -> tuple[int, ...]:
        return tuple(self.store.tokens)

    async def _on_watch(self, _: str, message: Message) -> None:
        if isinstance(message, Watch):
            self._watches.take(message)

    # ---- what to hold

    async def _on_load(self, _: str, message: Message) -> Message:
        if not isinstance(message, LoadPartitions):
            raise InvalidRequest("expected a LoadPartitions message")
        unknown = [p for p in message.partitions if not 0 <= p < self.config.partitions]
        if unknown:
            raise InvalidRequest(f"the model has no partitions {unknown}", "partitions")
        if message.version >= self._wanted.version:
            self._wanted = message
            self._new_wanted.set()
            self.beat_now()
        return Ok()

    async def _follow_wanted(self) -> None:
        while True:
            await self._new_wanted.wait()
            self._new_wanted.clear()
            wanted = frozenset(self._wanted.partitions)
            if missing := wanted - self.store.held:
                self.log.info("loading", partitions=sorted(missing), version=self._wanted.version)
                await self._load(missing)
            if self._new_wanted.is_set():
                continue  # what came meanwhile may want what this would drop
            await asyncio.to_thread(self.store.drop, self.store.held - wanted)
            self.log.info("holding", partitions=sorted(self.store.held), version=self._wanted.version)
            self.beat_now()

    async def _load(self, missing: frozenset[int]) -> None:
        await asyncio.to_thread(self.store.load, missing, self.loading.of("experts"))

    # ---- the bus link

    async def _on_experts(self, _: str, message: Message) -> Message:
        if not isinstance(message, ExpertRows):
            raise InvalidRequest("expected an ExpertRows message")
        if message.boot_id != self.boot_id:
            raise Unavailable(f"the rows are meant for another life of {self.id}")
        self._bus_workers[message.worker_id] = self.clock.now()
        job = self._job(message)
        await asyncio.wrap_future(self.server.submit(job))
        return ExpertSums(boot_id=self.boot_id, sums=job.rows.sums.numpy().tobytes())

    async def _on_worker(self, _: str, message: Message) -> None:
        if isinstance(message, WorkerBeat) and message.id in self._bus_workers:
            self._bus_workers[message.id] = self.clock.now()

    def _job(self, message: ExpertRows) -> Job:
        rows, hidden, topk = message.rows, self.config.hidden, self.config.topk
        sizes = len(message.x), len(message.ids), len(message.weights)
        if rows < 1 or sizes != (4 * rows * hidden, 4 * rows * topk, 4 * rows * topk):
            raise InvalidRequest(f"{rows} rows of this model are not {sizes} bytes", "rows")

        def tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
            return torch.frombuffer(bytearray(data), dtype=dtype).view(rows, -1)

        x, ids = tensor(message.x, torch.float32), tensor(message.ids, torch.int32)
        return Job(message.layer, Rows(x, ids, tensor(message.weights, torch.float32), torch.empty(rows, hidden)))

    # ---- mailboxes

    async def _on_attach(self, _: str, message: Message) -> Message:
        if not isinstance(message, Attach):
            raise InvalidRequest("expected an Attach message")
        if message.gpu is not None:
            raise Unavailable("this shard computes on a CPU and the worker on a GPU, between which there is no link")
        here = message.node == self.node and message.layout == LAYOUT
        return Attached(boot_id=self.boot_id, layout=LAYOUT, socket=self._socket_name if here else "")

    def _listen(self) -> None:
        self._socket_name = socket_name(self.id, self.boot_id)
        self._listener = handshake_socket()
        self._listener.bind(self._socket_name)
        self._listener.listen(64)
        self._loop.add_reader(self._listener, self._on_connection)

    def _on_connection(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it left before it was taken
        sock.setblocking(False)
        self._sockets[sock] = None
        self._loop.add_reader(sock, self._on_socket, sock)

    def _on_socket(self, sock: socket.socket) -> None:
        """The handshake, or the end of file that tells of the worker's death."""
        if self._sockets[sock] is not None:
            self._hang_up(sock)
            return
        try:
            self._shake_hands(sock)
        except (MoeculeError, OSError) as error:
            self.log.warning("a mailbox was refused", why=str(error))
            self._hang_up(sock)

    def _shake_hands(self, sock: socket.socket) -> None:
        hello, fds = receive_with_fds(sock, 1)
        bell = Bell(fds[0])
        bell.close_fd()
        if not isinstance(hello, Attach) or hello.layout != LAYOUT or not same_user(sock):
            raise HandshakeError("the handshake is of another layout or user")
        if not (0 < hello.decode_rows <= MOST_ROWS and 0 < hello.prefill_rows <= MOST_ROWS):
            raise HandshakeError(f"a mailbox of {hello.decode_rows} and {hello.prefill_rows} rows is out of bounds")
        slab, slab_fd = Slab.create(self.config.hidden, self.config.topk, hello.decode_rows, hello.prefill_rows)
        try:
            send_with_fds(sock, Attached(boot_id=self.boot_id, layout=LAYOUT), [slab_fd, self.server.bell.fd])
        finally:
            os.close(slab_fd)
        attachment = Attachment(hello.worker_id, slab, bell)
        self._sockets[sock] = attachment
        self.server.attach(attachment)
        self.log.info("worker attached", worker=hello.worker_id)

    def _hang_up(self, sock: socket.socket) -> None:
        attachment = self._sockets.pop(sock)
        self._loop.remove_reader(sock)
        sock.close()
        if attachment is not None:
            self._detach(attachment)
            self.log.info("worker detached", worker=attachment.worker_id)

    def _detach(self, attachment: Attachment) -> None:
        self.server.detach(attachment)
