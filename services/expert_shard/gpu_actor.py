"""An expert shard on a GPU: the same actor, with experts as stacks, and links that are kernels' own."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from common.device import device_uuid, fitting, require_gpu
from common.doorbell import Doorbell
from common.errors import MoeculeError, Unavailable
from common.mailbox import HandshakeError, receive_with_fds, same_user, send_with_fds
from common.messages import Attach, Attached, GpuMailbox, Message
from common.model_config import ModelConfig
from common.source import open_source
from kernels.link.layout import LAYOUT
from services.expert_shard.actor import ExpertShard
from services.expert_shard.device_store import DeviceStore
from services.expert_shard.gpu_attach import accept, mailbox_of
from services.expert_shard.gpu_server import GpuAttachment, GpuServer

T = TypeVar("T")


class GpuExpertShard(ExpertShard):
    store: DeviceStore  # type: ignore[assignment]
    server: GpuServer  # type: ignore[assignment]

    async def start(self) -> None:
        # One captures at a time, and meanwhile nobody may wait for the whole device: CUDA refuses it.
        self._alone = threading.Lock()
        self._pending: set[socket.socket] = set()  # whose handshake takes its time
        await super().start()

    def _open_checkpoint(self) -> tuple[ModelConfig, DeviceStore]:  # type: ignore[override]
        torch.set_num_threads(self.settings.threads)
        config = ModelConfig.load(self.settings.model, self.settings.weights)
        source = open_source(self.settings.model, config, self.settings.weights)
        store = DeviceStore(config, source, config.fp8 or self.settings.experts_fp8)
        store.check()
        return config, store

    def _make_server(self) -> GpuServer:  # type: ignore[override]
        return GpuServer(self.fail)

    async def _load(self, missing: frozenset[int]) -> None:
        before = self.store.stacks
        with fitting():
            await asyncio.to_thread(self.store.load, missing, self.loading.of("experts"))
        if self.store.stacks is not before:
            await self._alone_in_a_thread(self._recapture)
        del before

    def _alone_in_a_thread(self, call: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        def alone() -> T:
            with self._alone:
                return call(*arguments)

        return self._loop.run_in_executor(None, alone)

    def _expert_tokens(self) -> tuple[int, ...]:
        """Not counted: the ids are in device memory, and the host does not wait for it."""
        return ()

    def _recapture(self) -> None:
        """Links that stand go over to the new stacks; the old are freed when nothing that runs names them."""
        for attachment in self.server.attached:
            attachment.launches.use(self.store.stacks)  # type: ignore[attr-defined]
        torch.cuda.synchronize()

    async def _on_attach(self, _: str, message: Message) -> Message:
        if isinstance(message, Attach):
            mailbox_of(message, self.node, self.store.fp8)
            return Attached(boot_id=self.boot_id, layout=LAYOUT, socket=self._socket_name)
        return await super()._on_attach(_, message)

    async def _on_experts(self, _: str, message: Message) -> Message:
        raise Unavailable("this shard computes on a GPU: it answers no rows over the bus")

    def _on_socket(self, sock: socket.socket) -> None:
        """The handshake, which takes as long as a capture; then nothing but the end of file."""
        if sock in self._pending or self._sockets[sock] is not None:
            self._hang_up(sock)
            return
        try:
            hello, (fd,) = receive_with_fds(sock, 1)
        except MoeculeError as error:
            self.log.warning("a mailbox was refused", why=str(error))
            self._hang_up(sock)
            return
        self._pending.add(sock)
        self.spawn(self._attach_worker(sock, hello, fd), "attach")

    async def _attach_worker(self, sock: socket.socket, hello: Message, fd: int) -> None:
        try:
            if not isinstance(hello, Attach) or not same_user(sock):
                raise HandshakeError("the handshake is of another kind or user")
            doorbell = Doorbell(fd)
            mailbox = mailbox_of(hello, self.node, self.store.fp8)
            attachment, handle = await self._alone_in_a_thread(self._accept, hello, mailbox, doorbell)
            self._answer(sock, attachment, handle)
        except (MoeculeError, ValueError, OSError) as error:
            self.log.warning("a mailbox was refused", why=str(error))
            if sock in self._sockets:
                self._hang_up(sock)
            await self._alone_in_a_thread(require_gpu)
        finally:
            self._pending.discard(sock)
            os.close(fd)

    def _accept(self, hello: Attach, mailbox: GpuMailbox, doorbell: Doorbell) -> tuple[GpuAttachment, bytes]:
        return accept(hello, mailbox, doorbell, self.config, self.store.stacks, self.boot_id)

    def _answer(self, sock: socket.socket, attachment: GpuAttachment, handle: bytes) -> None:
        if sock not in self._sockets:  # it left meanwhile
            self._alone_in_a_thread(attachment.launches.close).add_done_callback(self._detached)
            return
        self._sockets[sock] = attachment  # type: ignore[assignment]
        self.server.attach(attachment)
        message = Attached(boot_id=self.boot_id, layout=LAYOUT, handle=handle, device=device_uuid())
        send_with_fds(sock, message, [self.server.bell.fd])
        self.log.info("worker attached", worker=attachment.worker_id)

    def _detach(self, attachment: GpuAttachment) -> None:  # type: ignore[override]
        """It waits for the device, which ends at once what it waits for in this worker's name."""
        attachment.launches.abort()
        self._alone_in_a_thread(self.server.detach, attachment).add_done_callback(self._detached)

    def _detached(self, detached: asyncio.Future[None]) -> None:
        if not detached.cancelled() and isinstance(error := detached.exception(), Exception):
            self.fail(error)
