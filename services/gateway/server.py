"""uvicorn inside an actor: the socket is bound before, signals are the actor's, and it ends within a limit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from common.errors import ConfigError

KEEP_ALIVE_SECONDS = 75  # above what clients' pools keep a connection for, so that they close first


class HttpServer(uvicorn.Server):
    def __init__(self, app: Any, host: str, port: int) -> None:
        """Raises ConfigError if the address cannot be taken."""
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

    def _cancel_requests(self) -> None:
        for task in list(self.server_state.tasks):
            task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"MOECULE_HOST is {host!r}: {error.strerror}") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
