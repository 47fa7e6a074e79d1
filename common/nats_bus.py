"""The bus over NATS. The settings below differ from nats-py's defaults because those give up, or notice too late."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import nats.errors
import structlog
from nats.aio.client import AUTHORIZATION_VIOLATION, PING_PROTO, Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription
from nats.js import JetStreamContext
from nats.js.api import StorageType
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError, NoStreamResponseError
from nats.js.kv import KeyValue

from common.bus import Conflict, Handler, RawMessage, Taker
from common.errors import BodyTooLarge, BusTimeout, BusUnavailable, ConfigError, NoResponders
from common.messages import Message
from common.nats_login import Login
from common.pump import HEADROOM, Pump, encode_within, read_reply
from common.settings import without_login

CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 1.0
RECONNECT_WAIT_SECONDS = 0.1
REFUSED_WAIT_SECONDS = 1.0  # where an attempt ended with a refusal, which the server logs too
PING_SECONDS = 2
JETSTREAM_SECONDS = 2.0
PULSE_SECONDS = 0.5  # between two questions whether the server still answers
STALLED_SECONDS = 1.5  # without its answer: then nobody's silence proves anything
WRITE_BUFFER_BYTES = 64 << 10
REPEAT_SECONDS = 30.0  # between two lines that say the same of attempts to reconnect
MOST_REASONS = 8  # told in that time: a server may find new words each time


T = TypeVar("T")


async def kept_cancellable(call: Coroutine[Any, Any, T]) -> T:
    """nats-py waits with `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that meets the reply; and
    in some places it takes one for a time-out."""
    task = asyncio.current_task()
    asked = task.cancelling() if task else 0
    try:
        return await call
    finally:
        if task and task.cancelling() > asked:
            raise asyncio.CancelledError


class NoTls(nats.errors.Error):
    def __str__(self) -> str:
        return "the server does not ask for TLS"


class OrderedClient(Client):
    """nats-py writes a PING ahead of the commands that are pending, so its `flush` returns before the server has seen
    a SUB (messages are missed) or an UNSUB (`drain` loses requests). Here a PING waits its turn."""

    def __init__(self, renew: Callable[[], Mapping[str, Any]] = dict) -> None:
        """`renew` is asked at each attempt for those of nats-py's options that have changed."""
        super().__init__()
        self._renew = renew

    async def _process_connect_init(self) -> None:
        """nats-py tries again after its own errors and those of sockets. Whatever else a peer makes it raise that is no
        NATS server, or is cut off (uvloop's word is RuntimeError), would end its attempts for good."""
        self.options |= self._renew()
        try:
            await super()._process_connect_init()
        except OSError:  # a certificate that is not known is a ValueError, too
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
            raise nats.errors.Error(f"no NATS server, or a broken connection: {error!r}") from error
        finally:
            if not self.is_connected and self._transport is not None:
                self._transport.close()  # nats-py leaves the socket of an attempt that failed to its peer

    def _connect_command(self) -> bytes:
        """It holds the password. nats-py leaves TLS to the server's word, which anyone can speak who takes its port."""
        if "tls" in self.options and not self._server_info.get("tls_required"):
            raise NoTls
        return super()._connect_command()

    async def _process_err(self, err_msg: str) -> None:
        """A server whose passwords have changed says so to those who came with the old ones. nats-py would close for
        good; the new one may be in its file by now, or soon."""
        if AUTHORIZATION_VIOLATION in err_msg:
            await self._process_op_err(nats.errors.AuthorizationError())
        else:
            await super()._process_err(err_msg)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _flush_pending(self, force_flush: bool = False) -> None:
        """Written at once while the socket takes it: nats-py leaves it to a task of its own, which costs two more
        turns of the loop a message. That task has the rest, so that a server that stands still holds nobody up."""
        writer = getattr(self._transport, "_io_writer", None)
        if not self.is_connected or writer is None or writer.transport.get_write_buffer_size() > WRITE_BUFFER_BYTES:
            await super()._flush_pending(force_flush)
            return
        pending, self._pending, self._pending_data_size = self._pending, [], 0
        try:
            writer.writelines(pending)
        except (OSError, RuntimeError) as error:  # uvloop's word for a transport that has just been closed
            await self._process_op_err(error)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """Anyone may publish a subject or a reply subject that is no text; nats-py would end its reading for good then,
        and the connection with it."""
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except (ValueError, IndexError) as error:
            await self._error_cb(error)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """Those that are no text are as none: who sent them waits for an answer still."""
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):
            return None

    def drop_pending(self) -> None:
        """What was kept for a connection that is lost; `close` would write it to the dead socket, and raise."""
        self._pending, self._pending_data_size = [], 0


class NatsListener:
    def __init__(self, bus: NatsBus, taker: Taker | None = None) -> None:
        self._bus = bus
        self._taker = taker
        self.client: ClientSubscription | None = None

    async def take(self, message: Msg) -> None:
        assert self._taker is not None
        taken = RawMessage(message.subject, message.data, message.reply, message.headers or {})
        message.data = b""  # nats-py holds the message until the next one comes, and it may be of 8 MB
        self._taker(taken)

    async def drain(self) -> None:
        try:
            if self.client is not None and self._bus.connected:
                await self.client.drain()
        except nats.errors.Error as error:
            # The connection broke meanwhile; what has arrived is still handled.
            self._bus.log.debug("a subscription was not drained", why=str(error))


class NatsSubscription(NatsListener):
    def __init__(self, bus: NatsBus, pump: Pump) -> None:
        super().__init__(bus)
        self._pump = pump

    async def take(self, message: Msg) -> None:
        await self._pump.put(message.subject, message.data, message.reply)

    async def drain(self) -> None:
        await super().drain()
        await self._pump.drain()
        self._bus.forget(self)

    def cancel(self) -> None:
        self._pump.cancel()


class Reminder:
    """Whether to tell what goes wrong at every attempt: at once, and then every REPEAT_SECONDS."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._told: dict[str, float] = {}  # reason: when

    def is_due(self, reason: str) -> bool:
        now = self._now()
        self._told = {told: at for told, at in self._told.items() if now - at < REPEAT_SECONDS}
        if reason in self._told or len(self._told) == MOST_REASONS:
            return False
        self._told[reason] = now
        return True

    def forget(self) -> None:
        self._told.clear()


class NatsBus:
    def __init__(
        self, url: str, name: str, read_login: Callable[[], Login] = Login, reminder: Reminder | None = None
    ) -> None:
        """`read_login` is called at each attempt to connect, and may raise ConfigError."""
        self._url = url
        self._name = name
        self._read_login = read_login
        self._login = Login()  # as it was read last
        self._unread = ""  # why it could not be read since
        self._reminder = reminder or Reminder()
        self._client = OrderedClient(self._renewed_options)
        self._since: float | None = None  # the connection stands, and the server answers
        self._pulse_at = 0.0  # when the server answered last
        self._pulse: asyncio.Task[None] | None = None
        self._begun = False  # nats-py cannot close what never began to connect
        self._leaving = False
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: set[NatsSubscription] = set()
        self._buckets: dict[str, KeyValue] = {}
        self._last_error = ""
        self.slow_consumer_drops = 0
        self.log = structlog.get_logger("bus").bind(bus=name)

    @property
    def connected(self) -> bool:
        return self._since is not None and self._client.is_connected

    @property
    def closed(self) -> bool:
        return self._leaving or self._client.is_closed

    @property
    def max_payload(self) -> int:
        return self._client.max_payload

    def connected_for(self) -> float:
        """0 also while the server, or this process, stands still."""
        now = time.monotonic()
        return 0.0 if self._since is None or now - self._pulse_at > STALLED_SECONDS else now - self._since

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._callbacks.append(callback)

    async def connect(self) -> None:
        self._login = self._read_login()
        options = self._login.options(self._url)
        self._begun = True
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.connect(
                    [self._url],
                    name=self._name,
                    **options,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnect,
                    reconnected_cb=self._on_reconnected,
                    closed_cb=self._on_closed,
                    connect_timeout=2,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RECONNECT_WAIT_SECONDS,  # type: ignore[arg-type]  # only slept for
                    ping_interval=PING_SECONDS,
                    max_outstanding_pings=2,
                )
        except TimeoutError:
            await self._abandon()
            raise BusUnavailable(f"NATS does not answer at {without_login(self._url)}: {self._last_error}") from None
        except ConfigError:
            await self._abandon()
            raise
        except (nats.errors.Error, ValueError) as error:
            self._begun = False
            raise ConfigError(f"MOECULE_NATS_URL is {without_login(self._url)!r}: {error}") from error
        self._since = self._pulse_at = time.monotonic()
        self._pulse = asyncio.create_task(self._feel_pulse())

    async def close(self) -> None:
        if self._leaving:
            return
        self._leaving = True
        try:
            if self.connected:
                await self._client.flush(timeout=1)
        except nats.errors.Error as error:
            self.log.warning("what was published last may be lost", why=str(error))
        for task in (*self._tasks, *([self._pulse] if self._pulse else [])):
            task.cancel()
        for subscription in self._subscriptions:
            subscription.cancel()
        await self._abandon()

    async def _abandon(self) -> None:
        if not self.connected:
            self._client.drop_pending()
        self._leaving, self._since = True, None
        if self._begun:
            # The connection broke just now, or never was: asyncio may wait for good for one whose TLS failed. And
            # nats-py may forget the cancellation, so that nobody waits for it.
            closing = asyncio.create_task(self._client.close())
            await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
            if not closing.cancel() and (error := closing.exception()):
                self.log.debug("the connection was not closed in order", why=repr(error))

    # ---- messages

    async def publish(self, subject: str, message: Message) -> None:
        await self.send(subject, encode_within(message, self.max_payload))

    async def send(
        self, subject: str, data: bytes, *, reply_to: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        if len(data) + HEADROOM > self.max_payload:
            raise BodyTooLarge(f"a message of {len(data)} bytes is over the limit")
        try:
            await self._client.publish(subject, data, reply_to, dict(headers) if headers else None)
        except nats.errors.OutboundBufferLimitError:
            raise BusUnavailable("NATS is gone, and the buffer for what is published is full") from None
        except nats.errors.ConnectionClosedError:
            raise BusUnavailable("the connection to NATS is closed") from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"the message was not sent: {error}") from error

    async def request(self, subject: str, message: Message, timeout: float = 2.0) -> Message:
        data = encode_within(message, self.max_payload)
        # A request that waits in the buffer would be carried out after its sender has given it up.
        self._need_connection()
        try:
            reply = await kept_cancellable(self._client.request(subject, data, timeout=timeout))
        except nats.errors.NoRespondersError:
            raise NoResponders(f"nobody listens on {subject}") from None
        except nats.errors.TimeoutError:
            raise BusTimeout(f"no answer on {subject} within {timeout:g} s") from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"the request was not sent: {error}") from error
        return read_reply(reply.data)

    async def subscribe(
        self, subject: str, handler: Handler, *, concurrency: int = 1, queue: str = ""
    ) -> NatsSubscription:
        # A full pump makes nats-py queue, and that queue has a limit which is told of (slow consumer).
        pump = Pump(handler, self.send, concurrency=concurrency, limit=concurrency)
        subscription = NatsSubscription(self, pump)
        self._subscriptions.add(subscription)
        try:
            await self._open(subscription, subject, queue)
        except BusUnavailable:
            subscription.cancel()
            self.forget(subscription)
            raise
        return subscription

    async def listen(self, subject: str, taker: Taker, *, queue: str = "") -> NatsListener:
        listener = NatsListener(self, taker)
        await self._open(listener, subject, queue)
        return listener

    async def _open(self, listener: NatsListener, subject: str, queue: str) -> None:
        """The server knows of it on return."""
        try:
            listener.client = await self._client.subscribe(subject, queue=queue, cb=listener.take)
            if self.connected:
                await self._client.flush(timeout=2)
        except nats.errors.Error as error:
            raise BusUnavailable(f"no subscription to {subject}: {error}") from error

    def forget(self, subscription: NatsSubscription) -> None:
        self._subscriptions.discard(subscription)

    # ---- the key-value store

    async def kv_get(self, bucket: str, key: str) -> tuple[bytes, int] | None:
        try:
            entry = await kept_cancellable((await self._bucket(bucket)).get(key))
        except KeyNotFoundError:
            return None
        except nats.errors.Error as error:
            raise self._no_store(bucket, error) from error
        return entry.value or b"", entry.revision or 0

    async def kv_put(self, bucket: str, key: str, value: bytes, revision: int) -> int:
        try:
            return await kept_cancellable((await self._bucket(bucket)).update(key, value, last=revision))
        except KeyWrongLastSequenceError as error:
            raise Conflict(f"{bucket}/{key} does not have revision {revision}: {error.description}") from None
        except nats.errors.Error as error:
            raise self._no_store(bucket, error) from error

    async def _bucket(self, name: str) -> KeyValue:
        """Makes the bucket where the server has none: a restarted server has forgotten it."""
        self._need_connection()
        if name not in self._buckets:
            store = JetStreamContext(self._client, timeout=JETSTREAM_SECONDS)
            self._buckets[name] = await store.create_key_value(bucket=name, storage=StorageType.MEMORY)
        return self._buckets[name]

    def _no_store(self, bucket: str, error: nats.errors.Error) -> BusUnavailable:
        if isinstance(error, NoStreamResponseError | APIError):
            self._buckets.pop(bucket, None)
        return BusUnavailable(f"the key-value store does not answer: {error}")

    # ---- the connection

    def _need_connection(self) -> None:
        if not self.connected:
            raise BusUnavailable(f"there is no connection to NATS at {without_login(self._url)}")

    async def _feel_pulse(self) -> None:
        """A server that stands still keeps its connections; that is told only by asking it."""
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            if not self.connected:
                continue
            try:
                await kept_cancellable(self._client.flush(timeout=STALLED_SECONDS))  # type: ignore[arg-type]
            except nats.errors.Error:
                continue  # no answer, or the connection broke
            now = time.monotonic()
            if now - self._pulse_at > STALLED_SECONDS and self._since is not None:
                self._since = now
            self._pulse_at = now

    async def _on_disconnect(self) -> None:
        self._since = None
        self._buckets.clear()
        if not self._leaving:
            self.log.warning("NATS is gone: connecting again", url=without_login(self._url))

    async def _on_reconnected(self) -> None:
        self._since = self._pulse_at = time.monotonic()
        self._reminder.forget()
        self._unread = ""
        self.log.info("NATS is back", url=without_login(self._url))
        for callback in self._callbacks:
            task = asyncio.create_task(self._call_back(callback))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call_back(self, callback: Callable[[], Awaitable[None]]) -> None:
        try:
            await callback()
        except BusUnavailable as error:
            # NATS went away again; the next reconnect calls again.
            self.log.warning("a reconnect callback failed", why=error.message)

    async def _on_closed(self) -> None:
        self._since = None
        if not self._leaving:
            self.log.error("NATS closed the connection for good", why=str(self._client.last_error))

    def _renewed_options(self) -> dict[str, Any]:
        """Of nats-py, where the login has changed. While it cannot be read, it stays as it is."""
        try:
            login = self._read_login()
            options = login.options(self._url) if login != self._login else {}
        except ConfigError as error:
            if error.message != self._unread:
                self.log.warning(f"{error.message}; mend it: until then NATS gets what was read before")
            self._unread = error.message
            return {}
        self._login, self._unread = login, ""
        return options

    def _refusal(self, error: Exception) -> str:
        """Why no attempt will succeed until somebody acts, and how; empty if `error` says nothing of the kind."""
        url, why = without_login(self._url), self._last_error
        if "authorization" in why.lower():
            who = self._login.user or "a client without a user"
            return f"NATS at {url} does not let {who} in ({why}): see MOECULE_NATS_PASSWORDS"
        if isinstance(error, NoTls):
            return f"NATS at {url} has no TLS, which tls:// or MOECULE_NATS_CA demands"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"NATS at {url} is not known: {why}; see MOECULE_NATS_CA"
        return ""

    async def _on_error(self, error: Exception) -> None:
        self._last_error = str(error) or type(error).__name__
        refusal = "" if self.connected else self._refusal(error)
        if refusal and self._pulse is None:
            raise ConfigError(refusal)  # ends the start, and nats-py's attempts
        self._client.options["reconnect_time_wait"] = REFUSED_WAIT_SECONDS if refusal else RECONNECT_WAIT_SECONDS
        if isinstance(error, nats.errors.SlowConsumerError):
            self.slow_consumer_drops += 1
            self.log.error("messages dropped: a handler is too slow", subject=error.subject)
        elif refusal:
            if self._reminder.is_due(refusal):
                self.log.error(f"{refusal}; trying on")
        elif isinstance(error, OSError | nats.errors.StaleConnectionError | nats.errors.TimeoutError):
            # One line tells of the loss and one of the return; the attempts between them are noise.
            self.log.debug("NATS connection", why=self._last_error)
        elif self.connected or self._reminder.is_due(self._last_error):
            self.log.error("NATS reported an error", why=self._last_error)
