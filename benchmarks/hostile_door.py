"""Hostile requests to the NATS front door. Each must get an end or an error that asyncapi.json documents, or, where it
names no inbox that may be answered, nothing at all."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import urllib.request
from collections import Counter
from random import Random
from typing import Any

from nats.aio.msg import Msg

from benchmarks.hostile_bodies import VALID, body
from common.nats_bus import OrderedClient

ANSWER_SECONDS = 20.0
GENERATE, MODELS, CANCEL = "moecule.v1.generate", "moecule.v1.models", "moecule.v1.cancel"
BODIES = (*VALID, {"model": "tiny", "tokens": [20, 21, 22], "max_tokens": 2, "n": 2, "logprobs": 1})
LONG = b'{"model":"tiny","prompt":"Once","max_tokens":150,"ignore_eos":true}'
HEADERS = (
    b"traceparent: 00-zz-1-\r\n", b"traceparent: " + b"0" * 8000 + b"\r\n", b"traceparent: \xff\xfe\xc3\r\n",
    b"Authorization: Bearer \xff\xff\r\n", b"authorization: \xe2\x82\r\n", b"Authorization: Basic ==\r\n",
    b"X-Request-Deadline-Ms: -1\r\n", b"X-Request-Deadline-Ms: 1e999\r\n", b"X-Request-Deadline-Ms: \xb2\r\n",
    b"Status: 503\r\n", b"Nats-Service-Error-Code: x\r\n", b": \r\n", b"\xff: \xff\r\n", b"no colon\r\n",
    b" folded\r\n", b"x: 1\r\n" * 2000, b"x-big: " + b"y" * 100_000 + b"\r\n", b"\x00: \x00\r\n", b"a:b\rc:d\r\n",
)  # fmt: skip
FIRST_LINES = (b"NATS/1.0",) * 8 + (
    b"NATS/1.0 503",
    b"NATS/1.0 \xff\xff\xff",
    b"NATS/1.0 100 \xff",
    b"NATS/1.0 5\xc3\xa9 x",
)
# Heard by us, so that an answer would be seen. The gateway may send to none of them.
FORBIDDEN = (
    b"moecule.v1.hostile.%d", b"$JS.hostile.%d", b"$SYS.hostile.%d", b"hostile.%d.*", b"hostile.%d.>",
    b"hostile.%d.\xff", b"hostile.%d." + b"x" * 300, b"hostile.\x01.%d",
)  # fmt: skip
LISTENED = ("moecule.v1.hostile.>", "$JS.hostile.>", "$SYS.hostile.>", "hostile.>")


def documented(url: str) -> dict[str, int]:
    """The code of each error that a request may get, and its status."""
    with urllib.request.urlopen(f"{url}/asyncapi.json", timeout=10) as got:
        about = json.load(got)["info"]["description"]
    return {code: int(status) for code, status in re.findall(r"`(\w+)` \((\d{3})\)", about)}


class Inbox:
    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.answers: list[Msg] = []
        self.accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # the subject that cancels
        self.last: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def take(self, message: Msg) -> None:
        self.answers.append(message)
        answer = json.loads(message.data) if message.data else {"type": "nobody"}
        if answer.get("type") == "accepted":
            self.accepted.set_result(answer["cancel"])
        elif answer.get("type") not in ("tokens", "alive") and not self.last.done():
            self.last.set_result(answer)

    @property
    def whole(self) -> bool:
        return [json.loads(one.data)["seq"] for one in self.answers] == list(range(len(self.answers)))


class Door:
    """`outcomes`: how often each kind of answer came; `bad`: those that none may get."""

    def __init__(self, url: str, codes: dict[str, int], draw: Random) -> None:
        self._url, self._codes, self._draw = url, codes, draw
        self._client = OrderedClient()
        self._own = f"_INBOX.hostile-{secrets.token_hex(6)}"
        self._inboxes: dict[str, Inbox] = {}
        self._sent = 0
        self._gateway = ""
        self.outcomes: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()

    async def __aenter__(self) -> Door:
        await self._client.connect(self._url)
        await self._client.subscribe(f"{self._own}.>", cb=self._take)
        for subject in LISTENED:
            await self._client.subscribe(subject, cb=self._take_forbidden)
        await self._client.flush()
        await self._cancel_of_another()  # the gateway's name is told by that
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def _take(self, message: Msg) -> None:
        if inbox := self._inboxes.get(message.subject):
            inbox.take(message)
        else:
            self.bad["an answer after the last"] += 1

    async def _take_forbidden(self, message: Msg) -> None:
        self.bad[f"an answer at {message.subject[:40]}"] += 1

    async def one(self) -> None:
        kind = self._draw.randrange(10)
        if kind == 0:
            await self._unanswerable()
        elif kind == 1:
            await self._ask(MODELS, self._draw.randbytes(20), self._head())
        elif kind == 2:
            await self._cancel_unknown()
        elif kind == 3:
            await self._cancel_of_another()
        else:
            await self._ask(GENERATE, self._body(), self._head())

    # ---- kinds of input

    async def _unanswerable(self) -> None:
        reply = self._draw.choice((*FORBIDDEN, b""))
        reply = reply.replace(b"%d", b"%d" % self._sent)
        subject = self._draw.choice((GENERATE, GENERATE, MODELS, f"{CANCEL}.{self._gateway}.x"))
        await self._send(subject, reply, self._body(), self._head())
        self.outcomes["none, as it must be"] += 1

    async def _cancel_unknown(self) -> None:
        odd = ("x", "*", ">", "a" * 3000, "größe", secrets.token_hex(12))
        gateway = self._draw.choice((self._gateway, self._gateway, "gateway-none"))
        head = self._draw.choice((b"", b"NATS/1.0\r\nStatus: 503\r\n\r\n"))
        await self._ask(f"{CANCEL}.{gateway}.{self._draw.choice(odd)}", self._draw.randbytes(20), head)

    async def _cancel_of_another(self) -> None:
        """It has ended by then, or it is cancelled; both are answered."""
        victim = self._inbox()
        await self._send(GENERATE, victim.subject.encode(), LONG)
        first: set[asyncio.Future[Any]] = {victim.accepted, victim.last}
        await asyncio.wait(first, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if victim.accepted.done():
            cancel = victim.accepted.result()
            self._gateway = cancel.removeprefix(f"{CANCEL}.").partition(".")[0]
            for _ in range(2):
                await self._ask(cancel, self._draw.randbytes(20))
        await self._judge(victim)

    def _body(self) -> bytes:
        draw, kind = self._draw, self._draw.randrange(60)
        if kind == 0:
            return b'{"model":"tiny","prompt":"' + b"x" * draw.choice((3 << 20, 5 << 20, (8 << 20) - 400_000)) + b'"}'
        if kind == 1:
            return b'{"model":"tiny","messages":' + b'[{"content":' * draw.choice((500, 100_000, 300_000))
        if kind == 2:
            return b"[" * draw.choice((100_000, 3 << 20))
        if kind == 3:
            return b'{"model":"tiny","tokens":[' + b"7," * draw.choice((5000, 1_000_000)) + b"7]}"
        return body(draw, BODIES)

    def _head(self) -> bytes:
        draw = self._draw
        if draw.random() < 0.5:
            return b""
        lines = draw.choices(HEADERS, k=draw.randrange(4))
        return draw.choice(FIRST_LINES) + b"\r\n" + b"".join(lines) + draw.choice((b"\r\n", b"\r\n", b""))

    # ---- out, and back

    def _inbox(self) -> Inbox:
        name = self._draw.choice(("{}", "{}", "größe.{}", "a-{}.b_.c", "{}." + "x" * 200))
        inbox = Inbox(f"{self._own}.{name.format(self._sent)}")
        self._sent += 1
        self._inboxes[inbox.subject] = inbox
        return inbox

    async def _send(self, subject: str, reply: bytes, data: bytes, head: bytes = b"") -> None:
        """As it is: nats-py would refuse most of it."""
        sizes = b"%d %d" % (len(head), len(head) + len(data)) if head else b"%d" % len(data)
        verb, name = (b"HPUB" if head else b"PUB"), subject.encode()
        self._sent += 1
        await self._client._send_command(b"%s %s %s %s\r\n%s%s\r\n" % (verb, name, reply, sizes, head, data))
        await self._client._flush_pending()

    async def _ask(self, subject: str, data: bytes, head: bytes = b"") -> None:
        inbox = self._inbox()
        await self._send(subject, inbox.subject.encode(), data, head)
        await self._judge(inbox)

    async def _judge(self, inbox: Inbox) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                last = await inbox.last
        except TimeoutError:
            self._note("no answer", good=False)
            return
        finally:
            del self._inboxes[inbox.subject]
        if last.get("type") == "error":
            error, headers = last["error"], inbox.answers[-1].headers or {}
            code, status = error["code"], error["status"]
            good = self._codes.get(code) == status < 500 and headers.get("Nats-Service-Error-Code") == code
            self._note(code, good=good and inbox.whole)
        elif last.get("type") == "end":
            self._note("end", good=inbox.whole)
        else:
            known = last.get("type", last.get("object"))
            self._note(str(known), good=known in ("cancelled", "list", "nobody"))

    def _note(self, outcome: str, *, good: bool) -> None:
        self.outcomes[outcome] += 1
        if not good:
            self.bad[outcome] += 1
