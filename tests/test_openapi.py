"""The OpenAPI document and the page of docs: they say what is there, and their examples run as they are."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from starlette.routing import Route

from common.errors import BY_CODE, InvalidRequest
from common.messages import Generate, Message, Ok, subject
from common.settings import Settings
from services.gateway import app
from services.gateway.app import App
from services.gateway.openapi import BODIES, OPERATIONS, Error, Operation, Served, document
from services.gateway.parameters import FIELDS, meaning
from services.gateway.responses import error_body
from services.gateway.samples import SAMPLES, Sample
from tests.api_front import EOS, TOKENIZER, Front, ScoringWorker, make_front, text_tokens

SERVED = Served("http://127.0.0.1:8000", "tiny", 2048)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3), ScoringWorker):

        async def forget(_: str, message: Message) -> Message:
            return Ok()

        await one.worker.bus.subscribe(subject("worker", "worker-1", "forget"), forget)
        one.worker.script = obedient
        yield one


CALL = '<tool_call>{"name": "add", "arguments": {"a": 47, "b": 85}}</tool_call>'
STORY = "Once there was a snail. " * 40


def obedient(request: Generate) -> list[int]:
    """A model that keeps to whatever grammar it is given, and goes on with stories."""
    grammar = request.sampling.grammar
    if list(request.prompt) == TOKENIZER.encode("Once upon a time"):
        return text_tokens(STORY)
    answers = {"json_schema": '{"sum": 132}', "lark": CALL}
    answer = answers[grammar.kind] if grammar else "It is 132."
    return [*text_tokens(f"4+5=9</think>\n\n{answer}"), EOS]


def values(node: Any, key: str) -> Iterator[Any]:
    """Everything called `key`, anywhere in a document."""
    if isinstance(node, dict):
        yield from (node[key] for _ in range(key in node))
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from values(inner, key)


# ---- the document


async def test_every_route_is_in_the_document_and_nothing_else(front: Front) -> None:
    whole: App = front.gateway.server.config.app._app
    routes = [route for route in whole._router.routes if isinstance(route, Route)]
    there = {
        (re.sub(r"\{\w+:path\}", "{model}", route.path), method.lower())
        for route in routes
        for method in route.methods - {"HEAD"}
    }
    assert there == {(operation.path, operation.method) for operation in OPERATIONS}
    answer = await front.http.get("/openapi.json")
    assert {path for path, _ in there} == set(answer.json()["paths"])


async def test_it_is_of_this_server(front: Front) -> None:
    served = (await front.http.get("/openapi.json")).json()
    assert served["openapi"].startswith("3.1")
    assert served["servers"] == [{"url": str(front.http.base_url).rstrip("/")}]
    schemas = served["components"]["schemas"]
    assert schemas["ChatBody"]["properties"]["model"]["enum"] == ["tiny"]
    assert schemas["DetokenizeBody"]["properties"]["tokens"]["items"]["maximum"] == 2047


async def test_a_host_that_is_no_name_is_not_repeated(front: Front) -> None:
    for path in ("/docs", "/openapi.json"):
        answer = await front.http.get(path, headers={"host": 'x"><script>alert(1)</script>'})
        assert "alert" not in answer.text


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_each_client_gets_the_address_it_used_and_none_costs_a_rendering(
    front: Front, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    made = []

    def counted(kind: str, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda of: (made.append(kind), make(of))[1]

    for kind, make in (("document", app.document), ("docs_page", app.docs_page)):
        monkeypatch.setattr(app, kind, counted(kind, make))
    pages = set()
    for i in range(200):
        host = f"h{i}.example.com:8000"
        page = (await front.http.get(path, headers={"host": host})).text
        assert f"http://{host}/v1" in page and ".invalid" not in page
        pages.add(page.replace(host, ""))
    assert len(pages) == 1
    assert made == ["document", "docs_page"]


async def test_an_address_that_is_too_long_is_not_repeated(front: Front) -> None:
    longest = "h" * 254 + ":65535"
    assert longest in (await front.http.get("/openapi.json", headers={"host": longest})).text
    answer = await front.http.get("/openapi.json", headers={"host": longest + "0"})
    assert answer.json()["servers"] == [{"url": str(front.http.base_url).rstrip("/")}]


def test_what_it_refers_to_is_there() -> None:
    found = document(SERVED)
    for ref in [*values(found, "$ref"), *(ref for d in values(found, "mapping") for ref in d.values())]:
        at: Any = found
        for word in ref.removeprefix("#/").split("/"):
            at = at[word]


@pytest.mark.parametrize("kind", BODIES)
def test_every_field_of_a_body_is_described(kind: type[msgspec.Struct]) -> None:
    schema = document(SERVED)["components"]["schemas"][kind.__name__]
    assert list(schema["properties"]) == list(kind.__struct_encode_fields__)
    assert [name for name, field in schema["properties"].items() if not field.get("description")] == []


def test_nothing_is_described_that_is_not_there() -> None:
    names = {f"{kind.__name__}.{name}" for kind in BODIES for name in kind.__struct_encode_fields__}
    plain = {name.rpartition(".")[2] for name in names}
    assert [name for name in FIELDS if name not in (names if "." in name else plain)] == []
    assert meaning("ChatBody", "unheard_of") == ""


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_every_error_is_under_its_status(operation: Operation) -> None:
    responses = document(SERVED)["paths"][operation.path][operation.method]["responses"]
    for status, response in responses.items():
        if status != "200":
            codes = re.findall(r"`(\w+)`", response["description"])
            assert {BY_CODE[code].status for code in codes} == {int(status)}


def test_the_schema_of_errors_is_what_is_sent() -> None:
    error = msgspec.json.decode(error_body(InvalidRequest("no", "n")), type=Error, strict=True).error
    assert (error.message, error.param, error.code) == ("no", "n", "invalid_request")


# ---- the examples


def each(samples: Iterable[Sample]) -> list[Any]:
    return [pytest.param(s, id=s.name) for s in samples]


@pytest.mark.parametrize("sample", each(SAMPLES))
async def test_an_example_runs_in_a_shell(front: Front, sample: Sample) -> None:
    command = sample.shell(str(front.http.base_url).rstrip("/"), "tiny").replace(
        "curl ", "curl -sS --fail-with-body ", 1
    )
    process = await asyncio.create_subprocess_shell(command, stdout=-1, stderr=-1)
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b""), out.decode()
    assert b"error" not in out.replace(b'"error":null', b"")


SHOWN = {
    "ask": "It is 132.\n",
    "stream": "4+5=9It is 132.",
    "cancel": STORY[:10],
    "json": '{"sum": 132}\n',
    "tool": 'add {"a": 47, "b": 85}\n',
    "score": "'<｜begin▁of▁sentence｜>' None\n",
    "respond": "It is 132.\n",
}


@pytest.mark.parametrize("sample", each(sample for sample in SAMPLES if sample.call))
async def test_an_example_runs_in_python(front: Front, sample: Sample) -> None:
    source = sample.python(str(front.http.base_url).rstrip("/"), "tiny")
    shown, names = io.StringIO(), dict[str, Any]()

    def run() -> None:
        try:
            with contextlib.redirect_stdout(shown):
                exec(compile(source, sample.name, "exec"), names)
        finally:
            names["client"].close()

    await asyncio.to_thread(run)
    assert shown.getvalue().startswith(SHOWN[sample.name]), source
    if sample.name == "cancel":
        async with asyncio.timeout(5):
            await front.worker.abort_seen.wait()


# ---- the page


class Page(HTMLParser):
    """What is open, what is loaded from elsewhere, which places are named and linked."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.names: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        self.loaded += [given[name] or "" for name in ("src", "srcset", "data") if name in given]
        self.names += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if "href" in given else []

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_page_stands_alone_and_has_it_all(front: Front) -> None:
    answer = await front.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Page()
    page.feed(answer.text)
    assert page.loaded == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import", answer.text)
    assert len(page.names) == len(set(page.names))
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} <= set(page.names)
    base_url = str(front.http.base_url).rstrip("/")
    for sample in SAMPLES:
        assert sample.title in page.text
        assert sample.shell(base_url, "tiny") in page.text
        assert not sample.call or sample.python(base_url, "tiny") in page.text
    for operation in OPERATIONS:
        assert operation.path in page.text
        assert operation.summary in page.text
    for sentence in FIELDS.values():
        assert sentence.replace("`", "") in page.text


def test_what_the_document_says_is_escaped() -> None:
    from services.gateway.docs_page import docs_page

    page = docs_page(document(Served("http://x", "<b>&", 10)))
    assert "<b>&" not in page
    assert json.dumps("<b>&") not in page
