"""API keys over NATS: the same keys and limits as over HTTP, in the same header."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.nats_bus import NatsBus
from common.settings import Settings
from tests.api_front import QUESTION, Front, make_front
from tests.outside import GENERATE, Inbox, Service, service

ALICE, SMALL = "mk-alice-0123456789", "mk-small-0123456789"


@pytest.fixture
async def front(nats_url: str, tmp_path: Path) -> AsyncIterator[Front]:
    path = tmp_path / "keys"
    path.write_text(f"alice {ALICE}\nsmall {SMALL} requests=1 priority=3\n")
    path.chmod(0o600)
    settings = Settings(port=0, drain_seconds=1, api_keys=str(path))
    async for one in make_front(settings, new_bus=lambda: NatsBus(nats_url, "test")):
        yield one


@pytest.fixture
async def other(nats_url: str) -> AsyncIterator[Service]:
    async with service(nats_url) as one:
        yield one


async def ask(other: Service, key: str, **fields: Any) -> Inbox:
    inbox = Inbox(other.client.new_inbox())
    await other.client.subscribe(inbox.subject, cb=inbox.take)
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 30} | fields
    headers = {"Authorization": f"Bearer {key}"} if key else None
    await other.client.publish(GENERATE, json.dumps(body).encode(), reply=inbox.subject, headers=headers)
    return inbox


@pytest.mark.parametrize("key", ["", "mk-nobody-0123456789"], ids=["none", "an unknown one"])
async def test_a_key_is_asked_for(front: Front, other: Service, key: str) -> None:
    error = await (await ask(other, key)).error()
    assert (error["code"], error["status"]) == ("invalid_api_key", 401)
    reply = await other.request("moecule.v1.models")
    assert reply["error"]["code"] == "invalid_api_key"
    assert front.worker.admitted == []


async def test_a_key_is_the_requests_tenant(front: Front, other: Service) -> None:
    assert (await (await ask(other, ALICE)).last())["type"] == "end"
    assert front.sent.tenant == "alice"


async def test_a_keys_limits_hold_over_both_doors(front: Front, other: Service) -> None:
    front.says("word " * 20)
    front.worker.pause_at = 2
    inbox = await ask(other, SMALL)
    await inbox.until("tokens")
    error = await (await ask(other, SMALL)).error()
    assert (error["code"], error["status"], error["retry_after"]) == ("rate_limit_exceeded", 429, 1)
    http = await front.http.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": QUESTION},
        headers={"authorization": f"Bearer {SMALL}"},
    )
    assert http.status_code == 429
    front.worker.resume_sending()
    assert (await inbox.last())["type"] == "end"
    assert (await (await ask(other, SMALL)).last())["type"] == "end"


async def test_priority_and_deadline_are_fields_of_a_request(front: Front, other: Service) -> None:
    assert (await (await ask(other, SMALL, priority=5, timeout=60)).last())["type"] == "end"
    assert front.sent.priority == 5
    assert (await (await ask(other, SMALL, priority=1)).error())["param"] == "priority"
