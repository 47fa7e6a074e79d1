"""A gateway with API keys, as clients see it: who is let in, what each may have, and how it leaves."""

from __future__ import annotations

import asyncio
import html
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from common.messages import Message, Ok, subject
from common.settings import Settings
from services.gateway.keys import ADMIN_PATHS, OPEN_PATHS
from services.gateway.openapi import OPERATIONS
from services.gateway.samples import SAMPLES, Sample
from tests.api_front import QUESTION, Front, make_front

ALICE, SMALL, OPS = "mk-alice-0123456789", "mk-small-0123456789", "mk-ops-0123456789"
CHAT = "/v1/chat/completions"


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    path = tmp_path / "keys"
    path.write_text(
        f"alice {ALICE}\nsmall {SMALL} requests=1 tokens=60 per_minute=4 priority=3\nops {OPS} admin=1 priority=-1\n"
    )
    path.chmod(0o600)
    with capture_logs() as logs:
        async for one in make_front(Settings(port=0, drain_seconds=2, body_limit=20_000, api_keys=str(path))):

            async def forget(_: str, message: Message) -> Message:
                return Ok()

            await one.worker.bus.subscribe(subject("worker", "worker-1", "forget"), forget)
            yield one
    assert logs and not any(secret in str(logs) for secret in (ALICE, SMALL, OPS, "mk-"))


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def ask(front: Front, key: str, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 30} | fields
    return await front.http.post(CHAT, json=body, headers=auth(key) | (headers or {}))


def error(answer: httpx.Response, status: int, code: str) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    return answer.json()["error"]["message"]


async def until_admitted(front: Front, count: int) -> None:
    async with asyncio.timeout(5):
        while len(front.worker.admitted) < count:
            await asyncio.sleep(0.001)


# ---- who is let in


async def test_the_sdk_with_a_key_and_with_another(front: Front) -> None:
    def client(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=str(front.http.base_url) + "/v1", api_key=key, max_retries=0)

    async with client(ALICE) as known, client("mk-alice-0123456780") as unknown:
        answer = await known.chat.completions.create(model="tiny", messages=QUESTION)
        assert answer.choices[0].message.content == "It is 132."
        with pytest.raises(openai.AuthenticationError) as caught:
            await unknown.chat.completions.create(model="tiny", messages=QUESTION)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(front.worker.admitted) == 1


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
async def test_where_a_key_is_asked_for(front: Front, operation) -> None:
    path = operation.path.replace("{model}", "tiny")
    if path == "/ready":
        await front.until_ready()
    for headers, known in (({}, False), (auth("mk-nobody-0123456789"), False), (auth(ALICE), True)):
        answer = await front.http.request(operation.method, path, headers=headers)
        if not known and operation.path not in OPEN_PATHS:
            error(answer, 401, "invalid_api_key")
        elif operation.path in ADMIN_PATHS:
            assert "needs admin=1" in error(answer, 403, "not_allowed")
        else:
            assert answer.status_code == (400 if operation.body else 200)
        documented = (await front.http.get("/openapi.json")).json()["paths"][operation.path][operation.method]
        assert str(answer.status_code) in documented["responses"]
        assert documented.get("security") == (None if operation.path in OPEN_PATHS else [{"key": []}])


async def test_nothing_is_told_of_what_is_there_without_a_key(front: Front) -> None:
    for method, path in (("GET", "/v2/nothing"), ("GET", CHAT), ("DELETE", "/v1/models")):
        error(await front.http.request(method, path), 401, "invalid_api_key")
    error(await front.http.get("/v2/nothing", headers=auth(ALICE)), 404, "not_found")


async def test_an_admin_may_do_what_concerns_everyone(front: Front) -> None:
    assert (await front.http.post("/reset_prefix_cache", headers=auth(OPS))).status_code == 200


async def test_a_huge_body_is_not_read_for_whoever_has_no_key(front: Front) -> None:
    error(await front.http.post(CHAT, content=b"x" * 30_000), 401, "invalid_api_key")
    error(await front.http.post(CHAT, content=b"x" * 30_000, headers=auth(ALICE)), 413, "body_too_large")


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.name in ("ask", "forget")], ids=lambda sample: sample.name)
async def test_the_examples_send_the_key(front: Front, sample: Sample) -> None:
    base_url = str(front.http.base_url).rstrip("/")
    shell, page = sample.shell(base_url, "tiny", key=True), html.unescape((await front.http.get("/docs")).text)
    assert shell in page and "Authorization: Bearer KEY" in page
    for key, passes in ((OPS, True), ("mk-nobody-0123456789", False)):
        command = shell.replace("curl ", "curl -sS --fail-with-body ", 1)
        process = await asyncio.create_subprocess_shell(command, env=os.environ | {"MOECULE_KEY": key}, stdout=-1)
        out, _ = await process.communicate()
        assert (process.returncode == 0, b"invalid_api_key" in out) == (passes, not passes)
        if sample.call:
            source = sample.python(base_url, "tiny", key=True)
            assert source in page
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", source, env=os.environ | {"MOECULE_KEY": key}, stdout=-1, stderr=-1
            )
            out, err = await process.communicate()
            assert (out == b"It is 132.\n") if passes else (b"AuthenticationError" in err), err.decode()


# ---- what each may have


async def test_the_key_is_the_tenant(front: Front) -> None:
    assert (await ask(front, ALICE)).status_code == 200
    assert (front.sent.tenant, front.sent.priority, front.sent.deadline) == ("alice", 0, None)
    assert front.scheduler.asked[-1].tenant == "alice"
    assert (await ask(front, SMALL, priority=7)).status_code == 200
    assert (front.sent.tenant, front.sent.priority) == ("small", 7)


async def test_one_key_at_its_limit_does_not_hold_up_another(front: Front) -> None:
    front.worker.pause_at = 1
    first = asyncio.create_task(ask(front, SMALL))
    await until_admitted(front, 1)
    refused = await ask(front, SMALL)
    assert "'small' may have 1 requests in flight" in error(refused, 429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "1" and "x-should-retry" not in refused.headers
    other = asyncio.create_task(ask(front, ALICE))
    await until_admitted(front, 2)
    front.worker.resume_sending()
    assert (await first).status_code == (await other).status_code == 200
    assert (await ask(front, SMALL)).status_code == 200
    usage = (await other).json()["usage"]
    page = (await front.http.get("/metrics", headers=auth(ALICE))).text
    for sample in (
        'moecule_request_failed_total{actor="gateway-1",code="rate_limit_exceeded",tenant="small"} 1.0',
        'moecule_request_success_total{actor="gateway-1",finished_reason="stop",tenant="small"} 2.0',
        f'moecule_tenant_tokens_total{{actor="gateway-1",kind="prompt",tenant="alice"}} {usage["prompt_tokens"]:.1f}',
        f'moecule_tenant_tokens_total{{actor="gateway-1",kind="generation",tenant="alice"}} '
        f"{usage['completion_tokens']:.1f}",
    ):
        assert sample in page, sample


async def test_what_a_client_that_left_had_is_given_back(front: Front) -> None:
    front.worker.pause_at = 1
    with pytest.raises(httpx.ReadTimeout):
        await front.http.post(
            CHAT, json={"model": "tiny", "messages": QUESTION, "max_tokens": 30}, headers=auth(SMALL), timeout=0.2
        )
    async with asyncio.timeout(5):
        await front.worker.abort_seen.wait()
    front.worker.resume_sending()
    caller = front.gateway.keys.caller(SMALL)
    async with asyncio.timeout(5):
        while caller.requests or caller.tokens:
            await asyncio.sleep(0.001)
    assert (await ask(front, SMALL)).status_code == 200


async def test_tokens_and_requests_a_minute(front: Front) -> None:
    assert "ask for fewer" in error(await ask(front, SMALL, max_tokens=50), 400, "invalid_request")
    for _ in range(3):
        assert (await ask(front, SMALL)).status_code == 200
    refused = await ask(front, SMALL)
    assert "may send 4 requests a minute" in error(refused, 429, "rate_limit_exceeded")
    assert 55 <= int(refused.headers["retry-after"]) <= 60
    counted = await front.http.post("/tokenize", json={"prompt": "x"}, headers=auth(SMALL))
    error(counted, 429, "rate_limit_exceeded")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_more_than_the_keys_right(front: Front, path: str) -> None:
    body = {CHAT: {"messages": QUESTION}, "/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"}}[path]
    limit = "max_output_tokens" if "responses" in path else "max_tokens"
    for key, priority, status in ((ALICE, -1, 400), (ALICE, 0, 200), (OPS, -1, 200), (OPS, -2, 400)):
        fields = {"model": "tiny", limit: 5, "priority": priority}
        answer = await front.http.post(path, json=body | fields, headers=auth(key))
        assert answer.status_code == status, answer.text
        if status == 400:
            assert answer.json()["error"]["param"] == "priority"
        else:
            assert front.sent.priority == priority


# ---- deadlines


async def test_a_deadline_reaches_the_worker(front: Front) -> None:
    await ask(front, ALICE, timeout=20)
    assert 19 < front.sent.deadline <= 20
    await ask(front, ALICE, timeout=20, headers={"x-request-deadline-ms": "7000"})
    assert 6 < front.sent.deadline <= 7
    body = {"model": "tiny", "input": "x", "timeout": 30}
    await front.http.post("/v1/responses", json=body, headers=auth(ALICE))
    assert 29 < front.sent.deadline <= 30


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "86400001", "1" * 40])
async def test_a_deadline_that_is_none(front: Front, value: str) -> None:
    answer = await ask(front, ALICE, headers={"x-request-deadline-ms": value})
    assert "x-request-deadline-ms must be" in error(answer, 400, "invalid_request")


async def test_a_deadline_that_passed_before_the_first_token(front: Front) -> None:
    front.worker.script = lambda _: [5]
    front.worker.end = {"finish": "error", "error": ("deadline_exceeded", "the request's deadline passed")}
    for stream in (False, True):
        answer = await ask(front, ALICE, stream=stream)
        assert error(answer, 408, "deadline_exceeded") == "the request's deadline passed"
        assert answer.headers["x-should-retry"] == "false"


async def test_a_deadline_that_passed_after_it(front: Front) -> None:
    script = front.worker.script(None)
    front.worker.script = lambda _: script[:4]
    front.worker.end = {"finish": "error", "error": ("deadline_exceeded", "the request's deadline passed")}
    answer = await ask(front, ALICE, stream=True)
    assert answer.status_code == 200
    *_, last, nothing = answer.text.split("\n\n")
    assert '"code":"deadline_exceeded"' in last and nothing == "" and "[DONE]" not in answer.text


# ---- how it leaves


async def test_it_finishes_what_is_in_flight_and_takes_nothing_more(front: Front) -> None:
    front.worker.pause_at = 1
    first = asyncio.create_task(ask(front, ALICE))
    await until_admitted(front, 1)
    front.life.leave.set()
    async with asyncio.timeout(5):
        while (ready := await front.http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.001)
    assert (await front.http.get("/health")).status_code == 200
    refused = await ask(front, ALICE)
    for answer in (ready, refused):
        assert error(answer, 503, "draining") == "the gateway is leaving"
        assert answer.headers["retry-after"] == "1"
    documented = (await front.http.get("/openapi.json")).json()["paths"]["/ready"]["get"]["responses"]["503"]
    assert documented["description"] == "Code `no_worker` or `draining`." and "retry-after" in documented["headers"]
    error(await ask(front, "mk-nobody-0123456789"), 401, "invalid_api_key")
    front.worker.resume_sending()
    assert (await first).status_code == 200
    await asyncio.wait_for(front.life.life, 5)
    assert front.gateway.keys.caller(ALICE).requests == 0
