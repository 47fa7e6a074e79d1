"""The NATS front door: requests from other services, answered in numbered batches on the inbox that they name.

It takes the path of HTTP: the same bodies, Preparer, Streams, Output, limits and errors. Every answer is published with
the request's own cancel subject as its reply subject, so that whatever comes there ends the request: a caller that
cancels, or the server's word that nobody listens on the inbox any more. A caller that vanishes is noticed by the next
answer, and there is one at least every second.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from starlette.types import Message as AsgiMessage

from common.bus import Bus, RawMessage, Subscription
from common.clock import Clock
from common.errors import (
    BodyTooLarge,
    BusUnavailable,
    InternalError,
    MoeculeError,
    NotFound,
    Overloaded,
    RequestCancelled,
)
from common.messages import GatewayBeat
from services.gateway.discovery import Discovery, Endpoint
from services.gateway.door_messages import (
    CANCEL,
    GENERATE,
    MODELS,
    QUEUE,
    Accepted,
    Alive,
    Batch,
    Cancelled,
    DoorAnswer,
    DoorError,
    Ended,
    Refused,
    blaming_field,
    error_headers,
    is_inbox,
    read_request,
)
from services.gateway.generate import Generator, Plan, entries, usage_of
from services.gateway.keys import Keys, bearer
from services.gateway.limits import Permit
from services.gateway.openapi import ModelList
from services.gateway.output import Delta
from services.gateway.prepare import off_loop
from services.gateway.protocol import AnyBody
from services.gateway.responses import ChatChoice
from services.gateway.streams import SETTLE_SECONDS, Spawn

TICK_SECONDS = 0.25
MOST_CALLERS = 10_000  # requests at a time; no socket a caller limits them, as HTTP's do
ALIVE_SECONDS = 1.0  # without an answer for so long, one says that there is nothing to tell
OTHERS_SECONDS = 2.0  # a gateway that was heard since then takes what we leave

_encode = msgspec.json.Encoder().encode


class Line:
    """The bus as callers need it. After a reconnect nothing is sent until they are back on their inboxes, too."""

    def __init__(self, bus: Bus, clock: Clock) -> None:
        self.bus = bus
        self.clock = clock
        self._broken_once = False
        bus.on_reconnect(self._on_reconnect)

    async def _on_reconnect(self) -> None:
        self._broken_once = True

    @property
    def settled(self) -> bool:
        return self.bus.connected and not (self._broken_once and self.bus.connected_for() < SETTLE_SECONDS)

    async def until_settled(self) -> None:
        while not self.settled:
            await self.clock.sleep(TICK_SECONDS)


class Caller:
    """One request's way back. `request_id` holds the gateway's id, so that a cancellation finds us."""

    def __init__(self, line: Line, inbox: str, gateway_id: str) -> None:
        self.request_id = f"{gateway_id}.{secrets.token_hex(12)}"
        self.cancel_subject = f"{CANCEL}.{self.request_id}"
        self.accepted = False
        self.vanished = False
        self.told_at = line.clock.now()
        self._line = line
        self._inbox = inbox
        self._seq = 0
        self._one_at_a_time = asyncio.Lock()
        self._left = asyncio.Event()

    def leave(self, *, vanished: bool) -> None:
        self.vanished = vanished
        self._left.set()

    async def receive(self) -> AsgiMessage:
        """What a handler of HTTP is told by its server."""
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def tell(self, kind: type[DoorAnswer], size: int = 0, **fields: Any) -> None:
        """`size`: entries in its longest field."""
        await self._send(kind, fields, size)

    async def tell_of(self, error: MoeculeError) -> None:
        await self._send(Refused, {"error": DoorError.of(error)}, headers=error_headers(error))

    async def _send(
        self, kind: type[DoorAnswer], fields: dict[str, Any], size: int = 0, headers: dict[str, str] | None = None
    ) -> None:
        async with self._one_at_a_time:
            await self._line.until_settled()
            answer = kind(request_id=self.request_id, seq=self._seq, **fields)
            data = await off_loop(size, _encode, answer)
            await self._line.bus.send(self._inbox, data, reply_to=self.cancel_subject, headers=headers)
            self._seq += 1
            self.told_at = self._line.clock.now()


class Door:
    def __init__(
        self,
        bus: Bus,
        gateway_id: str,
        generator: Generator,
        keys: Keys,
        models: Callable[[], ModelList],
        clock: Clock,
        spawn: Spawn,
        log: Any,
    ) -> None:
        self._bus = bus
        self._line = Line(bus, clock)
        self._gateway_id = gateway_id
        self._generator = generator
        self._keys = keys
        self._models = models
        self._clock = clock
        self._spawn = spawn
        self._log = log
        self._callers: dict[str, Caller] = {}
        self._others: dict[str, float] = {}  # gateways that are ready -> when that was heard
        self._shared: list[Subscription] = []  # what any gateway can answer
        self._own: list[Subscription] = []
        self._generate = Endpoint("generate", GENERATE, QUEUE)
        self._model_list = Endpoint("models", MODELS, QUEUE)
        self._discovery = Discovery(bus, gateway_id, [self._generate, self._model_list], self._reply)

    async def open(self) -> None:
        self._own = [
            await self._bus.listen(f"{CANCEL}.{self._gateway_id}.*", self._on_cancel),
            *await self._discovery.open(),
        ]
        self._shared = [
            await self._bus.listen(GENERATE, self._on_generate, queue=QUEUE),
            await self._bus.listen(MODELS, self._on_models, queue=QUEUE),
        ]
        self._spawn(self._keep_alive(), "door")

    def take_beat(self, beat: GatewayBeat) -> None:
        now = self._clock.now()
        self._others = {other: at for other, at in self._others.items() if at >= now - OTHERS_SECONDS}
        if beat.state == "ready" and beat.id != self._gateway_id:
            self._others[beat.id] = now
        else:
            self._others.pop(beat.id, None)

    async def leave(self) -> None:
        """Requests go to the other gateways from now on. The last one stays, and says to each why it is refused."""
        horizon = self._clock.now() - OTHERS_SECONDS
        if any(at >= horizon for at in self._others.values()):
            shared, self._shared = self._shared, []
            for subscription in shared:
                await subscription.drain()

    async def close(self) -> None:
        subscriptions, self._shared, self._own = [*self._shared, *self._own], [], []
        for subscription in subscriptions:
            await subscription.drain()

    # ---- what comes in

    def _on_generate(self, message: RawMessage) -> None:
        if is_inbox(message.reply_to):
            self._spawn(self._answer(message), "request over NATS")
        else:
            self._generate.failed("a request without an inbox that answers may be sent to")
            self._log.debug("a request over NATS names no inbox", reply_to=message.reply_to[:100])

    def _on_models(self, message: RawMessage) -> None:
        began = self._clock.now()
        try:
            self._keys.caller(shown(message))
        except MoeculeError as error:
            self._model_list.failed(f"{error.code}: {error.message}")
            self._refuse(message, error)
            return
        self._reply(message, _encode(self._models()))
        self._model_list.answered(self._clock.now() - began)

    def _on_cancel(self, message: RawMessage) -> None:
        request_id = message.subject.removeprefix(f"{CANCEL}.")
        caller = self._callers.get(request_id)
        if message.nobody_listened:
            if caller and self._line.settled:
                self._log.info("a caller over NATS is gone", request=request_id)
                caller.leave(vanished=True)
            return
        if caller:
            caller.leave(vanished=False)
            self._reply(message, _encode(Cancelled(request_id=request_id)))
        else:
            self._refuse(message, NotFound("there is no request of this id, or it has ended"), request_id)

    def _refuse(self, message: RawMessage, error: MoeculeError, request_id: str = "") -> None:
        answer = Refused(request_id=request_id, seq=0, error=DoorError.of(error))
        self._reply(message, _encode(answer), error_headers(error))

    def _reply(self, message: RawMessage, data: bytes, headers: dict[str, str] | None = None) -> None:
        if is_inbox(message.reply_to):
            self._spawn(self._send_reply(message.reply_to, data, headers), "reply over NATS")

    async def _send_reply(self, inbox: str, data: bytes, headers: dict[str, str] | None) -> None:
        try:
            await self._bus.send(inbox, data, headers=headers)
        except MoeculeError as error:
            self._log.warning("a reply over NATS was not sent", why=error.message)

    # ---- one request

    async def _answer(self, message: RawMessage) -> None:
        began = self._clock.now()
        caller = Caller(self._line, message.reply_to, self._gateway_id)
        self._callers[caller.request_id] = caller
        try:
            with self._generator.traces.request(GENERATE, partial(header_of, message.headers)):
                if len(self._callers) > MOST_CALLERS:
                    raise Overloaded(f"this gateway has {MOST_CALLERS} requests over NATS already")
                with self._generator.taking(self._keys.caller(shown(message))) as permit:
                    body = self._read(message)
                    del message  # of up to 8 MB, which nobody else holds by now
                    await self._follow(body, caller, permit)
            self._generate.answered(self._clock.now() - began)
        except MoeculeError as error:
            await self._fail(caller, error)
        except Exception:
            # The boundary of the service: whatever broke, the caller is answered.
            self._log.exception("a request over NATS broke", request=caller.request_id)
            await self._fail(caller, InternalError("internal error"))
        finally:
            del self._callers[caller.request_id]

    async def _fail(self, caller: Caller, error: MoeculeError) -> None:
        if isinstance(error, RequestCancelled):
            error = RequestCancelled("the caller is gone" if caller.vanished else "the request was cancelled")
        elif error.status >= 500:
            self._log.warning("refused", subject=GENERATE, code=error.code, why=error.message)
        # Anyone may ask for these statistics, and what is wrong with a request may quote it.
        self._generate.failed(f"{error.code}: {error.message}" if error.status >= 499 else error.code)
        if caller.vanished:
            return  # nobody is there to read it
        try:
            await caller.tell_of(error)
        except MoeculeError as lost:
            self._log.warning("an error was not sent", request=caller.request_id, why=lost.message)

    def _read(self, message: RawMessage) -> AnyBody:
        """Raises BodyTooLarge or InvalidRequest."""
        limit = self._generator.body_limit
        if len(message.data) > limit:
            raise BodyTooLarge(f"the body is larger than the limit of {limit} bytes")
        body, unknown = read_request(message.data)
        self._generator.warn_unknown(unknown)
        return body

    async def _follow(self, body: AnyBody, caller: Caller, permit: Permit) -> None:
        generator = self._generator
        with blaming_field(body):
            plan = await generator.plan(msgspec.structs.replace(body, return_token_ids=True), permit)
        await caller.tell(Accepted, cancel=caller.cancel_subject)
        caller.accepted = True
        batches = _Batches(body, plan)

        async def pass_on(choice: int, delta: Delta) -> None:
            size = entries(delta)
            await caller.tell(Batch, size, **await off_loop(size, batches.fields, choice, delta))

        await generator.run(plan.jobs, plan.outputs, caller.receive, pass_on)
        usage = usage_of(body, plan.jobs, plan.outputs)
        await caller.tell(Ended, finish_reasons=batches.finish_reasons, usage=usage)

    async def _keep_alive(self) -> None:
        while True:
            await self._clock.sleep(TICK_SECONDS)
            horizon = self._clock.now() - ALIVE_SECONDS
            silent = [one for one in self._callers.values() if one.accepted and one.told_at <= horizon]
            for caller in silent if self._line.settled else ():
                try:
                    await caller.tell(Alive)
                except BusUnavailable as error:
                    self._log.debug("a sign of life was not sent", request=caller.request_id, why=error.message)


def shown(message: RawMessage) -> str | None:
    """The key that came with a message, in HTTP's header; None: there is none."""
    return bearer([(b"authorization", header_of(message.headers, "authorization").encode())])


def header_of(headers: Mapping[str, str], name: str) -> str:
    """By its name in lower case; empty: there is none."""
    return next((text for one, text in headers.items() if one.lower() == name), "")


class _Batches:
    """What new tokens of a request's choices add, in the fields of a `Batch`."""

    def __init__(self, body: AnyBody, plan: Plan) -> None:
        self._body = body
        self._style = plan.style
        self._index = [0] * len(plan.jobs)
        self._finish: list[str] = [""] * len(plan.jobs)

    @property
    def finish_reasons(self) -> list[str]:
        return self._finish

    def fields(self, choice: int, delta: Delta) -> dict[str, Any]:
        part = self._style.part(choice, delta, False)
        fields: dict[str, Any] = {
            "choice": choice,
            "index": self._index[choice],
            "tokens": delta.tokens,
            "text": delta.text,
            "reasoning": delta.reasoning,
            "finish_reason": delta.finish,
        }
        self._index[choice] += len(delta.tokens)
        if delta.finish:
            self._finish[choice] = delta.finish
            fields["stop_reason"] = delta.stop_reason
        if part.logprobs is not None:
            fields["logprobs"] = part.logprobs
        if isinstance(part, ChatChoice) and part.delta:
            fields["tool_calls"] = part.delta.tool_calls
        about = self._style.of_answer(choice, delta) if isinstance(part, ChatChoice) else part
        fields["prompt_logprobs"] = about.prompt_logprobs
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = about.prompt_token_ids
        return fields
