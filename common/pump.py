"""What both buses do with a message that arrives: decode it, run the handler, send the reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from common.bus import Handler
from common.errors import BodyTooLarge, BusUnavailable, InternalError, InvalidRequest, MoeculeError
from common.messages import Failed, Message, decode, encode

HEADROOM = 4096  # bytes under max_payload: a message of the full size plus its header makes NATS hang up

Respond = Callable[[str, bytes], Awaitable[None]]

log = structlog.get_logger("bus")


def encode_within(message: Message, max_payload: int) -> bytes:
    data = encode(message)
    if len(data) + HEADROOM > max_payload:
        limit = max_payload - HEADROOM
        raise BodyTooLarge(f"a {type(message).__name__} message of {len(data)} bytes is over the limit of {limit}")
    return data


def read_reply(data: bytes) -> Message:
    """Raises what a Failed reply names."""
    try:
        reply = decode(data)
    except msgspec.DecodeError as error:
        raise InternalError(f"the reply cannot be read: {error}") from error
    if isinstance(reply, Failed):
        raise reply.error()
    return reply


class Pump:
    """`concurrency` tasks that take messages from one queue: with one task they are handled in order."""

    def __init__(self, handler: Handler, respond: Respond, *, concurrency: int, limit: int = 0) -> None:
        self._handler = handler
        self._respond = respond
        self._queue: asyncio.Queue[tuple[str, bytes, str]] = asyncio.Queue(limit)
        self._tasks = [asyncio.create_task(self._work()) for _ in range(concurrency)]

    async def put(self, subject: str, data: bytes, reply_to: str) -> None:
        await self._queue.put((subject, data, reply_to))

    def put_nowait(self, subject: str, data: bytes, reply_to: str) -> None:
        self._queue.put_nowait((subject, data, reply_to))

    async def drain(self) -> None:
        if not self._cancelled():
            await self._queue.join()
        self.cancel()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _cancelled(self) -> bool:
        return all(task.done() or task.cancelling() for task in self._tasks)

    async def _work(self) -> None:
        while True:
            subject, data, reply_to = await self._queue.get()
            try:
                await self._answer(subject, data, reply_to)
            finally:
                self._queue.task_done()

    async def _answer(self, subject: str, data: bytes, reply_to: str) -> None:
        reply = await self._handle(subject, data)
        if isinstance(reply, Failed) and not reply_to:
            log.warning("a message failed", subject=subject, code=reply.code, why=reply.message)
        if reply is None or not reply_to:
            return
        try:
            try:
                await self._respond(reply_to, encode(reply))
            except BodyTooLarge as error:
                await self._respond(reply_to, encode(Failed.of(error)))
        except BusUnavailable as error:
            log.warning("a reply was not sent", subject=subject, why=error.message)

    async def _handle(self, subject: str, data: bytes) -> Message | None:
        try:
            return await self._handler(subject, decode(data))
        except msgspec.DecodeError as error:
            log.warning("a message cannot be read", subject=subject, bytes=len(data), why=str(error))
            return Failed.of(InvalidRequest(f"the message cannot be read: {error}"))
        except MoeculeError as error:
            return Failed.of(error)
        except Exception:
            # The boundary of the actor: whoever asked is answered, and the next message is handled.
            log.exception("a handler broke", subject=subject)
            return Failed.of(InternalError("internal error"))
