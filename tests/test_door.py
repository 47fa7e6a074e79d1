"""The NATS front door, asked by another service over a real server: what HTTP answers, in numbered batches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain
from random import Random
from typing import Any

import msgspec
import nats.errors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

from common import nats_bus
from common.actor import running
from common.bus import RawMessage
from common.clock import FakeClock
from common.errors import LONGEST_MESSAGE, Draining, InvalidRequest, Overloaded
from common.nats_bus import NatsBus
from common.settings import Settings
from services.gateway import door
from services.gateway.actor import Gateway
from services.gateway.door_messages import is_inbox, read_request
from tests.api_front import EOS, PROMPT, QUESTION, Front, ScoringWorker, make_front, text_tokens
from tests.conftest import NatsServer
from tests.outside import GENERATE, Service, say, service

SETTINGS = Settings(port=0, drain_seconds=2.0, body_limit=50_000)
CHAT = {"messages": QUESTION}
TEXT = {"prompt": "Once upon a time", "max_tokens": 40}


@pytest.fixture
async def front(nats_url: str) -> AsyncIterator[Front]:
    async for one in make_front(SETTINGS, new_bus=lambda: NatsBus(nats_url, "test")):
        yield one


@pytest.fixture
async def scoring(nats_url: str) -> AsyncIterator[Front]:
    async for one in make_front(SETTINGS, ScoringWorker, new_bus=lambda: NatsBus(nats_url, "test")):
        yield one


@pytest.fixture
async def other(nats_url: str) -> AsyncIterator[Service]:
    async with service(nats_url) as one:
        yield one


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def paused(front: Front, at: int = 3) -> None:
    """A long answer that stops before its token `at`."""
    front.says("word " * 30)
    front.worker.pause_at = at


# ---- answers


async def test_messages_are_answered_as_http_answers_them(front: Front, other: Service) -> None:
    inbox = await other.ask(CHAT | {"temperature": 0})
    end = await inbox.last()
    http = (await front.post("/v1/chat/completions", temperature=0)).json()
    (choice,) = http["choices"]
    assert inbox.said() == choice["message"]["content"] == "It is 132."
    assert inbox.said("reasoning") == choice["message"]["reasoning_content"] == "4+5=9"
    assert end["usage"] == http["usage"] and end["finish_reasons"] == ["stop"]
    assert inbox.tokens() == [*text_tokens("4+5=9</think>\n\nIt is 132."), EOS]
    assert [one["type"] for one in inbox.answers][:2] == ["accepted", "tokens"]
    assert inbox.batches()[-1]["finish_reason"] == "stop"
    over_nats, over_http = front.worker.admitted
    assert over_nats.prompt == over_http.prompt == tuple(PROMPT)
    samplings = [msgspec.structs.replace(one.sampling, seed=0) for one in (over_nats, over_http)]
    assert samplings[0] == samplings[1]


@pytest.mark.parametrize("body", [{"prompt": "a b"}, {"tokens": [5, 6, 7]}], ids=["a text", "token ids"])
async def test_a_prompt_is_continued(scoring: Front, other: Service, body: dict[str, Any]) -> None:
    scoring.says(" and so on")
    inbox = await other.ask(body | {"max_tokens": 20, "logprobs": 2, "return_token_ids": True})
    await inbox.last()
    http = (await scoring.post("/v1/completions", prompt=next(iter(body.values())), max_tokens=20, logprobs=2)).json()
    (choice,) = http["choices"]
    assert inbox.said() == choice["text"] == " and so on"
    scores = [batch["logprobs"] for batch in inbox.batches()]
    assert {name: [*chain(*(one[name] for one in scores))] for name in scores[0]} == choice["logprobs"]
    assert inbox.batches()[0]["prompt_token_ids"] == list(scoring.sent.prompt)
    assert scoring.worker.admitted[0].prompt == scoring.sent.prompt


async def test_every_choice_has_its_own_numbers(front: Front, other: Service) -> None:
    front.says("so it goes")
    inbox = await other.ask(TEXT | {"n": 3})
    end = await inbox.last()
    assert end["finish_reasons"] == ["stop"] * 3
    for choice in range(3):
        assert inbox.said(choice=choice) == "so it goes"
        assert inbox.tokens(choice) == [*text_tokens("so it goes"), EOS]


async def test_a_stop_string_ends_it(front: Front, other: Service) -> None:
    front.says("one two three four")
    inbox = await other.ask(TEXT | {"stop": [" three"]})
    assert (await inbox.last())["finish_reasons"] == ["stop"]
    assert inbox.said() == "one two" and inbox.batches()[-1]["stop_reason"] == " three"
    assert all("prompt_token_ids" not in batch and "logprobs" not in batch for batch in inbox.batches())


async def test_logprobs_and_tool_calls_have_the_form_of_http(scoring: Front, other: Service) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    scoring.says('</think>\n\n<tool_call>{"name": "add", "arguments": {}}</tool_call>')
    body = CHAT | {"tools": [tool], "logprobs": True, "top_logprobs": 1}
    inbox = await other.ask(body)
    assert (await inbox.last())["finish_reasons"] == ["tool_calls"]
    events = await scoring.events("/v1/chat/completions", **body)
    choices = [event["choices"][0] for event in events]
    calls = [call for batch in inbox.batches() for call in batch.get("tool_calls", [])]
    http_calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [call["function"] for call in calls] == [call["function"] for call in http_calls] != []
    scores = [entry for batch in inbox.batches() for entry in batch["logprobs"]["content"]]
    assert scores == [entry for choice in choices for entry in choice["logprobs"]["content"]]


async def test_the_models(front: Front, other: Service) -> None:
    assert await other.request("moecule.v1.models") == (await front.http.get("/v1/models")).json()


# ---- refusals

BAD = {
    "no JSON": (b"{", None),
    "invalid UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', None),
    "no object": (b"[]", None),
    "nothing": (b"", None),
    "deep": (b'{"model": "tiny", "prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", None),
    "a number for a text": ({"prompt": 5}, "prompt"),
    "a text for ids": ({"tokens": "a"}, "tokens"),
    "a text among ids": ({"tokens": [1, "a"]}, "tokens[1]"),
    "an id beyond the vocabulary": ({"tokens": [9999]}, "tokens"),
    "no ids": ({"tokens": []}, "tokens"),
    "a list of prompts": ({"prompt": ["a", "b"]}, "prompt"),
    "no prompt": ({}, "prompt"),
    "a prompt of null": ({"prompt": None}, "prompt"),
    "two prompts": ({"prompt": "a", "messages": QUESTION}, "messages"),
    "an unknown role": ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    "a hot temperature": (TEXT | {"temperature": 1000}, "temperature"),
    "another model": (TEXT | {"model": "huge"}, "model"),
    "too much output": (TEXT | {"max_tokens": 10**6}, "max_tokens"),
    "a long prompt": ({"tokens": [5] * 8000}, "tokens"),
    "a whole answer": (TEXT | {"stream": False}, "stream"),
    "stream options": (TEXT | {"stream": True, "stream_options": {"include_usage": True}}, "stream_options"),
}
WHY = {"another model": "model_not_found", "too much output": "context_length_exceeded"}
WHY |= {"a long prompt": "context_length_exceeded"}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_is_refused_with_its_place(front: Front, other: Service, name: str) -> None:
    body, param = BAD[name]
    error = await (await other.ask(body)).error()
    assert (error["code"], error["param"]) == (WHY.get(name, "invalid_request"), param), error
    assert error["status"] in (400, 404) and error["retry_after"] is None
    assert front.worker.admitted == []


@pytest.mark.parametrize(
    "name", [name for name, (body, _) in BAD.items() if isinstance(body, dict) and "messages" in body]
)
async def test_http_refuses_messages_alike(front: Front, other: Service, name: str) -> None:
    body, _ = BAD[name]
    if "prompt" in body:
        return  # HTTP ignores a field that its endpoint does not know
    over_nats = await (await other.ask(body)).error()
    over_http = await front.refused(400, **body)
    assert {key: over_nats[key] for key in over_http} == over_http


async def test_what_workers_and_scheduler_refuse_is_told(front: Front, other: Service) -> None:
    front.worker.refusals = [Overloaded("the queue is full")] * 2
    inbox = await other.ask(CHAT)
    error = await inbox.error()
    assert (error["code"], error["status"], error["retry_after"]) == ("overloaded", 429, 1)
    assert inbox.answers[0]["type"] == "accepted"


async def test_a_body_over_the_limit_is_refused(front: Front, other: Service) -> None:
    limit = SETTINGS.body_limit
    data = json.dumps({"model": "tiny", "prompt": "a", "user": ""}).encode()
    fits = data.replace(b'"user": ""', b'"user": "' + b"x" * (limit - len(data)) + b'"')
    assert len(fits) == limit
    assert (await (await other.ask(fits)).last())["type"] == "end"
    error = await (await other.ask(fits + b" ")).error()
    http = await front.http.post("/v1/completions", content=fits + b" ")
    assert {key: error[key] for key in http.json()["error"]} == http.json()["error"]
    assert error["code"] == "body_too_large"


async def test_an_error_after_the_first_tokens_is_told(front: Front, other: Service) -> None:
    paused(front)
    inbox = await other.ask(CHAT)
    await inbox.until("tokens", count=3)
    front.gateway.streams.fail_all(Draining("the gateway is leaving"))
    assert (await inbox.error())["code"] == "draining"
    assert len(inbox.tokens()) == 3


async def test_whatever_breaks_the_caller_is_answered(
    front: Front, other: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patched:
        patched.setattr(front.gateway.generator, "run", broken)
        error = await (await other.ask(CHAT)).error()
    assert (error["code"], error["message"], error["status"]) == ("internal_error", "internal error", 500)
    assert (await (await other.ask(CHAT)).last())["type"] == "end"


class Body(bytes):
    """Bytes take no weak references; what is kept on them goes when they do."""

    kept: set[str]


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[set[str]]]:
    """Of the requests that came, as long as somebody holds them."""
    bodies: list[weakref.ref[set[str]]] = []

    def taken(subject: str, data: bytes, *rest: Any) -> RawMessage:
        body = Body(data)
        body.kept = set[str]()
        if subject == GENERATE:
            bodies.append(weakref.ref(body.kept))
        return RawMessage(subject, body, *rest)

    monkeypatch.setattr(nats_bus, "RawMessage", taken)
    return bodies


async def test_while_an_answer_comes_nothing_holds_the_bytes_that_asked_for_it(
    front: Front, other: Service, bodies: list[weakref.ref[set[str]]]
) -> None:
    paused(front)
    for body in (CHAT, TEXT, {"tokens": [5, 6, 7]}):
        await (await other.ask(body)).until("tokens", count=2)
    assert front.gateway.generator.active == 3
    assert [body() for body in bodies] == [None] * 3


# ---- cancelling, and callers that are gone


async def test_a_caller_cancels(front: Front, other: Service) -> None:
    paused(front)
    inbox = await other.ask(CHAT)
    accepted = await inbox.until("accepted")
    await inbox.until("tokens")
    assert accepted["cancel"] == f"moecule.v1.cancel.{accepted['request_id']}"
    answer = await other.request(accepted["cancel"])
    assert answer == {"type": "cancelled", "request_id": accepted["request_id"]}
    assert (await inbox.error())["code"] == "request_cancelled"
    await until(lambda: front.worker.aborted == [front.sent.request_id])
    assert front.gateway.generator.active == 0
    again = await other.request(accepted["cancel"])
    assert again["error"]["code"] == "not_found"


async def test_a_word_back_to_any_answer_cancels(front: Front, other: Service) -> None:
    paused(front)
    inbox = await other.ask(CHAT)
    await inbox.until("tokens")
    await inbox.messages[-1].respond(b"\xff no JSON")
    assert (await inbox.error())["code"] == "request_cancelled"
    await until(lambda: front.worker.aborted == [front.sent.request_id])


async def test_a_caller_that_unsubscribes_is_noticed_by_the_next_tokens(front: Front, other: Service) -> None:
    paused(front)
    inbox = other.client.new_inbox()
    first = await other.client.subscribe(inbox)
    await other.publish(CHAT, inbox)
    for _ in range(3):
        await first.next_msg(5)
    await first.unsubscribe()
    await other.client.flush()
    assert front.worker.aborted == []
    front.worker.resume_sending()
    await until(lambda: front.worker.aborted == [front.sent.request_id], 1)
    await until(lambda: front.gateway.generator.active == 0)


async def test_a_caller_that_was_never_there_costs_nothing(front: Front, other: Service) -> None:
    paused(front, at=0)
    await other.publish(CHAT, other.client.new_inbox())
    await until(lambda: front.gateway.door._generate.requests == 1)
    assert front.gateway.door._generate.last_error == "request_cancelled: the caller is gone"
    await until(lambda: len(front.worker.aborted) == len(front.worker.admitted))


# ---- silence


@pytest.fixture
async def slow(nats_url: str) -> AsyncIterator[tuple[Front, FakeClock]]:
    clock = FakeClock()
    stopped = asyncio.Event()

    async def tick() -> None:
        """The start needs a clock that goes; then the test moves it."""
        while not stopped.is_set():
            await clock.advance(0.01)
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    async for one in make_front(SETTINGS, clock=clock, new_bus=lambda: NatsBus(nats_url, "test")):
        stopped.set()
        await ticking
        yield one, clock
        stopped.clear()
        ticking = asyncio.create_task(tick())
    stopped.set()
    await ticking


async def test_a_silent_request_says_every_second_that_it_lives(slow: tuple[Front, FakeClock], other: Service) -> None:
    front, clock = slow
    paused(front)
    inbox = await other.ask(CHAT)
    await inbox.until("tokens", count=3)
    await clock.advance(0.9)
    await other.client.flush()
    assert len(inbox.answers) == 4
    await clock.advance(0.4)
    await inbox.until("alive")
    await clock.advance(1.3)
    await inbox.until("alive", count=2)
    front.worker.resume_sending()
    assert (await inbox.last())["type"] == "end"


async def test_a_caller_that_vanished_in_a_silence_is_noticed(slow: tuple[Front, FakeClock], nats_url: str) -> None:
    front, clock = slow
    paused(front)
    async with service(nats_url) as gone:
        await (await gone.ask(CHAT)).until("tokens", count=3)
    await asyncio.sleep(0.1)
    assert front.worker.aborted == []
    await clock.advance(1.3)
    await until(lambda: front.worker.aborted == [front.sent.request_id])


# ---- several gateways, and their ends


async def test_gateways_share_the_requests_and_each_hears_its_own_cancellations(
    front: Front, other: Service, nats_url: str
) -> None:
    paused(front)
    second = Gateway(NatsBus(nats_url, "second"), SETTINGS, actor_id="gateway-2")
    async with running(second):
        await until(lambda: not second.peers.why_not_ready())
        inboxes = [await other.ask(CHAT) for _ in range(12)]
        accepted = [await inbox.until("accepted") for inbox in inboxes]
        assert {one["request_id"].split(".")[0] for one in accepted} == {"gateway-1", "gateway-2"}
        for one, inbox in zip(accepted, inboxes, strict=True):
            assert (await other.request(one["cancel"]))["type"] == "cancelled"
            assert (await inbox.error())["code"] == "request_cancelled"
    with pytest.raises(nats.errors.NoRespondersError):
        await other.client.request(next(a["cancel"] for a in accepted if "gateway-2" in a["cancel"]), b"")


async def test_a_gateway_that_leaves_gives_the_requests_to_another(front: Front, other: Service, nats_url: str) -> None:
    second = Gateway(NatsBus(nats_url, "second"), SETTINGS, actor_id="gateway-2")
    async with running(second) as life:
        await until(lambda: not second.peers.why_not_ready())
        await until(lambda: "gateway-1" in second.door._others)
        paused(front)
        held = []
        while not any(one.startswith("gateway-2") for one in held):
            held.append((await (await other.ask(CHAT)).until("accepted"))["request_id"])
        life.leave.set()
        await until(lambda: second.state == "draining")
        await asyncio.sleep(0.05)
        for _ in range(10):
            accepted = await (await other.ask(CHAT)).until("accepted", "error")
            assert accepted["type"] == "accepted" and accepted["request_id"].startswith("gateway-1")
        front.worker.resume_sending()


async def test_the_last_gateway_refuses_while_it_finishes(
    front: Front, other: Service, bodies: list[weakref.ref[set[str]]]
) -> None:
    paused(front)
    first = await other.ask(CHAT)
    await first.until("tokens")
    front.life.leave.set()
    await until(lambda: front.gateway.state == "draining")
    for _ in range(3):
        error = await (await other.ask(CHAT)).error()
        assert (error["code"], error["status"], error["retry_after"]) == ("draining", 503, 1)
    await until(lambda: [body() for body in bodies] == [None] * 4)
    front.worker.resume_sending()
    assert (await first.last())["type"] == "end"


async def test_no_request_hangs_while_the_last_gateway_leaves(front: Front, other: Service) -> None:
    inboxes = []
    front.life.leave.set()
    while not front.life.life.done():
        inboxes.append(await other.ask(TEXT))
        await asyncio.sleep(0.002)
    inboxes.append(await other.ask(TEXT))
    ends = [(await inbox.until("end", "error", "503"))["type"] for inbox in inboxes]
    assert ends[-1] == "503" and len(ends) > 10


async def test_without_a_gateway_the_server_says_so(other: Service) -> None:
    inbox = await other.ask(CHAT)
    assert (await inbox.until("503")) == {"type": "503"}


async def test_a_stream_outlives_nats(front: Front, other: Service, nats_server: NatsServer) -> None:
    paused(front)
    inbox = await other.ask(CHAT)
    await inbox.until("tokens", count=3)
    nats_server.restart()
    await until(lambda: front.worker.bus.connected and front.gateway.bus.connected)
    front.worker.resume_sending()
    assert (await inbox.last())["type"] == "end"
    assert inbox.tokens() == [*text_tokens("word " * 30), EOS]


# ---- discovery


async def test_nats_micro_finds_it(front: Front, other: Service) -> None:
    await (await other.ask(CHAT)).last()
    await (await other.ask({})).error()
    await other.request("moecule.v1.models")
    for subject in ("$SRV.PING", "$SRV.PING.moecule", "$SRV.PING.moecule.gateway-1"):
        (answer,) = await other.ask_all(subject)
        assert answer["type"] == "io.nats.micro.v1.ping_response"
        ping = ServicePing.from_dict(answer)
        assert (ping.name, ping.id, ping.version) == ("moecule", "gateway-1", "1.0.0")
    (answer,) = await other.ask_all("$SRV.INFO.moecule")
    assert answer["type"] == "io.nats.micro.v1.info_response"
    info = ServiceInfo.from_dict(answer)
    assert [one.subject for one in info.endpoints] == ["moecule.v1.generate", "moecule.v1.models"]
    (answer,) = await other.ask_all("$SRV.STATS")
    assert answer["type"] == "io.nats.micro.v1.stats_response"
    generate, models = answer["endpoints"]
    assert (generate["num_requests"], generate["num_errors"], models["num_requests"]) == (2, 1, 1)
    assert generate["last_error"] == "invalid_request"
    assert generate["average_processing_time"] == generate["processing_time"] // 2 > 0
    ServiceStats.from_dict(answer | {"endpoints": [one | {"data": None} for one in answer["endpoints"]]})


# ---- hostile input

JSON = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=5))
BODIES = st.dictionaries(st.sampled_from(["model", "prompt", "tokens", "messages", "stream", "n", "stop"]), JSON)

WHERE_NOBODY_MAY_BE_ANSWERED = [
    "", "*", "a.*", "a.>", ">", "a..b", ".a", "a.", "moecule.v1.generate", "moecule.v1.worker.worker-1.admit",
    "moecule", "$JS.API.STREAM.DELETE.KV_moecule", "$SYS.REQ.USER", "a b", "a\r\nPUB x 0", "a" * 300,
]  # fmt: skip


@pytest.mark.parametrize("subject", WHERE_NOBODY_MAY_BE_ANSWERED)
def test_no_answer_goes_where_it_could_do_harm(subject: str) -> None:
    assert not is_inbox(subject)


@pytest.mark.parametrize("subject", ["_INBOX.abc.1", "orders.answers", "a", "größe.1"])
def test_answers_go_to_any_other_subject(subject: str) -> None:
    assert is_inbox(subject)


def hostile_lines() -> list[bytes]:
    body = json.dumps({"model": "tiny"} | CHAT).encode()

    def published(subject: bytes, reply: bytes, data: bytes = body) -> bytes:
        return b"PUB %s %s %d\r\n%s\r\n" % (subject, reply, len(data), data)

    def with_headers(headers: bytes, subject: bytes = GENERATE.encode(), data: bytes = body) -> bytes:
        reply = b" nobody.there" if subject == GENERATE.encode() else b""
        head = b"HPUB %s%s %d %d\r\n" % (subject, reply, len(headers), len(headers) + len(data))
        return head + headers + data + b"\r\n"

    replies = [one.encode() for one in WHERE_NOBODY_MAY_BE_ANSWERED if " " not in one]
    lines = [published(GENERATE.encode(), reply) for reply in [*replies, b"\xff\xfe"]]
    lines += [published(subject.encode(), b"a.*") for subject in ("$SRV.PING", "moecule.v1.models")]
    lines += [published(b"moecule.v1.cancel.gateway-1.\xff", b"", b""), published(b"$SRV.PING", b"\xff", b"")]
    lines += [
        published(b"moecule.v1.gateway.\xff.beat", b"", b"\x00"),
        published(b"moecule.v1.cancel.gateway-1.x", b""),
    ]
    for status in (
        b"NATS/1.0 \xff\xff\xff\r\n\r\n",
        b"NATS/1.0",
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 5\xc3\xa9 x\r\n\r\n",
    ):
        lines.append(with_headers(status))
        lines.append(with_headers(status, b"moecule.v1.cancel.gateway-1.abc", b""))
    lines.append(with_headers(b"NATS/1.0\r\n: \r\n\xff:\xff\r\nno colon\r\n\r\n"))
    return lines


async def test_a_refusal_that_quotes_a_long_request_is_sent(nats_url: str, other: Service) -> None:
    body = json.dumps({"model": "\x7f" * 1_900_000} | TEXT, ensure_ascii=False)  # quoted, four times as long
    settings = Settings(port=0, drain_seconds=0.3)
    async for front in make_front(settings, new_bus=lambda: NatsBus(nats_url, "test")):
        error = await (await other.ask(body.encode())).error()
        assert error["code"] == "model_not_found" and len(error["message"]) == LONGEST_MESSAGE
        stats = await other.request("$SRV.STATS.moecule")
        assert stats["endpoints"][0]["last_error"] == "model_not_found", "and not what it quotes of the request"
        assert front.gateway.state == "ready" and not front.life.life.done()


async def test_hostile_messages_leave_the_gateway_as_it_is(front: Front, other: Service, nats_url: str) -> None:
    connected_since = front.gateway.bus.connected_for()
    for line in hostile_lines():
        said = await say(nats_url, line)
        assert b"-ERR" not in said, (line, said)
        inbox = await other.ask(TEXT)
        assert (await inbox.last())["type"] == "end", line
    assert front.gateway.bus.connected_for() > connected_since, "the connection was never lost"
    await until(lambda: front.gateway.generator.active == 0 and not front.gateway.door._callers)
    assert front.gateway.state == "ready" and not front.life.life.done()


@pytest.mark.parametrize("head", [b"NATS/1.0 \xff\xff\xff", b"NATS/1.0 100 \xff", b"NATS/1.0\r\nx: \xff"])
async def test_a_request_whose_headers_are_no_text_is_answered(
    front: Front, other: Service, nats_url: str, head: bytes
) -> None:
    front.says("no")
    inbox = await other.ask({"model": "another"})
    assert (await inbox.last())["type"] == "error"
    inbox.answers.clear()
    head, body = head + b"\r\n\r\n", json.dumps({"model": "tiny"} | TEXT).encode()
    sizes = b"%d %d" % (len(head), len(head) + len(body))
    await say(nats_url, b"HPUB %s %s %s\r\n%s%s\r\n" % (GENERATE.encode(), inbox.subject.encode(), sizes, head, body))
    assert (await inbox.last())["type"] == "end"


@settings(deadline=None)  # other work on the machine is no failure
@given(st.one_of(st.binary(), st.recursive(JSON, st.lists).map(msgspec.json.encode), BODIES.map(msgspec.json.encode)))
def test_whatever_comes_is_a_request_or_is_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        read_request(data)


def mangled(count: int) -> Iterator[bytes]:
    rng = Random(6)
    whole = [msgspec.json.encode({"model": "tiny", "max_tokens": 5} | body) for body in (CHAT, TEXT, {"tokens": [5]})]
    for _ in range(count):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(0, 3)):
            at, kind = rng.randrange(len(data)), rng.randrange(3)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 5)]
            else:
                data[at:at] = rng.choice([b'"', b"[" * 500, b"{", b"\xff", b"null", b"1e999", b"\\ud800", b":"])
        yield bytes(data)


async def usual_tasks() -> int:
    """How many there mostly are: what is on its way at one moment has a task more, or less."""
    looks = []
    for _ in range(100):
        await asyncio.sleep(0.005)
        looks.append(len(asyncio.all_tasks()))
    return statistics.median_low(looks)


async def test_every_mangled_request_is_answered_and_leaves_nothing(front: Front, other: Service) -> None:
    front.says("no")
    inbox = await other.ask(TEXT)
    await inbox.last()
    tasks = await usual_tasks()
    count = 2000
    for sent, data in enumerate(mangled(count - 1), 2):
        await other.publish(data, inbox.subject)
        if sent % 100 == 0:
            await inbox.until("end", "error", count=sent)
    ends = [one for one in inbox.answers if one["type"] in ("end", "error")]
    assert len(ends) == count == len({one["request_id"] for one in ends})
    codes = {one["error"]["code"] for one in ends if one["type"] == "error"}
    assert codes == {"invalid_request", "model_not_found"} and len(front.worker.admitted) > 200
    await until(lambda: not front.gateway.door._callers)
    assert await usual_tasks() == tasks


async def test_more_callers_than_a_gateway_bears_are_refused(
    front: Front, other: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MOST_CALLERS", 2)
    paused(front)
    held = [await other.ask(CHAT) for _ in range(2)]
    for inbox in held:
        await inbox.until("tokens")
    error = await (await other.ask(CHAT)).error()
    assert (error["code"], error["retry_after"]) == ("overloaded", 1)
    front.worker.resume_sending()
    for inbox in held:
        await inbox.last()
    assert (await (await other.ask(CHAT)).last())["type"] == "end"


async def test_a_message_that_is_sent_again_is_a_request_of_its_own(front: Front, other: Service) -> None:
    inbox = await other.ask(TEXT)
    first = await inbox.last()
    for _ in range(2):
        inbox.answers.clear()
        await other.publish(TEXT, inbox.subject)
        again = await inbox.last()
        assert again["type"] == "end" and again["request_id"] != first["request_id"]
    assert len(front.worker.admitted) == 3
