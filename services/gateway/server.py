"""uvicorn inside an actor: the socket is bound before, signals are the actor's, and it ends within a limit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.clock import Clock
from common.errors import ConfigError

KEEP_ALIVE_SECONDS = 75  # above what clients' pools keep a connection for, so that they close first
TICKS_A_SECOND = 10  # uvicorn's
# What the kernel keeps for a client that does not read; by itself it would let that grow to megabytes, and a stream's
# tokens are kilobytes a second.
SEND_BUFFER_BYTES = 64 << 10


class HttpServer(uvicorn.Server):
    def __init__(
        self, app: Any, host: str, port: int, clock: Clock, receive_seconds: float, send_seconds: float
    ) -> None:
        """`receive_seconds`: the longest wait for a request's headers; `send_seconds`: for a client that takes nothing
        of an answer. Raises ConfigError if the address cannot be taken."""
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,
            )
        )
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._ended = asyncio.Event()
        self._clock = clock
        self._receive_seconds = receive_seconds
        self._send_seconds = send_seconds
        self.owing: dict[tuple[H11Protocol, object], float] = {}  # a connection after a request: since when
        self.stuck: dict[tuple[H11Protocol, int], float] = {}  # a connection with so many bytes unsent: since when

    async def run_until_finished(self) -> None:
        try:
            await self.serve(sockets=[self._socket])
        finally:
            self._cancel_requests()
            self._socket.close()
            self._ended.set()

    async def finish(self) -> None:
        """Take nothing more, end the requests that are still there, close the connections."""
        self._cancel_requests()
        self.should_exit = True
        await self._ended.wait()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_A_SECOND == 0:
            self._cut_off_the_slow()
        return await super().on_tick(counter)

    def _cut_off_the_slow(self) -> None:
        """uvicorn limits only the silence between two requests: not that before the first, nor a header byte now and
        then, nor a body that goes on after its answer."""
        now = self._clock.now()
        connections = [one for one in self.server_state.connections if isinstance(one, H11Protocol)]
        owing = [(one, one.cycle) for one in connections if _owes_headers(one)]
        self.owing = {key: self.owing.get(key, now) for key in owing}
        # While writing is paused nothing is added to what is unsent: as many bytes a while later, and none were taken.
        stuck = [(one, one.transport.get_write_buffer_size()) for one in connections if one.flow.write_paused]
        self.stuck = {key: self.stuck.get(key, now) for key in stuck}
        late = [one for (one, _), since in self.owing.items() if now - since >= self._receive_seconds]
        late += [one for (one, _), since in self.stuck.items() if now - since >= self._send_seconds]
        for connection in late:
            connection.transport.abort()

    def _cancel_requests(self) -> None:
        for task in list(self.server_state.tasks):
            task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _owes_headers(connection: H11Protocol) -> bool:
    """No request is being answered, and it is not the silence between two that uvicorn's timer ends."""
    answering = connection.cycle is not None and not connection.cycle.response_complete
    return not answering and connection.timeout_keep_alive_task is None and not connection.transport.is_closing()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"MOECULE_HOST is {host!r}: {error.strerror}") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit that
    try:
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            sentence = f"port {port} on {host} is taken: end what listens there, or set MOECULE_PORT to another one"
        else:
            sentence = f"cannot listen on port {port} of {host}: {error.strerror}"
        raise ConfigError(sentence) from None
    bound.setblocking(False)
    return bound
