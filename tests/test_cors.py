"""Which web pages may read the gateway's answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from common.settings import Settings
from services.gateway.cors import origins_of
from tests.api_front import Front, make_front

SETTINGS = Settings(port=0, drain_seconds=0.1)
PAGE = "https://chat.example.com"


async def front_with(origins: str) -> AsyncIterator[Front]:
    read = Settings.from_env({"MOECULE_CORS_ORIGINS": origins}).cors_origins
    async for one in make_front(replace(SETTINGS, cors_origins=read)):
        yield one


@pytest.fixture
async def closed() -> AsyncIterator[Front]:
    async for one in front_with(""):
        yield one


@pytest.fixture
async def listed() -> AsyncIterator[Front]:
    async for one in front_with(f"http://localhost:3000, {PAGE}"):
        yield one


@pytest.fixture
async def opened() -> AsyncIterator[Front]:
    async for one in front_with("*"):
        yield one


def cors_headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


async def preflight(front: Front, origin: str) -> httpx.Response:
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return await front.http.options("/v1/chat/completions", headers=asked)


async def test_without_the_setting_there_is_none(closed: Front) -> None:
    answer = await closed.http.get("/v1/models", headers={"origin": PAGE})
    assert (answer.status_code, cors_headers(answer)) == (200, {})
    assert (await preflight(closed, PAGE)).status_code == 405


async def test_a_listed_origin_may_ask_and_read(listed: Front) -> None:
    answer = await preflight(listed, PAGE)
    assert (answer.status_code, answer.content) == (204, b"")
    assert cors_headers(answer) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization,content-type",
        "access-control-max-age": "600",
    }
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    streamed = await listed.http.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
    assert cors_headers(streamed) == {
        "access-control-allow-origin": PAGE,
        "access-control-expose-headers": "x-request-id, retry-after",
    }
    assert streamed.headers["vary"] == "origin"
    assert streamed.text.endswith("[DONE]\n\n")


async def test_errors_may_be_read_too(listed: Front) -> None:
    answer = await listed.http.post("/v1/completions", content=b"{", headers={"origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (400, PAGE)


@pytest.mark.parametrize("origin", ["https://other.example.com", "https://chat.example.com.evil.example", "null", ""])
async def test_an_origin_that_is_not_listed(listed: Front, origin: str) -> None:
    answer = await listed.http.get("/v1/models", headers={"origin": origin})
    assert (answer.status_code, cors_headers(answer)) == (200, {})
    assert cors_headers(await preflight(listed, origin)) == {}


async def test_a_client_that_is_no_page(listed: Front) -> None:
    assert cors_headers(await listed.http.get("/v1/models")) == {}


async def test_any_origin(opened: Front) -> None:
    answer = await opened.http.get("/v1/models", headers={"origin": PAGE})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert (await preflight(opened, "null")).headers["access-control-allow-origin"] == "*"


def test_origins_are_parted_by_commas() -> None:
    assert origins_of("") == ()
    assert origins_of(f"http://localhost:3000 ,{PAGE}") == ("http://localhost:3000", PAGE)
